"""Floor 0: the objects that flow from the rollout to the loss, and their lossless file format. numpy only.

A trajectory alternates *chunks* (the tokens that the policy produced, up to and including one tool call or the final
answer) and *observations* (what the environment answered). Chunks are explicit objects with ids from the engine to the
loss; they are never re-derived from a mask, because two adjacent chunks with no observation between would merge.

The file format is msgpack, one file a list of trajectories, with a schema version; see `save_trajectories`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from rome.files import atomic_write

FORMAT = "rome.trajectories"
SCHEMA_VERSION = 1


class TrajectoryError(ValueError):
    """A trajectory, or a file of them, that breaks the contract. The message names the field and what was expected."""


class Status(StrEnum):
    """How an episode ended. An infrastructure failure is never a reward of 0."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    INFRA_FAILURE = "infra_failure"
    VERIFIER_FAILURE = "verifier_failure"
    ABORTED = "aborted"

    @property
    def is_reliable(self) -> bool:
        """Whether the reward says something about the policy. The others are discarded and sampled again."""
        return self in (Status.COMPLETED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True)
class Task:
    """What an episode is about. `path` is the task's Harbor folder ('' when it was drafted in memory)."""

    id: str
    instruction: str
    family: str = ""
    seed: int = 0
    horizon: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """Tokens (int32[n]) that the environment answered with, never trained on. `experts` as in Chunk."""

    tokens: np.ndarray
    text: str = ""
    experts: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One interaction of the policy: int32[n] tokens that end in a tool call or the final answer.

    Attributes:
      tokens: int32[n], n ≥ 1, the stop token included.
      behavior_logp: float32[n], log-prob of each token under the distribution it was sampled from (the paper's μ).
      versions: int32[n], the policy version that sampled each token.
      experts: int16[n, layers, k], the experts that each token visited in the inference engine, where a MoE policy
        records them; −1: not known, as of the very last token, which was sampled but never processed. Else None.
      error: the tool call or its execution failed, by the runtime's log (Err of the paper's SFT objective, Eq 2).
    """

    id: str
    tokens: np.ndarray
    behavior_logp: np.ndarray
    versions: np.ndarray
    text: str = ""
    experts: np.ndarray | None = None
    error: bool = False


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode. `observations[k]` follows `chunks[k]`; after the last chunk there may be none.

    Attributes:
      group_id: samples of the same task and seed share it.
      final_reward: the verifier's reward, or a mix that holds it; None unless `status.is_reliable`.
      start_version: the policy version that started the episode; staleness is measured against it.
      intrinsic_rewards: float32[K], one a chunk, or None.
      prefix_chunks: how many leading chunks were replayed from an expert instead of sampled.
      timings: seconds by stage (`generate`, `environment`, `verify`, …).
      reward_parts: what `final_reward` was mixed from, by name (`verifier`, `judge`, …); empty if it is the verifier's.
    """

    id: str
    group_id: str
    task: Task
    seed: int
    prompt: Observation
    chunks: tuple[Chunk, ...]
    observations: tuple[Observation, ...]
    final_reward: float | None
    status: Status
    start_version: int
    intrinsic_rewards: np.ndarray | None = None
    prefix_chunks: int = 0
    error: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)
    reward_parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def num_tokens(self) -> int:
        """All tokens of the episode: prompt, chunks and observations."""
        parts = (self.prompt, *self.chunks, *self.observations)
        return sum(len(part.tokens) for part in parts)

    @property
    def succeeded(self) -> bool:
        """The paper's T⁺: the verifier's reward is positive."""
        return self.final_reward is not None and self.reward_parts.get("verifier", self.final_reward) > 0

    def experts(self) -> np.ndarray | None:
        """int16[num_tokens, layers, k]: the experts that each token visited, −1 where not known; None: unrecorded."""
        parts = [self.prompt]
        for index, chunk in enumerate(self.chunks):
            parts += [chunk, *self.observations[index : index + 1]]
        shape = next((part.experts.shape[1:] for part in parts if part.experts is not None), None)
        if shape is None:
            return None
        unknown = (np.full((len(p.tokens), *shape), -1, np.int16) if p.experts is None else p.experts for p in parts)
        return np.concatenate(list(unknown))

    def with_experts(self, experts: np.ndarray) -> Trajectory:
        """A copy that knows the experts int16[n, layers, k] of its first n tokens, n ≤ num_tokens."""
        known = np.full((self.num_tokens, *experts.shape[1:]), -1, np.int16)
        known[: len(experts)] = experts
        start = 0

        def cut(part: Any) -> Any:
            nonlocal start
            start += len(part.tokens)
            return dataclasses.replace(part, experts=known[start - len(part.tokens) : start].copy())

        prompt, chunks, observations = cut(self.prompt), [], []
        for index, chunk in enumerate(self.chunks):
            chunks.append(cut(chunk))
            observations += map(cut, self.observations[index : index + 1])
        return dataclasses.replace(self, prompt=prompt, chunks=tuple(chunks), observations=tuple(observations))

    def segments(self) -> list[tuple[int, np.ndarray]]:
        """The episode's tokens in order as (chunk index, or −1 for context; int32[n])."""
        parts: list[tuple[int, np.ndarray]] = [(-1, self.prompt.tokens)]
        for index, chunk in enumerate(self.chunks):
            parts.append((index, chunk.tokens))
            if index < len(self.observations):
                parts.append((-1, self.observations[index].tokens))
        return parts


def _require(condition: bool, name: str, expected: str, found: Any) -> None:
    if not condition:
        raise TrajectoryError(f"{name}: expected {expected}, found {found!r}")


def _require_array(value: Any, name: str, dtype: type, shape: tuple[int | None, ...]) -> None:
    is_array = isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == len(shape)
    matches = is_array and all(want is None or want == got for want, got in zip(shape, value.shape, strict=True))
    found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    _require(matches, name, f"{np.dtype(dtype).name}{list(shape)}", found)


def _require_observation(observation: Observation, where: str) -> None:
    _require_array(observation.tokens, f"{where}.tokens", np.int32, (None,))
    if observation.experts is not None:
        _require_array(observation.experts, f"{where}.experts", np.int16, (len(observation.tokens), None, None))


def _validate(trajectory: Trajectory) -> None:
    t, count = trajectory, len(trajectory.chunks)
    _require(isinstance(t.status, Status), f"trajectory {t.id}: status", "a Status", t.status)
    _require_observation(t.prompt, f"trajectory {t.id}: prompt")
    for index, chunk in enumerate(t.chunks):
        where = f"trajectory {t.id}: chunks[{index}]"
        length = len(chunk.tokens)
        _require(length > 0, f"{where}.tokens", "at least one token", length)
        _require_array(chunk.tokens, f"{where}.tokens", np.int32, (None,))
        _require_array(chunk.behavior_logp, f"{where}.behavior_logp", np.float32, (length,))
        _require_array(chunk.versions, f"{where}.versions", np.int32, (length,))
        if chunk.experts is not None:
            _require_array(chunk.experts, f"{where}.experts", np.int16, (length, None, None))
    allowed = (max(count - 1, 0), count)
    _require(
        len(t.observations) in allowed, f"trajectory {t.id}: observations", f"{allowed} of them", len(t.observations)
    )
    for index, observation in enumerate(t.observations):
        _require_observation(observation, f"trajectory {t.id}: observations[{index}]")
    if t.status.is_reliable:
        finite = t.final_reward is not None and math.isfinite(t.final_reward)
        _require(finite, f"trajectory {t.id}: final_reward", f"a finite number ({t.status.value})", t.final_reward)
    else:
        _require(t.final_reward is None, f"trajectory {t.id}: final_reward", f"None ({t.status.value})", t.final_reward)
    if t.intrinsic_rewards is not None:
        _require_array(t.intrinsic_rewards, f"trajectory {t.id}: intrinsic_rewards", np.float32, (count,))
    _require(0 <= t.prefix_chunks <= count, f"trajectory {t.id}: prefix_chunks", f"0..{count}", t.prefix_chunks)


def _pack(value: Any) -> Any:
    """Dataclasses, arrays and enums as plain msgpack values; arrays keep dtype, shape and every bit."""
    if isinstance(value, np.ndarray):
        contiguous = np.ascontiguousarray(value)
        return {"__array__": contiguous.dtype.str, "shape": list(value.shape), "data": contiguous.tobytes()}
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _unpack_array(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    array = np.frombuffer(value["data"], dtype=np.dtype(value["__array__"]))
    return array.reshape(value["shape"]).copy()


def _build(cls: type, record: Any, where: str, **converted: Any) -> Any:
    """An instance of the dataclass `cls` from `record`, its keys checked one by one."""
    _require(isinstance(record, dict), where, f"a map ({cls.__name__})", record)
    names = {f.name for f in dataclasses.fields(cls)}
    missing, extra = sorted(names - record.keys()), sorted(record.keys() - names)
    _require(not missing and not extra, where, f"the fields of {cls.__name__}", {"missing": missing, "extra": extra})
    return cls(**{**record, **converted})


def _observation(record: Any, where: str) -> Observation:
    _require(isinstance(record, dict) and "tokens" in record, where, "an Observation", record)
    arrays = {name: _unpack_array(record.get(name)) for name in ("tokens", "experts")}
    return _build(Observation, {"experts": None, **record}, where, **arrays)  # older files have no experts here


def _chunk(record: Any, where: str) -> Chunk:
    _require(isinstance(record, dict), where, "a Chunk", record)
    arrays = ("tokens", "behavior_logp", "versions", "experts")
    return _build(Chunk, record, where, **{name: _unpack_array(record.get(name)) for name in arrays})


def trajectory_to_record(trajectory: Trajectory) -> dict[str, Any]:
    """The trajectory as plain msgpack values (maps, lists, numbers, strings, bytes)."""
    return _pack(trajectory)


def trajectory_from_record(record: Any, where: str = "trajectory") -> Trajectory:
    """The inverse of `trajectory_to_record`. Raises TrajectoryError that names the field."""
    _require(isinstance(record, dict), where, "a map (Trajectory)", type(record).__name__)
    try:
        status = Status(record.get("status"))
        return _build(
            Trajectory,
            {"reward_parts": {}, **record},  # older files have none
            where,
            task=_build(Task, record.get("task"), f"{where}.task"),
            prompt=_observation(record.get("prompt"), f"{where}.prompt"),
            chunks=tuple(_chunk(c, f"{where}.chunks[{i}]") for i, c in enumerate(record.get("chunks", ()))),
            observations=tuple(
                _observation(o, f"{where}.observations[{i}]") for i, o in enumerate(record.get("observations", ()))
            ),
            intrinsic_rewards=_unpack_array(record.get("intrinsic_rewards")),
            status=status,
        )
    except TrajectoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TrajectoryError(f"{where}: expected a Trajectory, found one that does not parse: {error}") from error


def save_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Writes the trajectories to one msgpack file, atomically: {format, version, trajectories: […]}."""
    records = [trajectory_to_record(trajectory) for trajectory in trajectories]
    payload = msgpack.packb({"format": FORMAT, "version": SCHEMA_VERSION, "trajectories": records})
    atomic_write(path, payload)


def load_trajectories(path: str | Path) -> list[Trajectory]:
    """Reads what `save_trajectories` wrote, bit for bit.

    Raises TrajectoryError that names the file and the field if it is truncated, of another format or schema version,
    or breaks the contract; OSError if it can't be read.
    """
    try:
        document = msgpack.unpackb(Path(path).read_bytes(), strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise TrajectoryError(f"{path}: expected a msgpack file of trajectories, found {error}") from error
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    _require(found == FORMAT, f"{path}: format", FORMAT, found)
    version = document.get("version")
    _require(version == SCHEMA_VERSION, f"{path}: version", f"schema version {SCHEMA_VERSION}", version)
    records = document.get("trajectories")
    _require(isinstance(records, list), f"{path}: trajectories", "a list", type(records).__name__)
    return [trajectory_from_record(record, f"{path}: trajectories[{i}]") for i, record in enumerate(records)]

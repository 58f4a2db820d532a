"""The decode engine: batched sampling over fixed slots, with a KV cache that outlives chunks.

The shape is JetStream's (slots; insert / append / generate / free; an opaque decode state), extended by what RL needs:
log-probs under the sampling distribution, the policy version of every token, and an explicit key for every trajectory.

A *turn* is the unit of work. `generate` appends each slot's new tokens (a prompt, or the last stop token and the
observation after it) in static buckets, then decodes all of them in one jitted `while_loop` until each has sampled a
stop id or `max_chunk_tokens`. There is one host ↔ device synchronisation a turn, and every token passes through the
model at most once: a chunk's last token is only processed when (and if) the next delta is appended, and slots that
start a turn with the same prompt (the samples of a group) share its prefill: it runs once, apart, and is copied.

Slots are split into cohorts, each with a decode state of its own, so that the environments of one cohort can run while
another decodes. All cohorts have the same shape: they share every compiled function.

An engine may have several *placements*, each a mesh over some of the devices, and moves between them while trajectories
are in flight: `move_to` takes weights and caches along. That is how training borrows devices from rollouts.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from rome.models import ModelConfig
from rome.models.sharding import Mesh
from rome.rollout.programs import Compiled, DecodeState, Finish, compiled, empty_state, row_of, slot_shardings
from rome.rollout.weights import PRECISIONS, EngineError, Publisher, check_version


@dataclass(frozen=True)
class EngineConfig:
    """Static shapes and the sampling distribution.

    Attributes:
      slots: trajectories in flight, over all cohorts; a multiple of `cohorts`.
      cohorts: groups of slots that take turns.
      max_length: tokens a trajectory may have: prompt, chunks and observations together.
      extend_buckets: ascending static sizes of an append; the longest delta of a cohort chooses. Each costs a compile.
        Prompts are prefilled in the largest.
      prompt_rows: distinct prompts that are prefilled together, at most `slots_per_cohort`; a turn with more of them
        takes several passes.
      max_chunk_tokens: tokens a chunk may have; without a stop id by then it ends as `Finish.LENGTH`.
      temperature: of sampling; 0 is greedy. `generate` may override it (no recompile).
      top_p, top_k, min_p: truncation of the sampling distribution; 1, 0 and 0 switch it off.
      record_experts: keep which experts each token visits, for router replay; of a mixture of experts only.
      precision: of the engine's weights, see `engine_model`; what is not ``model`` adds to π_old / μ (docs/serving.md).
    """

    slots: int = 64
    cohorts: int = 2
    max_length: int = 256
    extend_buckets: tuple[int, ...] = (16, 64)
    prompt_rows: int = 4
    max_chunk_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    record_experts: bool = False
    precision: str = "model"

    def __post_init__(self) -> None:
        buckets = tuple(self.extend_buckets)
        checks = {
            "cohorts": (self.cohorts >= 1, "at least 1"),
            "slots": (self.slots >= 1 and self.slots % max(self.cohorts, 1) == 0, "a positive multiple of cohorts"),
            "max_length": (self.max_length >= 2, "at least 2"),
            "extend_buckets": (
                bool(buckets) and buckets == tuple(sorted(set(buckets))) and buckets[0] >= 1,
                "ascending sizes of at least 1",
            ),
            "prompt_rows": (self.prompt_rows >= 1, "at least 1"),
            "max_chunk_tokens": (self.max_chunk_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number >= 0"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "min_p": (0 <= self.min_p < 1, "0 <= min_p < 1"),
            "precision": (self.precision in PRECISIONS, f"one of {PRECISIONS}"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise EngineError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

    @property
    def slots_per_cohort(self) -> int:
        return self.slots // self.cohorts


class Sampled(NamedTuple):
    """One chunk, as arrays over its n tokens."""

    tokens: np.ndarray  # int32[n]
    behavior_logp: np.ndarray  # float32[n], under the sampling distribution
    raw_logp: np.ndarray  # float32[n], at temperature 1 without truncation
    versions: np.ndarray  # int32[n]
    finish: Finish


@dataclass
class EngineStats:
    """Counts since the engine was made. Each token is processed once: prefilled or decoded; or it is copied."""

    turns: int = 0
    prefilled_tokens: int = 0  # prompts and observations
    copied_tokens: int = 0  # of prompts that another slot of the same turn starts with too
    decoded_tokens: int = 0  # sampled
    processed_tokens: int = 0  # went through the model; the last token of a chunk only once its slot continues
    padded_tokens: int = 0  # what appends went through the model with, padding included
    decode_steps: int = 0
    seconds: float = 0.0  # in `generate`, device time included
    host_seconds: float = 0.0  # of these, outside dispatch and wait
    moves: int = 0  # to another placement


class Append(NamedTuple):
    """Tokens for the rows of a DecodeState: the first `counts[b]` of `tokens[b]`; `fresh` rows are emptied before."""

    tokens: np.ndarray  # int32[B, bucket]
    counts: np.ndarray  # int32[B]
    fresh: np.ndarray  # bool[B]


class _Placement(NamedTuple):
    """Where an engine's arrays may lie, and its programs for there. Without a mesh: on the default device."""

    mesh: Mesh | None
    compiled: Compiled
    shardings: Any  # of the weights; None without a mesh


class DecodeEngine:
    """Slots, caches and weights of one policy. One thread calls `generate`; any may call `update_params` and `move_to`.

    Args:
      params, model_config: as for `rome.models.forward`. The engine keeps a copy, so a trainer may donate its own.
      stop_ids: sampled as the last token of a chunk.
      pad_id: fills unused positions of appends.
      version: of `params`.
      meshes: the engine's placements, each spreading slots and weights over its devices (None: the default device).
        The first is where it starts.
    """

    def __init__(
        self,
        params: Any,
        model_config: ModelConfig,
        config: EngineConfig,
        stop_ids: frozenset[int],
        pad_id: int,
        version: int = 0,
        meshes: Sequence[Mesh | None] = (None,),
    ) -> None:
        outside = sorted(i for i in {*stop_ids, pad_id} if not 0 <= i < model_config.vocab_size)
        if outside or not stop_ids:
            raise EngineError(
                f"stop_ids, pad_id: expected ids below {model_config.vocab_size}, found {outside or 'none'}"
            )
        if config.top_k > model_config.vocab_size:
            raise EngineError(f"top_k: expected at most {model_config.vocab_size}, found {config.top_k}")
        if config.record_experts and not model_config.is_moe:
            raise EngineError("record_experts: expected False of a policy without experts, found True")
        if not meshes or (None in meshes and len(meshes) > 1):
            raise EngineError(f"meshes: expected None alone, or one or more meshes, found {meshes!r}")
        self._publisher = Publisher(params, model_config, config.precision)
        self.config, self.model_config, self.pad_id = config, self._publisher.model_config, pad_id
        self.stats = EngineStats()
        self._placements = tuple(
            _Placement(
                mesh,
                compiled_functions(self.model_config, config, mesh),
                None if mesh is None else self._publisher.shardings(mesh),
            )
            for mesh in meshes
        )
        self._at = 0
        self._changing = threading.Lock()  # one update or move at a time
        # a move stands in the gate until the turn has ended, so that no other turn overtakes it
        self._gate, self._turn = threading.Lock(), threading.Lock()
        self._weights = (self._publisher.own(params, self._placements[0].shardings), int(version))
        self._stop_ids = np.array(sorted(stop_ids), np.int32)
        rows = config.slots
        self._held = np.zeros((rows, config.max_length), np.int32)  # the tokens in each slot's cache
        self._lengths = np.zeros(rows, np.int64)
        self._keys = np.zeros((rows, 2), np.uint32)
        self._occupied = np.zeros(rows, bool)
        self._fresh = np.zeros(rows, bool)  # inserted, not yet appended to
        self._prompt_rows = min(config.prompt_rows, config.slots_per_cohort)
        self._states: dict[int, DecodeState] = {}
        self._reset_states(range(config.cohorts))

    @property
    def version(self) -> int:
        """Of the weights that the next turn samples from."""
        return self._weights[1]

    @property
    def compilations(self) -> int:
        """How many shapes were compiled so far, by all engines with the same static configuration."""
        return sum(placement.compiled.traces for placement in self._placements)

    @property
    def placement(self) -> int:
        """The index of the mesh that the next turn decodes on."""
        return self._at

    @property
    def _compiled(self) -> Compiled:
        return self._placements[self._at].compiled

    def update_params(self, params: Any, version: int) -> None:
        """Swaps the weights between turns, without draining: trajectories in flight go on under the new ones.

        Cached keys and values of earlier tokens stay those of the weights that computed them; `versions` tells.
        Raises EngineError unless the version grows and shapes and dtypes stay.
        """
        with self._changing:
            check_version(version, self.version)
            own = self._publisher.own(params, self._placements[self._at].shardings)
            self._weights = (own, int(version))

    def move_to(self, placement: int) -> None:
        """Moves the weights and what every slot holds to `meshes[placement]`, after the turn that is being decoded.

        Nothing is prefilled again: trajectories in flight go on there as they would have here. Until it returns, both
        placements hold everything. Raises EngineError for an index that there is not.
        """
        if not 0 <= placement < len(self._placements):
            raise EngineError(f"placement: expected 0..{len(self._placements) - 1}, found {placement}")
        with self._changing:
            if placement == self._at:
                return
            target, (params, version) = self._placements[placement], self._weights
            params = jax.block_until_ready(jax.device_put(params, target.shardings))  # while turns go on
            with self._gate, self._turn:
                held = (self._states, self._prompts)
                held = jax.device_put(held, slot_shardings(held, target.mesh))
                self._states, self._prompts = jax.block_until_ready(held)
                self._at, self._weights = placement, (params, version)
            self.stats.moves += 1

    @contextmanager
    def _one_turn(self) -> Iterator[tuple[Any, int]]:
        """While it lasts the engine does not move. Gives (params, version)."""
        with self._gate:
            self._turn.acquire()
        try:
            yield self._weights
        finally:
            self._turn.release()

    def cohort_slots(self, cohort: int) -> range:
        """The slots of a cohort, in order."""
        size = self.config.slots_per_cohort
        return range(cohort * size, (cohort + 1) * size)

    def insert(self, slot: int, seed: int) -> None:
        """Gives an empty slot to a new trajectory, whose tokens are drawn with the 64-bit `seed` as key."""
        if self._occupied[slot]:
            raise EngineError(f"slot {slot}: expected a free one")
        self._occupied[slot] = self._fresh[slot] = True
        self._lengths[slot] = 0
        self._keys[slot] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF

    def free(self, slot: int) -> None:
        """Releases a slot. Idempotent."""
        self._occupied[slot] = False
        self._lengths[slot] = 0

    def processed(self, slot: int) -> np.ndarray:
        """The tokens (int32[n]) that the slot's cache holds. The next delta continues exactly these."""
        return self._held[slot, : self._lengths[slot]]

    def routed_experts(self, slot: int) -> np.ndarray:
        """int16[n, layers, k]: the experts that each token of `processed(slot)` visited. Needs `record_experts`."""
        if not self.config.record_experts:
            raise EngineError("routed_experts: expected an engine that was made with record_experts")
        cohort, row = divmod(slot, self.config.slots_per_cohort)
        with self._one_turn():
            recorded = np.asarray(row_of(self._states[cohort].cache.experts, np.int32(row)))
        return recorded[: self._lengths[slot]]

    def warmup(self) -> None:
        """Compiles every shape, on every placement. Call it while no slot is in use; nothing compiles afterwards."""
        if self._occupied.any():
            raise EngineError("warmup: expected no slot in use")
        start = self._at
        for placement in range(len(self._placements)):
            self.move_to(placement)
            self._compile()
        self.move_to(start)

    def _compile(self) -> None:
        rows, (params, _) = self.config.slots_per_cohort, self._weights
        keys, idle, counts = np.zeros((rows, 2), np.uint32), np.zeros(rows, bool), np.zeros(rows, np.int32)
        temperature = np.float32(self.config.temperature)
        state, prompts = self._empty_state(rows), self._empty_state(self._prompt_rows)
        for bucket in self.config.extend_buckets:
            tokens = np.zeros((rows, bucket), np.int32)
            state = self._compiled.append(params, state, tokens, counts, idle)
        some = slice(self._prompt_rows)
        prompts = self._compiled.append(params, prompts, tokens[some], counts[some], idle[some])  # the largest bucket
        state = self._compiled.share(state, prompts, counts - 1)
        state, out = self._compiled.decode(params, state, keys, idle, temperature, self._stop_ids)
        if self.config.record_experts:
            row_of(state.cache.experts, np.int32(0))
        jax.block_until_ready(out)

    def generate(
        self, cohort: int, deltas: Mapping[int, np.ndarray], temperature: float | None = None
    ) -> dict[int, Sampled]:
        """One turn of a cohort: appends each slot's delta, then samples one chunk for each.

        Args:
          cohort: whose slots.
          deltas: slot → int32[m], m ≥ 1, the tokens that follow `processed(slot)`. Slots without one rest untouched.
          temperature: overrides the config's; 0 is greedy.

        Raises EngineError if a slot is not occupied, or its delta leaves no room for a token.
        """
        started = time.perf_counter()
        first, rows = self.cohort_slots(cohort).start, self.config.slots_per_cohort
        self._check_deltas(cohort, deltas)
        active = np.zeros(rows, bool)
        active[[slot - first for slot in deltas]] = True
        prompts = {slot - first: delta for slot, delta in deltas.items() if self._fresh[slot]}
        continued = {slot - first: delta for slot, delta in deltas.items() if not self._fresh[slot]}
        shared = self._prompt_passes(prompts)
        appends = self._batches(rows, continued, self.config.extend_buckets)
        prepared = time.perf_counter()
        heat = np.float32(self.config.temperature if temperature is None else temperature)
        with self._one_turn() as (params, version):
            packed = self._advance(cohort, params, shared, appends, active, heat)
        waited = time.perf_counter() - prepared
        sampled = {slot: self._unpack(slot, delta, packed[slot - first], version) for slot, delta in deltas.items()}
        passes = [*(prefill for prefills, _ in shared for prefill in prefills), *appends]
        self._account(sampled, deltas, len(continued), passes, time.perf_counter() - started, waited)
        return sampled

    def _advance(
        self,
        cohort: int,
        params: Any,
        shared: Sequence[tuple[list[Append], np.ndarray]],
        appends: Sequence[Append],
        active: np.ndarray,
        temperature: np.float32,
    ) -> np.ndarray:
        """A turn on the device: what `_decode` returns of it, on the host."""
        run, slots = self._compiled, self.cohort_slots(cohort)
        rows = slice(slots.start, slots.stop)
        try:
            for prefills, source in shared:
                for prefill in prefills:
                    self._prompts = run.append(params, self._prompts, *prefill)
                self._states[cohort] = run.share(self._states[cohort], self._prompts, source)
            for append in appends:
                self._states[cohort] = run.append(params, self._states[cohort], *append)
            self._states[cohort], packed = run.decode(
                params, self._states[cohort], self._keys[rows], active, temperature, self._stop_ids
            )
            return np.asarray(packed)  # the turn's one synchronisation
        except BaseException:  # Ctrl-C too: the donated states are gone, and with them what the slots held
            self._reset_states([cohort])
            self._occupied[rows], self._lengths[rows] = False, 0
            raise

    def _reset_states(self, cohorts: Iterable[int]) -> None:
        """Empties cohorts, and where prompts are prefilled."""
        self._prompts = self._empty_state(self._prompt_rows)
        for cohort in cohorts:
            self._states[cohort] = self._empty_state(self.config.slots_per_cohort)

    def _empty_state(self, rows: int) -> DecodeState:
        empty = functools.partial(
            empty_state, self.model_config, rows, self.config.max_length, self.config.record_experts
        )
        mesh = self._placements[self._at].mesh
        if mesh is None:
            return empty()
        return jax.jit(empty, out_shardings=slot_shardings(jax.eval_shape(empty), mesh))()

    def _check_deltas(self, cohort: int, deltas: Mapping[int, np.ndarray]) -> None:
        slots = self.cohort_slots(cohort)
        for slot, delta in deltas.items():
            if slot not in slots or not self._occupied[slot]:
                raise EngineError(f"slot {slot}: expected an inserted one of cohort {cohort}")
            room = self.config.max_length - self._lengths[slot]
            if not 1 <= len(delta) < room:
                raise EngineError(f"slot {slot}: expected a delta of 1..{room - 1} tokens, found {len(delta)}")

    def _prompt_passes(self, prompts: Mapping[int, np.ndarray]) -> list[tuple[list[Append], np.ndarray]]:
        """How to prefill prompts (by row of the cohort), each distinct one once: (appends to the prompt rows, source).

        source[B] int32: which prompt row a row starts with; −1 for the others.
        """
        sharers: dict[bytes, list[int]] = {}
        for row, prompt in prompts.items():
            sharers.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(row)
        distinct, passes = list(sharers.values()), []
        for start in range(0, len(distinct), self._prompt_rows):
            source = np.full(self.config.slots_per_cohort, -1, np.int32)
            chosen = distinct[start : start + self._prompt_rows]
            for index, rows in enumerate(chosen):
                source[rows] = index
            given = {index: prompts[rows[0]] for index, rows in enumerate(chosen)}
            prefills = self._batches(self._prompt_rows, given, self.config.extend_buckets[-1:], fresh=True)
            passes.append((prefills, source))
        return passes

    def _batches(
        self, rows: int, deltas: Mapping[int, np.ndarray], buckets: Sequence[int], fresh: bool = False
    ) -> list[Append]:
        """The deltas, by row, as one or more appends of static size; `fresh`: to empty caches."""
        longest = max((len(delta) for delta in deltas.values()), default=0)
        batches, start = [], 0
        while start < longest:
            bucket = next((size for size in buckets if size >= longest - start), buckets[-1])
            tokens = np.full((rows, bucket), self.pad_id, np.int32)
            counts = np.zeros(rows, np.int32)
            for row, delta in deltas.items():
                part = delta[start : start + bucket]
                tokens[row, : len(part)] = part
                counts[row] = len(part)
            batches.append(Append(tokens, counts, np.full(rows, fresh and start == 0)))
            start += bucket
        return batches

    def _unpack(self, slot: int, delta: np.ndarray, packed: np.ndarray, version: int) -> Sampled:
        """One row of `_decode`'s packed result; records what the slot's cache now holds."""
        size = self.config.max_chunk_tokens
        count, finish = int(packed[-2]), tuple(Finish)[packed[-1]]
        tokens = packed[:count].copy()
        logps = packed[size : 3 * size].view(np.float32)
        length = int(self._lengths[slot])
        end = length + len(delta) + count - 1
        self._held[slot, length : length + len(delta)] = delta
        self._held[slot, length + len(delta) : end] = tokens[:-1]
        self._lengths[slot], self._fresh[slot] = end, False
        versions = np.full(count, version, np.int32)
        return Sampled(tokens, logps[:count].copy(), logps[size : size + count].copy(), versions, finish)

    def _account(
        self,
        sampled: Mapping[int, Sampled],
        deltas: Mapping[int, np.ndarray],
        continued: int,
        appends: list[Append],
        seconds: float,
        waited: float,
    ) -> None:
        stats = self.stats
        lengths = [len(chunk.tokens) for chunk in sampled.values()]
        passed = sum(int(append.counts.sum()) for append in appends)
        stats.turns += 1
        stats.prefilled_tokens += passed - continued  # a continued slot's first token was sampled, not given
        stats.copied_tokens += sum(map(len, deltas.values())) - passed
        stats.decoded_tokens += sum(lengths)
        stats.processed_tokens += passed + sum(lengths) - len(lengths)
        stats.padded_tokens += sum(append.tokens.size for append in appends)
        stats.decode_steps += max(lengths, default=0)
        stats.seconds += seconds
        stats.host_seconds += seconds - waited


def compiled_functions(model_config: ModelConfig, config: EngineConfig, mesh: Mesh | None = None) -> Compiled:
    """The engine's jitted `append` and `decode`, shared by all that ask for the same static configuration."""
    c = config
    return compiled(mesh, model_config, c.max_length, c.max_chunk_tokens, c.top_k, c.top_p, c.min_p)

"""The life of one trajectory: open, then chunk and answer in turn, until the verifier has spoken.

`Episode` is touched by one thread at a time. `open` and `act` talk to the environment: they run in a worker, under a
deadline, and return what happened; the runner's thread then writes it down with `opened` and `answered`. A call that
returns after its deadline has changed nothing but its own environment, which is closed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from rome.envs import EnvFailure
from rome.models import Message, Renderer
from rome.rollout.engine import Finish, Sampled
from rome.rollout.ledger import TokenLedger
from rome.rollout.workers import Job
from rome.trajectory import Chunk, Status, Trajectory


class ChunkEnv(Protocol):
    """What the runner asks of an environment: Gymnasium's API, one step a chunk. `rome.envs.TerminalEnv` is one.

    The reward that counts is that of the step that ends the episode. Infrastructure failures raise EnvFailure.
    An attribute `max_chunks`, if there is one, says after how many steps the environment ends the episode itself.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict]: ...
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Deadlines:
    """Seconds that an environment has for `reset`, for a `step` (one tool call), to `verify` and `close`; and that the
    reward stage has for an episode."""

    reset: float = 60.0
    step: float = 30.0
    verify: float = 60.0
    close: float = 10.0
    reward: float = 120.0

    def __post_init__(self) -> None:
        for name in ("reset", "step", "verify", "close", "reward"):
            if not getattr(self, name) > 0:
                raise ValueError(f"deadlines.{name}: expected seconds > 0, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class GroupRequest:
    """`size` trajectories from one initial state.

    Attributes:
      task: a `rome.envs.HarborTask` (anything whose `.task` is a `rome.trajectory.Task`); goes to `env.reset`.
      group_id: unique in a run. seed: of the environment and of the sampling.
      prefix, prefix_chunks: replay the first `prefix_chunks` chunks of this trajectory in the real environment before
        the policy takes over (chunk-level initialised resampling).
    """

    task: Any
    group_id: str
    size: int
    seed: int
    prefix: Trajectory | None = None
    prefix_chunks: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"group {self.group_id}: size: expected at least 1, found {self.size}")
        available = len(self.prefix.chunks) if self.prefix is not None else 0
        # one chunk at least is left for the policy
        if not 0 <= self.prefix_chunks <= max(available - 1, 0):
            limit = max(available - 1, 0)
            raise ValueError(f"group {self.group_id}: prefix_chunks: expected 0..{limit}, found {self.prefix_chunks}")
        if self.prefix is not None and self.prefix.task.id != self.task.task.id:
            found = self.prefix.task.id
            raise ValueError(f"group {self.group_id}: prefix: expected task {self.task.task.id}, found {found}")


def sampling_key(name: str) -> int:
    """The 64-bit key that whatever has this name is sampled with."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Answer(NamedTuple):
    """What the environment made of one chunk. `tokens` is None when the episode ended."""

    text: str
    tokens: np.ndarray | None
    reward: float
    status: Status | None
    error: bool
    command: str


class Opening(NamedTuple):
    """A fresh environment: the prompt, and the replayed prefix with its answers."""

    text: str
    tokens: np.ndarray
    replayed: list[tuple[Chunk, Answer]]


@dataclass
class Episode:
    """One attempt at one sample of a group."""

    request: GroupRequest
    sample: int
    attempt: int
    max_length: int
    slot: int = -1
    env: ChunkEnv | None = None
    ledger: TokenLedger | None = None
    job: Job | None = None
    stage: str = "reset"
    sampled: Sampled | None = None  # the chunk that the environment works on
    start_version: int | None = None
    rewards: list[float] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        suffix = f"+{self.attempt}" if self.attempt else ""
        return f"{self.request.group_id}/{self.sample}{suffix}"

    @property
    def key(self) -> int:
        """The 64-bit sampling key: a function of the request's seed and this trajectory's id alone."""
        return sampling_key(f"{self.request.seed}/{self.id}")

    # -- in a worker thread ------------------------------------------------------------------------------------------

    def open(self, job: Job, env_factory: Callable[[], ChunkEnv], renderer: Renderer, deadlines: Deadlines) -> Opening:
        """A fresh environment, reset to the task; the expert's prefix, if any, replayed in it."""
        self.env = env = env_factory()
        text, _ = env.reset(seed=self.request.seed, options={"task": self.request.task})
        tokens = np.array(renderer.prompt([Message("user", text)]), np.int32)
        replayed = []
        for index in range(self.request.prefix_chunks):
            chunk = self.request.prefix.chunks[index]
            answer = self.act(job, renderer, deadlines, chunk.tokens, index, self.max_length)
            if answer.tokens is None:
                raise EnvFailure(Status.INFRA_FAILURE, f"replayed chunk {index} ended the episode")
            replayed.append((chunk, answer))
        return Opening(text, tokens, replayed)

    def act(
        self, job: Job, renderer: Renderer, deadlines: Deadlines, tokens: np.ndarray, index: int, room: int
    ) -> Answer:
        """Sends chunk `index` to the environment.

        A tool call is executed; anything else (a final answer, a malformed or cut chunk) is the final answer, which
        brings in the verifier. If the observation and one more token don't fit in `room` tokens, the episode is
        truncated: the agent is stopped there and the verifier still runs.
        """
        parsed = renderer.parse(tokens)
        is_call = parsed.kind == "tool_call"
        action = f"<tool_call>{parsed.command}</tool_call>" if is_call else _without_call(parsed.text)
        verifies = not is_call or index + 1 == getattr(getattr(self.env, "unwrapped", self.env), "max_chunks", None)
        job.allow(deadlines.step * is_call + deadlines.verify * verifies)
        text, reward, terminated, truncated, info = self.env.step(action)
        error = bool(info.get("error", False)) or parsed.kind == "malformed"
        if terminated or truncated:
            default = Status.COMPLETED if terminated else Status.TRUNCATED
            return self._ended(text, reward, Status(info.get("status", default)), error, parsed.command)
        if not is_call:
            raise EnvFailure(Status.VERIFIER_FAILURE, "the final answer did not end the episode")
        answer = np.array(renderer.observation([Message("tool", text)]), np.int32)
        if len(answer) < room:
            return Answer(text, answer, float(reward), None, error, parsed.command)
        job.allow(deadlines.verify)
        _, reward, terminated, truncated, _ = self.env.step("")
        if not (terminated or truncated):
            raise EnvFailure(Status.VERIFIER_FAILURE, "the final answer did not end the episode")
        return self._ended(text, reward, Status.TRUNCATED, error, parsed.command)

    def close(self) -> None:
        """Closes the environment; called again after a late `open`, it closes what that left."""
        if self.env is not None:
            self.env.close()

    def _ended(self, text: str, reward: float, status: Status, error: bool, command: str) -> Answer:
        if not status.is_reliable:
            raise EnvFailure(status, f"the environment ended with status {status.value}")
        if not math.isfinite(reward):
            raise EnvFailure(Status.VERIFIER_FAILURE, f"expected a finite reward, found {reward!r}")
        return Answer(text, None, float(reward), status, error, command)

    # -- in the runner's thread --------------------------------------------------------------------------------------

    def opened(self, opening: Opening) -> bool:
        """Writes the prompt and the prefix into the ledger; False if they leave no room for a token of the policy."""
        self.timings["reset"] = self.job.seconds
        needed = len(opening.tokens) + sum(len(c.tokens) + len(a.tokens) for c, a in opening.replayed)
        if needed >= self.max_length:
            return False
        self.ledger = TokenLedger(self.id, self.max_length)
        self.ledger.append_prompt(opening.tokens, opening.text)
        for chunk, answer in opening.replayed:
            self.ledger.append_chunk(chunk)
            self.ledger.append_observation(answer.tokens, answer.text)
            self.rewards.append(answer.reward)
        return True

    def answered(self, renderer: Renderer, answer: Answer) -> Trajectory | None:
        """Writes the chunk and its answer into the ledger; the Trajectory if the episode is over."""
        sampled, ledger = self.sampled, self.ledger
        self._add_time("verify" if answer.status else "environment", self.job.seconds)
        name = f"{self.id}#{len(ledger.chunks)}"
        text = renderer.tokenizer.decode(sampled.tokens.tolist())
        chunk = Chunk(name, sampled.tokens, sampled.behavior_logp, sampled.versions, text, error=answer.error)
        ledger.append_chunk(chunk)
        if answer.status is None:
            self.rewards.append(answer.reward)
            ledger.append_observation(answer.tokens, answer.text)
            return None
        status = Status.TRUNCATED if sampled.finish is Finish.CONTEXT else answer.status
        return self._trajectory(status, answer.reward)

    def generated(self, sampled: Sampled, seconds: float) -> None:
        """Takes the chunk that the engine sampled."""
        self.sampled = sampled
        if self.start_version is None:
            self.start_version = int(sampled.versions[0])
        self._add_time("generate", seconds)

    def _trajectory(self, status: Status, reward: float) -> Trajectory:
        ledger, request = self.ledger, self.request
        self.timings["total"] = time.monotonic() - self.started
        intrinsic = np.array([*self.rewards, 0.0], np.float32) if any(self.rewards) else None
        return Trajectory(
            id=self.id,
            group_id=request.group_id,
            task=request.task.task,
            seed=request.seed,
            prompt=ledger.prompt,
            chunks=ledger.chunks,
            observations=ledger.observations,
            final_reward=reward,
            status=status,
            start_version=self.start_version,
            intrinsic_rewards=intrinsic,
            prefix_chunks=request.prefix_chunks,
            timings=dict(self.timings),
        )

    def _add_time(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds


def _without_call(text: str) -> str:
    """A final answer that no environment can take for a tool call."""
    return text.replace("<tool_call>", "").replace("</tool_call>", "")

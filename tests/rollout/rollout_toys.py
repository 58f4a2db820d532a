"""A tiny policy, and an environment in this process whose answers are a function of what it is told.

The toy renderer lets a random policy live: a fifth of its ids end a chunk, most of them as a tool call.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rome.models import ModelConfig, ParsedChunk, init_params
from rome.rollout import DecodeEngine, EngineConfig, GroupRequest
from rome.rollout.stream import Burst, StreamEngine
from rome.trajectory import Task

VOCAB = 64
END = 1  # ends a final answer
CALLS = frozenset(range(2, 14))  # each ends a tool call
ASSISTANT = 14
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
    tie_embeddings=False,
)


class ToyTokenizer:
    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


class ToyRenderer:
    """Text is a list of numbers 15..63; a message is its numbers and the assistant's header."""

    tokenizer = ToyTokenizer()
    stop_ids = CALLS | {END}

    def prompt(self, messages: Any) -> list[int]:
        return [int(word) for message in messages for word in message.content.split()] + [ASSISTANT]

    observation = prompt

    def parse(self, tokens: Any) -> ParsedChunk:
        ids = [int(token) for token in tokens]
        text = self.tokenizer.decode(ids[:-1])
        if ids[-1] in CALLS:
            return ParsedChunk("tool_call", self.tokenizer.decode(ids), "")
        return ParsedChunk("final" if ids[-1] == END else "malformed", "", text)


def numbers(text: str, count: int) -> list[int]:
    """`count` ids 15..63 that follow from `text`."""
    digest = hashlib.blake2b(text.encode(), digest_size=64).digest()
    return [15 + digest[i] % (VOCAB - 15) for i in range(count)]


@dataclass
class ToyTask:
    task: Task


def toy_task(name: str = "toy") -> ToyTask:
    return ToyTask(Task(id=name, instruction=f"do {name}"))


def toy_requests(groups: int, size: int, seed: int = 0) -> list[GroupRequest]:
    return [GroupRequest(toy_task(f"t{g}"), f"g{g}", size, seed + g) for g in range(groups)]


def endless_requests(size: int = 2) -> Iterator[GroupRequest]:
    for index in itertools.count():
        yield GroupRequest(toy_task(f"t{index}"), f"g{index}", size, index)


@dataclass
class Journal:
    """What all environments of a test did, and how they are to misbehave. `fault(env)` runs at the start of a call."""

    jitter: float = 0.0
    reset_fault: Any = None
    step_fault: Any = None
    close_fault: Any = None
    observation_tokens: int = 0
    reward: float | None = None  # of every episode; None: it follows from the history
    opened: int = 0
    closed: int = 0
    calls: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, name: str) -> int:
        with self.lock:
            self.calls[name] += 1
            return self.calls[name]


class ToyEnv:
    """Answers are hashes of the history. Ends on a final answer, or by itself after `max_chunks`."""

    max_chunks = 5

    def __init__(self, journal: Journal) -> None:
        self.journal, self.history, self.steps, self.live = journal, "", 0, False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        with self.journal.lock:
            self.journal.opened += 1
        self.live = True
        self._misbehave("reset", self.journal.reset_fault)
        self.history = f"{options['task'].task.id}/{seed}"
        return self._say(4 + seed % 5), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        self._misbehave("step", self.journal.step_fault)
        self.steps += 1
        self.history += action
        over = "<tool_call>" not in action
        cut = not over and self.steps >= self.max_chunks
        reward = float(numbers(self.history, 1)[0] % 2) if over or cut else 0.0
        if self.journal.reward is not None and (over or cut):
            reward = self.journal.reward
        words = self.journal.observation_tokens or 1 + numbers(self.history, 1)[0] % 6
        return self._say(words), reward, over, cut, {"error": self.steps == 2}

    def close(self) -> None:
        with self.journal.lock:
            self.journal.closed += self.live
        self.live = False
        if self.journal.close_fault is not None:
            self.journal.close_fault(self)

    def _say(self, count: int) -> str:
        return " ".join(map(str, numbers(self.history, count)))

    def _misbehave(self, name: str, fault: Any) -> None:
        count = self.journal.note(name)
        if self.journal.jitter:
            time.sleep(self.journal.jitter * (hash((time.monotonic_ns(), count)) % 100) / 100)
        if fault is not None:
            fault(self)


@functools.cache
def toy_params(seed: int = 0) -> Any:
    params = init_params(MODEL, jax.random.key(seed))
    # sharper than at initialisation, so that the log-probs say something
    return jax.tree.map(lambda x: x, {**params, "lm_head": params["lm_head"] * 3})


def toy_engine(seed: int = 0, **changes: Any) -> DecodeEngine:
    settings = {
        "slots": 4,
        "cohorts": 2,
        "max_length": 96,
        "extend_buckets": (8, 16),
        "max_chunk_tokens": 10,
        **changes,
    }
    return DecodeEngine(toy_params(seed), MODEL, EngineConfig(**settings), ToyRenderer.stop_ids, pad_id=0)


def finish_stream(engine: StreamEngine, slots: list[int]) -> dict[int, list[Burst]]:
    """Advances until all of them are done: slot → bursts."""
    bursts: dict[int, list[Burst]] = {slot: [] for slot in slots}
    left = set(slots)
    for _ in range(200):
        for slot, burst in engine.advance().items():
            bursts[slot].append(burst)
            if burst.finish is not None:
                left.discard(slot)
                engine.free(slot)
        if not left:
            return bursts
    raise AssertionError(f"slots {left} never ended")


def joined(bursts: list[Burst], name: str) -> np.ndarray:
    return np.concatenate([getattr(burst, name) for burst in bursts])


def same_trajectory(a: Any, b: Any) -> bool:
    """Bit for bit, apart from the measured seconds."""
    return (
        (a.id, a.seed, a.final_reward, a.status, a.start_version)
        == (b.id, b.seed, b.final_reward, b.status, b.start_version)
        and [s for s, _ in a.segments()] == [s for s, _ in b.segments()]
        and all(np.array_equal(x, y) for (_, x), (_, y) in zip(a.segments(), b.segments(), strict=True))
        and all(
            x.behavior_logp.tobytes() == y.behavior_logp.tobytes() and np.array_equal(x.versions, y.versions)
            for x, y in zip(a.chunks, b.chunks, strict=True)
        )
    )

"""SampleBuffer: where finished groups wait for the trainer, and grow stale.

A group (all samples of one initial state) is admitted, aged and handed out whole. Staleness is *per sample*:
`current version − sample.start_version`. A group with a sample whose staleness exceeds the asynchronous ratio is
discarded; its violators and their companions are counted apart, and its id is reported by `take_discarded`, so that the
same initial state is sampled again.

With `filter_groups`, a group whose samples all have the same reward is dropped as it arrives (dynamic sampling, DAPO,
arXiv 2503.14476): under a baseline it has no gradient. At most so many are dropped between two batches; then groups are
taken as they come, so that a solved, or hopeless, set of tasks never starves the trainer. `take_filtered` hands them
out once, because their outcome still says how hard their task is. Samples lost to infrastructure never get here: the
runner samples them again, by typed status.

The asynchronous ratio α may be fractional. It bounds staleness (integer gap ≤ α), and it sizes the buffer: α·batch
groups may be produced ahead of those that the trainer waits for, capacity = ⌈(1 + α)·batch⌉ (ROLL Flash,
arXiv 2510.11345).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rome.trajectory import Trajectory, trajectory_from_record, trajectory_to_record

STATE_VERSION = 2


class SampleBufferError(RuntimeError):
    """Base of the buffer's errors."""


class BufferTimeout(SampleBufferError):
    """A wait for room, or for groups, passed its deadline. Says what was waited for."""


class BufferClosed(SampleBufferError):
    """The buffer was closed while somebody waited on it; carries the producer's failure as its cause."""


@dataclass(frozen=True)
class BufferStats:
    """Counts since the buffer was made (they survive checkpoints).

    `dropped_stale` are samples whose own staleness exceeded the ratio; `dropped_with_group` their fresh companions.
    `filtered_solved` and `filtered_failed` are groups that were dropped because all of their samples had one reward, by
    what that was; they are no part of `groups_in`.
    """

    groups_in: int = 0
    groups_out: int = 0
    samples_in: int = 0
    samples_out: int = 0
    dropped_groups: int = 0
    dropped_stale: int = 0
    dropped_with_group: int = 0
    filtered_solved: int = 0
    filtered_failed: int = 0


class SampleBuffer:
    """A bounded, thread-safe queue of whole groups, oldest first.

    Args:
      async_ratio: the largest admissible `current version − start_version`, ≥ 0; fractions allowed.
      batch_groups: how many groups the trainer takes a step; with the ratio it gives the capacity.
      filter_groups: how many groups of one reward may be dropped between two batches; 0: none is.
    """

    def __init__(self, async_ratio: float, batch_groups: int, filter_groups: int = 0) -> None:
        if not (math.isfinite(async_ratio) and async_ratio >= 0):
            raise ValueError(f"async_ratio: expected a finite number >= 0, found {async_ratio!r}")
        if batch_groups < 1:
            raise ValueError(f"batch_groups: expected at least 1, found {batch_groups!r}")
        if filter_groups < 0:
            raise ValueError(f"filter_groups: expected at least 0, found {filter_groups!r}")
        self.async_ratio = float(async_ratio)
        self.batch_groups, self.filter_groups = batch_groups, filter_groups
        self.capacity = math.ceil((1 + self.async_ratio) * batch_groups)
        self._groups: list[tuple[Trajectory, ...]] = []
        self._discarded: list[str] = []
        self._filtered: list[tuple[Trajectory, ...]] = []
        self._filtered_since_batch = 0
        self._version = 0
        self._counts = dict.fromkeys(BufferStats.__dataclass_fields__, 0)
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closed = False

    def __len__(self) -> int:
        """Groups that wait."""
        with self._changed:
            return len(self._groups)

    @property
    def version(self) -> int:
        """The trainer's version that staleness is measured against."""
        return self._version

    @property
    def stats(self) -> BufferStats:
        with self._changed:
            return BufferStats(**self._counts)

    def staleness(self) -> list[int]:
        """`version − start_version` of every waiting sample, oldest group first."""
        with self._changed:
            return [self._version - sample.start_version for group in self._groups for sample in group]

    def put_group(self, group: Sequence[Trajectory], timeout: float = 0.0) -> None:
        """Admits a finished group, or filters it; waits up to `timeout` seconds for room.

        Raises:
          ValueError: the group is empty, mixes group ids, holds an unreliable sample, or one from a future version.
          BufferTimeout: the buffer stayed full. BufferClosed: it was closed.
        """
        samples = tuple(group)
        _check_group(samples)
        with self._changed:
            if self._filtered_since_batch < self.filter_groups and has_one_reward(samples):
                self._filtered_since_batch += 1
                self._filtered.append(samples)
                self._count("filtered_solved" if samples[0].succeeded else "filtered_failed", 1)
                return
            self._wait(
                lambda: len(self._groups) < self.capacity, timeout, f"room for a group (capacity {self.capacity})"
            )
            newest = max(sample.start_version for sample in samples)
            if newest > self._version:
                # The producer may see the published weights a moment before the trainer asks for its next batch.
                self._set_version(newest)
            self._groups.append(samples)
            self._count("groups_in", 1)
            self._count("samples_in", len(samples))
            self._discard_stale()
            self._changed.notify_all()

    def get_batch(self, num_groups: int, current_version: int, timeout: float = 0.0) -> list[list[Trajectory]]:
        """The `num_groups` oldest groups that are fresh at `current_version`; waits up to `timeout` seconds for them.

        Raises BufferTimeout if there are not enough, BufferClosed if the producer failed or stopped, ValueError if
        `num_groups` can never be served or the version goes backwards.
        """
        if not 1 <= num_groups <= self.capacity:
            raise ValueError(f"num_groups: expected 1..{self.capacity} (the capacity), found {num_groups}")
        with self._changed:
            self._set_version(current_version)
            self._wait(lambda: len(self._groups) >= num_groups, timeout, f"{num_groups} fresh groups")
            batch, self._groups = self._groups[:num_groups], self._groups[num_groups:]
            self._filtered_since_batch = 0
            self._count("groups_out", num_groups)
            self._count("samples_out", sum(map(len, batch)))
            self._changed.notify_all()
        return [list(group) for group in batch]

    def set_version(self, version: int) -> None:
        """Tells the buffer that the trainer published `version`: what is now too stale is discarded at once."""
        with self._changed:
            self._set_version(version)

    def group_ids(self) -> list[str]:
        """Ids of the groups that wait, oldest first."""
        with self._changed:
            return [group[0].group_id for group in self._groups]

    def take_discarded(self) -> list[str]:
        """Ids of the groups discarded since the last call: their initial states are to be sampled again."""
        with self._changed:
            discarded, self._discarded = self._discarded, []
            return discarded

    def take_filtered(self) -> list[list[Trajectory]]:
        """The groups filtered since the last call, in the order of their arrival."""
        with self._changed:
            filtered, self._filtered = self._filtered, []
            return [list(group) for group in filtered]

    def close(self, failure: BaseException | None = None) -> None:
        """Wakes every waiter with BufferClosed (caused by `failure`). Idempotent; what waits can still be read."""
        with self._changed:
            self._closed, self._failure = True, failure
            self._changed.notify_all()

    def reopen(self) -> None:
        """Undoes `close`: a producer is back."""
        with self._changed:
            self._closed, self._failure = False, None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain msgpack values."""
        with self._changed:
            return {
                "state_version": STATE_VERSION,
                "version": self._version,
                "groups": _to_records(self._groups),
                "discarded": list(self._discarded),
                "filtered": _to_records(self._filtered),
                "filtered_since_batch": self._filtered_since_batch,
                "counts": dict(self._counts),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave. Raises ValueError that names the key; the buffer is then unchanged."""
        expected = {"state_version", "version", "groups", "discarded", "filtered", "filtered_since_batch", "counts"}
        if set(state) != expected:
            raise ValueError(f"buffer state: expected the keys {sorted(expected)}, found {sorted(state)}")
        if state["state_version"] != STATE_VERSION:
            raise ValueError(f"buffer state: state_version: expected {STATE_VERSION}, found {state['state_version']!r}")
        if set(state["counts"]) != set(self._counts):
            raise ValueError(f"buffer state: counts: expected {sorted(self._counts)}, found {sorted(state['counts'])}")
        groups, filtered = (_from_records(state[name], name) for name in ("groups", "filtered"))
        with self._changed:
            self._groups, self._version = groups, int(state["version"])
            self._filtered, self._filtered_since_batch = filtered, int(state["filtered_since_batch"])
            self._discarded, self._counts = list(state["discarded"]), dict(state["counts"])
            self._changed.notify_all()

    def _set_version(self, version: int) -> None:
        if version < self._version:
            raise ValueError(f"current_version: expected at least {self._version}, found {version}")
        self._version = version
        self._discard_stale()

    def _discard_stale(self) -> None:
        kept = []
        for group in self._groups:
            stale = sum(self._version - sample.start_version > self.async_ratio for sample in group)
            if not stale:
                kept.append(group)
                continue
            self._count("dropped_groups", 1)
            self._count("dropped_stale", stale)
            self._count("dropped_with_group", len(group) - stale)
            self._discarded.append(group[0].group_id)
        if len(kept) < len(self._groups):
            self._groups = kept
            self._changed.notify_all()

    def _wait(self, ready: Any, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            if self._closed:
                raise BufferClosed(f"closed while waiting for {what}") from self._failure
            left = deadline - time.monotonic()
            if left <= 0:
                raise BufferTimeout(f"no {what} within {timeout:g} s; {len(self._groups)} groups wait")
            self._changed.wait(left)

    def _count(self, name: str, amount: int) -> None:
        self._counts[name] += amount


def _check_group(samples: tuple[Trajectory, ...]) -> None:
    if not samples:
        raise ValueError("group: expected at least one trajectory")
    ids = sorted({sample.group_id for sample in samples})
    if len(ids) != 1:
        raise ValueError(f"group: expected one group_id, found {ids}")
    for sample in samples:
        if not sample.status.is_reliable:
            raise ValueError(f"trajectory {sample.id}: status: expected a reliable one, found {sample.status.value}")


def has_one_reward(group: Sequence[Trajectory]) -> bool:
    """Whether all samples of a group are worth the same, intrinsic rewards included. A group that starts from an
    expert's prefix never counts as such: whether it succeeds decides where the next one starts."""
    if group[0].prefix_chunks:
        return False
    intrinsic = (0.0 if t.intrinsic_rewards is None else float(t.intrinsic_rewards.sum()) for t in group)
    return len({t.final_reward + extra for t, extra in zip(group, intrinsic, strict=True)}) == 1


def _to_records(groups: Sequence[tuple[Trajectory, ...]]) -> list[list[dict[str, Any]]]:
    return [[trajectory_to_record(sample) for sample in group] for group in groups]


def _from_records(groups: Sequence[Sequence[Any]], name: str) -> list[tuple[Trajectory, ...]]:
    return [
        tuple(trajectory_from_record(record, f"buffer state: {name}[{g}][{s}]") for s, record in enumerate(group))
        for g, group in enumerate(groups)
    ]

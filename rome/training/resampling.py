"""Chunk-level initialised resampling: which groups start from an expert's prefix instead of the initial state.

A policy that never succeeds from the initial state gets no signal there. Replay the first chunks of a trajectory that
is closer to success, in a real sandbox, and let the policy sample the rest. The mathematics is `rome.ipa.resampling`;
here is the bookkeeping, which a checkpoint holds, so that a resumed run draws the same starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rome.ipa import Fork, anchor_prefixes, crucial_forks, imitated_forks, rollback
from rome.ipa.resampling import ROLLBACK_THRESHOLD
from rome.trajectory import Trajectory, trajectory_from_record, trajectory_to_record

_POOL = 64  # failed trajectories that wait to be resampled; the oldest make room
_CHOICES = {"source": ("demonstration", "failure"), "start": ("rollback", "uniform", "random")}


@dataclass(frozen=True)
class ResamplingSettings:
    """Chunk-level initialised resampling (arXiv 2512.24873, section 3.2.4).

    Attributes:
      fraction: of the groups, those that start from a prefix, in [0, 1); 0 switches it off.
      source: whose prefixes. demonstration: of demonstrations that solve their task. failure: of the policy's own
        trajectories, from groups that failed altogether.
      start: rollback: a cell (family, horizon) starts with one chunk left to sample, and with one more each time a
        group's success rate reaches `threshold` [ours: by cell, over its demonstrations, not by single trajectory].
        uniform, random: a group from each of `anchors` positions of one trajectory, evenly spaced or drawn.
      threshold: see rollback. anchors: see uniform.
      fork_level: of the test that locates crucial chunks between anchors.
    """

    fraction: float = 0.0
    source: str = "demonstration"
    start: str = "rollback"
    threshold: float = ROLLBACK_THRESHOLD
    anchors: int = 4
    fork_level: float = 0.05

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction: expected a fraction in [0, 1), found {self.fraction!r}")
        for name in ("threshold", "fork_level"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a fraction in (0, 1], found {getattr(self, name)!r}")
        if self.anchors < 1:
            raise ValueError(f"anchors: expected at least 1, found {self.anchors!r}")
        if self.source == "failure" and self.start == "rollback":
            raise ValueError(
                "start: expected uniform or random with source failure, found 'rollback' (the end of a failure is a "
                "failure: it would never move back)"
            )


class Start(NamedTuple):
    """Replay the first `prefix` chunks of `expert`, then sample."""

    expert: Trajectory
    prefix: int


class Expert(NamedTuple):
    """The first `chunks` chunks of a trajectory are to be imitated (Eq 10): a prefix and the crucial chunk after it."""

    trajectory: Trajectory
    chunks: int


def _cell(trajectory: Trajectory) -> str:
    return f"{trajectory.task.family}/{trajectory.task.horizon}"


class Resampler:
    """Draws starts, and learns from the groups that came of them. A function of its seed and of what it was told.

    Args:
      demonstrations: the experts of source demonstration; those that failed, or have a single chunk, are left out.
    """

    def __init__(self, settings: ResamplingSettings, demonstrations: Iterable[Trajectory], seed: int) -> None:
        self.settings, self._seed = settings, seed
        self._demonstrations = {t.id: t for t in demonstrations if t.succeeded and len(t.chunks) > 1}
        self._by_cell: dict[str, list[Trajectory]] = {}
        for t in self._demonstrations.values():
            self._by_cell.setdefault(_cell(t), []).append(t)
        self._failures: deque[Trajectory] = deque(maxlen=_POOL)
        self._left: dict[str, int] = {}  # rollback: chunks left to sample, by cell
        self._queue: list[Start] = []  # anchors of the current expert that are still to be sampled
        self._counts: dict[str, dict[int, tuple[int, int]]] = {}  # expert → prefix → (successes, attempts)
        self._forks = 0

    def next(self, number: int, success: Mapping[str, float]) -> Start | None:
        """Where group `number` starts; None for the initial state of the task that it would have anyway.

        `success`: the running success rate of each cell from the initial state; the failing ones are drawn more often.
        """
        fraction = self.settings.fraction
        if int((number + 1) * fraction) == int(number * fraction):
            return None
        if self._queue:
            return self._queue.pop(0)
        rng = np.random.default_rng([self._seed, number])
        expert = self._draw(rng, success)
        if expert is None:
            return None
        if self.settings.start == "rollback":
            prefix = len(expert.chunks) - self._left.get(_cell(expert), 1)
            return Start(expert, prefix) if prefix > 0 else None  # rolled back to the initial state: nothing to do
        seed = int(rng.integers(2**31)) if self.settings.start == "random" else None
        prefixes = anchor_prefixes(len(expert.chunks), self.settings.anchors, seed)
        self._counts[expert.id] = dict.fromkeys(prefixes, (0, 0))
        first, *self._queue = [Start(expert, prefix) for prefix in prefixes]
        return first

    def _draw(self, rng: np.random.Generator, success: Mapping[str, float]) -> Trajectory | None:
        if self.settings.source == "failure":
            return self._failures.popleft() if self._failures else None
        if not self._by_cell:
            return None
        cells = list(self._by_cell)
        weights = np.array([1.05 - success.get(cell, 0.5) for cell in cells])
        experts = self._by_cell[cells[rng.choice(len(cells), p=weights / weights.sum())]]
        return experts[rng.integers(len(experts))]

    def observe(self, group: Sequence[Trajectory]) -> None:
        """Takes in a group from the initial state: one that failed altogether offers its longest trajectory."""
        longest = max(group, key=lambda t: len(t.chunks))
        if self.settings.source == "failure" and not any(t.succeeded for t in group) and len(longest.chunks) > 1:
            self._failures.append(longest)

    def record(self, start: Start, group: Sequence[Trajectory]) -> list[Fork]:
        """Takes in a group that began at `start`. Returns the crucial chunks that this located, if any."""
        successes, attempts = sum(t.succeeded for t in group), len(group)
        expert, prefix = start
        if self.settings.start == "rollback":
            cell, left = _cell(expert), len(expert.chunks) - prefix
            if left == self._left.get(cell, 1):  # not a group that was drawn before the last step back
                self._left[cell] = left + prefix - rollback(prefix, successes, attempts, self.settings.threshold)
            return []
        counts = self._counts.get(expert.id, {})
        counts[prefix] = (successes, attempts)
        if not all(tried for _, tried in counts.values()):
            return []
        self._counts.pop(expert.id, None)
        prefixes = sorted(counts)
        forks = crucial_forks(
            prefixes, [counts[p][0] for p in prefixes], [counts[p][1] for p in prefixes], self.settings.fork_level
        )
        self._forks += len(forks)
        return forks

    def metrics(self) -> dict[str, float]:
        """How far the starts have moved back, or how many crucial chunks were located so far."""
        if self.settings.start == "rollback":
            left = [self._left.get(cell, 1) for cell in self._by_cell]
            return {"resampling/chunks_left_mean": float(np.mean(left))} if left else {}
        return {"resampling/crucial_chunks": float(self._forks)}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, pending: Iterable[Start]) -> dict[str, Any]:
        """msgpack values. `pending`: starts whose groups are not finished; their experts are kept too."""
        mine = [*self._failures, *(start.expert for start in (*self._queue, *pending))]
        experts = {t.id: t for t in mine if t.id not in self._demonstrations}
        return {
            "left": dict(self._left),
            "queue": [[start.expert.id, start.prefix] for start in self._queue],
            "counts": [[name, [[p, *pair] for p, pair in counts.items()]] for name, counts in self._counts.items()],
            "forks": self._forks,
            "failures": [t.id for t in self._failures],
            "experts": [trajectory_to_record(t) for t in experts.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> dict[str, Trajectory]:
        """The inverse of `state_dict`; returns the experts by id, for the pending starts."""
        experts = [trajectory_from_record(record, "resampling.experts") for record in state["experts"]]
        known = self._demonstrations | {t.id: t for t in experts}
        self._left = dict(state["left"])
        self._queue = [Start(known[name], prefix) for name, prefix in state["queue"]]
        self._counts = {name: {p: (s, n) for p, s, n in counts} for name, counts in state["counts"]}
        self._forks = int(state["forks"])
        self._failures = deque((known[name] for name in state["failures"]), maxlen=_POOL)
        return known


def experts_to_imitate(imitation: str, resampled: Sequence[tuple[Start, Sequence[Trajectory]]]) -> list[Expert]:
    """What Eq 10's imitation term trains after a batch, under `ObjectiveConfig.imitation`.

    For each start that it asks for: the expert's chunks up to and including the one after the prefix (the paper's
    prefix ∪ {c*_f}). An expert with several such starts is imitated once, up to the last of them. Failures never are.
    """
    starts = [(start, group) for start, group in resampled if start.expert.succeeded]
    positive = np.array([any(t.succeeded for t in group) for _, group in starts], bool)
    chosen = imitated_forks(imitation, positive, np.arange(len(starts)))
    experts: dict[str, Expert] = {}
    for (start, _), imitated in zip(starts, chosen, strict=True):
        known = experts.get(start.expert.id)
        if imitated and (known is None or known.chunks <= start.prefix):
            experts[start.expert.id] = Expert(start.expert, start.prefix + 1)
    return list(experts.values())

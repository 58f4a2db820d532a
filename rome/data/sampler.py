"""Which task comes next: a seeded stream over families and horizons that leans to what is being learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Task seeds of the three uses never meet: training, demonstrations and held-out evaluation.
TRAIN_SEEDS = 1_000_000_000
DEMONSTRATION_SEEDS = 2_000_000_000
EVALUATION_SEEDS = 3_000_000_000
SEEDS_PER_RUN = 10_000_000


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """The three numbers that a procedural task is a function of."""

    family: str
    horizon: int
    seed: int


def fixed_tasks(families: Sequence[str], horizons: Sequence[int], count: int, first_seed: int) -> list[TaskSpec]:
    """`count` tasks that go round families first, then horizons, each with a seed of its own."""
    cells = [(family, horizon) for horizon in horizons for family in families]
    return [TaskSpec(*cells[i % len(cells)], seed=first_seed + i) for i in range(count)]


@dataclass
class TaskSampler:
    """An endless, reproducible stream of training tasks.

    A (family, horizon) cell is drawn with weight `floor + 4 p (1 − p)`, p its running success rate: the variance of the
    reward, which is where a policy gradient has something to learn. `focus` 0 makes all cells equal.
    """

    families: Sequence[str]
    horizons: Sequence[int]
    seed: int
    focus: float = 1.0
    floor: float = 0.35
    decay: float = 0.9
    cursor: int = 0
    success: dict[str, float] = field(default_factory=dict)

    def _cells(self) -> list[tuple[str, int]]:
        return [(family, horizon) for family in self.families for horizon in self.horizons]

    def next(self, count: int) -> list[TaskSpec]:
        """The next `count` tasks; advances the cursor."""
        cells = self._cells()
        rates = np.array([self.success.get(f"{family}/{horizon}", 0.5) for family, horizon in cells])
        weights = self.floor + self.focus * 4 * rates * (1 - rates)
        rng = np.random.default_rng([self.seed, self.cursor])
        picks = rng.choice(len(cells), size=count, p=weights / weights.sum())
        first = TRAIN_SEEDS + (self.seed % 64) * SEEDS_PER_RUN + self.cursor
        self.cursor += count
        return [TaskSpec(*cells[pick], seed=first + i) for i, pick in enumerate(picks)]

    def record(self, family: str, horizon: int, success_rate: float) -> None:
        """Takes in a group's success rate."""
        key = f"{family}/{horizon}"
        before = self.success.get(key, 0.5)
        self.success[key] = self.decay * before + (1 - self.decay) * success_rate

    def state_dict(self) -> dict[str, Any]:
        """What changes over a run, as JSON values."""
        return {"cursor": self.cursor, "success": dict(self.success)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = int(state["cursor"])
        self.success = {str(key): float(value) for key, value in state["success"].items()}

"""Success on held-out seeds, sampled from the initial state, with a confidence interval that knows about tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rome.trajectory import Trajectory


@dataclass(frozen=True)
class EvaluationResult:
    """avg@k: mean success over `episodes` = tasks × samples, with a 95 % interval, by family and by horizon."""

    success: float
    low: float
    high: float
    episodes: int
    tasks: int
    by_family: dict[str, float]
    by_horizon: dict[int, float]
    cells: dict[str, dict[str, float]]
    chunks_mean: float

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Flat names for the metrics file: eval/success, eval/success/<family>, eval/success_h/<horizon>."""
        return {
            f"{prefix}/success": self.success,
            f"{prefix}/success_low": self.low,
            f"{prefix}/success_high": self.high,
            f"{prefix}/episodes": float(self.episodes),
            f"{prefix}/chunks_mean": self.chunks_mean,
            **{f"{prefix}/success/{family}": value for family, value in self.by_family.items()},
            **{f"{prefix}/success_h/{horizon}": value for horizon, value in self.by_horizon.items()},
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "by_horizon": {str(key): value for key, value in self.by_horizon.items()}}


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 4000) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of `values` [tasks]: samples of one task are not independent, tasks are."""
    if len(values) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def summarize(groups: Sequence[Sequence[Trajectory]]) -> EvaluationResult:
    """The table of a set of groups, one group the samples of one task."""
    rates = np.array([np.mean([t.succeeded for t in group]) for group in groups if group])
    episodes = [t for group in groups for t in group]
    by_family: dict[str, list[bool]] = defaultdict(list)
    by_horizon: dict[int, list[bool]] = defaultdict(list)
    cells: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for t in episodes:
        by_family[t.task.family].append(t.succeeded)
        by_horizon[t.task.horizon].append(t.succeeded)
        cells[t.task.family][str(t.task.horizon)].append(t.succeeded)
    low, high = bootstrap_interval(rates)
    return EvaluationResult(
        success=float(np.mean([t.succeeded for t in episodes])) if episodes else float("nan"),
        low=low,
        high=high,
        episodes=len(episodes),
        tasks=len(rates),
        by_family={family: float(np.mean(values)) for family, values in sorted(by_family.items())},
        by_horizon={horizon: float(np.mean(values)) for horizon, values in sorted(by_horizon.items())},
        cells={f: {h: float(np.mean(v)) for h, v in sorted(row.items())} for f, row in sorted(cells.items())},
        chunks_mean=float(np.mean([len(t.chunks) for t in episodes])) if episodes else 0.0,
    )

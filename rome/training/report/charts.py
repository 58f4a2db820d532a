"""What is drawn: the charts of a run as plain values, from which both the PNG files and the page are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rome.training.report.data import Record, breakdown, evaluations, number

MAX_POINTS = 800
WARM_STAGES = ("cpt", "sft")


@dataclass(frozen=True)
class Series:
    """One curve. `low`/`high`: the ends of a 95% interval. `faint`: raw values behind a smoothed curve."""

    label: str
    x: list[int]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture. `kind` is `line` or `stack`; `section` is where it stands: `ipa`, `warm`, `eval` or `more`."""

    key: str
    title: str
    note: str
    section: str
    series: list[Series] = field(default_factory=list)
    kind: str = "line"
    fraction: bool = False
    wide: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the page's script."""
        return {**vars(self), "series": [vars(series) for series in self.series]}


# key, title, what to look for, ((metric, label), …), whether the values lie in 0..1
_IPA: tuple[tuple[str, str, str, tuple[tuple[str, str], ...], bool], ...] = (
    ("return", "Return", "mean chunk return G", (("train/return_mean", "return"),), False),
    ("loss", "Loss", "the objective's value; its size says little", (("train/loss", "loss"),), False),
    ("grad", "Gradient norm", "before clipping", (("train/grad_norm", "norm"),), False),
    (
        "ratio",
        "Importance ratio ρ",
        "π_θ / π_old by chunk; 1 is on-policy",
        (("ratio/chunk_mean", "mean"), ("ratio/chunk_max", "max"), ("ratio/chunk_min", "min")),
        False,
    ),
    (
        "mismatch",
        "Train / inference mismatch",
        "π_old / μ by chunk; 1 is perfect agreement",
        (("mismatch/chunk_mean", "mean"), ("mismatch/chunk_max", "max"), ("mismatch/chunk_min", "min")),
        False,
    ),
    (
        "masks",
        "Clipped and masked",
        "share of chunks",
        (("ratio/clipped_fraction", "ratio clipped"), ("mask/chunk_dropped", "mask dropped")),
        True,
    ),
    (
        "staleness",
        "Staleness",
        "policy versions between sampling and training",
        (("buffer/staleness_mean", "mean"), ("buffer/staleness_max", "max")),
        False,
    ),
    ("dropped", "Dropped samples", "too stale to train on", (("buffer/dropped_stale", "dropped"),), False),
    ("speed", "Decoding speed", "tokens a second", (("rollout/tokens_per_second", "tokens/s"),), False),
    ("chunks", "Episode length", "chunks a trajectory", (("rollout/chunks_mean", "chunks"),), False),
)


def build_charts(records: Sequence[Record]) -> list[Chart]:
    """Every metric of the run in some chart; charts without a value are left out."""
    by_stage: dict[str, list[Record]] = {}
    for record in records:
        by_stage.setdefault(record["stage"], []).append(record)
    ipa = by_stage.get("ipa", [])
    charts = [_success(ipa, records), *_evaluation_breakdowns(records)]
    charts += [
        Chart(key, title, note, "ipa", [_series(ipa, name, label) for name, label in metrics], fraction=fraction)
        for key, title, note, metrics, fraction in _IPA
    ]
    charts += [_times(ipa), *_warm(by_stage)]
    charts = [_without_empty(chart) for chart in charts]
    charts = [chart for chart in charts if chart.series]
    return charts + _remaining(by_stage)


def _series(records: Sequence[Record], name: str, label: str, **options: Any) -> Series:
    points = [(record["step"], number(record[name])) for record in records if name in record]
    if len(points) > MAX_POINTS:  # keep the last point: it is the state of the run
        spacing = (len(points) - 1) / (MAX_POINTS - 1)
        points = [points[round(i * spacing)] for i in range(MAX_POINTS)]
    return Series(label, [x for x, _ in points], [y for _, y in points], **options)


def smooth(values: Sequence[float | None], weight: float = 0.8) -> list[float | None]:
    """Exponential moving average with start-up correction; None stays None and does not count."""
    total, mass, out = 0.0, 0.0, []
    for value in values:
        if value is not None:
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(None if value is None else number(total / mass))
    return out


def _success(ipa: Sequence[Record], records: Sequence[Record]) -> Chart:
    raw = _series(ipa, "train/success", "training, each step", faint=True)
    smoothed = Series("training, smoothed", raw.x, smooth(raw.y))
    first = next((i for i, record in enumerate(records) if record["stage"] == "ipa"), len(records))
    before = evaluations(records[:first])[-1:]  # where IPA starts from, at step 0
    evals = [{**record, "step": 0} for record in before] + evaluations(records[first:])
    points = _series(evals, "eval/success", "held-out evaluation, 95% interval", dots=True)
    low, high = _series(evals, "eval/success_low", "").y, _series(evals, "eval/success_high", "").y
    if len(low) == len(high) == len(points.x):
        points = Series(points.label, points.x, points.y, low, high, dots=True)
    note = "share of episodes that the verifier accepts"
    return Chart("success", "Success", note, "ipa", [points, smoothed, raw], fraction=True, wide=True)


def _evaluation_breakdowns(records: Sequence[Record]) -> list[Chart]:
    evals = evaluations(records)
    charts = []
    for key, prefix, title in (("families", "eval/success", "family"), ("horizons", "eval/success_h", "horizon")):
        names: dict[str, float] = {}
        for record in evals:
            names |= breakdown(record, prefix)
        series = [_series(evals, f"{prefix}/{name}", f"h {name}" if key == "horizons" else name) for name in names]
        charts.append(Chart(key, f"Evaluation by {title}", "success", "eval", series, fraction=True))
    return charts


def _times(ipa: Sequence[Record]) -> Chart:
    names = dict.fromkeys(name for record in ipa for name in record if name.startswith("time/") and name != "time/step")
    series = [_series(ipa, name, name.removeprefix("time/")) for name in names]
    return Chart("time", "Time of a step", "seconds, by part", "ipa", series, kind="stack")


def _warm(by_stage: dict[str, list[Record]]) -> list[Chart]:
    """One chart a metric, with a curve for each warm-start stage that has it."""
    names: dict[str, None] = {}
    for stage in WARM_STAGES:
        names |= dict.fromkeys(name for record in by_stage.get(stage, []) for name in _metrics(record))
    charts = []
    for name in names:
        series = [_series(by_stage.get(stage, []), name, stage.upper()) for stage in WARM_STAGES]
        charts.append(Chart(f"warm {name}", name, "warm start", "warm", series))
    return sorted(charts, key=lambda chart: chart.title != "train/loss")


def _remaining(by_stage: dict[str, list[Record]]) -> list[Chart]:
    """Charts for the metrics of other stages, and those of IPA that no chart above names."""
    known = {name for _, _, _, metrics, _ in _IPA for name, _ in metrics} | {"train/success"}
    charts = []
    for stage, records in by_stage.items():
        if stage in WARM_STAGES:
            continue
        for name in dict.fromkeys(name for record in records for name in _metrics(record)):
            covered = name in known or name.startswith("eval/success") or name.startswith("time/")
            if not (covered and stage in ("ipa", "eval")):
                charts.append(Chart(f"{stage} {name}", name, stage, "more", [_series(records, name, name)]))
    return [chart for chart in map(_without_empty, charts) if chart.series]


def _metrics(record: Record) -> list[str]:
    return [name for name in record if name not in ("step", "stage", "time")]


def _without_empty(chart: Chart) -> Chart:
    series = [series for series in chart.series if any(value is not None for value in series.y)]
    return Chart(**{**vars(chart), "series": series})

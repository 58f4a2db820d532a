"""The charts of a run as PNG files, for documents and for a glance without a browser."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rome.files import atomic_write
from rome.training.report.charts import Chart

COLORS = ("#2f6fed", "#e0762b", "#15936f", "#9a4fd0", "#b8901c", "#d1495b", "#4b9fc4", "#6b7280")
_INK, _FAINT = "#1c2330", "#c9ced8"


def save_plots(directory: Path, charts: Sequence[Chart], title: str) -> list[Path]:
    """Writes `learning_curve.png` (success alone, to be shown) and one sheet a section: `ipa`, `eval`, `warm_start`."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        if chart.key == "success":
            figure = _figure(8.4, 4.2)
            _draw(figure.add_subplot(), chart, title)
            written.append(_save(figure, directory / "learning_curve.png"))
    for section, name in (("ipa", "ipa"), ("eval", "evaluation"), ("warm", "warm_start")):
        chosen = [chart for chart in charts if chart.section == section]
        if chosen:
            written.append(_save(_sheet(chosen), directory / f"{name}.png"))
    return written


def _sheet(charts: Sequence[Chart]) -> Figure:
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = _figure(4.6 * columns, 3.0 * rows)
    for index, chart in enumerate(charts, start=1):
        _draw(figure.add_subplot(rows, columns, index), chart, chart.title)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _draw(axes: Axes, chart: Chart, title: str) -> None:
    if chart.kind == "stack":
        _draw_stack(axes, chart)
    else:
        _draw_lines(axes, chart)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_ylabel(chart.note, fontsize=8, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if chart.fraction:
        axes.set_ylim(0.0, max(1.0, axes.get_ylim()[1]) if chart.key in ("success", "families", "horizons") else None)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_xlabel("step", fontsize=8, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    if len(chart.series) > 1 or chart.key == "success":
        axes.legend(fontsize=7, frameon=False, ncols=1 if len(chart.series) < 5 else 2)


def _draw_lines(axes: Axes, chart: Chart) -> None:
    shown = [series for series in chart.series if not series.faint]
    colors = {id(series): COLORS[i % len(COLORS)] for i, series in enumerate(shown)}
    for series in chart.series:
        color = colors.get(id(series), COLORS[1])
        y = [math.nan if value is None else value for value in series.y]
        if series.low is not None and series.high is not None:
            ends = [[math.nan if value is None else value for value in side] for side in (series.low, series.high)]
            axes.fill_between(series.x, *ends, color=color, alpha=0.15, linewidth=0)
        alpha, width = (0.25, 1.0) if series.faint else (1.0, 1.8)
        marker = "o" if series.dots or len(y) == 1 else None
        axes.plot(series.x, y, color=color, alpha=alpha, linewidth=width, marker=marker, ms=4, label=series.label)


def _draw_stack(axes: Axes, chart: Chart) -> None:
    steps = sorted({x for series in chart.series for x in series.x})
    tables = [dict(zip(series.x, series.y, strict=True)) for series in chart.series]
    heights = [[table.get(step) or 0.0 for step in steps] for table in tables]
    axes.stackplot(steps, *heights, labels=[s.label for s in chart.series], colors=COLORS, alpha=0.85, linewidth=0)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
    return path

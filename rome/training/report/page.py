"""Puts a run's report together: one HTML file that needs nothing else, made from the files in `assets/`.

Text of a run is hostile until shown otherwise (an agent writes it). Three walls: the page's HTML is escaped here, its
script only ever sets text (never markup), and a content-security policy lets no other script run and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from rome.files import atomic_write
from rome.training.config import flatten
from rome.training.report.charts import build_charts
from rome.training.report.data import (
    Decode,
    Record,
    Run,
    before_and_after,
    breakdown,
    natural,
    number,
    number_exact,
    read_run,
    stage_seconds,
)
from rome.training.report.plots import save_plots
from rome.training.report.steps import timeline
from rome.training.tracking import format_duration

_SCRIPTS = ("base.js", "charts.js", "viewer.js")


def write_report(
    run_dir: str | Path, decode: Decode | None = None, *, max_steps: int = 16, max_trajectories: int = 16
) -> Path:
    """Writes `report.html` and `plots/*.png` into the run directory, from whatever the run has written so far.

    Args:
        run_dir: a run directory (docs/run-directory.md). Files that are missing or damaged are left out; the report
            says which were damaged.
        decode: token ids to text, to show single tokens. Default: the tokenizer saved in `run_dir/tokenizer`, if any.
        max_steps, max_trajectories: how many trajectory files, and trajectories of each, the page carries.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: the directory does not exist, or a file cannot be written.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise NotADirectoryError(f"run directory: no such directory: {directory}")
    problems: list[str] = []
    run = read_run(directory, decode or _saved_tokenizer(directory, problems), max_steps, max_trajectories)
    run.problems.extend(problems)
    charts = build_charts(run.records)
    drawn = timeline(directory, run.problems)
    save_plots(directory / "plots", charts, f"{directory.resolve().name}: success")
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = {
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": escape(directory.resolve().name),
        "style": _asset("report.css"),
        "overview": _overview(run),
        "problems": _problems(run.problems),
        "results": _results(run),
        "timeline": drawn or _empty("No trace yet. The first IPA step writes one."),
        "config": _config(run.config),
        "data": _script_json({"charts": [chart.to_json() for chart in charts], "steps": run.steps}),
        "script": script,
    }
    path = directory / "report.html"
    atomic_write(path, re.sub(r"\{\{(\w+)\}\}", lambda match: page[match[1]], _asset("report.html")))
    return path


def _asset(name: str) -> str:
    return (files("rome.training.report") / "assets" / name).read_text(encoding="utf-8")


def _saved_tokenizer(directory: Path, problems: list[str]) -> Decode | None:
    folder = directory / "tokenizer"
    if not folder.is_dir():
        return None
    from rome.training.pretrained import kept_tokenizer  # here, because a report without it needs no JAX

    try:
        return kept_tokenizer(directory).decode
    except ValueError as error:
        problems.append(f"tokenizer: {error}")
        return None


def _script_json(value: Any) -> str:
    """JSON that is also safe inside <script>: ASCII only, and no character that HTML could read."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ---------------------------------------------------------------- the parts that need no script


def _overview(run: Run) -> str:
    before, after = before_and_after(run.records)
    seconds = stage_seconds(run.records)
    last = run.records[-1] if run.records else None
    stamp = number_exact(last.get("time")) if last else None
    when = datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M UTC") if stamp else ""
    state = f"{last['stage']} step {last['step']}, {when}" if last else "no metrics yet: the run has just begun"
    narrowest = 0.07 * sum(seconds.values())
    stages = "".join(
        f'<span class="stage" style="flex-grow:{max(value, narrowest):.3f}" data-stage="{escape(name)}">'
        f"<b>{escape(name)}</b> {format_duration(value)}</span>"
        for name, value in seconds.items()
        if value > 0
    )
    return f'<p class="state">{escape(state)}</p>{_headline(before, after)}<dl class="tiles">{_tiles(run)}</dl>' + (
        f'<div class="timeline">{stages}</div>' if stages else ""
    )


def _headline(before: Record | None, after: Record | None) -> str:
    if after is None or before is None:
        return ""
    value = number(after["eval/success"]) or 0.0
    interval = _interval(after)
    start = number(before["eval/success"]) or 0.0
    arrow = f'<span class="from">{_percent(start)} <i>→</i></span> ' if before is not after else ""
    note = "held-out success, before and after IPA" if before is not after else "held-out success"
    return (
        f'<div class="headline">{arrow}<strong>{_percent(value)}</strong>'
        f"<small>{note}{f'<br>95% interval {interval}' if interval else ''}</small></div>"
    )


def _tiles(run: Run) -> str:
    ipa = [record for record in run.records if record["stage"] == "ipa"]
    recent = ipa[-20:]
    tiles: list[tuple[str, str]] = []
    if ipa:
        tiles.append(("IPA steps", f"{ipa[-1]['step']:,}"))
    for name, label, form in (
        ("train/success", "training success", "{:.1%}"),
        ("ratio/chunk_mean", "ratio ρ", "{:.3f}"),
        ("mask/chunk_dropped", "mask dropped", "{:.2%}"),
        ("buffer/staleness_mean", "staleness", "{:.2f}"),
        ("rollout/tokens_per_second", "tokens / s", "{:,.0f}"),
        ("time/step", "seconds / step", "{:.2f}"),
    ):
        values = [value for record in recent if (value := number(record.get(name))) is not None]
        if values:
            tiles.append((label, form.format(sum(values) / len(values))))
    title = f"mean of the last {len(recent)} steps"
    return "".join(
        f'<div title="{title if label != "IPA steps" else ""}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>'
        for label, value in tiles
    )


def _results(run: Run) -> str:
    before, after = before_and_after(run.records)
    found = list(_evaluations_in(run.result))
    summary = _summary(before, after, found)
    bars = _cards(
        _bars("By family", breakdown(before, "eval/success"), breakdown(after, "eval/success")),
        _bars("By horizon", breakdown(before, "eval/success_h"), breakdown(after, "eval/success_h"), "h "),
    )
    heat = _cards(*(_cells(name, _rows(value.get("cells"))) for name, value in found))
    return (summary + bars + heat) or _empty(
        "No evaluation yet. It appears here as soon as a record with eval/success is written."
    )


def _cards(*contents: str) -> str:
    cards = "".join(f'<section class="card">{content}</section>' for content in contents if content)
    return f'<div class="grid results">{cards}</div>' if cards else ""


def _summary(before: Record | None, after: Record | None, found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = [
        (name, value.get("success"), _interval(value, ""), value.get("episodes"), value.get("chunks_mean"))
        for name, value in found
    ]
    if not rows:
        named = [("before IPA", before), ("latest", after)] if before is not after else [("latest", after)]
        rows = [
            (name, r["eval/success"], _interval(r), r.get("eval/episodes"), r.get("eval/chunks_mean"))
            for name, r in named
            if r is not None
        ]
    if not rows:
        return ""
    body = "".join(
        f"<tr><th>{escape(str(name))}</th><td><b>{_percent(number(success))}</b></td><td>{interval or '–'}</td>"
        f"<td>{_plain(episodes, '{:,.0f}')}</td><td>{_plain(chunks, '{:.1f}')}</td></tr>"
        for name, success, interval, episodes, chunks in rows
    )
    head = "<th></th><th>success</th><th>95% interval</th><th>episodes</th><th>chunks</th>"
    return f'<table class="summary card"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _evaluations_in(value: Any, name: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """The evaluation tables anywhere in `result.json`, named by where they stand."""
    if not isinstance(value, dict):
        return []
    if number(value.get("success")) is not None:
        return [(name or "final", value)]
    return [item for key, inner in value.items() for item in _evaluations_in(inner, f"{name} {key}".strip())]


def _bars(title: str, before: Mapping[str, float], after: Mapping[str, float], prefix: str = "") -> str:
    """Rows of a bar (now) with a tick (before)."""
    if not after:
        return ""
    rows = "".join(_bar(prefix + name, before.get(name), value) for name, value in after.items())
    legend = '<p class="hint">bar: latest evaluation · tick: before IPA</p>' if before != after else ""
    return f"<h3>{title}</h3>{rows}{legend}"


def _bar(name: str, before: float | None, now: float) -> str:
    tick = f'<s style="left:{_width(before)}"></s>' if before is not None else ""
    return (
        f'<div class="bar" title="{_percent(before)} → {_percent(now)}"><span>{escape(name)}</span>'
        f'<i><u style="width:{_width(now)}"></u>{tick}</i><b>{_percent(now)}</b></div>'
    )


def _rows(cells: Any) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in cells.items() if isinstance(row, dict)} if isinstance(cells, dict) else {}


def _cells(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Family × horizon as a heat table."""
    columns = sorted({column for row in rows.values() for column in row}, key=natural)
    if not rows or not columns:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(family)}</th>{''.join(_heat(number(row.get(column))) for column in columns)}</tr>"
        for family, row in rows.items()
    )
    return (
        f"<h3>Family × horizon <small>{escape(name)}</small></h3>"
        f'<table class="heat"><thead><tr><th>horizon</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _heat(value: float | None) -> str:
    return "<td></td>" if value is None else f'<td style="--heat:{_width(value)}">{100 * value:.0f}</td>'


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return _empty("No config.json in this run directory.")
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in flatten(config):
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append((name, value))
    return (
        '<div class="grid config">'
        + "".join(
            f'<section class="card"><h3>{escape(section or "run")}</h3><dl>'
            + "".join(
                f"<dt>{escape(name)}</dt><dd>{escape(json.dumps(value, ensure_ascii=False))}</dd>"
                for name, value in rows
            )
            + "</dl></section>"
            for section, rows in sections.items()
        )
        + "</div>"
    )


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems[:20])
    return f'<details class="problems" open><summary>Some files could not be read</summary><ul>{items}</ul></details>'


def _interval(values: Mapping[str, Any], prefix: str = "eval/success_") -> str:
    low, high = number(values.get(f"{prefix}low")), number(values.get(f"{prefix}high"))
    return "" if low is None or high is None else f"{_percent(low)} – {_percent(high)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _plain(value: Any, form: str) -> str:
    known = number(value)
    return "–" if known is None else form.format(known)


def _width(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'

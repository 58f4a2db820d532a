"""The timeline of one IPA step as an SVG: what the trainer, the engine and every slot did when."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

_WIDTH, _ROW, _LABEL = 1160, 15, 84
_MOST_LANES, _MOST_SPANS = 72, 6000
_CLASSES = ("decode", "reset", "step", "reward", "update", "wait", "publish")


def timeline(directory: Path, problems: list[str]) -> str:
    """Of the newest file in `traces/`; empty if there is none. A damaged file is noted in `problems`."""
    paths = sorted((directory / "traces").glob("step_*.json"))
    if not paths:
        return ""
    path = paths[-1]
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        names = {e["tid"]: str(e["args"]["name"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        spans = [
            (e["tid"], str(e["name"]), e["ts"] / 1e6, e["dur"] / 1e6, e.get("args", {}))
            for e in events
            if e["ph"] == "X"
        ]
        return _draw(path.stem, names, spans)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"traces/{path.name}: {type(error).__name__}: {error}")
        return ""


def _draw(name: str, names: dict[int, str], spans: list[tuple[int, str, float, float, dict[str, Any]]]) -> str:
    if not spans:
        return ""
    seconds = max(start + length for _, _, start, length, _ in spans)
    lanes = sorted({tid for tid, *_ in spans if tid in names})
    left_out = len(lanes) - len(lanes[:_MOST_LANES])
    rows = {tid: index for index, tid in enumerate(lanes[:_MOST_LANES])}
    scale, height = (_WIDTH - _LABEL) / max(seconds, 1e-9), _ROW * (len(rows) + 1)
    shapes = [
        f'<text x="{_LABEL - 8}" y="{_ROW * row + 11}" text-anchor="end">{escape(names[tid])}</text>'
        for tid, row in rows.items()
    ]
    for tid, label, start, length, arguments in spans[:_MOST_SPANS]:
        if tid in rows:
            details = " · ".join([f"{1e3 * length:,.1f} ms", *(f"{k} {v}" for k, v in arguments.items())])
            shapes.append(
                f'<rect class="{_class(names[tid], label)}" '
                f'x="{_LABEL + scale * start:.1f}" y="{_ROW * rows[tid] + 2}" '
                f'width="{max(scale * length, 0.6):.1f}" height="{_ROW - 4}">'
                f"<title>{escape(f'{label}: {details}')}</title></rect>"
            )
    shapes += [
        f'<text x="{_LABEL + scale * seconds * part / 4:.0f}" y="{height - 3}" '
        f'text-anchor="{("start", "middle", "middle", "middle", "end")[part]}">{seconds * part / 4:.2f} s</text>'
        for part in range(5)
    ]
    legend = "".join(f'<span><i class="{name}"></i>{name}</span>' for name in _CLASSES)
    more = f" {left_out} more lanes are in the file." if left_out else ""
    return (
        f'<section class="card spans"><h3>{escape(name.replace("_", " "))} '
        f"<small>{seconds:.2f} s; hover for details.{more} "
        f"The whole trace is traces/{escape(name)}.json, for ui.perfetto.dev</small></h3>"
        f'<p class="legend">{legend}</p>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline of one step">{"".join(shapes)}</svg>'
        "</section>"
    )


def _class(lane: str, label: str) -> str:
    kind = lane.split(" ")[0]
    word = "decode" if kind == "decode" else "reward" if kind == "reward" else label.split(" ")[0]
    return word if word in _CLASSES else "other"

"""What happened when, as a Chrome trace: open the file at https://ui.perfetto.dev or chrome://tracing.

The format is Google's "Trace Event Format" (JSON object form, complete events, microseconds).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rome.files import atomic_write


class Span(NamedTuple):
    """Something that took time. Seconds on the clock of `time.monotonic`."""

    lane: str
    name: str
    start: float
    seconds: float
    arguments: dict[str, Any]


class Trace:
    """Collects spans from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []

    def add(self, lane: str, name: str, start: float, seconds: float, **arguments: Any) -> None:
        """One span: `lane` is the row that it is drawn in."""
        with self._lock:
            self._spans.append(Span(lane, name, start, seconds, arguments))

    def merge(self, spans: Iterable[Span], prefix: str, later: float) -> None:
        """Spans of another process, whose clock shows `later` seconds less than this one's; in lanes of their own."""
        moved = [span._replace(lane=f"{prefix}: {span.lane}", start=span.start + later) for span in spans]
        with self._lock:
            self._spans += moved

    def drain(self) -> list[Span]:
        """The spans so far, which it forgets."""
        with self._lock:
            spans, self._spans = self._spans, []
            return spans

    @property
    def spans(self) -> list[Span]:
        """In the order in which they ended."""
        with self._lock:
            return list(self._spans)

    def write(self, path: Path) -> None:
        """Writes the file, atomically. Times start at the first span."""
        spans = self.spans
        origin = min((span.start for span in spans), default=0.0)
        lanes = {lane: number for number, lane in enumerate(sorted({s.lane for s in spans}, key=_lane_order))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
            for lane, number in lanes.items()
        ]
        events += [
            {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": number, "args": {"sort_index": number}}
            for number in lanes.values()
        ]
        events += [
            {
                "ph": "X",
                "cat": _parts(span.lane)[1],
                "name": span.name,
                "pid": 1,
                "tid": lanes[span.lane],
                "ts": round(1e6 * (span.start - origin)),
                "dur": round(1e6 * span.seconds),
                "args": span.arguments,
            }
            for span in spans
        ]
        atomic_write(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _parts(lane: str) -> tuple[str, str, str]:
    """(process, kind, number) of "host 1: slot 12" or "slot 12"."""
    process, _, name = lane.rpartition(": ")
    kind, _, number = name.partition(" ")
    return process, kind, number


def _lane_order(lane: str) -> tuple[str, int, str, int]:
    """This process first; in each the trainer and the engine first; "slot 10" after "slot 9"."""
    process, kind, number = _parts(lane)
    first = ("train", "decode", "slot", "reward")
    place = first.index(kind) if kind in first else len(first)
    return process, place, kind, int(number) if number.isdigit() else 0

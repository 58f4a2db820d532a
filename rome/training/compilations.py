"""Counts XLA compilations, so that a run can show that nothing recompiles after warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_open: list[Compilations] = []


@dataclass
class Compilations:
    """`count` programs compiled while the context was open, by any thread."""

    count: int = 0


def _listen(event: str, duration: float, **_: object) -> None:
    if event == _EVENT:
        for counter in _open:
            counter.count += 1


_listening = False


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts the backend compilations inside the `with` block."""
    global _listening
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_listen)
        _listening = True
    counter = Compilations()
    _open.append(counter)
    try:
        yield counter
    finally:
        _open.remove(counter)

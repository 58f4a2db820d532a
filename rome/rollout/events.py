"""Discrete events: simulated processes that wait for time, for one another, and for a share of the processor.

A process is a generator that yields what it waits for: seconds, a `Signal`, or `Work`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Generator
from typing import Any, NamedTuple


class Signal:
    """`yield signal` waits until somebody fires it."""

    def __init__(self) -> None:
        self.waiting: list[Process] = []


class Work(NamedTuple):
    """`yield Work(s)` computes for s seconds, or longer where cores are shared."""

    seconds: float


Process = Generator["float | Signal | Work", None, None]


class Scheduler:
    """Simulated time. `yield s` waits for s seconds."""

    def __init__(self, cores: float | None) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._cores = cores
        self._jobs: dict[int, list[Any]] = {}  # number → [seconds left, process]
        self._since, self._epoch = 0.0, 0

    def start(self, process: Process) -> None:
        self._at(self.now, process)

    def fire(self, signal: Signal) -> None:
        waiting, signal.waiting = signal.waiting, []
        for process in waiting:
            self._at(self.now, process)

    def run(self, main: Process) -> None:
        """Until the main process has ended. Raises RuntimeError if all wait for one another."""
        self.start(main)
        while main.gi_frame is not None:
            if not self._events:
                raise RuntimeError("the simulation came to a standstill")
            self.now, _, what = heapq.heappop(self._events)
            if isinstance(what, int):
                self._finish_jobs(what)
            else:
                self._resume(what)

    def _at(self, time: float, what: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), what))

    def _resume(self, process: Process) -> None:
        try:
            wanted = next(process)
        except StopIteration:
            return
        if isinstance(wanted, Signal):
            wanted.waiting.append(process)
        elif isinstance(wanted, Work) and self._cores is not None:
            self._advance_jobs()
            self._jobs[next(self._order)] = [wanted.seconds, process]
            self._plan_jobs()
        else:
            seconds = wanted.seconds if isinstance(wanted, Work) else wanted
            self._at(self.now + seconds, process)

    @property
    def _rate(self) -> float:
        return min(1.0, self._cores / len(self._jobs))

    def _advance_jobs(self) -> None:
        if self._jobs:
            done = (self.now - self._since) * self._rate
            for job in self._jobs.values():
                job[0] -= done
        self._since = self.now

    def _plan_jobs(self) -> None:
        self._epoch += 1
        if self._jobs:
            least = max(0.0, min(job[0] for job in self._jobs.values()))
            self._at(self.now + least / self._rate, self._epoch)

    def _finish_jobs(self, epoch: int) -> None:
        if epoch != self._epoch:  # another job came or went since this was planned
            return
        self._advance_jobs()
        over = [number for number, job in self._jobs.items() if job[0] <= 1e-9]
        for process in [self._jobs.pop(number)[1] for number in over]:
            self._at(self.now, process)
        self._plan_jobs()

"""Threads that run environment calls under a deadline.

A call that hangs can't be killed from outside, so it is abandoned: its worker is replaced, its late result is thrown
away, and whatever it opened late is closed. Workers are daemons: a hung one never keeps the process alive.

Why threads and not asyncio: an environment is a `gymnasium.Env`, whose calls block by contract, and so does the sandbox
SDK. An event loop would hand them to a pool of threads anyway, asyncio's own, which the interpreter joins at its exit:
a hung call would keep the process alive. And it costs more: 21 µs of CPU a call with a deadline (`wait_for` of a
coroutine that does nothing) against 4 µs here, where an environment call takes milliseconds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any


class DeadlineExceeded(TimeoutError):
    """An environment call passed its deadline."""


class Job:
    """One call in flight; it is handed to the call itself. Read `value`, `error`, `seconds` once it is settled."""

    __slots__ = ("abandoned", "allowed", "call", "error", "late", "seconds", "settled", "started", "value")

    def __init__(self, call: Callable[[Job], Any], allowed: float, late: Callable[[], None] | None) -> None:
        self.call, self.allowed, self.late = call, allowed, late
        self.value: Any = None
        self.error: BaseException | None = None
        self.started: float | None = None
        self.seconds = 0.0
        self.settled = self.abandoned = False

    def allow(self, seconds: float) -> None:
        """Called by the call itself: it has `seconds` from now on (the next stage of the same call begins)."""
        self.allowed = time.monotonic() - self.started + seconds

    def left(self, now: float) -> float:
        """Seconds until the deadline; the clock starts when the call does."""
        return self.allowed if self.started is None else self.started + self.allowed - now


class EnvWorkers:
    """A pool of daemon threads whose calls have deadlines.

    Args:
      threads: how many calls run at once.
    """

    def __init__(self, threads: int) -> None:
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._threads = threads
        for _ in range(threads):
            self._spawn()

    def submit(self, call: Callable[[Job], Any], seconds: float, late: Callable[[], None] | None = None) -> Job:
        """Queues `call(job)`. It has `seconds` from its start; should it return later, `late` cleans up after it."""
        job = Job(call, seconds, late)
        self._queue.put(job)
        return job

    def wait(self, jobs: Collection[Job], enough: int, timeout: float | None = None) -> int:
        """Blocks until `enough` of the jobs are settled (done, failed or past their deadline), or `timeout` seconds.

        Returns how many are settled. A job past its deadline settles with DeadlineExceeded as its error. Every wait
        ends: jobs that run have deadlines, and jobs that queue get a worker when one of those ends.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                now = time.monotonic()
                running = [job for job in jobs if not job.settled]
                for job in running:
                    if job.left(now) <= 0:
                        self._abandon(job)
                settled = sum(job.settled for job in jobs)
                if settled >= min(enough, len(jobs)) or (give_up is not None and now >= give_up):
                    return settled
                # a job that has not started yet may start, and expire, while we sleep: look again within a second
                pause = min([1.0, *(job.left(now) for job in running if not job.settled)])
                self._changed.wait(pause if give_up is None else min(pause, give_up - now))

    def abandon(self, jobs: Collection[Job]) -> None:
        """Gives up on jobs that are not settled, without waiting for their deadlines."""
        with self._changed:
            for job in jobs:
                if not job.settled:
                    self._abandon(job)

    def close(self) -> None:
        """Lets idle workers end. Calls still running are left to their daemon threads."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _abandon(self, job: Job) -> None:
        job.settled = job.abandoned = True
        job.error = DeadlineExceeded(f"no answer within {job.allowed:g} s")
        if job.started is not None:
            self._spawn()

    def _spawn(self) -> None:
        threading.Thread(target=self._work, name="env-worker", daemon=True).start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._changed:
                if job.abandoned:
                    continue
                job.started = time.monotonic()
            value, error = None, None
            try:
                value = job.call(job)
            except BaseException as caught:  # delivered to whoever waits, whatever it is
                error = caught
            with self._changed:
                in_time = not job.abandoned
                if in_time:
                    job.value, job.error, job.settled = value, error, True
                    job.seconds = time.monotonic() - job.started
                    self._changed.notify_all()
            if not in_time:
                if job.late is not None:
                    job.late()
                return  # a replacement has taken this worker's place

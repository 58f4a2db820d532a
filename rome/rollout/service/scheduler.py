"""Requests in and out of the engine's slots, in a thread of its own.

A bounded queue (`QueueFull` above it), a deadline for each request, cancellation that frees the slot before the next
burst, and a drain that ends what is still running after a grace period.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rome.rollout.grammar import Constraint
from rome.rollout.service.errors import ServiceError
from rome.rollout.service.text import TextStream
from rome.rollout.stream import Burst, Sampling, StreamEngine

_IDLE_SECONDS = 60.0  # the longest wait for work; what wakes the thread is the condition


class Part(NamedTuple):
    """Some more of an answer: certain text (perhaps ""), the tokens behind it, and at the end the finish reason."""

    text: str
    burst: Burst
    finish: str | None


@dataclass(eq=False)
class Job:
    """One sequence to sample.

    `deliver` gets a `Part` or a `ServiceError`, the last thing it gets; it is called in the scheduler's thread and must
    not block. `deadline` is on the monotonic clock.
    """

    prompt: np.ndarray
    sampling: Sampling
    text: TextStream
    deadline: float
    deliver: Callable[[Part | ServiceError], None]
    constraint: Constraint | None = None
    queued: float = field(default_factory=time.monotonic)
    slot: int | None = None
    cancelled: bool = False


@dataclass
class SchedulerStats:
    """Of jobs: how they ended, and seconds by which the time of the next can be guessed."""

    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    rejected: int = 0
    failed: int = 0
    seconds_each: float = 1.0  # in a slot; a moving average


class Scheduler:
    """Owns a `StreamEngine`: nothing else may call it, but for `update_params`.

    Args:
      engine: warmed up.
      queue_limit: jobs that may wait for a slot.
    """

    def __init__(self, engine: StreamEngine, queue_limit: int) -> None:
        self.engine, self.queue_limit = engine, queue_limit
        self.stats = SchedulerStats()
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._drain_until = math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rome-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def draining(self) -> bool:
        return self._drain_until < math.inf

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs or none. Raises ServiceError: 429 with `retry_after` if they do not fit, 503 when ending."""
        with self._changed:
            if self.draining or self._closed or not self.alive:
                raise ServiceError(503, "the server is shutting down", code="shutting_down")
            idle = self.engine.config.slots - len(self._running)
            if len(self._queue) + len(jobs) > self.queue_limit + idle:
                self.stats.rejected += 1
                rounds = (len(self._queue) + len(jobs)) / self.engine.config.slots
                wait = min(max(1, math.ceil(rounds * self.stats.seconds_each)), 60)
                raise ServiceError(
                    429, f"the queue is full; try again in {wait} s", code="queue_full", retry_after=wait
                )
            self._queue.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody wants the answers any more: the slots are free before the next burst. Idempotent."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Takes no new jobs; those that are not done in `seconds` end with a 503."""
        with self._changed:
            self._drain_until = min(self._drain_until, time.monotonic() + seconds)
            self._changed.notify_all()

    def close(self, timeout: float = 30.0) -> None:
        """Ends all jobs and the thread; waits for it up to `timeout` seconds. Idempotent."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._running or self._closed):
                    self._changed.wait(_IDLE_SECONDS)
                self._drop_ended()
                if self._closed and not self._running:
                    return
                self._admit()
            if self._running:
                self._advance()

    def _drop_ended(self) -> None:
        """Cancelled and late jobs leave the queue and the slots."""
        now = time.monotonic()
        for job in [*self._queue, *self._running.values()]:
            if job.cancelled:
                self.stats.cancelled += 1
                self._end(job)
            elif now >= self._drain_until:
                self._end(job, ServiceError(503, "the server is shutting down", code="shutting_down"))
            elif now >= job.deadline:
                self.stats.expired += 1
                self._end(job, ServiceError(504, "the request's time is over", code="deadline_exceeded"))

    def _end(self, job: Job, error: ServiceError | None = None) -> None:
        if job.slot is None:
            self._queue.remove(job)
        elif self._running.get(job.slot) is job:
            del self._running[job.slot]
            self.engine.free(job.slot)
        if error is not None:
            job.deliver(error)

    def _admit(self) -> None:
        """The queue's next jobs take free slots, in order; one whose prompt is just being prefilled by another waits
        for it (at the head, so that nobody overtakes)."""
        while self._queue and self.engine.free_slots:
            job = self._queue[0]
            if self.engine.shares_soon(job.prompt):
                return
            self._queue.popleft()
            job.slot = self.engine.start(job.prompt, job.sampling, job.constraint)
            job.queued = time.monotonic()
            self._running[job.slot] = job

    def _advance(self) -> None:
        try:
            bursts = self.engine.advance()
        except Exception as error:  # the engine is empty now; say so to all, and go on
            failed, self._running = list(self._running.values()), {}
            self.stats.failed += len(failed)
            for job in failed:
                job.deliver(ServiceError(500, f"the engine failed: {type(error).__name__}", code="engine_error"))
            return
        with self._changed:
            for slot, burst in bursts.items():
                job = self._running.get(slot)
                if job is not None:
                    self._give(job, burst)

    def _give(self, job: Job, burst: Burst) -> None:
        """Delivers a burst, cut after the token that completed a stop string."""
        if burst.finish == "grammar":
            self.stats.failed += 1
            self._end(job, ServiceError(500, "the grammar became too complex to follow", code="grammar_error"))
            return
        text, count, size = "", 0, len(burst.tokens)
        while count < size and not job.text.stopped:
            last = burst.finish == "stop" and count == size - 1  # a stop id: no part of the text
            if not last:
                text += job.text.push(burst.tokens[count])
            count += 1
        finish = "stop" if job.text.stopped else burst.finish
        if finish is not None:
            text += job.text.finish()
            self.stats.finished += 1
            self.stats.seconds_each += 0.1 * (time.monotonic() - job.queued - self.stats.seconds_each)
            self._end(job)
        if count < size:
            tops = (None, None) if burst.top_ids is None else (burst.top_ids[:count], burst.top_logp[:count])
            cut = (burst.tokens[:count], burst.behavior_logp[:count], burst.raw_logp[:count])
            burst = Burst(*cut, burst.version, finish, *tops)
        job.deliver(Part(text, burst, finish))

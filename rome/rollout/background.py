"""Free-running rollouts: a thread feeds the sample buffer while the trainer consumes it.

The thread never drains: a cohort's turn starts as soon as some of its slots are ready, and new weights take effect at
the next turn. Back-pressure comes from the buffer's capacity: a group is started only while the groups in flight and
those that wait are fewer than ⌈(1 + α)·batch⌉, which also bounds how stale a sample can get.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

from rome.rollout.buffer import SampleBuffer
from rome.rollout.episode import GroupRequest
from rome.rollout.runner import Group, RolloutRunner


class RolloutStopped(RuntimeError):
    """The rollout thread did not obey within its deadline, or is not running."""


class Admission:
    """Decides which group is started next, so that the buffer will have room for whatever is in flight.

    Args:
      buffer: takes what is delivered.
      requests: where new groups come from, in order; drawn lazily.
      known: requests of groups that a restored buffer already holds, to be sampled again if those go stale.
    """

    def __init__(
        self, buffer: SampleBuffer, requests: Iterable[GroupRequest], known: Iterable[GroupRequest] = ()
    ) -> None:
        self._buffer = buffer
        self._requests: Iterator[GroupRequest] = iter(requests)
        self._again: list[Group] = []
        self._delivered: dict[str, Group] = {request.group_id: Group(request) for request in known}
        self.exhausted = False

    @property
    def waiting(self) -> list[GroupRequest]:
        """Groups that are to be sampled again and were not started yet."""
        return [group.request for group in self._again]

    def deliver(self, groups: Sequence[Group]) -> None:
        """Hands finished groups to the buffer, which has room: `next` saw to that."""
        for group in groups:
            self._delivered[group.request.group_id] = group
            self._buffer.put_group(group.samples)

    def again(self, group: Group) -> None:
        """Has a group sampled once more, under fresh ids and keys: an attempt is never numbered twice."""
        self._again.append(Group(replace(group.request), [attempt + 1 for attempt in group.attempts]))

    def next(self, in_flight: int) -> Group | None:
        """The group to start while `in_flight` others are; None if the buffer could not take it, or none is left.

        Groups that went stale come before new ones.
        """
        waiting = set(self._buffer.group_ids())
        for name in self._buffer.take_discarded():
            self.again(self._delivered.pop(name))
        self._delivered = {name: group for name, group in self._delivered.items() if name in waiting}
        if in_flight + len(self._buffer) >= self._buffer.capacity:
            return None
        if self._again:
            return self._again.pop(0)
        request = next(self._requests, None)
        self.exhausted = request is None
        return None if request is None else Group(request)

    @property
    def hopeless(self) -> bool:
        """With nothing in flight: whether no batch can ever be completed."""
        return self.exhausted and len(self._buffer) < self._buffer.batch_groups


def free_run(runner: RolloutRunner) -> bool:
    """One round over the cohorts: a turn starts as soon as some of its slots are ready. False: nothing is in flight."""
    cohorts = range(runner.engine.config.cohorts)
    for cohort in cohorts:
        runner.fill(cohort)
        runner.settle(cohort, enough=0)
    decoded = runner.stats.chunks
    for cohort in cohorts:
        if runner.ready(cohort):
            runner.settle(cohort, timeout=runner.config.gather_seconds)
            runner.turn(cohort)
    if runner.stats.chunks > decoded:
        return True
    if not runner.busy:
        return False
    runner.settle_any(timeout=1.0)  # whoever is ready, if anyone is, waits for pages that others have
    return True


class RolloutThread(ABC):
    """A thread that feeds a sample buffer until the requests run out or `stop`; the same whatever rolls out.

    Args:
      buffer: with an asynchronous ratio > 0; one with ratio 0 would discard what is produced while the trainer works.
      requests: where new groups come from, in order; drawn lazily.
      known: requests of groups that a restored buffer already holds, to be sampled again if those go stale.

    A failure of the thread closes the buffer: the trainer's `get_batch` raises BufferClosed with the failure as cause.
    """

    def __init__(
        self, buffer: SampleBuffer, requests: Iterable[GroupRequest], known: Iterable[GroupRequest] = ()
    ) -> None:
        if buffer.async_ratio <= 0:
            raise ValueError(f"async_ratio: free-running rollouts expect more than 0, found {buffer.async_ratio:g}")
        self._buffer = buffer
        self._admission = Admission(buffer, requests, known)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="rollouts", daemon=True)
        self._failure: BaseException | None = None
        self._unfinished: list[GroupRequest] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the thread. Once."""
        self._buffer.reopen()
        self._thread.start()

    def stop(self, timeout: float = 90.0) -> list[GroupRequest]:
        """Ends the thread, closing every environment. Idempotent.

        Returns the requests that were not finished (to be requested again later). Raises what the thread failed with,
        if it did; RolloutStopped if it did not end within `timeout` seconds.
        """
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise RolloutStopped(f"the rollout thread did not end within {timeout:g} s")
        self._raise_failure()
        return list(self._unfinished)

    @abstractmethod
    def _tick(self) -> bool:
        """One round; False when there is nothing left to do, ever."""

    @abstractmethod
    def _in_flight(self) -> list[GroupRequest]:
        """What was started and is not finished."""

    @abstractmethod
    def _abandon(self) -> None:
        """Gives up on all that is in flight."""

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _main(self) -> None:
        failure: BaseException | None = None
        try:
            while not self._stop.is_set() and self._tick():
                pass
        except BaseException as caught:  # delivered to the trainer, whatever it is
            self._failure = failure = caught
        finally:
            self._unfinished = [*self._in_flight(), *self._admission.waiting]
            try:
                self._abandon()
            finally:
                self._buffer.close(failure)


class BackgroundRollouts(RolloutThread):
    """Feeds a buffer with groups from `runner`. Nobody else uses the runner, nor its engine's slots, in the meantime;
    `engine.update_params` may be called. The other arguments are `RolloutThread`'s."""

    def __init__(
        self,
        runner: RolloutRunner,
        buffer: SampleBuffer,
        requests: Iterable[GroupRequest],
        known: Iterable[GroupRequest] = (),
    ) -> None:
        super().__init__(buffer, requests, known)
        self._runner = runner
        self._run, self._idle = threading.Event(), threading.Event()
        self._run.set()

    def pause(self, timeout: float = 60.0) -> None:
        """Returns once no turn is being decoded; trajectories in flight keep their slots. Raises as `stop`."""
        self._run.clear()
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and not self._idle.wait(0.05):
            if time.monotonic() > deadline:
                raise RolloutStopped(f"the rollout thread did not pause within {timeout:g} s")
        self._raise_failure()

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._idle.clear()
        self._run.set()

    def stop(self, timeout: float = 90.0) -> list[GroupRequest]:
        """As RolloutThread's; ends a pause too."""
        self._stop.set()
        self._run.set()
        return super().stop(timeout)

    def _in_flight(self) -> list[GroupRequest]:
        return self._runner.unfinished()

    def _abandon(self) -> None:
        try:
            self._runner.reset()
        finally:
            self._idle.set()

    def _tick(self) -> bool:
        if not self._run.is_set():
            self._idle.set()
            self._run.wait()
        runner, admission = self._runner, self._admission
        while (group := admission.next(runner.in_flight)) is not None:
            runner.admit(group, runner.config.redundancy)
        progressed = free_run(runner)
        # at once: a finished group is neither in flight nor in the buffer, and this may be the last round
        admission.deliver(runner.take_finished())
        if not progressed:
            if admission.hopeless and not runner.in_flight:
                return False  # not even a batch is left: nothing could become of it
            time.sleep(0.005)  # the buffer is full: the trainer's turn
        return True

"""Free-running rollouts: a thread feeds the sample buffer while the trainer consumes it.

The thread never drains: a cohort's turn starts as soon as some of its slots are ready, and new weights take effect at
the next turn. Back-pressure comes from the buffer's capacity: a group is started only while the groups in flight and
those that wait are fewer than ⌈(1 + α)·batch⌉, which also bounds how stale a sample can get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rome.rollout.buffer import SampleBuffer
from rome.rollout.episode import GroupRequest
from rome.rollout.runner import Group, RolloutRunner


class RolloutStopped(RuntimeError):
    """The rollout thread did not obey within its deadline, or is not running."""


class BackgroundRollouts:
    """Feeds `buffer` with groups from `runner`, in a thread, until the requests run out or `stop`.

    Args:
      runner: nobody else uses it, nor its engine's slots, in the meantime. `engine.update_params` may be called.
      buffer: with an asynchronous ratio > 0; one with ratio 0 would discard what is produced while the trainer works.
      requests: where new groups come from, in order; drawn lazily.
      known: requests of groups that a restored buffer already holds, to be sampled again if those go stale.

    A failure of the thread closes the buffer: the trainer's `get_batch` raises BufferClosed with the failure as cause.
    """

    def __init__(
        self,
        runner: RolloutRunner,
        buffer: SampleBuffer,
        requests: Iterable[GroupRequest],
        known: Iterable[GroupRequest] = (),
    ) -> None:
        if buffer.async_ratio <= 0:
            raise ValueError(f"async_ratio: free-running rollouts expect more than 0, found {buffer.async_ratio:g}")
        self._runner, self._buffer = runner, buffer
        self._requests: Iterator[GroupRequest] = iter(requests)
        self._again: list[Group] = []
        self._delivered: dict[str, Group] = {request.group_id: Group(request) for request in known}
        self._exhausted = False
        self._stop, self._run, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._run.set()
        self._thread = threading.Thread(target=self._main, name="rollouts", daemon=True)
        self._failure: BaseException | None = None
        self._unfinished: list[GroupRequest] = []

    def __enter__(self) -> BackgroundRollouts:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the thread. Once."""
        self._buffer.reopen()
        self._thread.start()

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

    def stop(self, timeout: float = 60.0) -> list[GroupRequest]:
        """Ends the thread, closing every environment. Idempotent.

        Returns the requests that were not finished (to be requested again later). Raises what the thread failed with,
        if it did; RolloutStopped if it did not end within `timeout` seconds.
        """
        self._stop.set()
        self._run.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise RolloutStopped(f"the rollout thread did not end within {timeout:g} s")
        self._raise_failure()
        return list(self._unfinished)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _main(self) -> None:
        failure: BaseException | None = None
        try:
            while not self._stop.is_set() and self._tick():
                if not self._run.is_set():
                    self._idle.set()
                    self._run.wait()
        except BaseException as caught:  # delivered to the trainer, whatever it is
            self._failure = failure = caught
        finally:
            self._unfinished = [*self._runner.unfinished(), *(group.request for group in self._again)]
            try:
                self._runner.reset()
            finally:
                self._idle.set()
                self._buffer.close(failure)

    def _tick(self) -> bool:
        """One round over the cohorts; False when there is nothing left to do, ever."""
        runner, config = self._runner, self._runner.config
        self._deliver()  # before admitting: a group finished by the last turn is neither in flight nor in the buffer
        self._admit()
        cohorts = range(runner.engine.config.cohorts)
        for cohort in cohorts:
            runner.fill(cohort)
            runner.settle(cohort, enough=0)
        self._deliver()
        if any(runner.ready(cohort) for cohort in cohorts):
            for cohort in cohorts:
                if runner.ready(cohort):
                    runner.settle(cohort, timeout=config.gather_seconds)
                    runner.turn(cohort)
        elif runner.busy:
            runner.settle_any(timeout=1.0)
        elif self._exhausted and len(self._buffer) < self._buffer.batch_groups:
            return False  # not even a batch is left: nothing could become of it
        else:
            time.sleep(0.005)  # the buffer is full: the trainer's turn
        return True

    def _deliver(self) -> None:
        """Hands the finished groups to the buffer, which has room: `_admit` saw to that."""
        for group in self._runner.take_finished():
            self._delivered[group.request.group_id] = group
            self._buffer.put_group(group.samples)

    def _admit(self) -> None:
        """Starts groups while the buffer will have room for them: discarded ones again first, then new ones."""
        waiting = set(self._buffer.group_ids())
        for name in self._buffer.take_discarded():
            group = self._delivered.pop(name)
            # fresh ids and keys: an attempt is never numbered twice
            attempts = [attempt + 1 for attempt in group.attempts]
            self._again.append(Group(replace(group.request), attempts))
        self._delivered = {name: group for name, group in self._delivered.items() if name in waiting}
        while self._runner.in_flight + len(self._buffer) < self._buffer.capacity:
            if self._again:
                self._runner.admit(self._again.pop(0))
                continue
            request = next(self._requests, None)
            if request is None:
                self._exhausted = True
                return
            self._runner.admit(Group(request))

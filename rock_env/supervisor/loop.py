"""A small event loop: epoll, timers, child exits, and coroutines that wait for events.

asyncio would do the same at ten times the start-up cost; the supervisor has to start in well under 100 ms.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine

INFINITY = float("inf")


class Timer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _Waiter:
    """One coroutine suspended on one event, with an optional deadline."""

    __slots__ = ("deadline", "event")

    def __init__(self, event: Event, deadline: float) -> None:
        self.event = event
        self.deadline = deadline

    def __await__(self):
        return (yield self)


class Event:
    """A one-way flag; `set` wakes every waiter."""

    __slots__ = ("_callbacks", "_loop", "is_set")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.is_set = False
        self._callbacks: list[Callable[[bool], None]] = []

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            for callback in self._callbacks:
                self._loop.call_soon(lambda callback=callback: callback(True))
            self._callbacks.clear()

    async def wait(self, deadline: float = INFINITY) -> bool:
        """True once set; False when `deadline` (time.monotonic) passes first."""
        if self.is_set:
            return True
        return await _Waiter(self, deadline)


class Lock:
    """Mutual exclusion between coroutines, in order of arrival."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._held = False
        self._queue: deque[Event] = deque()

    async def acquire(self, deadline: float = INFINITY) -> bool:
        if not self._held:
            self._held = True
            return True
        turn = Event(self._loop)
        self._queue.append(turn)
        if await turn.wait(deadline):
            return True
        if turn in self._queue:
            self._queue.remove(turn)
            return False
        return True  # handed over at the very moment of the deadline

    def release(self) -> None:
        if self._queue:
            self._queue.popleft().set()
        else:
            self._held = False


class Loop:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = 0
        self._ready: deque[Callable[[], None]] = deque()
        self._children: dict[int, Callable[[int], None]] = {}
        self._stopped = False
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wake_fd = wake_read
        self.add_reader(wake_read, self._reap)

    # -- file descriptors
    def _update(self, fd: int, was: int) -> None:
        mask = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if mask and was:
            self._epoll.modify(fd, mask)
        elif mask:
            self._epoll.register(fd, mask)
        elif was:
            self._epoll.unregister(fd)

    def _known(self, fd: int) -> int:
        return (fd in self._readers) + (fd in self._writers)

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        was = self._known(fd)
        self._readers[fd] = callback
        self._update(fd, was)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        was = self._known(fd)
        self._writers[fd] = callback
        self._update(fd, was)

    def remove_reader(self, fd: int) -> None:
        was = self._known(fd)
        if self._readers.pop(fd, None) is not None:
            self._update(fd, was)

    def remove_writer(self, fd: int) -> None:
        was = self._known(fd)
        if self._writers.pop(fd, None) is not None:
            self._update(fd, was)

    # -- children
    def on_exit(self, pid: int, callback: Callable[[int], None]) -> None:
        """Call `callback(wait_status)` when child `pid` has been reaped. Register right after the fork."""
        self._children[pid] = callback

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_fd, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            callback = self._children.pop(pid, None)  # unknown: an orphan of a sandbox, reaped on its behalf
            if callback is not None:
                callback(status)

    # -- scheduling
    def call_soon(self, callback: Callable[[], None]) -> None:
        self._ready.append(callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, timer))
        return timer

    def spawn(self, coroutine: Coroutine) -> None:
        self._step(coroutine, None)

    async def sleep(self, seconds: float) -> None:
        await Event(self).wait(time.monotonic() + seconds)

    def _step(self, coroutine: Coroutine, value: bool | None) -> None:
        try:
            waiter = coroutine.send(value)
        except StopIteration:
            return
        fired = False
        timer: Timer | None = None

        def resume(result: bool) -> None:
            nonlocal fired
            if fired:
                return
            fired = True
            if timer is not None:
                timer.cancel()
            if not result and resume in waiter.event._callbacks:
                waiter.event._callbacks.remove(resume)
            self._step(coroutine, result)

        waiter.event._callbacks.append(resume)
        if waiter.deadline != INFINITY:
            timer = self.call_at(waiter.deadline, lambda: resume(False))

    def stop(self) -> None:
        self._stopped = True

    def _timeout(self) -> float:
        if self._ready:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())

    def run(self) -> None:
        while not self._stopped:
            timeout = self._timeout()
            for fd, events in self._epoll.poll(timeout):
                if events & ~select.EPOLLOUT and fd in self._readers:
                    self._readers[fd]()
                if events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP) and fd in self._writers:
                    self._writers[fd]()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                callback = heapq.heappop(self._timers)[2].callback
                if callback is not None:
                    callback()
            while self._ready:
                self._ready.popleft()()

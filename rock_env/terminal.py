"""A job in front of a person: its output as it comes, what is typed to it, and a terminal in raw mode and back."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator

from rock_env.errors import FileError, RockError
from rock_env.jobs import Chunk, Dropped, Job

_READ_BYTES = 64 << 10
_JOIN_SECONDS = 2.0
_RESIZED, _INTERRUPTED = b"r", b"i"
_PATIENT_INTERRUPTS = 2


def window_size(fd: int) -> tuple[int, int]:
    """(rows, columns) of a terminal; 24 and 80 where it does not say."""
    try:
        rows, columns = termios.tcgetwinsize(fd)
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


def show(job: Job) -> int:
    """Write its output to ours until it has ended, standard error to standard error. Returns its exit code."""
    for piece in job.stream():
        show_piece(piece)
    return job.status().exit_code or 0


def show_piece(piece: Chunk | Dropped) -> None:
    if isinstance(piece, Dropped):
        print(f"rock: {piece.size} bytes of output were dropped", file=sys.stderr, flush=True)
        return
    target = sys.stderr if piece.stream == "stderr" else sys.stdout
    target.flush()
    target.buffer.write(piece.data)
    target.buffer.flush()


class Typing:
    """A thread that passes our standard input (if `fd` is one), signals and new sizes of the terminal on to a job.

    A thread, because a signal handler must not make a request in the middle of another one.
    """

    def __init__(self, job: Job, fd: int | None) -> None:
        self._job, self._fd = job, fd
        self._interrupts = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="rock-typing", daemon=True)
        self._thread.start()

    def resized(self, *_: object) -> None:
        """As a handler of SIGWINCH."""
        self._tell(_RESIZED)

    def interrupted(self, *_: object) -> None:
        """As a handler of SIGINT: the first interrupts the job, the second kills it, the third is ours."""
        self._interrupts += 1
        if self._interrupts > _PATIENT_INTERRUPTS:
            raise KeyboardInterrupt
        self._tell(_INTERRUPTED)

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, what)

    def close(self) -> None:
        """End the thread; one that is in the middle of a request is left to end with the process."""
        os.close(self._wake_write)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        try:
            with contextlib.closing(_make_selector(self._fd, self._wake_read)) as selector:
                while self._step(selector):
                    pass
        except (RockError, OSError):
            return  # the job or the sandbox has ended: whoever reads the output says so
        finally:
            os.close(self._wake_read)

    def _step(self, selector: selectors.BaseSelector) -> bool:
        """Wait for something, and pass it on. False when there is no more to come."""
        for key, _ in selector.select():
            if key.fd == self._wake_read:
                told = os.read(self._wake_read, 4096)
                if _INTERRUPTED in told:
                    self._job.signal(signal.SIGINT if self._interrupts == 1 else signal.SIGKILL)
                if _RESIZED in told:
                    self._job.resize(*window_size(self._fd))
                if not told:
                    return False
                continue
            data = os.read(self._fd, _READ_BYTES)
            if not data:
                selector.unregister(self._fd)
                self._job.close_stdin()
                continue
            with contextlib.suppress(FileError):  # it does not read; it may still write
                self._job.write(data)
        return True


def _make_selector(*fds: int | None) -> selectors.BaseSelector:
    selector = selectors.PollSelector()  # which takes files, too, unlike epoll
    for fd in set(fds) - {None}:
        selector.register(fd, selectors.EVENT_READ)
    return selector


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """A terminal that passes every key on as it is. Restored however this ends, but by SIGKILL."""
    before = termios.tcgetattr(fd)
    handlers = {}

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            handlers[number] = signal.signal(number, leave)
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it may have gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def attach(job: Job, fd: int) -> int:
    """Connect a job in a terminal to the one at `fd`, until the job has ended. Returns its exit code."""
    with raw_mode(fd):
        typing = Typing(job, fd)
        before = signal.signal(signal.SIGWINCH, typing.resized)
        try:
            typing.resized()  # it may have changed since the job was started
            return show(job)
        finally:
            signal.signal(signal.SIGWINCH, before)
            typing.close()
            _hang_up(job)


def follow(job: Job, stdin_fd: int | None = None) -> int:
    """Show a job until it has ended, and pass `stdin_fd` on to it. Returns its exit code.

    Ctrl-C interrupts the job; a second one kills it.
    """
    typing = Typing(job, stdin_fd)
    before = signal.signal(signal.SIGINT, typing.interrupted)
    try:
        return show(job)
    finally:
        signal.signal(signal.SIGINT, before)
        typing.close()
        _hang_up(job)


def _hang_up(job: Job) -> None:
    """Whoever looked at it has gone: what still runs ends, as with a closed terminal."""
    with contextlib.suppress(RockError):
        job.signal(signal.SIGHUP)

"""Jobs: commands that run on by themselves, whose output is read when it suits, from where one left off.

Output is numbered by bytes (see rock_env.supervisor.jobs). Over REST it comes by long polls: each answer is complete
and says from where to go on, so a connection that was cut costs nothing but asking again.
"""

from __future__ import annotations

import signal as signals
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rock_env.errors import BackendUnavailable, RequestTimeout, SpecError

if TYPE_CHECKING:
    from rock_env.backend import Backend

JOB_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
MAX_WAIT_SECONDS = 30.0
MAX_READ_BYTES = 4 << 20
DEFAULT_BUFFER_BYTES = 1 << 20
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 4 << 10, 16 << 20
MAX_TERMINAL = 4096  # rows, columns
_READ_BYTES, _LEAST_READ_BYTES = 256 << 10, 4 << 10
_STDIN_PIECE_BYTES = 256 << 10
_STDIN_WAIT_SECONDS = 10.0
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class Chunk:
    """Bytes that a job wrote to `stream` ("stdout" or "stderr"); the first one has the number `seq`."""

    seq: int
    stream: str
    data: bytes


@dataclass(frozen=True)
class Dropped:
    """`size` bytes from number `seq` on are gone: nobody read them in time, and the job's buffer was full."""

    seq: int
    size: int


@dataclass(frozen=True)
class JobStatus:
    """How a job is doing.

    Attributes:
      state: "running" or "exited".
      exit_code: None while it runs; 128 + n after signal n; 124 after its timeout.
      output_bytes: written so far, to all streams. dropped_bytes: of these, no longer there.
      keeps_busy: whether it alone keeps an idle sandbox alive; a terminal does not.
      stdin_bytes: accepted so far.
      started_at: seconds since 1970. seconds: how long it has run.
    """

    id: str
    command: str
    state: str
    exit_code: int | None
    signal: int | None
    timed_out: bool
    oom_killed: bool
    terminal: bool
    keeps_busy: bool
    started_at: float
    seconds: float
    output_bytes: int
    dropped_bytes: int
    stdin_bytes: int

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    @classmethod
    def from_wire(cls, row: dict) -> JobStatus:
        return cls(**{field.name: row[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class JobOutput:
    """An answer to a reader: pieces in order, the number to go on from, and how the job was doing then."""

    pieces: tuple[Chunk | Dropped, ...]
    next: int
    status: JobStatus

    @property
    def is_end(self) -> bool:
        """Whether nothing will follow."""
        return not self.status.is_running and self.next >= self.status.output_bytes


def check_size(size: object) -> list[int]:
    """A terminal's (rows, columns)."""
    valid = isinstance(size, tuple | list) and len(size) == 2
    if not valid or not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_TERMINAL for n in size):
        raise SpecError(f"terminal: expected (rows, columns), each in 1..{MAX_TERMINAL}, got {size!r}")
    return list(size)


def check_signal(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < signals.NSIG:
        raise SpecError(f"signal: expected a number in 1..{signals.NSIG - 1}, got {number!r}")
    return int(number)


class Job:
    """A job of a sandbox; make one with `Sandbox.start_job`, find one with `Sandbox.job`. Thread-safe but for writes,
    of which one goes on at a time."""

    def __init__(self, backend: Backend, sandbox: str, status: JobStatus) -> None:
        self.id = status.id
        self._backend = backend
        self._sandbox = sandbox
        self._sent = status.stdin_bytes

    def _call(self, op: str, seconds: float = 0.0, blob: bytes = b"", /, **arguments: object) -> tuple[dict, bytes]:
        return self._backend.call(self._sandbox, op, seconds, blob, job=self.id, **arguments)

    def status(self, wait: float = 0.0) -> JobStatus:
        """How it is doing; once it has ended, or after `wait` seconds (of which 30 count)."""
        seconds = min(max(0.0, float(wait)), MAX_WAIT_SECONDS)
        return JobStatus.from_wire(self._call("job_status", seconds, seconds=seconds)[0])

    # -- output
    def read(self, seq: int = 0, wait: float = 0.0, max_bytes: int = _READ_BYTES) -> JobOutput:
        """What was written from number `seq` on, at most `max_bytes` of it. If there is nothing, and the job runs,
        waits for it at most `wait` seconds (of which 30 count)."""
        for name, value, least, most in (("seq", seq, 0, 1 << 62), ("max_bytes", max_bytes, 1, MAX_READ_BYTES)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise SpecError(f"{name}: expected an integer in {least}..{most}, got {value!r}")
        seconds = min(max(0.0, float(wait)), MAX_WAIT_SECONDS)
        reply, data = self._call("job_read", seconds, seq=seq, seconds=seconds, max_bytes=max_bytes)
        pieces: list[Chunk | Dropped] = []
        at = 0
        for number, stream, size in reply["pieces"]:
            if stream == "dropped":
                pieces.append(Dropped(number, size))
            else:
                pieces.append(Chunk(number, stream, data[at : at + size]))
                at += size
        return JobOutput(tuple(pieces), reply["next"], JobStatus.from_wire(reply["status"]))

    def stream(self, seq: int = 0, patience: float = 60.0) -> Iterator[Chunk | Dropped]:
        """Every piece from number `seq` on, as it comes, until the job has ended.

        Where whoever has the sandbox does not answer, asks again for `patience` seconds.
        """
        deadline: float | None = None
        size = _READ_BYTES
        while True:
            try:
                output = self.read(seq, MAX_WAIT_SECONDS, size)
            except (BackendUnavailable, RequestTimeout):
                now = time.monotonic()
                deadline = now + patience if deadline is None else deadline
                if now > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
                size = max(_LEAST_READ_BYTES, size // 4)  # a bad line may carry less at once
                continue
            deadline, size = None, min(2 * size, _READ_BYTES)
            yield from output.pieces
            seq = output.next
            if output.is_end:
                return

    def wait(self, seconds: float) -> JobStatus:
        """Wait until it has ended. Raises RequestTimeout if it has not after `seconds`; it runs on then."""
        deadline = time.monotonic() + seconds
        while (status := self.status(deadline - time.monotonic())).is_running:
            if time.monotonic() >= deadline:
                raise RequestTimeout(f"job {self.id} still runs after {seconds:g} s")
        return status

    # -- input
    def write(self, data: bytes | str, timeout: float = 60.0) -> None:
        """Write all of `data` to its standard input (or its terminal).

        Raises:
          FileError: EPIPE, it does not read any more.
          RequestTimeout: it has not read so much in time; what is accepted stays accepted.
        """
        data = data.encode() if isinstance(data, str) else data
        deadline = time.monotonic() + timeout
        while data:
            piece = data[:_STDIN_PIECE_BYTES]
            accepted = self._send(piece, False, deadline)
            data = data[accepted:]
            if data and time.monotonic() > deadline:
                raise RequestTimeout(f"job {self.id}: {len(data)} bytes were not accepted within {timeout:g} s")

    def close_stdin(self, timeout: float = 60.0) -> None:
        """End its standard input; in a terminal, type Ctrl-D."""
        self._send(b"", True, time.monotonic() + timeout)

    def _send(self, data: bytes, close: bool, deadline: float) -> int:
        """How many bytes were accepted. `at` makes it safe to send again what may have arrived."""
        seconds = min(max(0.05, deadline - time.monotonic()), _STDIN_WAIT_SECONDS)
        while True:
            try:
                reply, _ = self._call("job_write", seconds, data, at=self._sent, close=close, seconds=seconds)
            except (BackendUnavailable, RequestTimeout):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
                continue
            accepted = reply["stdin_bytes"] - self._sent
            self._sent = reply["stdin_bytes"]
            return accepted

    # -- signals
    def signal(self, number: int) -> bool:
        """Send a signal to its process group, or in a terminal to that in the foreground; SIGKILL goes to everything
        that it started. False: it had ended before."""
        return bool(self._call("job_signal", number=check_signal(number))[0]["delivered"])

    def interrupt(self) -> bool:
        """SIGINT, as Ctrl-C sends it."""
        return self.signal(signals.SIGINT)

    def kill(self) -> bool:
        return self.signal(signals.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size."""
        self._call("job_resize", size=check_size((rows, columns)))

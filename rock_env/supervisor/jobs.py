"""Jobs: commands that run on without the request that started them, and whose output waits for whoever reads it.

The bytes of a job's streams are numbered together, in the order in which they arrived: a byte's sequence number is how
many came before it. A reader names the number that it wants to go on from; so it can ask again after a connection was
cut, and neither loses nor doubles a byte. While somebody reads, a job that writes faster is made to wait, as at a pipe;
while nobody does, it never waits: the oldest bytes are dropped, and the reader is told how many.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import termios
import time
from collections import deque
from typing import TYPE_CHECKING

from rock_env.supervisor import process
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.inlet import Inlet
from rock_env.supervisor.loop import Event, Timer

if TYPE_CHECKING:
    from rock_env.supervisor.commands import Runner

_CHUNK = 64 << 10
_PIPE_READS = 16  # of what is left in a pipe when its command has ended: more than fits
_PIECE_OVERHEAD = 128  # bytes that a piece of output costs beside its own
_MERGED_BYTES = 4096  # a shorter last piece is continued
_READER_SECONDS = 10.0  # after a request for output, its sender still counts as a reader
_FLOOD_BYTES = 8 << 20  # of dropped output, after which reading is slowed: a flood must not eat the host's CPU
_FLOOD_PAUSE = 0.004
_STDIN_BYTES = 1 << 20  # accepted and not yet read by the command
_MOST_JOBS = 64  # of a sandbox, running or ended
_MOST_BYTES = 32 << 20  # of all their buffers
_KILL_PAUSE = 0.02
_BIRTH_SECONDS = 20.0
_SHOWN_COMMAND = 500
_END_OF_INPUT = b"\x04"  # Ctrl-D, in a terminal
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441  # ioctl_tty(2)


class Buffer:
    """Output between the numbers `start` (the oldest kept) and `end`; about `limit` bytes are kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.start = self.end = 0
        self._pieces: deque[tuple[str, bytearray]] = deque()
        self._size = 0

    @property
    def is_full(self) -> bool:
        return self._size >= self.limit

    def add(self, stream: str, data: bytes) -> None:
        self.end += len(data)
        self._size += len(data)
        if self._pieces and self._pieces[-1][0] == stream and len(self._pieces[-1][1]) < _MERGED_BYTES:
            self._pieces[-1][1].extend(data)
            return
        self._size += _PIECE_OVERHEAD
        self._pieces.append((stream, bytearray(data)))

    def trim(self, before: int) -> None:
        """Where it is full, drop the oldest quarter, but nothing from number `before` on."""
        excess = self._size - self.limit * 3 // 4 if self.is_full else 0
        while self._pieces and excess > 0 and self.start < before:
            piece = self._pieces[0][1]
            count = min(len(piece), before - self.start, excess)
            excess -= count
            del piece[:count]
            self.start += count
            self._size -= count
            if not piece:
                self._pieces.popleft()
                self._size -= _PIECE_OVERHEAD

    def since(self, number: int, most: int) -> tuple[list[list], bytes]:
        """([[number of the first byte, stream, bytes]...], the bytes) from `number` on, at most `most` of them.

        What has been dropped is told of by a piece of the stream "dropped", whose bytes are not among the bytes.
        """
        pieces: list[list] = []
        data = bytearray()
        if number < self.start:
            pieces.append([number, "dropped", self.start - number])
        at = self.start
        for stream, piece in self._pieces:
            begin = max(0, number - at)
            if begin < len(piece):
                taken = piece[begin : begin + most - len(data)]
                pieces.append([at + begin, stream, len(taken)])
                data += taken
                if len(data) >= most:
                    break
            at += len(piece)
        return pieces, bytes(data)


class Job(Inlet):
    """One command. `id` is its caller's choice, so that a repeated request to start it does not start a second one."""

    _most_pending = _STDIN_BYTES

    def __init__(self, box: Runner, id: str, argv: list[str], buffer_bytes: int, is_terminal: bool) -> None:
        super().__init__(box)
        self.id = id
        self.buffer = Buffer(buffer_bytes)
        self.pid = 0
        self.born = Event(box.loop)  # from then on it is a process group of its own
        self._argv = argv
        self._is_terminal = is_terminal
        self._outputs: dict[str, int] = {}
        self._input: int | None = None
        self._status: int | None = None
        self._timed_out = False
        self._oom_before = box.oom_kills()
        self._oom_killed = False
        self._started_at, self._started = time.time(), time.monotonic()
        self._ended = 0.0
        self._since = process.ticks_now()
        self._acknowledged = 0
        self._readers, self._read_at = 0, time.monotonic()  # who starts it counts as a reader at first
        self._paused: Timer | None = None
        self._timer: Timer | None = None

    # -- start
    def start(self, env: dict, cwd: str, seconds: float | None, stdin: bool, size: tuple[int, int] | None) -> None:
        """`size` (rows, columns): run it in a pseudo-terminal of its own."""
        born, writing = process.pipe(True)  # ends when the child executes the command
        theirs = [writing]
        try:
            if size is not None:
                master, slave = self._open_terminal(size)
                theirs.append(slave)
                self._outputs, self._input = {"stdout": master}, master
                descriptors = {0: slave, 1: slave, 2: slave}
            else:
                descriptors = {0: self._box.null_fd}
                for number, name in ((1, "stdout"), (2, "stderr")):
                    self._outputs[name], descriptors[number] = process.pipe(True)
                    theirs.append(descriptors[number])
                if stdin:
                    descriptors[0], self._input = process.pipe(False)
                    os.set_blocking(self._input, False)
                    theirs.append(descriptors[0])
            self.pid = self._box.spawn_inside(self._argv, {**self._box.env, **env}, cwd, descriptors)
        except BaseException:
            os.close(born)
            self._close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._loop.on_exit(self.pid, self._on_exit)
        self._loop.add_reader(born, lambda: self._on_born(born))
        if seconds is not None:
            self._timer = self._loop.call_at(self._started + seconds, lambda: self._loop.spawn(self._expire()))
        self._listen()

    def _on_born(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        os.close(fd)
        self.born.set()

    def _open_terminal(self, size: tuple[int, int]) -> tuple[int, int]:
        """A pseudo-terminal of the sandbox's own kind (its /dev/pts), which the sandbox's user owns."""
        try:
            master = self._box.open_inside("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
                slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
                if os.fstat(slave).st_uid != self._box.uid:
                    os.fchown(slave, self._box.uid, self._box.uid)
                _set_size(master, size)
            except BaseException:
                os.close(master)
                raise
        except OSError as error:
            raise Fault(
                "unavailable", f"terminal: cannot open one in the sandbox: {os.strerror(error.errno)}"
            ) from error
        return master, slave

    # -- output
    def _listen(self) -> None:
        self._end_pause()
        for stream, fd in self._outputs.items():
            self._loop.add_reader(fd, lambda stream=stream: self._on_readable(stream))

    def _pause(self, seconds: float) -> None:
        self._end_pause()
        for fd in self._outputs.values():
            self._loop.remove_reader(fd)
        self._paused = self._loop.call_at(time.monotonic() + seconds, self._after_pause)

    def _end_pause(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None

    def _after_pause(self) -> None:
        if self._is_followed() and self.buffer.is_full:
            self._go_on()
        else:
            self._listen()

    def _is_followed(self) -> bool:
        return self._readers > 0 or time.monotonic() - self._read_at < _READER_SECONDS

    def _on_readable(self, stream: str) -> None:
        self._take(stream)
        self._go_on()

    def _trim(self) -> None:
        self.buffer.trim(self._acknowledged if self._is_followed() else self.buffer.end)

    def _go_on(self) -> None:
        """Wait for a reader who is behind, or for a moment where a flood is being thrown away; else read on."""
        self._trim()
        if self._is_followed() and self.buffer.is_full:
            self._pause(_READER_SECONDS)
        elif not self._is_followed() and self.buffer.start > _FLOOD_BYTES:
            self._pause(_FLOOD_PAUSE)
        elif self._paused is not None:
            self._listen()

    def _take(self, stream: str) -> bool:
        """Read once. False when there is nothing more now."""
        fd = self._outputs.get(stream)
        if fd is None:
            return False
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # of a terminal that nobody has open any more
                raise
            data = b""
        if not data:
            self._loop.remove_reader(fd)
            if fd != self._input:
                os.close(fd)
            del self._outputs[stream]
            return False
        self.buffer.add(stream, data)
        self._wake()
        return True

    async def read(self, since: int, seconds: float, most: int) -> tuple[dict, bytes]:
        """What was written from number `since` on; waits until there is something, or the job has ended."""
        if since > self.buffer.end:
            raise Fault("spec", f"seq: expected at most {self.buffer.end}, which is all that job {self.id} wrote")
        deadline = time.monotonic() + seconds
        self._readers += 1
        try:
            self._acknowledged = max(self._acknowledged, since)
            if self._paused is not None:
                self._go_on()
            while self.buffer.end <= since and self.is_running and self._box.alive:
                if not await self._changed.wait(deadline):
                    break
        finally:
            self._readers -= 1
            self._read_at = time.monotonic()
        await self._settle()
        pieces, data = self.buffer.since(since, most)
        following = pieces[-1][0] + pieces[-1][2] if pieces else since
        return {"pieces": pieces, "next": following, "status": self.status()}, data

    async def wait(self, seconds: float) -> dict:
        """Its status, once it has ended or `seconds` are over."""
        deadline = time.monotonic() + seconds
        while self.is_running and self._box.alive and await self._changed.wait(deadline):
            pass
        await self._settle()
        return self.status()

    async def _settle(self) -> None:
        """Raises Fault when the sandbox has ended; the job's SIGKILL may be all that is known of that yet."""
        if self._status is not None and process.exit_of(self._status)[1] == signal.SIGKILL:
            await self._box.settle()
        self._box.require_alive()

    # -- input
    async def write(self, data: bytes, at: int | None, close: bool, seconds: float) -> dict:
        """Accept input for the command, as far as there is room within `seconds`; then, with `close`, its end. `at`:
        see Inlet."""
        if self._accepted == 0 and self._input is None and self.is_running and not self._input_ends:
            raise Fault("spec", f"stdin: job {self.id} was started without one")
        taken = await self._accept(data, self._accepted if at is None else at, seconds)
        if taken and close and not self._input_ends:
            self._input_ends = True
            if self._is_terminal and self._input is not None:
                self._pending += _END_OF_INPUT
            self._feed()
        return {"stdin_bytes": self._accepted, "accepted": taken}

    def _require_reader(self) -> None:
        if self._input is None or self._input_ends:
            raise Fault("file", f"stdin: job {self.id} does not read any more", "EPIPE")

    def _feed(self) -> None:
        fd = self._input
        if fd is None:
            return
        try:
            while self._pending:
                del self._pending[: os.write(fd, self._pending[:_CHUNK])]
        except BlockingIOError:
            self._loop.add_writer(fd, self._on_writable)
            return
        except OSError:  # the command reads no more
            self._pending.clear()
            self._input_ends = True
        self._loop.remove_writer(fd)
        if self._input_ends and not self._is_terminal:
            os.close(fd)
            self._input = None

    def resize(self, size: tuple[int, int]) -> None:
        """Give its terminal another size, of which the programs in its foreground are told."""
        if not self._is_terminal:
            raise Fault("spec", f"size: job {self.id} has no terminal")
        if self._input is not None:
            _set_size(self._input, size)

    # -- signals and the end
    @property
    def is_running(self) -> bool:
        return self._status is None

    @property
    def keeps_busy(self) -> bool:
        """Whether it is work by itself; a shell at its prompt, say, is not."""
        return self.is_running and not self._is_terminal

    def signal(self, number: int) -> bool:
        """Send a signal to its process group (in a terminal, to the one in the foreground). False: it has ended.

        SIGKILL goes to everything that it started.
        """
        if not self.is_running:
            return False
        if number == signal.SIGKILL:
            process.kill_command(self.pid, self._since, self._box.keep(), self._box.pids)
            return True
        group = self.pid
        if self._is_terminal and self._input is not None:
            with contextlib.suppress(OSError):
                group = os.tcgetpgrp(self._input) or self.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        return True

    async def _expire(self) -> None:
        self._timed_out = self.is_running
        while self.is_running and self._box.alive:
            process.kill_command(self.pid, self._since, self._box.keep(), self._box.pids)
            await self._changed.wait(time.monotonic() + _KILL_PAUSE)

    def _on_exit(self, status: int) -> None:
        for stream in list(self._outputs):
            for _ in range(_PIPE_READS):
                if not self._take(stream):
                    break
        self._trim()
        if self._timed_out:  # what it left behind meanwhile
            self._loop.spawn(self._box.end_command(self.pid, self._since))
        self._status, self._ended = status, time.monotonic()
        if self._box.alive:
            self._oom_killed = self._box.oom_kills() > self._oom_before
            self._box.note_limits(self._timed_out, self.buffer.start > self._acknowledged)
        self._close()

    def _close(self) -> None:
        """Give back every descriptor. What it left behind finds its terminal gone, and nobody at its pipes."""
        self._end_pause()
        if self._timer is not None:
            self._timer.cancel()
        for fd in {*self._outputs.values(), self._input} - {None}:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            os.close(fd)
        self._outputs, self._input = {}, None
        self._pending.clear()
        self._wake()

    def abandon(self) -> None:
        """The sandbox is gone, and the process with it."""
        if self.is_running:
            self._close()

    def status(self) -> dict:
        code, number = (None, None) if self._status is None else process.exit_of(self._status)
        number = number or (process.signal_of(code) if code is not None else None)
        return {
            "id": self.id,
            "command": " ".join(self._argv)[:_SHOWN_COMMAND],
            "state": "running" if self.is_running else "exited",
            "exit_code": 124 if self._timed_out and code is not None else code,
            "signal": None if self._timed_out else number,
            "timed_out": self._timed_out and not self.is_running,
            "oom_killed": self._oom_killed,
            "terminal": self._is_terminal,
            "keeps_busy": self.keeps_busy,
            "started_at": self._started_at,
            "seconds": (time.monotonic() if self.is_running else self._ended) - self._started,
            "output_bytes": self.buffer.end,
            "dropped_bytes": self.buffer.start,
            "stdin_bytes": self._accepted,
        }


def _set_size(fd: int, size: tuple[int, int]) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))


class Jobs:
    """Those of one sandbox. An ended one is forgotten when its place is needed, the oldest first."""

    def __init__(self, box: Runner) -> None:
        self._box = box
        self._jobs: dict[str, Job] = {}

    def __iter__(self):
        return iter(self._jobs.values())

    def get(self, id: str) -> Job:
        if id not in self._jobs:
            raise Fault("job_not_found", f"no job {id!r} in sandbox {self._box.name}")
        return self._jobs[id]

    async def start(
        self,
        id: str,
        argv: list[str],
        env: dict,
        cwd: str,
        seconds: float | None,
        stdin: bool,
        size: tuple[int, int] | None,
        buffer_bytes: int,
    ) -> Job:
        """Start one, or return the one of that id."""
        self._box.require_alive()
        if id not in self._jobs:
            self._make_room(buffer_bytes)
            job = Job(self._box, id, argv, buffer_bytes, size is not None)
            job.start(env, cwd, seconds, stdin, size)
            self._jobs[id] = job
        job = self._jobs[id]
        await job.born.wait(time.monotonic() + _BIRTH_SECONDS)
        self._box.require_alive()
        return job

    def _make_room(self, buffer_bytes: int) -> None:
        while (
            len(self._jobs) >= _MOST_JOBS
            or sum(job.buffer.limit for job in self._jobs.values()) + buffer_bytes > _MOST_BYTES
        ):
            ended = next((job for job in self._jobs.values() if not job.is_running), None)
            if ended is None:
                text = f"jobs: expected at most {_MOST_JOBS} running, with buffers of {_MOST_BYTES} bytes together"
                raise Fault("limit_exceeded", text)
            del self._jobs[ended.id]

    def abandon(self) -> None:
        for job in self._jobs.values():
            job.abandon()

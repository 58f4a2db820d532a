"""The rocklet: the first process of a container, which runs commands, keeps files and tells of what programs try.

It speaks frames (rock_env.wire) over its standard input and output, which only whoever started the container holds:
requests {"rid", "op", ...} come in, replies {"rid", ...} go out, and between them {"audit": event, "fields": {...}} and
at its own end {"end": reason}. The container ends with its input, however the other side went.

Programs in the container have the same user, but can neither signal it (it is the first process of the pid namespace),
nor trace it, nor open its files (it is not dumpable).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable

from rock_env.supervisor import files, linux, process
from rock_env.supervisor.cell import Cell, NoProcess
from rock_env.supervisor.channel import Channel
from rock_env.supervisor.faults import Fault, file_fault
from rock_env.supervisor.loop import Event, Lock, Loop
from rock_env.supervisor.operations import Operations, Reply

_PART_BYTES = 256 << 10
_BACKLOG_BYTES = 1 << 20  # of parts that the other side has not read
_LAST_WORDS_SECONDS = 2.0
_STALLED_SECONDS = 30.0
_FULL = 3  # exit code of a child
_UNBOUNDED_BYTES = 2 << 30  # of a snapshot without a limit on the disk


class Rocklet(Operations):
    def __init__(self, loop: Loop, channel: Channel) -> None:
        self._loop = loop
        self._channel = channel
        self._cell: Cell | None = None
        self._turn = Lock(loop)  # of what stops the whole sandbox
        self._unpacking: Unpacking | None = None
        self._heard = time.monotonic()
        channel.on_frame = lambda header, blob: loop.spawn(self._serve(header, blob))
        channel.on_end = lambda: os._exit(0)

    async def _serve(self, request: dict, blob: bytes) -> None:
        self._heard = time.monotonic()
        rid = request.pop("rid")
        if request["op"] == "snapshot":
            request["rid"] = rid
        header, body = await self.answer(request, blob)
        self._channel.send({"rid": rid, **header}, body)

    def box(self, name: str) -> Cell:
        if self._cell is None:
            raise Fault("not_found", f"no sandbox {name!r}: the rocklet has not been told to start one")
        self._cell.require_alive()
        return self._cell

    # -- start
    async def do_start(
        self, blob: bytes, *, id: str, spec: dict, places: list[str], states: dict, silence_seconds: float
    ) -> Reply:
        """Become sandbox `id`; tells what confines this container, for the other side to compare.

        After `silence_seconds` without a request it ends: its input stays open where the Docker daemon was killed.
        """
        cell = Cell(id, spec, self._loop, self._channel, places)
        cell.restore_sessions({name: tuple(state) for name, state in states.items()})
        self._cell = cell
        self._listen_for_silence(silence_seconds)
        return {"facts": _facts(cell)}, b""

    def _listen_for_silence(self, seconds: float) -> None:
        left = self._heard + seconds - time.monotonic()
        if left <= 0:
            self._end(f"nobody has spoken to it for {seconds:g} s")
        self._loop.call_at(time.monotonic() + left, lambda: self._listen_for_silence(seconds))

    async def do_ping(self, blob: bytes) -> Reply:
        """Somebody is still there."""
        return {}, b""

    async def do_unpack(self, blob: bytes, *, id: str, into: str, last: bool) -> Reply:
        """The next part of a tar stream, to be extracted below `into` before `begin`."""
        self.box(id)
        if self._unpacking is None:
            self._unpacking = Unpacking(self._loop, into)
        await self._unpacking.feed(blob)
        if last:
            unpacking, self._unpacking = self._unpacking, None
            await unpacking.finish()
        return {}, b""

    async def do_begin(
        self, blob: bytes, *, id: str, entries: list[dict], directories: list[str], fresh: bool
    ) -> Reply:
        """Make directories and place the first files. From now on the sandbox lives, and its lifetime counts."""
        cell = self.box(id)
        for path in directories:
            os.close(files.make_directories(cell.root_fd, path, cell.uid))
        files.put(cell.root_fd, entries, blob, cell.uid, cell.workdir)
        if fresh:
            for place in cell.places:
                fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                files.reset_times(fd)
                os.close(fd)
        lifetime = cell.limits["lifetime_seconds"]
        if lifetime is not None:
            reason = f"lifetime_seconds={lifetime} is over"
            self._loop.call_at(time.monotonic() + lifetime, lambda: self._end(reason))
        return {}, b""

    # -- what must not happen while everything is stopped
    async def _undisturbed(self) -> None:
        await self._turn.acquire()
        self._turn.release()

    async def do_execute(self, blob: bytes, **arguments) -> Reply:
        await self._undisturbed()
        try:
            return await super().do_execute(blob, **arguments)
        except NoProcess:
            return self._without_process(arguments["id"]), b""

    async def do_run(self, blob: bytes, **arguments) -> Reply:
        await self._undisturbed()
        try:
            return await super().do_run(blob, **arguments)
        except NoProcess:
            return self._without_process(arguments["id"]), b""

    async def do_job_start(self, blob: bytes, **arguments) -> Reply:
        await self._undisturbed()
        return await super().do_job_start(blob, **arguments)

    def _without_process(self, id: str) -> dict:
        """The result of a command when programs of the sandbox have taken the last process: as a shell would say it."""
        cell = self.box(id)
        output = process.Output(cell.limits["output_bytes"])
        output.add(b"rock: fork: Resource temporarily unavailable\n")
        return cell.result(254, None, False, output, cell.oom_kills(), time.monotonic())

    async def do_put(self, blob: bytes, **arguments) -> Reply:
        await self._undisturbed()
        return await super().do_put(blob, **arguments)

    async def do_kill_all(self, blob: bytes, **arguments) -> Reply:
        await self._turn.acquire()
        try:
            return await super().do_kill_all(blob, **arguments)
        finally:
            self._turn.release()

    # -- snapshots
    async def do_snapshot(self, blob: bytes, *, id: str, rid: int) -> Reply:
        """Send every writable place as parts of a tar, {"rid", "part"}, while nothing runs; then sessions' states."""
        cell = self.box(id)
        await self._turn.acquire()
        try:
            states = await cell.save_sessions()
            stopped = await cell.halt()
            try:
                self._send_archive(cell, rid)
            finally:
                cell.resume(stopped)
        finally:
            self._turn.release()
        return {"states": states}, b""

    def _send_archive(self, cell: Cell, rid: int) -> None:
        """Without a child: a program may have taken the last process. The loop stands still, as everything does."""
        from rock_env.supervisor import archive  # which takes a while to load, and not every sandbox needs

        disk_bytes = cell.limits["disk_bytes"]
        bound = disk_bytes + (1 << 20) if disk_bytes is not None else _UNBOUNDED_BYTES
        try:
            archive.write(cell.places, _Parts(self._channel, rid), bound, _PART_BYTES)
        except OSError as error:
            if error.errno == errno.EFBIG:
                message = "snapshot: the files, holes counted, are larger than limits.disk_bytes"
                raise Fault("limit_exceeded", message) from error
            raise file_fault(error, "snapshot") from error

    # -- end
    async def do_finish(self, blob: bytes, *, id: str) -> Reply:
        """Tell what has not been told. The container is removed from outside."""
        cell = self.box(id)
        cell.notes.flush()
        return cell.stats(), b""

    def _end(self, reason: str) -> None:
        """End the container: its first process exits, and everything with it."""
        cell = self._cell
        usage = cell.stats() if cell is not None else {}
        if cell is not None:
            cell.notes.flush()
        self._channel.send({"end": reason, "usage": usage})
        self._channel.flush(_LAST_WORDS_SECONDS)
        os._exit(0)


class _Child:
    """A forked child of the rocklet that does one thing beside it."""

    def __init__(self, loop: Loop, work: Callable[[], None]) -> None:
        self._status: list[int] = []
        self._exited = Event(loop)
        try:
            pid = os.fork()
        except OSError as error:
            raise Fault("limit_exceeded", f"limits.pids: cannot start a process: {error}") from error
        if pid == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                work()
                code = 0
            except OSError as error:
                code = _FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1
                traceback.print_exc()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        loop.on_exit(pid, self._on_exit)

    def _on_exit(self, status: int) -> None:
        self._status.append(status)
        self._exited.set()

    async def finish(self, what: str) -> None:
        """Wait for its end; raises Fault unless it did what it should."""
        await self._exited.wait()
        code, number = process.exit_of(self._status[0])
        if code == _FULL:
            raise Fault("limit_exceeded", f"{what}: no space left (limits.disk_bytes)", "ENOSPC")
        if number is not None:
            raise Fault("limit_exceeded", f"{what}: killed by signal {number} (limits.memory_bytes)")
        if code:
            raise Fault("error", f"{what}: failed inside the container (exit code {code})")


class _Parts:
    """Where a snapshot goes: parts of the reply, as fast as the other side takes them."""

    def __init__(self, channel: Channel, rid: int) -> None:
        self._channel, self._rid = channel, rid

    def write(self, data: bytes) -> int:
        self._channel.send({"rid": self._rid, "part": True}, bytes(data))
        if not self._channel.flush(_STALLED_SECONDS, _BACKLOG_BYTES):
            raise TimeoutError(errno.ETIMEDOUT, "the other side does not read")
        return len(data)


class Unpacking:
    """A child that extracts a tar stream, fed part by part."""

    def __init__(self, loop: Loop, into: str) -> None:
        self._loop = loop
        read, self._fd = process.pipe(False)
        os.set_blocking(self._fd, False)

        def work() -> None:
            os.close(self._fd)
            from rock_env.supervisor import archive  # see _send_archive

            archive.read(read, into)

        self._child = _Child(loop, work)
        os.close(read)

    async def feed(self, data: bytes) -> None:
        """Write all of `data` to the child; one that has ended is told of by `finish`."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                writable = Event(self._loop)
                self._loop.add_writer(self._fd, writable.set)
                await writable.wait()
                self._loop.remove_writer(self._fd)
            except BrokenPipeError:
                return

    async def finish(self) -> None:
        """The stream is complete."""
        os.close(self._fd)
        await self._child.finish("start: files")


def _facts(cell: Cell) -> dict:
    """What confines this container, read from the kernel."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file.read().splitlines())
    routes: set[str] = set()
    for name, column in (("route", 0), ("ipv6_route", -1)):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}") as file:
            routes |= {line.split()[column] for line in file}
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    return {
        "uid": os.getuid(),
        "groups": sorted({os.getgid(), *os.getgroups()}),
        "capabilities": max(int(status[name], 16) for name in names),
        "no_new_privileges": int(status["NoNewPrivs"]) == 1,
        "seccomp": int(status["Seccomp"]) == 2,
        "routes": sorted(routes - {"lo", "Iface"}),
        "readonly_root": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
        "first_process": os.getpid() == 1,
        "landlock": cell.landlock,
        "watched": cell.is_watched,
        "python": list(sys.version_info[:3]),
    }


def main() -> None:
    """Entry point: serve until the input ends."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    linux.set_dumpable(False)
    linux.set_name("rocklet")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0o022)
    os.chdir("/")
    loop = Loop()
    Rocklet(loop, Channel(loop, 0, 1))
    loop.run()

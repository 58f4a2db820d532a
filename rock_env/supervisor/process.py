"""Processes: entering a live sandbox, collecting a command's output within its cap, and killing what a command left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import termios
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rock_env.supervisor import cgroups, linux
from rock_env.supervisor.loop import Loop

_PIPE_READ = 65536
_FLOOD_BYTES = 8 << 20  # of dropped output, after which draining is slowed: a flood must not eat the host's CPU
_FLOOD_PAUSE = 0.004
_ALL_NAMESPACES = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
_LAST_CAPABILITY = linux.last_capability()
_OPEN_FILES = 4096
_ABOVE_TARGETS = 256


class Output:
    """What a command wrote: its beginning and its end, at most `limit` bytes; the middle is counted and dropped."""

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._head_limit = limit - self._half
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0
        self._limit = limit

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 4 * self._half + _PIPE_READ:
            del self._tail[: -self._half]

    @property
    def dropped(self) -> int:
        return max(0, self.total - self._limit)

    def text(self) -> str:
        if not self.dropped:
            return (self._head + self._tail).decode("utf-8", "replace")
        head = self._head.decode("utf-8", "replace")
        tail = self._tail[-self._half :].decode("utf-8", "replace")
        return f"{head}\n[... {self.dropped} bytes dropped ...]\n{tail}"


class Drain:
    """Reads a pipe into an Output while a command runs, slowly once a flood is being thrown away."""

    def __init__(self, loop: Loop, fd: int, output: Output) -> None:
        self._loop = loop
        self._fd = fd
        self._output = output
        self._active = True
        loop.add_reader(fd, self._on_readable)

    def _on_readable(self) -> None:
        self.read_available(once=True)
        if self._active and self._output.dropped > _FLOOD_BYTES:
            self._loop.remove_reader(self._fd)
            self._loop.call_at(time.monotonic() + _FLOOD_PAUSE, self._resume)

    def _resume(self) -> None:
        if self._active:
            self._loop.add_reader(self._fd, self._on_readable)

    def read_available(self, once: bool = False) -> None:
        """Take what is in the pipe now; at most one pipe's capacity, so that a background flood cannot hold us."""
        budget = 16
        while budget:
            budget -= 1
            try:
                data = os.read(self._fd, _PIPE_READ)
            except (BlockingIOError, InterruptedError):
                return
            if not data:
                self._loop.remove_reader(self._fd)
                return
            self._output.add(data)
            if once:
                return

    def close(self) -> None:
        """Stop reading; the descriptor stays open."""
        self._active = False
        self._loop.remove_reader(self._fd)


def reset_signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def place_descriptors(descriptors: dict[int, int]) -> None:
    """In a child: give descriptors their numbers ({number: descriptor}) and close all others at the exec."""
    safe = {  # a source whose own number is somebody's target would be overwritten
        target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_TARGETS) if fd in descriptors else fd
        for target, fd in descriptors.items()
    }
    for target, fd in safe.items():
        os.dup2(fd, target)
    linux.close_on_exec(set(descriptors))


def open_files() -> tuple[int, int]:
    """RLIMIT_NOFILE of sandboxed processes (soft, hard). The hard one is a number that we can still open ourselves."""
    hard = min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 1)
    return min(1024, hard), hard


class Confinement(NamedTuple):
    """What every process of a sandbox is put into before it executes anything."""

    directories: list[str]  # of its control groups
    seccomp: bytes
    landlock_fd: int | None
    handover: socket.socket | None  # where the listener of a watched filter goes, with `name`
    name: str


def enter_and_exec(
    pidfd: int | None,
    confinement: Confinement,
    cwd: str,
    argv: list[str],
    env: dict[str, str],
    descriptors: dict[int, int],
    agent: int,
) -> None:
    """In a fresh child, already in the pid namespace: join everything else, drop all privileges, exec. No return.

    `pidfd` is a process of the sandbox; None: the child is inside already, and has no capabilities (see Cell). A
    terminal at descriptor 0 becomes the controlling one.
    """
    try:
        os.setsid()
        if pidfd is not None:
            # The agent's processes go first at the memory limit; the sandbox's own (bubblewrap, its first) live on.
            linux.offer_to_oom_killer()
            cgroups.join(confinement.directories)
            linux.setns(pidfd, _ALL_NAMESPACES)
        soft, hard = open_files()
        handover, landlock_fd = confinement.handover, confinement.landlock_fd
        if landlock_fd is not None:  # out of the way of what the next lines overwrite
            landlock_fd = fcntl.fcntl(landlock_fd, fcntl.F_DUPFD_CLOEXEC, max(hard + 1, _ABOVE_TARGETS))
        place_descriptors(descriptors)
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if handover is not None:  # to the one number from which the filter lets it be sent
            handover = socket.socket(fileno=os.dup2(handover.fileno(), hard, inheritable=False))
        os.setresgid(agent, agent, agent)
        os.setresuid(agent, agent, agent)
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        reset_signals()
        if pidfd is not None:
            linux.empty_bounding_set(_LAST_CAPABILITY)
        listener = linux.drop_privileges(confinement.seccomp, handover is not None, landlock_fd)
        if handover is not None:
            socket.send_fds(handover, [confinement.name.encode()], [listener])
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        code = 126
        try:
            os.chdir(cwd)
        except OSError as error:
            os.write(2, f"rock: {cwd}: {os.strerror(error.errno or 0)}\n".encode())
            os._exit(code)
        try:
            _exec(argv, env)
        except OSError as error:
            code = 127 if error.errno == errno.ENOENT else 126
            os.write(2, f"rock: {argv[0]}: {os.strerror(error.errno or 0)}\n".encode())
        os._exit(code)
    except BaseException as error:
        os.write(2, f"rock: cannot enter the sandbox: {error}\n".encode(errors="replace"))
        os._exit(125)


def _exec(argv: list[str], env: dict[str, str]) -> None:
    """execvp by hand: os.execvpe would import more of the standard library in the child."""
    if "/" in argv[0]:
        os.execve(argv[0], argv, env)
    last: OSError = FileNotFoundError(errno.ENOENT, "not found")
    for directory in env.get("PATH", "/usr/bin:/bin").split(":"):
        try:
            os.execve(f"{directory}/{argv[0]}", argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            last = error
    raise last


def pipe(nonblocking_read: bool) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    if nonblocking_read:
        flags = fcntl.fcntl(read, fcntl.F_GETFL)
        fcntl.fcntl(read, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    return read, write


def exit_of(status: int) -> tuple[int, int | None]:
    """(exit code, signal) of a wait status; 128 + n after signal n."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return 128 + number, number
    return os.WEXITSTATUS(status), None


def signal_of(code: int) -> int | None:
    """The signal that a shell's exit code stands for, by its 128 + n convention."""
    return code - 128 if 128 < code <= 128 + 64 else None


def kill_command(leader: int, since: int, keep: set[int], candidates: Callable[[], list[int]]) -> int:
    """SIGKILL what a command started: members of `leader`'s session or its descendants, started at or after `since`.

    `since` is in clock ticks since boot (linux.start_time); `keep` is spared. Returns how many were signalled.
    """
    table: dict[int, list[str]] = {}
    for pid in candidates():
        fields = linux.stat_fields(pid)
        if fields and fields[0] not in "ZX":
            table[pid] = fields
    killed = 0
    for pid, fields in table.items():
        if pid in keep or int(fields[19]) < since:
            continue
        ancestor, depth = pid, 0
        while ancestor != leader and ancestor in table and depth < 1000:
            ancestor, depth = int(table[ancestor][1]), depth + 1
        if ancestor == leader or int(fields[3]) == leader:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
    return killed


def kill_each(pids: Iterable[int]) -> int:
    """SIGKILL processes. Returns how many there still were."""
    killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


_TICK_SECONDS = 1.0 / os.sysconf("SC_CLK_TCK")


def ticks_now() -> int:
    """The current time in the units of linux.start_time."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) / _TICK_SECONDS)

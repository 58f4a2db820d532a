"""The container that this process is the first process of, as a sandbox: no privileges, no other sandbox in sight."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time

from rock_env.supervisor import linux, process, tunnels
from rock_env.supervisor.cgroups import Group
from rock_env.supervisor.commands import Runner
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.guard import Guard
from rock_env.supervisor.journal import Recorder
from rock_env.supervisor.loop import Loop

_KILL_SECONDS = 5.0
_STOP_SECONDS = 1.0
_NICENESS = 10  # of programs: they share the container's CPU limit with us, who must get to end them
_STOPPED = "tTZX"  # states of a process that does not run (proc(5))


class NoProcess(Fault):
    """The container's programs have taken all the processes that it may have."""


class Cell(Runner):
    """`places` are the writable directories, each a file system of its own."""

    def __init__(self, name: str, spec: dict, loop: Loop, log: Recorder, places: list[str]) -> None:
        super().__init__(name, spec, loop, log, os.getuid())
        self.places = places
        self._guard = Guard()
        self._group = Group.own()
        self._fds["root"] = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        landlock_fd = self._guard.landlock_fd(self._fds["root"])
        self._confinement = process.Confinement([], self._guard.seccomp, landlock_fd, self._guard.handover, name)
        if self._guard.listeners is not None:
            loop.add_reader(self._guard.listeners.fileno(), self._on_listener)

    @property
    def landlock(self) -> int:
        """The ABI version of Landlock here; 0 for none."""
        return self._guard.landlock

    @property
    def is_watched(self) -> bool:
        """Whether the kernel tells of the calls that programs make."""
        return self._guard.handover is not None

    def _on_listener(self) -> None:
        arrived = self._guard.receive_listener()
        if arrived is not None:
            self.watcher.add(arrived[1])

    # -- processes
    @property
    def null_fd(self) -> int:
        return self._guard.null_fd

    def spawn_inside(self, argv: list[str], env: dict[str, str], cwd: str, descriptors: dict[int, int]) -> int:
        try:
            pid = os.fork()
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise NoProcess("limit_exceeded", "limits.pids: no process is left to start another") from error
            raise Fault("unavailable", f"cannot start a process: {error}") from error
        if pid == 0:
            try:
                os.nice(_NICENESS)
                if (
                    self._confinement.landlock_fd is not None
                ):  # which keeps the others off what is dumpable for a moment
                    linux.set_dumpable(True)
                    linux.offer_to_oom_killer()
                process.enter_and_exec(None, self._confinement, cwd, argv, env, descriptors, self.uid)
            finally:
                os._exit(125)
        return pid

    def pids(self) -> list[int]:
        return process.all_pids()

    def guardians(self) -> set[int]:
        return {os.getpid()}

    @property
    def is_ending(self) -> bool:
        return False  # we are its first process

    def _others(self) -> list[int]:
        return [pid for pid in process.all_pids() if pid != os.getpid()]

    async def kill_all(self) -> None:
        """As the first process of a pid namespace, kill(-1) reaches all others at one moment: no fork escapes it."""
        self.require_alive()
        deadline = time.monotonic() + _KILL_SECONDS
        while self._others():
            self._signal_all(signal.SIGKILL)
            if time.monotonic() > deadline:
                raise Fault("error", f"kill_all: {len(self._others())} processes were left after {_KILL_SECONDS:g} s")
            await self.loop.sleep(0.001)

    @staticmethod
    def _signal_all(number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
            os.kill(-1, number)

    async def halt(self) -> list[int]:
        """Stop every process; returns those to let `resume`. One that the sandbox itself had stopped stays stopped."""
        before = {pid for pid in self._others() if (linux.stat_fields(pid) or "X")[0] == "T"}
        self._signal_all(signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_SECONDS
        while any((linux.stat_fields(pid) or "X")[0] not in _STOPPED for pid in self._others()):
            if time.monotonic() > deadline:
                break  # one that waits for a disk: it does not write meanwhile
            await self.loop.sleep(0.001)
        return [pid for pid in self._others() if pid not in before]

    @staticmethod
    def resume(pids: list[int]) -> None:
        """Let stopped processes go on."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def connect_inside(self, port: int, seconds: float) -> socket.socket:
        return await tunnels.connect(self.loop, tunnels.sockets(), port, seconds)

    # -- files
    def disks(self) -> list[os.statvfs_result]:
        return [os.statvfs(place) for place in self.places]

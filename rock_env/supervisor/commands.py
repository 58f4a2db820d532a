"""Running commands in one sandbox, however it came to be: single processes, sessions, their limits, what is recorded.

`Box` (a sandbox that this supervisor has made around bubblewrap) and `Cell` (the container that a rocklet lives in) say
how a process is born inside, and which processes there are.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from rock_env.supervisor import linux, process
from rock_env.supervisor.cgroups import Group
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.jobs import Jobs
from rock_env.supervisor.journal import Notes, Recorder
from rock_env.supervisor.loop import Event, Loop
from rock_env.supervisor.session import Session
from rock_env.supervisor.tunnels import Tunnels
from rock_env.supervisor.watch import Watcher

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

_MAX_SESSIONS = 4096
_END_SECONDS, _SETTLE_SECONDS = 5.0, 30.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/home/agent",
    "USER": "agent",
    "LOGNAME": "agent",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
}


class Runner:
    """What sessions and requests need of a sandbox.

    Attributes:
      spec: as it came by wire (rock_env.spec.SandboxSpec).
      uid: who owns the sandbox's files, as this process sees it.
      death: why the sandbox has ended; "" while it lives. `died` is set once its end has begun.
    """

    def __init__(self, name: str, spec: dict, loop: Loop, log: Recorder, uid: int) -> None:
        self.name = name
        self.spec = spec
        self.limits: dict = spec["limits"]
        self.workdir: str = spec["workdir"]
        self.env = {**ENVIRONMENT, **spec["env"]}
        self.loop = loop
        self.uid = uid
        self.sessions: dict[str, Session] = {}
        self.jobs = Jobs(self)
        self.tunnels = Tunnels(self)
        self.death = ""
        self.died = Event(loop)
        self.notes = Notes(log, loop, name)
        self.watcher = Watcher(loop, self.notes)
        self.proxy_env: dict[str, str] = {}
        self._log = log
        self._group: Group | None = None
        self._hits: dict[str, int] = {}
        self._fds: dict[str, int] = {}
        self._saved_states: dict[str, tuple[str, str]] = {}

    # -- how this kind of sandbox does it
    @property
    def null_fd(self) -> int:
        """/dev/null."""
        raise NotImplementedError(f"{type(self).__name__}.null_fd")

    def spawn_inside(self, argv: list[str], env: dict[str, str], cwd: str, descriptors: dict[int, int]) -> int:
        """Fork a child that is confined and execs `argv` inside. Returns its pid; raises Fault."""
        raise NotImplementedError(f"{type(self).__name__}.spawn_inside")

    def pids(self) -> list[int]:
        """Every process inside (and perhaps others, which no command can have started)."""
        raise NotImplementedError(f"{type(self).__name__}.pids")

    def guardians(self) -> set[int]:
        """The processes that hold the sandbox together, which nothing may kill while it lives."""
        raise NotImplementedError(f"{type(self).__name__}.guardians")

    async def kill_all(self) -> None:
        """SIGKILL everything inside but the guardians; returns when it is gone."""
        raise NotImplementedError(f"{type(self).__name__}.kill_all")

    async def connect_inside(self, port: int, seconds: float) -> socket.socket:
        """A connection to a port of the sandbox's own loopback. Raises Fault."""
        raise NotImplementedError(f"{type(self).__name__}.connect_inside")

    def record(self, event: str, **fields: object) -> None:
        """Put something on record, now."""
        self._log.record(event, sandbox=self.name, **fields)

    def disks(self) -> Iterable[os.statvfs_result]:
        """The file systems that `disk_bytes` is about."""
        raise NotImplementedError(f"{type(self).__name__}.disks")

    @property
    def root_fd(self) -> int:
        """The sandbox's root directory."""
        self.require_alive()
        return self._fds["root"]

    def open_inside(self, path: str, flags: int) -> int:
        """Open an absolute path as a program of the sandbox would. Raises OSError."""
        return linux.open_in_root(self.root_fd, path, flags)

    def keep(self) -> set[int]:
        """Processes that a command's timeout must spare."""
        return self.guardians() | {s.pid for s in self.sessions.values()}

    # -- commands
    async def execute(self, argv: list[str], env: dict[str, str], cwd: str, seconds: float, output_bytes: int) -> dict:
        self.require_alive()
        started, since = time.monotonic(), process.ticks_now()
        oom_before = self.oom_kills()
        output_read, output_write = process.pipe(True)
        status: list[int] = []
        finished = Event(self.loop)
        try:
            try:
                descriptors = {0: self.null_fd, 1: output_write, 2: output_write}
                pid = self.spawn_inside(argv, {**self.env, **env}, cwd, descriptors)
            finally:
                os.close(output_write)

            def on_exit(value: int) -> None:
                status.append(value)
                finished.set()

            self.loop.on_exit(pid, on_exit)
            output = process.Output(output_bytes)
            drain = process.Drain(self.loop, output_read, output)
            in_time = await finished.wait(started + seconds)
            if not in_time:
                while not status and self.alive:
                    process.kill_command(pid, since, self.keep(), self.pids)
                    await finished.wait(time.monotonic() + 0.02)
                await self.end_command(pid, since)
            drain.read_available()
            drain.close()
        finally:
            os.close(output_read)
        code, number = process.exit_of(status[0]) if status else (137, signal.SIGKILL)
        number = number or process.signal_of(code)
        if number == signal.SIGKILL and in_time:
            await self.settle()
        return self.result(code, number if in_time else None, not in_time, output, oom_before, started)

    async def end_command(self, leader: int, since: int) -> None:
        """SIGKILL what a command has left, until nothing is: what was forking has escaped the first time."""
        deadline = time.monotonic() + _END_SECONDS
        while self.alive and process.kill_command(leader, since, self.keep(), self.pids):
            if time.monotonic() > deadline:
                return
            await self.loop.sleep(0.002)

    def result(
        self, code: int, number: int | None, timed_out: bool, output: process.Output, oom_before: int, started: float
    ) -> dict:
        """What the client is told of a command that has ended; limits that it met are recorded."""
        self.require_alive()
        truncated = output.dropped > 0
        self.note_limits(timed_out, truncated)
        return {
            "exit_code": 124 if timed_out else code,
            "signal": number,
            "timed_out": timed_out,
            "output": output.text(),
            "truncated": truncated,
            "oom_killed": self.oom_kills() > oom_before,
            "seconds": time.monotonic() - started,
        }

    def session(self, name: str) -> Session:
        session = self.sessions.get(name)
        if session is None:
            session = self.sessions[name] = Session(self, name, self._saved_states.pop(name, None))
        return session

    def session_names(self) -> list[str]:
        return [*self.sessions, *self._saved_states]

    def open_session(self, name: str) -> None:
        """Reserve a name; the shell starts with the first command."""
        names = self.session_names()
        if name in names:
            raise Fault("spec", f"session: {name!r} exists already")
        if len(names) >= _MAX_SESSIONS:
            raise Fault("limit_exceeded", f"session: a sandbox has at most {_MAX_SESSIONS}")
        self.session(name)

    async def close_session(self, name: str, seconds: float) -> None:
        if name not in self.session_names():
            raise Fault("spec", f"session: expected the name of one, got {name!r}")
        session = self.session(name)
        await session.end(time.monotonic() + seconds)
        if self.sessions.get(name) is session:
            del self.sessions[name]

    def restore_sessions(self, states: dict[str, tuple[str, str]]) -> None:
        """The shells of these sessions begin with what a snapshot holds of them."""
        self._saved_states = states

    async def save_sessions(self) -> dict[str, tuple[str, str]]:
        """The states of the idle sessions, by name, for a snapshot."""
        self.require_alive()
        states = dict(self._saved_states)
        for name, session in self.sessions.items():
            state = await session.save()
            if state is not None:
                states[name] = state
        self.require_alive()
        return states

    # -- accounting
    def note_limits(self, timed_out: bool, truncated: bool) -> None:
        """Record the limits met since the last call. A disk counts when it is full now."""
        hits = {name for name, met in (("command_seconds", timed_out), ("output_bytes", truncated)) if met}
        if self._group:
            counts = self._group.hits()
            hits |= {name for name, count in counts.items() if count > self._hits.get(name, 0)}
            self._hits = counts
        if self.limits["disk_bytes"] is not None:
            full = any(disk.f_bfree == 0 or disk.f_ffree == 0 for disk in self.disks())
            hits |= {"disk_bytes"} if full else set()
        for name in sorted(hits):
            self.notes.note("limit_hit", limit=name)

    def oom_kills(self) -> int:
        return self._group.oom_kills() if self._group and self.limits["memory_bytes"] is not None else 0

    def stats(self) -> dict:
        self.require_alive()
        usage = dict.fromkeys(("cpu_seconds", "memory_bytes", "memory_peak_bytes", "pids"))
        if self._group:
            usage.update(self._group.usage())
        usage["disk_bytes"] = sum((disk.f_blocks - disk.f_bfree) * disk.f_frsize for disk in self.disks())
        return usage

    # -- life
    @property
    def alive(self) -> bool:
        return not self.death

    def require_alive(self) -> None:
        if self.death:
            raise Fault("dead", f"sandbox {self.name} has ended: {self.death}")

    @property
    def is_ending(self) -> bool:
        """Whether its first process is just ending, and so everything inside is being killed."""
        raise NotImplementedError(f"{type(self).__name__}.is_ending")

    async def settle(self) -> None:
        """After a SIGKILL that may have been the end of the whole sandbox: wait until that is known, if it was."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self.alive and self.is_ending and time.monotonic() < deadline:
            await self.died.wait(time.monotonic() + 0.02)

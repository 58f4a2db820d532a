"""One live sandbox: its bubblewrap processes, its control group, its root, and everything that runs inside."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rock_env.supervisor import cgroups, files, helpers, linux, process
from rock_env.supervisor.cgroups import Group
from rock_env.supervisor.commands import PATH, Runner
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.loop import Event, Loop
from rock_env.supervisor.store import AGENT_ID

if TYPE_CHECKING:
    import socket

    from rock_env.supervisor.machine import Machine

_READY = b"\x06"
_START_SECONDS = 20.0
_KILL_SECONDS = 5.0
_SHM_BYTES = 16 << 20
_PASSWD_ENTRY = b"agent:x:1000:1000:agent:/home/agent:/bin/bash\n"
_GROUP_ENTRY = b"agent:x:1000:\n"


class Box(Runner):
    def __init__(
        self, name: str, spec: dict, machine: Machine, loop: Loop, lower: list[str], uid: int, log: AuditLog
    ) -> None:
        super().__init__(name, spec, loop, log, uid)
        self.lower = lower
        self.on_death: Callable[[Box], None] = lambda box: None
        self._machine = machine
        self._confinement: process.Confinement | None = None
        self.policy: list[list] = []
        self._monitor = 0
        self._init = 0
        self._gone = Event(loop)
        self._lifetime = None

    # -- start
    async def start(self, entries: list[dict], blob: bytes, states: dict[str, tuple[str, str]]) -> None:
        """Mount, place files, and run bubblewrap until its first process reports. Cleans up after itself on failure."""
        machine, limits = self._machine, self.limits
        self.restore_sessions(states)
        try:
            if machine.hierarchies.base:
                self._group = Group.make(machine.hierarchies, machine.name, self.name)
                self._group.apply(limits["memory_bytes"], limits["pids"], limits["cpus"])
            lower = [*self.lower, machine.store.image(self.spec["image"])]
            setup_fd, upper_fd = machine.store.mount_box(self.name, lower, limits["disk_bytes"])
            self._fds["upper"] = upper_fd
            try:
                self._populate(setup_fd, upper_fd, entries, blob)
            finally:
                os.close(setup_fd)
            await self._launch()
            self._fds["root"] = os.open(f"/proc/{self._init}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._confinement = self._confine()
        except BaseException as error:
            await self.stop("start failed")
            if isinstance(error, OSError):
                raise Fault("unavailable", f"start: {error}") from error
            raise
        finally:
            machine.store.unmount_box(self.name)
        if limits["lifetime_seconds"] is not None:
            when = time.monotonic() + limits["lifetime_seconds"]
            message = f"lifetime_seconds={limits['lifetime_seconds']} is over"
            self._lifetime = self.loop.call_at(when, lambda: self.loop.spawn(self.stop(message)))

    def _confine(self) -> process.Confinement:
        machine = self._machine
        landlock_fd = machine.landlock_fd(self._fds["root"])
        if landlock_fd is not None:
            self._fds["landlock"] = landlock_fd
        directories = self._group.directories if self._group else []
        return process.Confinement(directories, machine.seccomp, landlock_fd, machine.handover, self.name)

    def _populate(self, root_fd: int, upper_fd: int, entries: list[dict], blob: bytes) -> None:
        for directory in ("proc", "dev", "tmp"):
            os.close(files.make_directories(root_fd, f"/{directory}", 0))
        for target in self.spec["readonly_binds"].values():
            self._make_bind_target(root_fd, target)
        if self.spec["image"] is not None:
            self._name_agent(root_fd)
        if not self.lower:
            os.close(files.make_directories(root_fd, "/home", 0))
            os.close(files.make_directories(root_fd, self.env["HOME"], self.uid))
        work_fd = files.make_directories(root_fd, self.workdir, self.uid)
        try:
            if not self.lower:
                os.chown(f"/proc/self/fd/{work_fd}", self.uid, self.uid)
        finally:
            os.close(work_fd)
        files.put(root_fd, entries, blob, self.uid, self.workdir, unseen=True)
        if not self.lower:
            files.reset_times(upper_fd)

    @staticmethod
    def _name_agent(root_fd: int) -> None:
        """Give the sandbox's user its name in an image that does not know it."""
        for path, entry in (("/etc/passwd", _PASSWD_ENTRY), ("/etc/group", _GROUP_ENTRY)):
            try:
                text = files.read_file(root_fd, path, 1 << 20)
            except Fault:
                text = b""
            if not any(line.split(b":")[2:3] == [b"%d" % AGENT_ID] for line in text.splitlines()):
                separator = b"" if not text or text.endswith(b"\n") else b"\n"
                files.write_file(root_fd, path, memoryview(text + separator + entry), None, 0)

    def _make_bind_target(self, root_fd: int, target: str) -> None:
        source = next(s for s, t in self.spec["readonly_binds"].items() if t == target)
        if os.path.isdir(source):
            os.close(files.make_directories(root_fd, target, 0))
        else:
            files.write_file(root_fd, target, memoryview(b""), 0o644, 0)

    def _arguments(self, info_fd: int, seccomp_fd: int) -> list[str]:
        machine, spec = self._machine, self.spec
        arguments = [
            machine.bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--disable-userns", "--uid", str(AGENT_ID), "--gid", str(AGENT_ID),
            "--hostname", "sandbox", "--cap-drop", "ALL", "--die-with-parent", "--as-pid-1", "--clearenv",
            "--info-fd", str(info_fd), "--seccomp", str(seccomp_fd),
            "--bind", os.path.abspath(f"box/{self.name}/root"), "/",
        ]  # fmt: skip
        if spec["image"] is None:
            arguments += ["--ro-bind", "/usr", "/usr"]
        arguments += ["--proc", "/proc", "--dev", "/dev", "--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm"]
        arguments += ["--remount-ro", "/dev"]
        for source, target in spec["readonly_binds"].items():
            arguments += ["--ro-bind", machine.store.readonly(source), target]
        # A `cat` is the first process: it says that the sandbox is set up by echoing a byte, and ends with its input.
        return [*arguments, "--chdir", "/", "--", "cat"]

    async def _launch(self) -> None:
        machine = self._machine
        info_read, info_write = process.pipe(True)
        ready_read, ready_write = process.pipe(True)
        input_read, input_write = process.pipe(False)
        self._fds["input"] = input_write
        os.write(input_write, _READY)
        inner_info, inner_seccomp = 200, 201
        arguments = self._arguments(inner_info, inner_seccomp)
        descriptors = {0: input_read, 1: ready_write, 2: ready_write, inner_info: info_write}
        try:
            pid = os.fork()
            if pid == 0:
                self._exec_bwrap(arguments, descriptors, inner_seccomp)
            self._monitor = pid
            self.loop.on_exit(pid, self._on_monitor_exit)
        finally:
            for fd in (info_write, ready_write, input_read):
                os.close(fd)
        try:
            deadline = time.monotonic() + _START_SECONDS
            information = await self._collect(info_read, deadline, lambda data: False)
            greeting = await self._collect(ready_read, deadline, lambda data: _READY in data)
        finally:
            os.close(info_read)
            os.close(ready_read)
        if not greeting.endswith(_READY):
            reason = greeting.decode(errors="replace").strip() or "no answer from bubblewrap"
            raise Fault("unavailable", f"start: {reason} ({machine.bwrap})")
        self._init = json.loads(information)["child-pid"]
        self._fds["init"] = os.pidfd_open(self._init)
        self.loop.add_reader(self._fds["init"], self._on_init_exit)

    def _exec_bwrap(self, arguments: list[str], descriptors: dict[int, int], seccomp_fd: int) -> None:
        """In the forked child: join the group, become the sandbox's user, exec bubblewrap. No return."""
        try:
            os.setsid()
            if self._group:
                cgroups.join(self._group.directories)
            process.place_descriptors({**descriptors, seccomp_fd: self._machine.seccomp_file()})
            process.reset_signals()
            # Inherited by the first process of the sandbox: the kernel then reaps orphans without its help.
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            if self._machine.privileged:
                os.setgroups([])
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
            linux.die_with_parent()
            os.execve(arguments[0], ["bwrap", *arguments[1:]], {"PATH": PATH})
        except BaseException as error:
            os.write(2, f"cannot run bubblewrap: {error}\n".encode(errors="replace"))
        finally:
            os._exit(125)

    async def _collect(self, fd: int, deadline: float, enough: Callable[[bytes], bool]) -> bytes:
        """Read until the end, `enough`, or the deadline."""
        data = b""
        while True:
            readable = Event(self.loop)
            self.loop.add_reader(fd, readable.set)
            arrived = await readable.wait(deadline)
            self.loop.remove_reader(fd)
            try:
                piece = os.read(fd, 65536) if arrived else b""
            except BlockingIOError:  # a stale event of a descriptor with the same number
                continue
            data += piece
            if not piece or enough(data):
                return data

    # -- processes
    def spawn_inside(self, argv: list[str], env: dict[str, str], cwd: str, descriptors: dict[int, int]) -> int:
        """Fork a child that is born in the sandbox's pid namespace and execs `argv` there. Returns its pid."""
        try:
            linux.setns(self._fds["init"], linux.CLONE_NEWPID)
            try:
                env = {**self.proxy_env, **env}
                pid = os.fork()
                if pid == 0:
                    process.enter_and_exec(self._fds["init"], self._confinement, cwd, argv, env, descriptors, AGENT_ID)
            finally:
                linux.setns(self._machine.pid_namespace_fd, linux.CLONE_NEWPID)
        except OSError as error:
            if self._has_exited():
                self._die("its first process has ended")
                self.require_alive()
            raise Fault("unavailable", f"cannot start a process: {error}") from error
        return pid

    @property
    def null_fd(self) -> int:
        return self._machine.null_fd

    async def connect_inside(self, port: int, seconds: float) -> socket.socket:
        return await helpers.connect(self.loop, self, port, seconds)

    @property
    def init_fd(self) -> int:
        self.require_alive()
        return self._fds["init"]

    def set_proxy(self, port: int | None) -> None:
        """Tell programs that start from now on, and shells at their next command, of the proxy's port."""
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        self.proxy_env = dict.fromkeys(names, f"http://127.0.0.1:{port}") if port else {}
        self.proxy_env |= dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1") if port else {}

    def guardians(self) -> set[int]:
        return {self._init, self._monitor}

    @property
    def is_ending(self) -> bool:
        # The kernel flags an exiting process before it kills the rest of its pid namespace, and tells of its end last.
        fields = linux.stat_fields(self._init) if self._init else None
        return fields is None or bool(int(fields[6]) & linux.PF_EXITING)

    def pids(self) -> list[int]:
        return self._group.pids() if self._group else process.all_pids()

    def disks(self) -> list[os.statvfs_result]:
        return [os.statvfs(self._fds["upper"])]

    async def kill_all(self) -> None:
        """SIGKILL everything inside but the first process; returns when it is gone. Frozen first: no fork escapes."""
        self.require_alive()
        spared, deadline = {self._init, self._monitor}, time.monotonic() + _KILL_SECONDS
        leaders = [self._init, *(s.pid for s in self.sessions.values() if s.is_running)]
        while self.alive:
            jobs = {job.pid for job in self.jobs if job.is_running}  # one just born is not in the group yet
            frozen = self._group is not None and self._group.freeze(True)
            try:
                if self._group:
                    left = process.kill_each((set(self.pids()) | jobs) - spared)
                else:
                    left = sum(process.kill_command(leader, 0, spared, self.pids) for leader in (*leaders, *jobs))
            finally:
                if frozen and self._group is not None:
                    self._group.freeze(False)
            if not left:
                return
            if time.monotonic() > deadline:
                raise Fault("error", f"kill_all: {left} processes were left after {_KILL_SECONDS:g} s")
            await self.loop.sleep(0.0005)
        self.require_alive()

    # -- files
    async def snapshot(self) -> tuple[str, dict[str, tuple[str, str]]]:
        """Copy the writable layer while nothing runs. Returns (layer, states of the sessions)."""
        states = await self.save_sessions()
        frozen = self._group is not None and self._group.freeze(True)
        try:
            return self._machine.store.copy_layer(self._fds["upper"]), states
        finally:
            if frozen and self._group is not None:
                self._group.freeze(False)

    # -- end
    def _has_exited(self) -> bool:
        poll = select.poll()
        poll.register(self._fds["init"], select.POLLIN)
        return bool(poll.poll(0))

    def _on_monitor_exit(self, status: int) -> None:
        self._monitor = 0
        if self._init:
            self._die("its monitor has ended")

    def _on_init_exit(self) -> None:
        self.loop.remove_reader(self._fds["init"])
        self._init = 0
        self._gone.set()
        reason = "the memory limit killed its first process" if self.oom_kills() else "its first process was killed"
        self._die(reason)

    def _die(self, reason: str) -> None:
        if not self.death:
            self.death = reason
            self.loop.spawn(self.stop(reason))

    def _kill(self) -> None:
        if self._init:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fds["init"], signal.SIGKILL)
        if self._monitor:
            os.kill(self._monitor, signal.SIGKILL)

    async def stop(self, reason: str) -> None:
        """Kill everything and give back every resource. Idempotent; returns when nothing is left (or after 5 s)."""
        if self.died.is_set:
            return
        self.death = self.death or reason
        self.died.set()
        usage = self._group.usage() if self._group else {}
        if self._lifetime:
            self._lifetime.cancel()
        if self._group and self._group.directories:
            self._group.freeze(False)
        self._kill()
        for session in self.sessions.values():
            session.abandon()
        if self._init:
            await self._gone.wait(time.monotonic() + 5)
        for session in self.sessions.values():
            session.close()
        self.jobs.abandon()
        self.tunnels.abandon()
        self.watcher.close()
        self.notes.flush()
        self.record("sandbox_ended", reason=self.death, **usage)
        for name, fd in self._fds.items():
            if name == "init":
                self.loop.remove_reader(fd)
            os.close(fd)
        self._fds = {}
        deadline = time.monotonic() + 5
        while self._group and not self._group.remove() and time.monotonic() < deadline:
            await self.loop.sleep(0.002)
        self.on_death(self)

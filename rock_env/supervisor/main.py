"""The supervisor's life: isolate itself, serve requests, and leave nothing behind.

A keeper process (what the client starts) forks the supervisor as the first process of a pid namespace of its own:
however the supervisor ends, the kernel kills every sandbox with it. The keeper then removes the control groups and the
directory.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import traceback

from rock_env import wire
from rock_env.supervisor import cgroups, linux
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.loop import Loop
from rock_env.supervisor.machine import Machine
from rock_env.supervisor.retention import Retention
from rock_env.supervisor.server import Server
from rock_env.supervisor.store import Store


def main(
    control_fd: int,
    bwrap: str,
    state_directory: str,
    store_bytes: int | None,
    audit_directory: str,
    client_pid: int,
    retention: tuple[int, int],
) -> None:
    """Entry point of the keeper."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.set_name("rock-keeper")
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    directory = name = ""
    hierarchies = None
    try:
        client = os.pidfd_open(client_pid)
        pid_namespace = os.stat("/proc/self/ns/pid").st_ino
        privileged = os.geteuid() == 0
        hierarchies = cgroups.Hierarchies.detect()
        cgroups.sweep(hierarchies, pid_namespace)
        sweep_directories(state_directory, pid_namespace)
        name = cgroups.supervisor_name(pid_namespace, os.getpid(), linux.start_time(os.getpid()) or 0)
        for base in hierarchies.directories():
            os.mkdir(os.path.join(base, name))
            if hierarchies.version == 2:
                enable_controllers(os.path.join(base, name))
        directory = os.path.join(state_directory, name)
        os.mkdir(directory, 0o711)
        outside = os.geteuid(), os.getegid()
        privileged = isolate(privileged)
        if not privileged:
            map_ids(*outside)
        audit = (audit_directory, os.getpid(), Retention(*retention))
        pid = os.fork()
        if pid == 0:
            serve(control, client, bwrap, directory, store_bytes, audit, client_pid, name, privileged, hierarchies)
        control.detach()
        os.close(control_fd)
        wait_for(pid)
    except BaseException as error:
        report_failure(control, error)
    finally:
        remove(directory, name, hierarchies)


def serve(
    control: socket.socket,
    client: int,
    bwrap: str,
    directory: str,
    store_bytes: int | None,
    audit: tuple[str, int, Retention],
    client_pid: int,
    name: str,
    privileged: bool,
    hierarchies: cgroups.Hierarchies,
) -> None:
    """In the supervisor: set up, run until the client goes away, and exit."""
    code = 1
    try:
        linux.die_with_parent()
        linux.become_subreaper()
        linux.set_name("rock-supervisor")
        linux.mount("", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        store = Store(directory, privileged, store_bytes)
        machine = Machine(bwrap, name, privileged, hierarchies, store)
        loop = Loop()
        log = AuditLog(loop, *audit)
        log.open(supervisor=name, client_pid=client_pid)
        server = Server(loop, machine, control, log)
        loop.add_reader(client, server.finish)
        control.sendall(wire.encode({"ready": machine.report(log.path)}))
        loop.run()
        log.close()
        code = 0
    except BaseException as error:
        report_failure(control, error)
        if not isinstance(error, Fault | OSError):
            traceback.print_exc()
    finally:
        os._exit(code)


def report_failure(control: socket.socket, error: BaseException) -> None:
    fault = error if isinstance(error, Fault) else Fault("unavailable", f"the supervisor cannot start: {error}")
    try:
        control.sendall(wire.encode({"error": fault.to_wire()}))
    except OSError:
        print(f"rock-supervisor: {error}", file=sys.stderr)


def isolate(is_root: bool) -> bool:
    """Enter namespaces of our own; True when that needed no user namespace (root with CAP_SYS_ADMIN)."""
    if is_root:
        try:
            linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID)
            return True
        except PermissionError:  # root of an ordinary container
            pass
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWUSER)
    return False


def map_ids(uid: int, gid: int) -> None:
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)


def enable_controllers(directory: str) -> None:
    with open(f"{directory}/cgroup.controllers") as file:
        available = file.read().split()
    with open(f"{directory}/cgroup.subtree_control", "w") as file:
        file.write(" ".join(f"+{name}" for name in ("memory", "pids", "cpu") if name in available))


def wait_for(pid: int) -> None:
    """Reap the supervisor; a polite signal to the keeper ends both."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
    while True:
        try:
            if os.waitpid(-1, 0)[0] == pid:
                return
        except InterruptedError:
            continue


def remove(directory: str, name: str, hierarchies: cgroups.Hierarchies | None) -> None:
    if hierarchies is not None and name:
        for base in hierarchies.directories():
            cgroups.remove_tree(os.path.join(base, name), kill=True)
    if directory:
        with contextlib.suppress(OSError):
            linux.umount(directory)
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def sweep_directories(state_directory: str, pid_namespace: int) -> None:
    for name in os.listdir(state_directory):
        if cgroups.is_stale(name, pid_namespace):
            with contextlib.suppress(OSError):  # an empty mount point
                os.rmdir(os.path.join(state_directory, name))

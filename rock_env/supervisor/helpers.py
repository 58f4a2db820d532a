"""What the processes beside the supervisor (egress proxy, model endpoints) need: a start, and sockets in sandboxes."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rock_env.supervisor import linux, process, tunnels
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.loop import Event, Loop

if TYPE_CHECKING:
    from rock_env.supervisor.box import Box

_LISTEN_SECONDS = 5.0
_BACKLOG = 64
# Imports the module without rock_env/__init__.py, which would load the whole SDK.
_BOOT = (
    "import importlib, sys, types\n"
    "package = types.ModuleType('rock_env'); package.__path__ = [sys.argv[1]]; sys.modules['rock_env'] = package\n"
    "importlib.import_module(sys.argv[2]).main(*map(int, sys.argv[3:]))\n"
)


def start(module: str, descriptors: dict[int, int], uid: int) -> int:
    """Start a process that runs `main(*numbers of the descriptors, uid)` of a module of ours. Returns its pid."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    arguments = [sys.executable, "-I", "-S", "-c", _BOOT, package, module, *map(str, descriptors), str(uid)]
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.chdir("/")
            process.place_descriptors(descriptors)
            process.reset_signals()
            os.execve(arguments[0], arguments, dict(os.environ))
        finally:
            os._exit(125)
    return pid


def _make_inside(pidfd: int, make: Callable[[], list[socket.socket]]) -> tuple[int, socket.socket]:
    """Fork a child that enters the namespaces of process `pidfd` and makes sockets there, which stay theirs.

    Returns (its pid, a socket on which they arrive). The child exits at once.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            linux.setns(pidfd, linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
            made = make()
            socket.send_fds(theirs, [b"+"], [each.fileno() for each in made])
        finally:
            os._exit(0)
    theirs.close()
    return pid, ours


async def _sockets(loop: Loop, box: Box, make: Callable[[], list[socket.socket]]) -> list[socket.socket]:
    """The sockets that `make` gives in the sandbox's network namespace. Raises Fault when there are none."""
    pid, arriving = _make_inside(box.init_fd, make)
    exited = Event(loop)
    loop.on_exit(pid, lambda status: exited.set())
    try:
        await exited.wait(time.monotonic() + _LISTEN_SECONDS)
        arriving.setblocking(False)
        try:
            _, fds, _, _ = socket.recv_fds(arriving, 16, 2, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            fds = []
    finally:
        arriving.close()
    if not fds:
        raise Fault("unavailable", "network: cannot make a socket inside the sandbox")
    return [socket.socket(fileno=fd) for fd in fds]


def _listener(port: int) -> list[socket.socket]:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        listener.bind(("127.0.0.1", 0))
    listener.listen(_BACKLOG)
    return [listener]


async def listen(loop: Loop, box: Box, port: int) -> tuple[int, socket.socket]:
    """A socket that listens on the sandbox's 127.0.0.1 (a socket of the host's can't), and its port: `port`, or another
    one if a program of the sandbox has that. Raises Fault."""
    listener = (await _sockets(loop, box, lambda: _listener(port)))[0]
    return listener.getsockname()[1], listener


async def connect(loop: Loop, box: Box, port: int, seconds: float) -> socket.socket:
    """A connection to a port of the sandbox's loopback. Raises Fault."""
    return await tunnels.connect(loop, await _sockets(loop, box, tunnels.sockets), port, seconds)

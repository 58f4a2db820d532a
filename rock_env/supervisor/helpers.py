"""What the processes beside the supervisor (egress proxy, model endpoints) need: a start, and sockets in sandboxes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
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


def _listen_inside(pidfd: int, port: int) -> tuple[int, socket.socket]:
    """Fork a child that enters the namespaces of process `pidfd` and listens on their 127.0.0.1.

    Returns (its pid, a socket on which the listener arrives). The child exits at once; its code is 0 if all went well.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            linux.setns(pidfd, linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                listener.bind(("127.0.0.1", 0))
            listener.listen(_BACKLOG)
            port = listener.getsockname()[1]
            socket.send_fds(theirs, [str(port).encode()], [listener.fileno()])
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    return pid, ours


async def listen(loop: Loop, box: Box, port: int) -> tuple[int, socket.socket]:
    """A socket that listens on the sandbox's 127.0.0.1 (a socket of the host's can't), and its port: `port`, or another
    one if a program of the sandbox has that. Raises Fault."""
    pid, arriving = _listen_inside(box.init_fd, port)
    text, fd = await _arrival(loop, pid, arriving, _LISTEN_SECONDS)
    if fd is None:
        raise Fault("unavailable", "network: cannot listen inside the sandbox")
    return int(text), socket.socket(fileno=fd)


def _connect_inside(pidfd: int, port: int, seconds: float) -> tuple[int, socket.socket]:
    """As _listen_inside, for a connection to a port of their loopback; where there is none, the error's number."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            linux.setns(pidfd, linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
            try:
                connection = tunnels.connect(port, seconds)
            except OSError as error:
                theirs.send(str(error.errno or errno.ETIMEDOUT).encode())
            else:
                socket.send_fds(theirs, [b"0"], [connection.fileno()])
        finally:
            os._exit(0)
    theirs.close()
    return pid, ours


async def connect(loop: Loop, box: Box, port: int, seconds: float) -> socket.socket:
    """A connection to a port of the sandbox's loopback. Raises Fault."""
    pid, arriving = _connect_inside(box.init_fd, port, seconds)
    text, fd = await _arrival(loop, pid, arriving, 2 * seconds + _LISTEN_SECONDS)
    if fd is None:
        raise tunnels.refused(port, int(text or errno.ETIMEDOUT))
    return socket.socket(fileno=fd)


async def _arrival(loop: Loop, pid: int, arriving: socket.socket, seconds: float) -> tuple[bytes, int | None]:
    """What a child sent before it exited: a text, and a descriptor if there was one."""
    exited = Event(loop)
    loop.on_exit(pid, lambda status: exited.set())
    try:
        if not await exited.wait(time.monotonic() + seconds):
            os.kill(pid, signal.SIGKILL)
        arriving.setblocking(False)
        try:
            text, fds, _, _ = socket.recv_fds(arriving, 16, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return b"", None
        return text, fds[0] if fds else None
    finally:
        arriving.close()

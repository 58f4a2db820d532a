"""Connections from outside to a port inside a sandbox, carried by requests: port forwarding without any route.

As a job's (see jobs.py), the bytes that come from inside are numbered, and a request names the number that it wants to
go on from; so nothing is lost or doubled where a connection was cut. What is acknowledged is forgotten, and while the
window is full nothing is read: the program inside waits, as for any slow peer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from typing import TYPE_CHECKING

from rock_env.supervisor.faults import Fault
from rock_env.supervisor.inlet import Inlet
from rock_env.supervisor.loop import Event, Loop, Timer

if TYPE_CHECKING:
    from rock_env.supervisor.commands import Runner

_WINDOW_BYTES = 128 << 10  # each way; a rocklet keeps them within its sandbox's memory limit
_MOST = 32  # open at once to one sandbox
_SILENT_SECONDS = 120.0  # without a request, after which the one who opened it counts as gone
_CONNECT_SECONDS = 5.0


class Tunnel(Inlet):
    """One connection. `id` is its caller's choice, so that a repeated request to open it does not open a second one."""

    _most_pending = _WINDOW_BYTES

    def __init__(self, box: Runner, id: str, port: int, connection: socket.socket) -> None:
        super().__init__(box)
        self.id, self.port = id, port
        self._socket = connection
        self._received, self._start = bytearray(), 0  # from inside, from number `start` on
        self._ended = False  # nothing more will come
        self._broken = False
        self.used, self.in_use = time.monotonic(), 0
        self._listen()

    @property
    def counts(self) -> dict[str, int]:
        return {"bytes_received": self._end, "bytes_sent": self._accepted - len(self._pending)}

    @property
    def _end(self) -> int:
        return self._start + len(self._received)

    def _listen(self) -> None:
        if not self._ended and len(self._received) < _WINDOW_BYTES:
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
        else:
            self._loop.remove_reader(self._socket.fileno())

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(_WINDOW_BYTES - len(self._received))
        except BlockingIOError:
            return
        except OSError:
            self._broken, data = True, b""
        self._received += data
        self._ended = self._ended or not data
        self._listen()
        self._wake()

    async def read(self, since: int, seconds: float, most: int) -> tuple[dict, bytes]:
        """What came from number `since` on (what came before is forgotten); waits for it, or for the end."""
        if not self._start <= since <= self._end:
            raise Fault("spec", f"seq: expected a number in {self._start}..{self._end}, got {since}")
        del self._received[: since - self._start]
        self._start = since
        self._listen()
        deadline = time.monotonic() + seconds
        while not self._received and not self._ended and self._box.alive:
            if not await self._changed.wait(deadline):
                break
        self._box.require_alive()
        if since != self._start:
            raise Fault("spec", f"seq: {since} was acknowledged by another request meanwhile")
        data = bytes(self._received[:most])
        end = self._ended and len(data) == len(self._received)
        return {"next": since + len(data), "is_end": end}, data

    async def write(self, data: bytes, at: int, close: bool, seconds: float) -> dict:
        """Take bytes for inside, as far as there is room within `seconds`; then, with `close`, their end. `at`: see
        Inlet."""
        if await self._accept(data, at, seconds) and close and not self._input_ends:
            self._input_ends = True
            self._feed()
        return {"accepted": self._accepted}

    def _require_reader(self) -> None:
        if self._broken or self._input_ends:
            raise Fault("forward_failed", f"port {self.port}: nobody reads the connection any more")

    def _feed(self) -> None:
        fd = self._socket.fileno()
        if fd < 0:
            return
        try:
            while self._pending:
                del self._pending[: self._socket.send(self._pending)]
            if self._input_ends:
                self._socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._loop.add_writer(fd, self._on_writable)
            return
        except OSError:
            self._broken = True
            self._pending.clear()
        self._loop.remove_writer(fd)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._ended = self._broken = True
        self._wake()


class Tunnels:
    """Those of one sandbox. Each is on record when it opens, when it could not, and when it ends."""

    def __init__(self, box: Runner) -> None:
        self._box = box
        self._tunnels: dict[str, Tunnel] = {}
        self._opening: dict[str, Event] = {}
        self._timer: Timer | None = None

    def get(self, id: str) -> Tunnel:
        tunnel = self._tunnels.get(id)
        if tunnel is None:
            raise Fault("forward_failed", f"no forwarded connection {id!r} in sandbox {self._box.name}")
        tunnel.used = time.monotonic()
        return tunnel

    async def open(self, id: str, port: int) -> None:
        """Connect to the sandbox's own loopback. Raises Fault where nobody listens."""
        if id in self._opening:
            await self._opening[id].wait(time.monotonic() + 2 * _CONNECT_SECONDS)
        if id in self._tunnels:
            return
        if len(self._tunnels) + len(self._opening) >= _MOST:
            raise Fault("limit_exceeded", f"forward: expected at most {_MOST} connections at once")
        opened = self._opening[id] = Event(self._box.loop)
        try:
            connection = await self._box.connect_inside(port, _CONNECT_SECONDS)
        except Fault as fault:
            self._box.record("forward", port=port, verdict="failed", reason=str(fault))
            raise
        finally:
            del self._opening[id]
            opened.set()
        if not self._box.alive:
            connection.close()
            self._box.require_alive()
        self._box.record("forward", port=port, verdict="opened", connection=id)
        self._tunnels[id] = Tunnel(self._box, id, port, connection)
        if self._timer is None:
            self._watch()

    async def read(self, id: str, since: int, seconds: float, most: int) -> tuple[dict, bytes]:
        tunnel = self.get(id)
        tunnel.in_use += 1
        try:
            return await tunnel.read(since, seconds, most)
        finally:
            tunnel.in_use -= 1
            tunnel.used = time.monotonic()

    async def write(self, id: str, data: bytes, at: int, close: bool, seconds: float) -> dict:
        tunnel = self.get(id)
        tunnel.in_use += 1
        try:
            return await tunnel.write(data, at, close, seconds)
        finally:
            tunnel.in_use -= 1
            tunnel.used = time.monotonic()

    def close(self, id: str, reason: str) -> None:
        tunnel = self._tunnels.pop(id, None)
        if tunnel is not None:
            tunnel.close()
            self._box.record("forward_ended", port=tunnel.port, connection=id, reason=reason, **tunnel.counts)

    def _watch(self) -> None:
        """Close those whose client has gone."""
        oldest = time.monotonic() - _SILENT_SECONDS
        for tunnel in list(self._tunnels.values()):
            if not tunnel.in_use and tunnel.used < oldest:
                self.close(tunnel.id, f"nobody asked for {_SILENT_SECONDS:g} s")
        again = time.monotonic() + _SILENT_SECONDS / 4
        self._timer = self._box.loop.call_at(again, self._watch) if self._tunnels else None

    def abandon(self) -> None:
        """The sandbox is gone."""
        if self._timer is not None:
            self._timer.cancel()
        for id in list(self._tunnels):
            self.close(id, "the sandbox has ended")


def sockets() -> list[socket.socket]:
    """Sockets of the network namespace that this process is in, for `connect`: IPv4 and, if there is such, IPv6."""
    found = [socket.socket(socket.AF_INET)]
    with contextlib.suppress(OSError):
        found.append(socket.socket(socket.AF_INET6))
    return found


async def connect(loop: Loop, unconnected: list[socket.socket], port: int, seconds: float) -> socket.socket:
    """The first of the sockets that gets a connection to the loopback of its namespace. Raises Fault.

    Never blocks: a program that accepts nothing must not hold us.
    """
    deadline = time.monotonic() + seconds
    first, found = 0, None
    for each in unconnected:
        number = errno.EINVAL if found is not None else await _connect(loop, each, port, deadline)
        if number == 0:
            found = each
        else:
            each.close()
            first = first or number
    if found is None:
        raise Fault("forward_failed", f"port {port}: {os.strerror(first)}")
    return found


async def _connect(loop: Loop, connection: socket.socket, port: int, deadline: float) -> int:
    """0, or the error's number."""
    connection.setblocking(False)
    number = connection.connect_ex(("127.0.0.1" if connection.family == socket.AF_INET else "::1", port))
    if number != errno.EINPROGRESS:
        return number
    writable = Event(loop)
    loop.add_writer(connection.fileno(), writable.set)
    in_time = await writable.wait(deadline)
    loop.remove_writer(connection.fileno())
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if in_time else errno.ETIMEDOUT

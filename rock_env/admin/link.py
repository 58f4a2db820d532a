"""The link between an admin and a worker: frames (rock_env.wire) over a unix socket or loopback TCP.

Both ends prove that they know a shared secret before either reads a request; the secret itself never travels.
Whatever else can carry `(header, blob) -> (header, blob)` can host a worker too: see Worker.handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rock_env import wire
from rock_env.errors import BackendUnavailable, RequestTimeout, SpecError, from_wire

Handler = Callable[[dict, bytes], tuple[dict, bytes]]
_HANDSHAKE_SECONDS = 5.0
_HANDSHAKE_BYTES = 1024
_IDLE_SECONDS = 3600.0
_IDLE_CONNECTIONS = 128
_MAX_CONNECTIONS = 1024


def parse_address(address: str) -> tuple[str, str | tuple[str, int]]:
    """("unix", path) or ("tcp", (host, port)) of "unix:PATH" or "tcp:HOST:PORT".

    Raises:
      SpecError: neither, or a host that is not loopback: requests are authenticated here, but not encrypted.
    """
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return kind, rest
    host, _, port = rest.rpartition(":")
    try:
        if kind == "tcp" and ipaddress.ip_address(host.strip("[]")).is_loopback and 0 <= int(port) <= 65535:
            return kind, (host.strip("[]"), int(port))
    except ValueError:
        pass
    raise SpecError(f"address: expected unix:/PATH or tcp:LOOPBACK-ADDRESS:PORT, got {address!r}")


def read_secret(path: str | Path) -> bytes:
    """The secret in a file that only its owner can read."""
    try:
        mode, secret = os.stat(path).st_mode, Path(path).read_bytes().strip()
    except OSError as error:
        raise SpecError(f"secret file {path}: {error.strerror}") from error
    if mode & 0o077 or len(secret) < 32:
        raise SpecError(f"secret file {path}: expected at least 32 bytes and mode 0600, got {len(secret)} and {mode:o}")
    return secret


def _proof(secret: bytes, role: str, first: str, second: str) -> str:
    return hmac.new(secret, f"rock link {role} {first} {second}".encode(), hashlib.sha256).hexdigest()


def _matches(header: dict, expected: str) -> bool:
    return hmac.compare_digest(str(header.get("proof", "")).encode(), expected.encode())


def _small_frame(data: bytes) -> int:
    """The length of a handshake's header, from a frame's first bytes. Raises ConnectionLost for anything large."""
    header, blob = wire.HEADER.unpack(data)
    if header > _HANDSHAKE_BYTES or blob:
        raise wire.ConnectionLost("this is no handshake")
    return header


def _small_header(data: bytes) -> dict:
    try:
        header = json.loads(data)
    except ValueError as error:
        raise wire.ConnectionLost("this is no handshake") from error
    if not isinstance(header, dict):
        raise wire.ConnectionLost("this is no handshake")
    return header


class LinkServer:
    """Serves `handle` to whoever knows the secret; one thread for each connection, one request at a time on each."""

    def __init__(self, address: str, secret: bytes, handle: Handler) -> None:
        self._secret = secret
        self._handle = handle
        kind, where = parse_address(address)
        self._path = where if kind == "unix" else ""
        if kind == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(where)
            self._socket = socket.socket(socket.AF_UNIX)
        else:
            self._socket = socket.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(where)
        if kind == "unix":
            os.chmod(where, 0o600)
        self.address = address if kind == "unix" else "tcp:%s:%d" % self._socket.getsockname()[:2]  # noqa: UP031
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._closed = threading.Event()

    def start(self) -> None:
        """Accept, in threads that end with the process."""
        self._socket.listen(256)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="request", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._authenticate(connection)
            while True:
                header, blob = wire.receive(connection, time.monotonic() + _IDLE_SECONDS)
                if self._closed.is_set():
                    return
                reply = wire.encode(*self._handle(header, blob))
                wire.send(connection, reply, time.monotonic() + _IDLE_SECONDS)
        except (OSError, TimeoutError, ValueError, wire.ConnectionLost):
            return
        finally:
            connection.close()
            self._slots.release()

    def _authenticate(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + _HANDSHAKE_SECONDS
        nonce = secrets.token_hex(16)
        wire.send(connection, wire.encode({"nonce": nonce}), deadline)
        size = _small_frame(_receive_exactly(connection, wire.HEADER.size, deadline))
        header = _small_header(_receive_exactly(connection, size, deadline))
        theirs = str(header.get("nonce", ""))
        if not _matches(header, _proof(self._secret, "admin", nonce, theirs)):
            raise wire.ConnectionLost("the other end does not know the secret")
        wire.send(connection, wire.encode({"proof": _proof(self._secret, "worker", theirs, nonce)}), deadline)

    def close(self) -> None:
        """Answers nothing that comes from now on, on connections that there are already, either: what a process that
        ends takes down would look as if it had ended by itself."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def _receive_exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connection.recv(count - len(data))
        if not piece:
            raise wire.ConnectionLost("the connection was closed")
        data += piece
    return data


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Link:
    """The admin's end. Each call in flight has a connection of its own; idle ones are kept."""

    def __init__(self, name: str, address: str, secret: bytes) -> None:
        self.name = name
        self.address = address
        self._kind, self._where = parse_address(address)
        self._secret = secret
        self._idle: list[Streams] = []

    async def call(self, op: str, seconds: float, blob: bytes = b"", /, **arguments: object) -> tuple[dict, bytes]:
        """Send one request and wait for its reply, at most `seconds`.

        Raises:
          BackendUnavailable: nobody (or nobody with the secret) is there, or they have gone meanwhile.
          RequestTimeout: no reply in time; the worker may still act on the request.
          RockError: what the worker reports.
        """
        streams: Streams | None = None
        reused = False
        try:
            async with asyncio.timeout(seconds):
                reused = bool(self._idle)
                streams = self._idle.pop() if reused else await self._connect()
                streams[1].write(wire.encode({"op": op, **arguments}, blob))
                await streams[1].drain()
                reply = await _receive(streams[0])
        except TimeoutError as error:
            _close(streams)
            raise RequestTimeout(f"worker {self.name}: no answer to {op} within {seconds:g} s") from error
        except (OSError, EOFError, wire.ConnectionLost) as error:
            _close(streams)
            if reused:  # all connections of a process that has ended are gone; it may have been replaced
                self.close()
            raise BackendUnavailable(f"worker {self.name} cannot be reached: {error or 'it has ended'}") from error
        except BaseException:
            _close(streams)
            raise
        if len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append(streams)
        else:
            _close(streams)
        if "error" in reply[0]:
            raise from_wire(reply[0]["error"])
        return reply

    async def _connect(self) -> Streams:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            if self._kind == "unix":
                streams = await asyncio.open_unix_connection(self._where)
            else:
                streams = await asyncio.open_connection(*self._where)
            reader, writer = streams
            try:
                theirs = str((await _receive_small(reader)).get("nonce", ""))
                nonce = secrets.token_hex(16)
                proof = _proof(self._secret, "admin", theirs, nonce)
                writer.write(wire.encode({"nonce": nonce, "proof": proof}))
                await writer.drain()
                if not _matches(await _receive_small(reader), _proof(self._secret, "worker", nonce, theirs)):
                    raise wire.ConnectionLost("who listens there does not know the secret")
            except BaseException:
                writer.close()
                raise
            return streams

    def close(self) -> None:
        """Drop idle connections."""
        while self._idle:
            _close(self._idle.pop())


async def _receive_small(reader: asyncio.StreamReader) -> dict:
    size = _small_frame(await reader.readexactly(wire.HEADER.size))
    return _small_header(await reader.readexactly(size))


async def _receive(reader: asyncio.StreamReader) -> wire.Frame:
    header, blob = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
    if header > wire.MAX_HEADER_BYTES or blob > wire.MAX_BLOB_BYTES:
        raise wire.ConnectionLost(f"oversized frame: header {header}, blob {blob} bytes")
    return json.loads(await reader.readexactly(header)), await reader.readexactly(blob)


def _close(streams: Streams | None) -> None:
    if streams is not None:
        streams[1].close()

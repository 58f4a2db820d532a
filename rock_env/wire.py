"""Frames between client and supervisor: two lengths, a JSON header, a binary blob. Standard library only."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence

HEADER = struct.Struct("!II")
MAX_HEADER_BYTES = 256 << 20
MAX_BLOB_BYTES = 2 << 30

Frame = tuple[dict, bytes]


class ConnectionLost(Exception):
    """The other end has gone, or stopped speaking the protocol."""


def encode(header: dict, blob: bytes = b"") -> bytes:
    body = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((HEADER.pack(len(body), len(blob)), body, blob))


class FrameReader:
    """Reassembles frames from whatever pieces a non-blocking socket gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Frame | None:
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return None
        header_size, blob_size = HEADER.unpack_from(buffer)
        if header_size > MAX_HEADER_BYTES or blob_size > MAX_BLOB_BYTES:
            raise ConnectionLost(f"oversized frame: header {header_size}, blob {blob_size} bytes")
        middle = HEADER.size + header_size
        end = middle + blob_size
        if len(buffer) < end:
            return None
        header = json.loads(buffer[HEADER.size : middle])
        blob = bytes(buffer[middle:end])
        del buffer[:end]
        return header, blob


def send(sock: socket.socket, data: bytes, deadline: float) -> None:
    """Send all of `data` before `deadline` (time.monotonic). Raises TimeoutError or ConnectionLost."""
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        sock.sendall(data)
    except TimeoutError:
        raise
    except OSError as error:
        raise ConnectionLost(str(error)) from error


def receive(sock: socket.socket, deadline: float) -> Frame:
    """Receive one frame before `deadline` (time.monotonic). Raises TimeoutError or ConnectionLost."""
    reader = FrameReader()
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no reply before the deadline")
        sock.settimeout(remaining)
        try:
            data = sock.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if not data:
            raise ConnectionLost("the connection was closed")
        reader.feed(data)
        frame = reader.next()
        if frame is not None:
            return frame


def send_fd(sock: socket.socket, fd: int) -> None:
    socket.send_fds(sock, [b"+"], [fd])


def receive_fds(sock: socket.socket) -> Sequence[int] | None:
    """File descriptors handed over a control socket; None at its end."""
    data, fds, _, _ = socket.recv_fds(sock, 64, 16, socket.MSG_CMSG_CLOEXEC)
    return fds if data else None

"""Port forwarding: a listener on this machine's loopback, whose connections reach a port inside a sandbox.

The sandbox gets no route: bytes travel as requests of its channel, here and over REST.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rock_env.errors import BackendUnavailable, ForwardFailed, RequestTimeout, RockError, SpecError
from rock_env.jobs import MAX_WAIT_SECONDS

if TYPE_CHECKING:
    from rock_env.backend import Backend

MAX_CONNECTIONS = 32
READ_BYTES, _LEAST_READ_BYTES = 128 << 10, 4 << 10
_WRITE_WAIT_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0  # with a backend that does not answer
_RETRY_SECONDS = 0.2
_JOIN_SECONDS = 10.0


def check_port(name: str, port: object, least: int = 1) -> int:
    if isinstance(port, bool) or not isinstance(port, int) or not least <= port <= 65535:
        raise SpecError(f"{name}: expected an integer in {least}..65535, got {port!r}")
    return port


class Forward:
    """A listener at 127.0.0.1:`local_port`; make one with `Sandbox.forward`. A context manager closes it.

    At most 32 connections at once: others are closed at once. So is one for which nobody listens inside; `failure`
    says why the last one failed.
    """

    def __init__(self, backend: Backend, sandbox: str, port: int, local_port: int) -> None:
        self.port = port
        self.failure: RockError | None = None
        self._backend, self._sandbox = backend, sandbox
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: dict[str, socket.socket] = {}
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            self._listener = socket.create_server(("127.0.0.1", local_port))
        except OSError as error:
            raise SpecError(f"local_port: {local_port} cannot be had ({error.strerror})") from error
        self.local_port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="rock-forward", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """For a program inside that speaks HTTP."""
        return f"http://127.0.0.1:{self.local_port}"

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and cut what is open. Idempotent."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._sockets.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(_JOIN_SECONDS)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="rock-forward", daemon=True).start()
            else:
                connection.close()

    # -- one connection
    def _call(self, op: str, seconds: float, blob: bytes = b"", /, **arguments: object) -> tuple[dict, bytes]:
        """One request, and again while nobody answers: each may be repeated. A bad line may carry less at once."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._backend.call(self._sandbox, op, seconds, blob, **arguments)
            except (BackendUnavailable, RequestTimeout):
                if time.monotonic() > deadline or self._closed.is_set():
                    raise
                time.sleep(_RETRY_SECONDS)
                if "max_bytes" in arguments:
                    arguments["max_bytes"] = max(_LEAST_READ_BYTES, arguments["max_bytes"] // 4)

    def _serve(self, connection: socket.socket) -> None:
        id = secrets.token_hex(8)
        with self._lock:
            self._sockets[id] = connection
        try:
            self._call("forward_open", 0.0, connection=id, port=self.port)
            inward = threading.Thread(target=self._guarded, args=(self._inward, id, connection), daemon=True)
            inward.start()
            self._guarded(self._outward, id, connection)
            inward.join()
        except RockError as error:
            self.failure = error
        finally:
            with contextlib.suppress(RockError):
                self._call("forward_close", 0.0, connection=id)
            with self._lock:
                del self._sockets[id]
                connection.close()
            self._slots.release()

    def _guarded(self, move: Callable[[str, socket.socket], None], id: str, connection: socket.socket) -> None:
        """Move bytes one way; when that fails, the other way has ended as well."""
        try:
            move(id, connection)
        except (OSError, RockError) as error:
            if isinstance(error, RockError) and not isinstance(error, ForwardFailed):
                self.failure = error
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(RockError):
                self._call("forward_close", 0.0, connection=id)

    def _outward(self, id: str, connection: socket.socket) -> None:
        """From the sandbox to whoever has connected."""
        asked = {"connection": id, "seconds": MAX_WAIT_SECONDS, "max_bytes": READ_BYTES}
        seq, end = 0, False
        while not end:
            reply, data = self._call("forward_read", MAX_WAIT_SECONDS, seq=seq, **asked)
            connection.sendall(data)
            seq, end = reply["next"], reply["is_end"]
        connection.shutdown(socket.SHUT_WR)

    def _inward(self, id: str, connection: socket.socket) -> None:
        """From whoever has connected to the sandbox."""
        at, end = 0, False
        while not end:
            data = connection.recv(READ_BYTES)
            end, sent = not data, at
            while data or end:
                arguments = {"connection": id, "close": end, "seconds": _WRITE_WAIT_SECONDS}
                reply, _ = self._call("forward_write", _WRITE_WAIT_SECONDS, data, at=sent, **arguments)
                data = data[reply["accepted"] - sent :]
                sent = reply["accepted"]
                if end:
                    break
            at = sent

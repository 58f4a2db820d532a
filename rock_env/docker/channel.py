"""Our end of a rocklet's channel: the attached standard streams of a container, as the Docker Engine API carries them.

The engine sends what a container writes in frames of its own: [stream, 0, 0, 0, length], then the data. Stream 1 is the
rocklet's output; stream 2, its errors, is kept (its end only) for messages.
"""

from __future__ import annotations

import contextlib
import io
import marshal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from rock_env import wire
from rock_env.errors import RequestTimeout, RockError, SandboxDead, from_wire

_HEADER = struct.Struct(">BxxxI")
_STDOUT, _STDERR = 1, 2
_KEPT_ERRORS = 4096
_STALLED_SECONDS = 60.0
_NOBODY = 0  # the request id of a ping
_MODULES = (
    "wire", "supervisor.faults", "supervisor.linux", "supervisor.loop", "supervisor.retention", "supervisor.journal",
    "supervisor.seccomp", "supervisor.cgroups", "supervisor.process", "supervisor.session", "supervisor.watch",
    "supervisor.jobs", "supervisor.inlet", "supervisor.tunnels", "supervisor.files", "supervisor.commands",
    "supervisor.guard", "supervisor.cell", "supervisor.operations", "supervisor.archive", "supervisor.channel",
    "supervisor.rocklet",
)  # fmt: skip
LEAST_PYTHON = (3, 9)  # that an image must have
# Reads the rocklet's modules from the standard input, so that nothing has to be in the image but a Python.
BOOT = """
import importlib.machinery, marshal, os, sys
if sys.version_info < (3, 9):
    sys.exit("the docker backend needs Python 3.9 in the image, found " + sys.version.split()[0])
def take(count):
    data = b""
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data
bundle = marshal.loads(take(int.from_bytes(take(8), "big")))
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in bundle["modules"]:
            is_package = name in ("rock_env", "rock_env.supervisor")
            return importlib.machinery.ModuleSpec(name, self, is_package=is_package)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        source, code = bundle["modules"][module.__name__]
        same = sys.implementation.cache_tag == bundle["tag"]
        exec(marshal.loads(code) if same else compile(source, module.__name__, "exec"), module.__dict__)
sys.meta_path.insert(0, Finder())
from rock_env.supervisor.rocklet import main
main()
"""


@cache
def bundle() -> bytes:
    """The rocklet's modules for BOOT: as source, and compiled for a Python like ours."""
    root = Path(__file__).resolve().parents[1]
    modules = {"rock_env": (b"", marshal.dumps(compile("", "rock_env", "exec")))}
    modules["rock_env.supervisor"] = modules["rock_env"]
    for name in _MODULES:
        source = (root / f"{name.replace('.', '/')}.py").read_bytes()
        full = f"rock_env.{name}"
        modules[full] = (source, marshal.dumps(compile(source, full, "exec", dont_inherit=True, optimize=0)))
    data = marshal.dumps({"tag": sys.implementation.cache_tag, "modules": modules}, 2)
    return len(data).to_bytes(8, "big") + data


class _Waiting:
    """A request in flight."""

    __slots__ = ("done", "error", "on_part", "reply")

    def __init__(self, on_part: Callable[[bytes], None] | None) -> None:
        self.done = threading.Event()
        self.reply: wire.Frame | None = None
        self.error: Exception | None = None
        self.on_part = on_part


class Channel:
    """Requests from any thread; one thread reads. `on_audit(event, fields)` runs before the reply that follows it.

    `stream` is the package's hold on the socket. `on_end(reason, usage)` may run twice. A ping goes out where nothing
    else has for `ping_seconds`.
    """

    def __init__(
        self,
        sock: socket.socket,
        stream: io.RawIOBase | socket.socket,
        on_audit: Callable[[str, dict], None],
        on_end: Callable[[str, dict], None],
        ping_seconds: float,
    ) -> None:
        self._socket, self._stream = sock, stream
        self._ping_seconds, self._sent = ping_seconds, float("inf")  # no ping before the modules
        self._on_audit, self._on_end = on_audit, on_end
        self._lock = threading.Lock()  # of the table
        self._sending = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._serial = 0
        self._errors = b""
        self.dead = ""
        sock.settimeout(min(_STALLED_SECONDS, ping_seconds))
        self._thread = threading.Thread(target=self._read, name="rock-docker-channel", daemon=True)
        self._thread.start()

    @property
    def errors(self) -> str:
        """The end of what the rocklet has written to its standard error."""
        return self._errors.decode(errors="replace").strip()

    def boot(self) -> None:
        """Send the rocklet its modules."""
        self._send(bundle())

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._sent = time.monotonic()
            try:
                self._socket.sendall(data)
            except OSError as error:
                self._die(f"its container does not listen any more ({error})")
                raise SandboxDead(f"sandbox has ended: {self.dead}") from error

    def call(
        self, op: str, seconds: float, blob: bytes = b"", on_part: Callable[[bytes], None] | None = None, /, **arguments
    ) -> wire.Frame:
        """Send one request and wait for its reply, at most `seconds`; `on_part` is told of each part before it."""
        waiting = _Waiting(on_part)
        with self._lock:
            if self.dead:
                raise SandboxDead(f"sandbox has ended: {self.dead}")
            self._serial += 1
            rid = self._serial
            self._waiting[rid] = waiting
        try:
            self._send(wire.encode({"rid": rid, "op": op, **arguments}, blob))
            if not waiting.done.wait(seconds):
                raise RequestTimeout(f"{op}: no answer from the container within {seconds:g} s")
        finally:
            with self._lock:
                self._waiting.pop(rid, None)
        if waiting.error is not None:
            raise waiting.error
        if waiting.reply is None:
            raise SandboxDead(f"sandbox has ended: {self.dead}")
        header, body = waiting.reply
        if "error" in header:
            raise from_wire(header["error"])
        return header, body

    # -- the reading thread
    def _read(self) -> None:
        raw, frames = bytearray(), wire.FrameReader()
        reason = "its container has ended"
        try:
            while True:
                try:
                    data = self._socket.recv(1 << 18)
                except TimeoutError:
                    self._ping()
                    continue
                if not data:
                    break
                self._ping()
                raw += data
                self._split(raw, frames)
                while (frame := frames.next()) is not None:
                    self._on_frame(*frame)
        except SandboxDead:
            pass
        except OSError as error:
            reason = f"its container cannot be reached any more ({error.strerror or error})"
        except (wire.ConnectionLost, ValueError, KeyError, TypeError) as error:
            reason = f"its container does not speak the protocol ({error})"
        self._die(reason)
        with contextlib.suppress(OSError, ValueError):
            # The HTTP response first, which holds the socket too, and could not be closed after it.
            getattr(self._stream, "_response", self._stream).close()
        self._socket.close()

    def _ping(self) -> None:
        """Show that we are still here, when nothing else has shown it for a while."""
        if time.monotonic() - self._sent >= self._ping_seconds:
            self._send(wire.encode({"rid": _NOBODY, "op": "ping"}))

    def _split(self, raw: bytearray, frames: wire.FrameReader) -> None:
        """Take the engine's complete frames out of `raw`."""
        at = 0
        while len(raw) - at >= _HEADER.size:
            stream, size = _HEADER.unpack_from(raw, at)
            end = at + _HEADER.size + size
            if len(raw) < end:
                break
            data = bytes(raw[at + _HEADER.size : end])
            if stream == _STDOUT:
                frames.feed(data)
            elif stream == _STDERR:
                self._errors = (self._errors + data)[-_KEPT_ERRORS:]
            at = end
        del raw[:at]

    def _on_frame(self, header: dict, blob: bytes) -> None:
        if "audit" in header:
            self._on_audit(header["audit"], header["fields"])
        elif "end" in header:
            self.dead = self.dead or header["end"]
            self._on_end(header["end"], header["usage"])
        else:
            with self._lock:
                waiting = self._waiting.get(header["rid"])
            if waiting is None:
                return
            if header.pop("part", False):
                try:
                    if waiting.on_part is not None and waiting.error is None:
                        waiting.on_part(blob)
                except (OSError, RockError) as error:
                    waiting.error = error if isinstance(error, RockError) else RockError(f"snapshot: {error}")
                return
            del header["rid"]
            waiting.reply = header, blob
            waiting.done.set()

    def _die(self, reason: str) -> None:
        with self._lock:
            self.dead = self.dead or reason
            waiting, self._waiting = list(self._waiting.values()), {}
        for one in waiting:
            one.done.set()
        self._on_end(self.dead, {})

    def close(self) -> None:
        """Let go of the container, whose input ends with this. Idempotent."""
        with self._lock:
            self.dead = self.dead or "it was stopped"
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(_STALLED_SECONDS)

"""The client's side of the supervisor: start it, call it from many threads, notice its death, end it."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from rock_env import wire
from rock_env.errors import BackendUnavailable, RequestTimeout, SandboxDead, SpecError, from_wire
from rock_env.supervisor.retention import Retention

_START_SECONDS = 30.0
_END_SECONDS = 10.0
_IDLE_CONNECTIONS = 128
# Imports the supervisor without rock_env/__init__.py, which would load the whole SDK: users wait for the start-up.
_BOOT = (
    "import sys, types\n"
    "package = types.ModuleType('rock_env'); package.__path__ = [sys.argv[1]]; sys.modules['rock_env'] = package\n"
    "from rock_env.supervisor.main import main\n"
    "numbers = [int(text) for text in sys.argv[7:]]\n"
    "main(int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]) or None, sys.argv[6], numbers[0], numbers[1:])\n"
)


def state_directory() -> str:
    """Where supervisors keep their (empty) mount points: $ROCK_STATE_DIR, else a folder of the temporary directory."""
    chosen = os.environ.get("ROCK_STATE_DIR")
    base = chosen or tempfile.gettempdir()
    if not chosen and not _traversable(base):
        base = "/tmp"
    if not _traversable(base):
        raise BackendUnavailable(
            f"state directory {base}: every parent must be searchable by others (chmod o+x), or set ROCK_STATE_DIR"
        )
    directory = os.path.join(os.path.abspath(base), f"rock-{os.getuid()}")
    try:
        os.makedirs(directory, mode=0o711, exist_ok=True)
        status = os.stat(directory)
    except OSError as error:
        raise BackendUnavailable(f"state directory {directory}: {error.strerror}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BackendUnavailable(f"state directory {directory}: not ours alone; set ROCK_STATE_DIR to another place")
    return directory


def _traversable(path: str) -> bool:
    path = os.path.abspath(path)
    while True:
        try:
            if not os.stat(path).st_mode & 0o001:
                return False
        except OSError:
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


def audit_directory() -> str:
    """Where new logs go: $ROCK_AUDIT_DIR, else rock/audit in $XDG_STATE_HOME (~/.local/state), else in /tmp."""
    chosen = os.environ.get("ROCK_AUDIT_DIR")
    if chosen:
        return os.path.abspath(chosen)
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    existing = state
    while not os.path.exists(existing) and existing not in ("", "/"):
        existing = os.path.dirname(existing)
    if not os.path.isabs(state) or not os.access(existing, os.W_OK):
        fallback = os.path.join(tempfile.gettempdir(), f"rock-audit-{os.getuid()}")
        if os.path.lexists(fallback) and os.lstat(fallback).st_uid != os.getuid():
            raise BackendUnavailable(f"audit directory {fallback}: not ours; set ROCK_AUDIT_DIR to another place")
        return fallback
    return os.path.join(state, "rock", "audit")


def _number(name: str, default: int, unit: str, minimum: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or int(text) < minimum:
        raise SpecError(f"{name}: expected a number of {unit} >= {minimum}, got {text!r}")
    return int(text)


def store_bytes() -> int:
    """$ROCK_STORE_BYTES: a bound on the memory that snapshots may take; 0 (default) is half of the machine's."""
    return _number("ROCK_STORE_BYTES", 0, "bytes")


def audit_retention() -> Retention:
    """$ROCK_AUDIT_MAX_FILES and $ROCK_AUDIT_MAX_BYTES: what the audit directory may hold (500 logs, 1 GiB)."""
    return Retention(
        _number("ROCK_AUDIT_MAX_FILES", 500, "logs", 1), _number("ROCK_AUDIT_MAX_BYTES", 1 << 30, "bytes", 1)
    )


class Supervisor:
    """One supervisor process. `call` is thread-safe: each call in flight has a connection of its own."""

    def __init__(self, bwrap: str) -> None:
        self.pid = os.getpid()
        self._dead = ""
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        directory = state_directory()
        self._control, theirs = socket.socketpair()
        package = os.path.dirname(os.path.abspath(__file__))
        arguments = [package, str(theirs.fileno()), bwrap, directory, str(store_bytes()), audit_directory()]
        arguments += [str(number) for number in (self.pid, *audit_retention())]
        keep = ("LD_LIBRARY_PATH",)  # some interpreters need it to start
        env = {"PATH": os.defpath, "LANG": "C.UTF-8", **{k: os.environ[k] for k in keep if k in os.environ}}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is the client's to handle
                env=env,
                cwd="/",
            )
        except OSError as error:
            self._control.close()
            raise BackendUnavailable(f"cannot start the supervisor with {sys.executable}: {error}") from error
        finally:
            theirs.close()
        atexit.register(self.close)
        self.report = self._greet()

    def _greet(self) -> dict:
        try:
            header, _ = wire.receive(self._control, time.monotonic() + _START_SECONDS)
        except (TimeoutError, wire.ConnectionLost) as error:
            self.close()
            raise BackendUnavailable(f"the supervisor did not start: {error}") from error
        if "error" in header:
            self.close()
            raise from_wire(header["error"])
        return header["ready"]

    @property
    def is_dead(self) -> bool:
        return bool(self._dead) or self.pid != os.getpid()

    def _connection(self, deadline: float) -> socket.socket:
        if self.pid != os.getpid():
            raise SandboxDead("this process is a fork: sandboxes belong to the process that started them")
        with self._lock:
            if self._dead:
                raise SandboxDead(self._dead)
            if self._idle:
                return self._idle.pop()
            ours, theirs = socket.socketpair()
            try:
                self._control.settimeout(max(0.001, deadline - time.monotonic()))
                wire.send_fd(self._control, theirs.fileno())
            except OSError as error:
                ours.close()
                self._dead = f"the supervisor has ended ({error})"
                raise SandboxDead(self._dead) from error
            finally:
                theirs.close()
            return ours

    def call(self, op: str, seconds: float, blob: bytes = b"", /, **arguments: object) -> tuple[dict, bytes]:
        """Send one request and wait for its reply, at most `seconds`."""
        deadline = time.monotonic() + seconds
        data = wire.encode({"op": op, **arguments}, blob)
        connection = self._connection(deadline)
        try:
            wire.send(connection, data, deadline)
            header, body = wire.receive(connection, deadline)
        except wire.ConnectionLost as error:
            connection.close()
            self._dead = self._dead or f"the supervisor has ended ({error})"
            raise SandboxDead(self._dead) from error
        except TimeoutError as error:
            connection.close()
            raise RequestTimeout(f"{op}: no answer from the supervisor within {seconds:g} s") from error
        except BaseException:  # e.g. Ctrl-C: the reply may still come, so this connection is of no more use
            connection.close()
            raise
        with self._lock:
            if len(self._idle) < _IDLE_CONNECTIONS and not self._dead:
                self._idle.append(connection)
            else:
                connection.close()
        if "error" in header:
            raise from_wire(header["error"])
        return header, body

    def close(self) -> None:
        """Say goodbye: the supervisor destroys every sandbox and exits. Idempotent."""
        atexit.unregister(self.close)
        self._dead = self._dead or "the supervisor was closed"
        with self._lock:
            if self.pid == os.getpid():
                with contextlib.suppress(OSError):  # also ends copies that a forked child may hold
                    self._control.shutdown(socket.SHUT_RDWR)
            for connection in (*self._idle, self._control):
                connection.close()
            self._idle.clear()
        if self.pid != os.getpid():
            return
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    @property
    def keeper_pid(self) -> int:
        return self._process.pid

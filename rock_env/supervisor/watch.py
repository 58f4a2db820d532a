"""What sandboxed programs try, as the kernel tells it: seccomp user notification.

A watched filter (rock_env.supervisor.seccomp) stops two kinds of calls until we have looked at them: those it denies,
which we record and deny, and those that name an address of a network namespace, which we record and let continue: a
program could exchange the address after our look, so nothing is decided by it. What keeps a sandbox in is that
namespace. Calls are answered one after another, at a bounded rate per sandbox: a program that makes a million waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable

from rock_env.supervisor import linux, seccomp
from rock_env.supervisor.journal import Notes
from rock_env.supervisor.loop import Loop

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # id, thread, flags; number, architecture, instruction, arguments
_RESPONSE = struct.Struct("=QqiI")  # id, value, error, flags
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_BURST, _PER_SECOND = 1000, 200.0
_AT_ONCE = 32  # calls answered before other work gets its turn
_MESSAGE = struct.Struct("=QI")  # the start of struct msghdr: address, its length
_MESSAGE_BYTES, _MESSAGES = 64, 16
_ADDRESS_BYTES = 128
Address = tuple[str, int]  # numeric host and port; or "@name" of an abstract unix socket and 0


def parse_address(data: bytes, sends: bool) -> Address | None:
    """The address in a struct sockaddr that belongs to a network namespace: internet, or an abstract unix socket's.

    None for other families. To `sends`, Linux reads AF_UNSPEC as IPv4.
    """
    if len(data) < 3:
        return None
    family = struct.unpack_from("=H", data)[0]
    if family == socket.AF_UNIX and data[2] == 0:
        return "@" + ascii(data[3:].rstrip(b"\0").decode("latin-1"))[1:-1], 0
    if len(data) < 8:
        return None
    port = struct.unpack_from("!H", data, 2)[0]
    if family == socket.AF_INET or (family == socket.AF_UNSPEC and sends):
        return socket.inet_ntop(socket.AF_INET, data[4:8]), port
    if family == socket.AF_INET6 and len(data) >= 24:
        return socket.inet_ntop(socket.AF_INET6, data[8:24]), port
    return None


def is_loopback(host: str) -> bool:
    """Whether a numeric address stays on `lo`."""
    return host.startswith(("127.", "::ffff:127.")) or host == "::1"


class Watcher:
    """Answers for the processes of one sandbox; each command brings a listener of its own."""

    def __init__(self, loop: Loop, notes: Notes) -> None:
        self._loop = loop
        self._notes = notes
        self._names = seccomp.names(linux.MACHINE)
        self._listeners: set[int] = set()
        self._tokens, self._refilled = float(_BURST), time.monotonic()

    def add(self, listener: int) -> None:
        """Take over a listener."""
        self._listeners.add(listener)
        self._listen(listener)

    def _listen(self, listener: int) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, lambda: self._on_readable(listener))

    def close(self) -> None:
        for listener in list(self._listeners):
            self._drop(listener)

    def _drop(self, listener: int) -> None:
        self._loop.remove_reader(listener)
        self._listeners.discard(listener)
        os.close(listener)

    def _on_readable(self, listener: int) -> None:
        for _ in range(_AT_ONCE):
            poll = select.poll()  # a receive without a call to receive would block
            poll.register(listener, select.POLLIN)
            state = dict(poll.poll(0)).get(listener, 0)
            if not state & select.POLLIN:
                if state & (select.POLLHUP | select.POLLERR):  # the last process of this command has ended
                    self._drop(listener)
                return
            if not self._take_token():
                self._loop.remove_reader(listener)
                self._loop.call_at(time.monotonic() + 0.1, lambda: self._listen(listener))
                return
            self._answer(listener)

    def _take_token(self) -> bool:
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._refilled) * _PER_SECOND)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _answer(self, listener: int) -> None:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # it was killed meanwhile
                return
            raise
        id, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        name = self._names.get(number, str(number))
        error = seccomp.error_of(name, tuple(arguments))
        if error:
            self._note_denied(name, arguments, thread)
        else:
            self._note_addresses(name, arguments, thread)
        response = _RESPONSE.pack(id, 0, -error, 0 if error else _CONTINUE)
        with contextlib.suppress(OSError):  # ENOENT: it was killed meanwhile
            fcntl.ioctl(listener, _SEND, response)

    def _note_denied(self, name: str, arguments: list[int], thread: int) -> None:
        detail = {}
        if name == "socket":
            detail = {"family": arguments[0] & 0xFFFFFFFF, "type": arguments[1] & 0xF}
        self._notes.note("syscall_denied", syscall=name, **detail, _once=_program(thread))

    def _note_addresses(self, name: str, arguments: list[int], thread: int) -> None:
        try:
            with _Memory(thread) as read:
                found = _addresses(name, arguments, read)
        except PermissionError:  # a program that hides its memory from us, where we have no privileges
            self._notes.note("network_call", syscall=name, scope="hidden", _once=_program(thread))
            return
        except OSError:  # what it points to is no memory, or it was killed meanwhile
            return
        for host, port in found:
            scope = "abstract" if host.startswith("@") else "loopback" if is_loopback(host) else "outside"
            self._notes.note("network_call", syscall=name, host=host, port=port, scope=scope, _once=_program(thread))


def _addresses(name: str, arguments: list[int], read: Callable[[int, int], bytes]) -> set[Address]:
    if name in ("connect", "bind", "sendto"):
        at, length = (arguments[4], arguments[5]) if name == "sendto" else (arguments[1], arguments[2])
        places = [(at, length)]
    else:
        count = min(arguments[2] & 0xFFFFFFFF, _MESSAGES) if name == "sendmmsg" else 1
        places = [
            _MESSAGE.unpack(data)
            for i in range(count)
            if len(data := read(arguments[1] + i * _MESSAGE_BYTES, _MESSAGE.size)) == _MESSAGE.size
        ]
    found = set()
    for at, length in places:
        if at and length & 0xFFFFFFFF:
            found.add(parse_address(read(at, min(length & 0xFFFFFFFF, _ADDRESS_BYTES)), name.startswith("send")))
    return found - {None}


class _Memory:
    """Reads another process's memory: `with _Memory(thread) as read: read(address, size)`. Raises OSError."""

    def __init__(self, thread: int) -> None:
        self._fd = os.open(f"/proc/{thread}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Callable[[int, int], bytes]:
        return self._read

    def _read(self, address: int, size: int) -> bytes:
        if address > 1 << 62:
            raise OSError(errno.EFAULT, "not an address of a process")
        return os.pread(self._fd, size, address)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _program(thread: int) -> dict[str, object]:
    """The name that a thread gives itself, for a record."""
    try:
        with open(f"/proc/{thread}/comm", "rb") as file:
            return {"program": file.read(64).strip().decode(errors="replace")}
    except OSError:
        return {}

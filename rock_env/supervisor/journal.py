"""The audit log's writer: JSON lines, each of which carries the SHA-256 of the line before it.

Beside LOG.jsonl lies LOG.jsonl.head: how many records there are, and the last one's hash. A cut at the end disagrees
with it. When what is durable: a record has been handed to the kernel (`write`) before the act it records goes on, so no
`kill -9` loses it; it is on the disk (`fdatasync`, by a child, so that a slow disk delays nobody) about a second later.
Standard library only, and little of it: the supervisor has to start fast. The reader is rock_env.audit.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from rock_env.supervisor.retention import HEAD_SUFFIX, Retention, lock, prune

if TYPE_CHECKING:
    from rock_env.supervisor.loop import Loop

GENESIS = "0" * 64  # what the first record carries
SYNC_SECONDS = 1.0
_FLUSH_SECONDS = 10.0
_DISTINCT_NOTES = 500  # per sandbox; beyond them, only the number of others is recorded


def digest(line: bytes) -> str:
    """A record's hash: SHA-256 of its line without the newline."""
    return hashlib.sha256(line).hexdigest()


def head_text(records: int, head: str) -> bytes:
    """The head file's content. Always of one length, so that rewriting it in place leaves no rest."""
    return f"{records:020d} {head}\n".encode()


class Recorder(Protocol):
    """Takes records, to write them or to send them to whoever writes."""

    def record(self, event: str, **fields: object) -> None: ...


class AuditLog:
    """Appends records. One that cannot be written is counted, and `fault` says why: nothing may start or connect.

    A new log removes old ones beyond `retention`, and records which. `loop` is None where a subclass synchronises.
    """

    def __init__(self, loop: Loop | None, directory: str, keeper: int, retention: Retention) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._loop = loop
        self._fd, self.path = _create(directory, f"{stamp}-{keeper}")
        self._head_fd = os.open(self.path + HEAD_SUFFIX, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._records, self._head, self._size = 0, GENESIS, 0
        self._lost = 0
        self._sync_pending = False
        self.fault = ""
        self.on_fault: Callable[[], None] = lambda: None
        self._removed = prune(directory, retention)

    def open(self, **fields: object) -> None:
        """Write the first record, and one for each log that had to go."""
        self.record("log_opened", host=os.uname().nodename, **fields)
        for removed in self._removed:
            self.record("log_removed", **removed)

    def record(self, event: str, **fields: object) -> None:
        """Append one record: its number, the time in seconds since 1970, the event, its fields, the previous hash."""
        if self._lost:
            fields["records_lost_before"] = self._lost
        body = {"n": self._records, "time": round(time.time(), 6), "event": event, **fields, "previous": self._head}
        line = json.dumps(body, separators=(",", ":")).encode()
        try:
            if os.write(self._fd, line + b"\n") != len(line) + 1:
                os.ftruncate(self._fd, self._size)
                raise OSError("the disk is full")
        except OSError as error:
            self._lost += 1
            self.fault = f"audit log {self.path}: {error}"
            self.on_fault()
            return
        self._records, self._head, self._size = self._records + 1, digest(line), self._size + len(line) + 1
        self._lost, self.fault = 0, ""
        os.pwrite(self._head_fd, head_text(self._records, self._head), 0)
        if not self._sync_pending:
            self._sync_pending = True
            self._schedule(SYNC_SECONDS)

    def _schedule(self, seconds: float) -> None:
        """See to it that the file is flushed to the disk in `seconds`."""
        self._loop.call_at(time.monotonic() + seconds, self._sync)

    def _sync(self) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                os.fdatasync(self._fd)
                os.fdatasync(self._head_fd)
            finally:
                os._exit(0)
        self._loop.on_exit(pid, self._on_synced)

    def _on_synced(self, status: int) -> None:
        self._sync_pending = False

    def close(self) -> None:
        """Write the last record, wait for the disk, and keep no descriptor."""
        self.record("log_closed")
        for fd in (self._fd, self._head_fd):
            os.fdatasync(fd)
            os.close(fd)


def _create(directory: str, stem: str) -> tuple[int, str]:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for number in range(1000):
        path = os.path.join(directory, f"audit-{stem}{f'-{number}' if number else ''}.jsonl")
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            continue
        if lock(fd) and os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # another writer has just taken it for an old one and removed it
    raise FileExistsError(f"{directory}: a thousand audit logs of this second")


class Notes:
    """What one sandbox did, recorded at its first occurrence; repeats are counted and recorded every ten seconds.

    Bounds the log: a program that tries the same thing a million times, or a million things, writes a few lines.
    """

    def __init__(self, log: Recorder, loop: Loop, sandbox: str) -> None:
        self._log = log
        self._loop = loop
        self._sandbox = sandbox
        self._repeats: dict[tuple, int] = {}
        self._others = 0
        self._timer = None

    def note(self, event: str, /, _once: dict | None = None, **fields: str | int | float | bool) -> None:
        """Record an event; what equals an earlier one in `fields` is a repeat. `_once` is told of the first only."""
        key = (event, *fields.items())
        if key in self._repeats:
            self._repeats[key] += 1
        elif len(self._repeats) < _DISTINCT_NOTES:
            self._repeats[key] = 0
            self._log.record(event, sandbox=self._sandbox, **fields, **(_once or {}))
            return
        else:
            self._others += 1
        if self._timer is None:
            self._timer = self._loop.call_at(time.monotonic() + _FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Record the counts since the last flush."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for (event, *fields), count in self._repeats.items():
            if count:
                self._log.record(event, sandbox=self._sandbox, **dict(fields), repeats=count)
        self._repeats = dict.fromkeys(self._repeats, 0)
        if self._others:
            self._log.record("other_events", sandbox=self._sandbox, repeats=self._others)
            self._others = 0

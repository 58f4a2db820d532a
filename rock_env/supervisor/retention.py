"""How many audit logs are kept: a writer that starts removes the oldest of a folder beyond a number and a size.

A log that is still being written is never removed, whatever its age: its writer holds a lock (flock) on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import NamedTuple

HEAD_SUFFIX = ".head"
_PREFIX, _SUFFIX = "audit-", ".jsonl"


class Retention(NamedTuple):
    """The most that a folder may hold: logs, and bytes of all of them together (their heads not counted)."""

    files: int
    size: int


def lock(fd: int) -> bool:
    """Mark an open log as in use, for as long as any copy of the descriptor is open; False if another holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def prune(directory: str, limit: Retention) -> list[dict[str, str]]:
    """Remove the oldest logs that nobody writes until `limit` holds. Returns [{"log": name, "head": its head file}]."""
    logs: list[tuple[int, str, int]] = []  # time, name, bytes
    for entry in os.scandir(directory):
        if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                logs.append((status.st_mtime_ns, entry.name, status.st_size))
    count, size = len(logs), sum(bytes for _, _, bytes in logs)
    removed = []
    for _, name, bytes in sorted(logs):
        if count <= limit.files and size <= limit.size:
            break
        head = _remove(os.path.join(directory, name))
        if head is not None:
            count, size = count - 1, size - bytes
            removed.append({"log": name, "head": head})
    return removed


def _remove(path: str) -> str | None:
    """Remove a log and its head; the head's text, or None if the log is in use or gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not lock(fd):
            return None
        head = ""
        with contextlib.suppress(OSError), open(path + HEAD_SUFFIX) as file:
            head = file.read(200).strip()
        os.unlink(path)  # first: a log without a head would look as if somebody had tampered with it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + HEAD_SUFFIX)
        return head
    except FileNotFoundError:  # another writer was faster
        return None
    finally:
        os.close(fd)

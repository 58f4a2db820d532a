"""The audit log of sandboxes in containers, written by the process that uses them: by any of its threads."""

from __future__ import annotations

import os
import threading

from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.retention import Retention


class ThreadedAuditLog(AuditLog):
    """As the supervisor's, but a thread of its own flushes the file to the disk."""

    def __init__(self, directory: str, retention: Retention) -> None:
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._closed = False
        super().__init__(None, directory, os.getpid(), retention)

    def record(self, event: str, **fields: object) -> None:
        with self._lock:
            if not self._closed:
                super().record(event, **fields)

    def _schedule(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._flush)
        self._timer.daemon = True
        self._timer.start()

    def _flush(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._sync_pending = False
            fds = [os.dup(fd) for fd in (self._fd, self._head_fd)]
        try:
            for fd in fds:
                os.fdatasync(fd)
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        """Write the last record, wait for the disk. Idempotent."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if not self._closed:
                super().close()
            self._closed = True

"""The worker's process: `rock worker`, and what an admin starts for itself."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

from rock_env.admin.link import LinkServer, read_secret
from rock_env.admin.worker import Worker
from rock_env.errors import BackendUnavailable, RockError

ORPHAN_SECONDS = 120.0
_LOCK_ATTEMPTS = 10


def serve(name: str, address: str, secret_file: str, lock_file: str | None, orphan_seconds: float) -> None:
    """Serve until told to end, by a signal, by the admin, or by having been left alone.

    Args:
      lock_file: held (flock) for this process's life, and tells its pid; a second worker with the same one refuses.
    """
    secret = read_secret(secret_file)
    if lock_file is not None:
        _take(lock_file)
    done = threading.Event()
    worker = Worker(name, orphan_seconds, done.set)
    server = LinkServer(address, secret, worker.handle)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    threading.Thread(target=worker.run, name="reaper", daemon=True).start()
    server.start()
    print(f"worker {name}: serving at {server.address}", flush=True)
    while not done.wait(3600):
        pass
    server.close()
    print(f"worker {name}: ended", flush=True)
    # Backends end their sandboxes at the interpreter's exit.


def _take(lock_file: str) -> None:
    fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for attempt in range(_LOCK_ATTEMPTS):  # `holder` may hold it for an instant
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if attempt == _LOCK_ATTEMPTS - 1:
                raise BackendUnavailable(f"{lock_file}: another worker holds it") from error
            time.sleep(0.05)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    # The descriptor stays open on purpose: the lock ends with the process.


def holder(lock_file: Path) -> int | None:
    """The pid of the worker that holds the lock; None when nobody does."""
    try:
        fd = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(fd, 32, 0).strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(fd)


if __name__ == "__main__":  # as an admin starts it: NAME ADDRESS SECRET_FILE LOCK_FILE ORPHAN_SECONDS
    try:
        serve(*sys.argv[1:5], float(sys.argv[5]))
    except RockError as problem:
        sys.exit(f"worker: {problem}")

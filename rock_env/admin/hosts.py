"""Workers as the admin sees them: which there are, who has room, and the life of those that the admin starts itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rock_env.admin.link import Link, read_secret
from rock_env.admin.worker_main import holder
from rock_env.errors import BackendUnavailable, NoCapacity, RockError

_SPAWN_SECONDS = 30.0
_KILL_SECONDS = 10.0
_PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "XDG_STATE_HOME")
_PASSED_ON_ROCK = ("ROCK_BWRAP", "ROCK_STATE_DIR", "ROCK_AUDIT_DIR", "ROCK_STORE_BYTES", "DOCKER_HOST")


class WorkerLink(Protocol):
    """How a worker is reached: see rock_env.admin.link.Link."""

    async def call(self, op: str, seconds: float, blob: bytes = b"", /, **arguments: object) -> tuple[dict, bytes]: ...

    def close(self) -> None: ...


class WorkerProcess(Protocol):
    """A worker that the admin starts, ends and replaces itself: see LocalWorker."""

    async def is_dead(self) -> bool: ...

    async def bring_up(self, link: WorkerLink) -> dict: ...

    async def kill(self) -> None: ...

    async def wait_end(self, seconds: float) -> bool: ...


@dataclass
class Host:
    """One worker. `process` None: somebody else starts it. `incarnation` None: it has not answered yet, or is gone."""

    name: str
    link: WorkerLink
    capacity: int
    process: WorkerProcess | None = None
    incarnation: str | None = None
    pid: int | None = None  # on its own machine
    used: int = 0
    silent_since: float | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_up(self) -> bool:
        return self.incarnation is not None and self.silent_since is None

    @property
    def has_room(self) -> bool:
        return self.is_up and self.used < self.capacity


def write_private(path: Path, text: str) -> None:
    """Write a file that only we can read, atomically."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class LocalWorker:
    """A worker process on this machine, in a directory of its own. Whoever holds the directory's lock is it."""

    def __init__(self, directory: Path, orphan_seconds: float) -> None:
        self.name = directory.name
        self.directory = directory
        self._orphan_seconds = orphan_seconds
        self._process: subprocess.Popen | None = None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._secret = directory / "secret"
        if not self._secret.exists():
            write_private(self._secret, secrets.token_hex(32))

    @property
    def address(self) -> str:
        return f"unix:{self.directory / 'socket'}"

    def link(self) -> Link:
        return Link(self.name, self.address, read_secret(self._secret))

    @property
    def pid(self) -> int | None:
        """Of the living process, whoever started it."""
        if self._process is not None:
            self._process.poll()  # reaps it
        return holder(self.directory / "lock")

    async def is_dead(self) -> bool:
        return self.pid is None

    def spawn(self) -> None:
        """Start a process, in a session of its own: it outlives the admin."""
        env = {k: v for k, v in os.environ.items() if k in _PASSED_ON or k in _PASSED_ON_ROCK}
        arguments = [self.name, self.address, str(self._secret), str(self.directory / "lock")]
        command = [sys.executable, "-m", "rock_env.admin.worker_main", *arguments, str(self._orphan_seconds)]
        log = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        finally:
            os.close(log)

    async def bring_up(self, link: WorkerLink) -> dict:
        """Find the living process, or start one, and wait until it answers."""
        deadline = time.monotonic() + _SPAWN_SECONDS
        if self.pid is None:
            self.spawn()
        while True:
            try:
                return (await link.call("hello", 5.0))[0]
            except RockError as error:
                ended = self._process is not None and self._process.poll() is not None and self.pid is None
                if ended or time.monotonic() > deadline:
                    why = f"see {self.directory / 'log'}"
                    raise BackendUnavailable(f"worker {self.name} does not start ({error}); {why}") from error
            await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """SIGKILL, and wait for the end; its sandboxes go with it."""
        pid = self.pid
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                if self.pid == pid:  # still it, and not somebody with the same number
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)
        await self.wait_end(_KILL_SECONDS)

    async def wait_end(self, seconds: float) -> bool:
        """Whether it has ended, after at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self.pid is not None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, 5.0)
        return True


class Scheduler:
    """Places sandboxes: on the worker with the most room, and when there is none, in turn by tenant as room comes."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self._waiting: dict[str, deque[tuple[asyncio.Future[Host], str | None]]] = {}

    async def acquire(self, tenant: str, seconds: float, pinned: str | None = None) -> Host:
        """A place on a worker (on `pinned`, if given), to be given back by `release`.

        Raises:
          NoCapacity: there was none within `seconds`.
        """
        if not self._waiting:
            host = self._pick(pinned)
            if host is not None:
                host.used += 1
                return host
        turn: asyncio.Future[Host] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append((turn, pinned))
        self.serve()
        try:
            async with asyncio.timeout(seconds):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(turn.result())
            self._forget(tenant, turn)
            if isinstance(error, TimeoutError):
                where = f"worker {pinned}" if pinned else "any worker"
                raise NoCapacity(f"no room on {where} within {seconds:g} s") from error
            raise

    def _pick(self, pinned: str | None) -> Host | None:
        with_room = [h for h in self.hosts.values() if h.has_room and pinned in (None, h.name)]
        return max(with_room, key=lambda host: host.capacity - host.used, default=None)

    def release(self, host: Host) -> None:
        host.used -= 1
        self.serve()

    def serve(self) -> None:
        """Give places to those who wait: one for each tenant in turn, its first request that some worker can take."""
        progress = True
        while progress:
            progress = False
            for tenant in list(self._waiting):
                progress = self._serve_one(tenant) or progress

    def _serve_one(self, tenant: str) -> bool:
        queue = self._waiting[tenant]
        served = False
        for turn, pinned in list(queue):
            host = None if turn.done() else self._pick(pinned)
            if host is not None:
                host.used += 1
                turn.set_result(host)
                served = True
            if served or turn.done():
                queue.remove((turn, pinned))
            if served:
                break
        if served or not queue:
            del self._waiting[tenant]
        if served and queue:
            self._waiting[tenant] = queue  # at the end: the others come first
        return served

    def _forget(self, tenant: str, turn: asyncio.Future[Host]) -> None:
        queue = self._waiting.get(tenant)
        if queue is not None:
            for entry in [entry for entry in queue if entry[0] is turn]:
                queue.remove(entry)
            if not queue:
                del self._waiting[tenant]

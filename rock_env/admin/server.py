"""The admin's process: its directory, its keys, its workers, and the HTTP server over them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from rock_env.admin.app import create_app
from rock_env.admin.auth import ADMIN_TENANT, Redact, new_key
from rock_env.admin.control import ControlPlane, Record
from rock_env.admin.database import Database
from rock_env.admin.gem import Environments
from rock_env.admin.hosts import Host, write_private
from rock_env.admin.hub_routes import HubStore
from rock_env.admin.link import Link, read_secret
from rock_env.admin.models import Tenant
from rock_env.admin.ray_workers import RayFleet
from rock_env.admin.reconcile import Reconciler, local_hosts
from rock_env.admin.worker_main import ORPHAN_SECONDS
from rock_env.errors import BackendUnavailable, RockError, SpecError
from rock_env.model_proxy.settings import check_url

log = logging.getLogger("rock.admin")
_STOP_SECONDS = 60.0
_STOPS_AT_ONCE = 64


@dataclass(frozen=True)
class AdminConfig:
    """How an admin runs.

    Attributes:
      directory: its own: database, admin's key, workers' secrets and logs. One admin at a time.
      host, port: where it listens; other than loopback only with TLS. Port 0: any; see the file `url`.
      workers: processes on this machine. `capacity`: sandboxes on each.
      joined: workers started elsewhere (`rock worker`): (name, address, secret file).
      ray: address of a Ray cluster, each node of which gets a worker.
      database: a SQLAlchemy URL; None: SQLite in `directory`.
      images: name that tenants use -> what the backend takes; "": what it has without an image.
      models: name that tenants use -> (URL of an OpenAI-compatible server on this machine's loopback, its API key).
      certificate, private_key: PEM files, for TLS.
      reconcile_seconds, worker_seconds: see Reconciler. orphan_seconds: see Worker.
      hub_bytes: what each tenant may keep in the hub; None: no bound.
    """

    directory: Path
    host: str = "127.0.0.1"
    port: int = 7600
    workers: int = 1
    capacity: int = 1000
    joined: tuple[tuple[str, str, str], ...] = ()
    ray: str | None = None
    database: str | None = None
    images: dict[str, str] = field(default_factory=dict)
    backends: tuple[str, ...] = ("bubblewrap",)
    models: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    certificate: Path | None = None
    private_key: Path | None = None
    reconcile_seconds: float = 2.0
    worker_seconds: float = 30.0
    orphan_seconds: float = ORPHAN_SECONDS
    hub_bytes: int | None = 4 << 30

    def __post_init__(self) -> None:
        try:
            is_loopback = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError as error:
            raise SpecError(f"host: expected an address or localhost, got {self.host!r}") from error
        if (self.certificate is None) != (self.private_key is None):
            raise SpecError("TLS: expected both a certificate and a private key, or neither")
        if not is_loopback and self.certificate is None:
            raise SpecError(f"host: {self.host} is not loopback: keys would travel in the clear; give a certificate")
        for url, _ in self.models.values():
            check_url(url)
        for name in ("workers", "capacity", "port"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}: expected a number >= 0, got {getattr(self, name)}")

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.directory / 'admin.db'}"


def default_directory() -> Path:
    """$ROCK_ADMIN_DIR, else rock/admin in $XDG_STATE_HOME (~/.local/state)."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(os.environ.get("ROCK_ADMIN_DIR") or os.path.join(state, "rock", "admin"))


def lock_directory(directory: Path) -> int:
    """Make the directory ours for this process's life."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(directory, 0o700)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackendUnavailable(f"directory {directory}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise BackendUnavailable(f"directory {directory}: another admin uses it") from error
    return fd


class Admin:
    """Everything of one admin but the HTTP server. `prepare`: see WorkerActor."""

    def __init__(self, config: AdminConfig, prepare: Callable[[], None] | None = None) -> None:
        self.config = config
        self.fleet: RayFleet | None = None
        if config.ray is not None:
            self.fleet = RayFleet(config.ray, config.directory, config.capacity, config.orphan_seconds, prepare)
        self.control = ControlPlane(Database(config.database_url), config.images, config.backends, config.models)
        self.reconciler = Reconciler(self.control, config.reconcile_seconds, config.worker_seconds, self.fleet)
        self.hub = HubStore(config.directory / "hub", config.hub_bytes)
        self.environments = Environments(self.control, self.hub)

    async def start(self) -> None:
        config, control = self.config, self.control
        hosts = local_hosts(config.directory / "workers", config.workers, config.capacity, config.orphan_seconds)
        hosts += [Host(n, Link(n, where, read_secret(file)), config.capacity) for n, where, file in config.joined]
        if self.fleet is not None:
            await self.fleet.connect()
            hosts += [self.fleet.host(name, node) for name, node in (await self.fleet.nodes()).items()]
        for host in hosts:
            if host.name in control.scheduler.hosts:
                raise SpecError(f"worker {host.name!r}: expected each name once")
            control.scheduler.hosts[host.name] = host
        await self.reconciler.load()
        await self._ensure_admin()
        await self.reconciler.start()
        self.environments.start()

    async def _ensure_admin(self) -> None:
        """At the first start: the admin's tenant, and a key in the file `admin.key`."""
        control, path = self.control, self.config.directory / "admin.key"
        if ADMIN_TENANT not in control.tenants:
            bounds = dict.fromkeys(("max_sandboxes", "max_memory_bytes", "max_cpus", "max_snapshots"))
            tenant = Tenant(name=ADMIN_TENANT, max_lifetime_seconds=7 * 86400.0, created_at=time.time(), **bounds)
            await control.db(control.database.put_tenant, tenant, new=True)
            control.tenants[ADMIN_TENANT] = tenant
        if not any(key.sandbox is None for key in control.keyring.of(ADMIN_TENANT)) or not path.exists():
            key, credential = new_key(ADMIN_TENANT, "first", is_admin=True)
            await control.db(control.database.add_key, key)
            control.keyring.add(key)
            write_private(path, credential + "\n")
            log.info("the admin's key is in %s", path)

    async def stop(self) -> None:
        """In order: end every environment, every sandbox and every worker of ours, and leave nothing."""
        await self.environments.stop()
        await self.reconciler.close()
        control, turns = self.control, asyncio.Semaphore(_STOPS_AT_ONCE)

        async def stop(record: Record) -> None:
            async with turns:
                await control.stop(record, "the admin was stopped")

        stops = [asyncio.create_task(stop(record)) for record in list(control.live.values())]
        for row in list(control.snapshots.values()):
            await control.drop_snapshot(row, "lost")
        if stops:
            await asyncio.wait(stops, timeout=_STOP_SECONDS)
        for host in control.scheduler.hosts.values():
            if host.process is not None and not await host.process.is_dead():
                with contextlib.suppress(RockError):
                    await host.link.call("shutdown", 5.0)
                if not await host.process.wait_end(20.0):
                    await host.process.kill()
            host.link.close()
        if self.fleet is not None:
            await self.fleet.close()
        control.close()


class _Server(uvicorn.Server):
    """uvicorn, which handles signals itself; `ready` is called with the port once it listens."""

    def __init__(self, config: uvicorn.Config, directory: Path, scheme: str, host: str) -> None:
        super().__init__(config)
        self._directory, self._scheme, self._host = directory, scheme, host

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = f"[{self._host}]" if ":" in self._host else self._host
            url = f"{self._scheme}://{host}:{port}"
            write_private(self._directory / "url", url + "\n")
            log.info("serving at %s", url)


def serve(config: AdminConfig) -> None:
    """Run an admin until SIGINT or SIGTERM, which end its sandboxes and workers; SIGKILL does not: start it again.

    Raises:
      RockError: it cannot start.
    """
    lock = lock_directory(config.directory)
    try:
        admin = Admin(config)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, SQLAlchemyError):
            raise BackendUnavailable(f"the database cannot be used: {type(error).__name__}") from error
        raise
    configure_process()
    app = create_app(admin.control, admin.hub, admin.environments)

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await admin.start()
        try:
            yield
        finally:
            await admin.stop()

    app.router.lifespan_context = lifespan
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        ssl_certfile=config.certificate,
        ssl_keyfile=config.private_key,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
        backlog=2048,
        lifespan="on",
    )
    try:
        server = _Server(settings, config.directory, "https" if config.certificate else "http", config.host)
        server.run()
        if not server.started:
            raise BackendUnavailable("the admin did not start: see the log above")
    finally:
        (config.directory / "url").unlink(missing_ok=True)
        os.close(lock)


def configure_process() -> None:
    """Log lines on stderr; credentials are taken out wherever they come from."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Redact())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):  # which uvicorn acts on, and then raises again
        signal.signal(number, lambda *_: None)

"""The control plane: who may start what, where it runs, and what has become of it. Lives in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rock_env.admin.auth import Keyring, Principal
from rock_env.admin.database import Database
from rock_env.admin.hosts import Host, Scheduler
from rock_env.admin.models import TRANSITIONS, SandboxRow, SnapshotRow, State, Tenant
from rock_env.admin.worker import audit_report, spec_to_wire, without_key
from rock_env.bubblewrap import entries_of
from rock_env.errors import (
    BackendUnavailable,
    NotReady,
    QuotaExceeded,
    RequestTimeout,
    RockError,
    SandboxDead,
    SandboxNotFound,
    SpecError,
)
from rock_env.spec import FileEntry, Limits, SandboxSpec

T = TypeVar("T")
START_SECONDS = 75.0
STOP_SECONDS = 30.0
REQUEST_SECONDS = 75.0
IDLE_SECONDS = 600.0
QUEUE_SECONDS = 30.0


@dataclass
class Record:
    """A sandbox in the admin's memory. `row` mirrors the database's; `task` brings it up."""

    row: SandboxRow
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task | None = None
    queued: asyncio.Task | None = None  # its wait for a place
    failure: RockError | None = None

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def state(self) -> State:
        return State(self.row.state)

    @property
    def is_coming_up(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def limits(self) -> Limits:
        return Limits(**self.row.spec["limits"])


@dataclass
class Usage:
    """What a tenant's live sandboxes may take, all together."""

    sandboxes: int = 0
    memory_bytes: int = 0
    cpus: float = 0.0

    def add(self, limits: Limits, count: int) -> None:
        self.sandboxes += count
        self.memory_bytes += count * (limits.memory_bytes or 0)
        # a sum of floats that goes up and down would drift away from what a quota is compared with
        self.cpus = round(self.cpus + count * (limits.cpus or 0.0), 6)


@dataclass(frozen=True)
class StartRequest:
    """What somebody asks for. `spec` has the tenant's name of an image; None: the snapshot's spec."""

    spec: SandboxSpec | None
    snapshot: str | None = None
    name: str = ""
    idle_seconds: float | None = None
    queue_seconds: float = QUEUE_SECONDS


def public_spec(spec: SandboxSpec) -> dict:
    """What is kept and shown of a spec: neither files nor the environment."""
    return {**spec_to_wire(without_key(spec)), "env": {}, "readonly_binds": {}}


class ControlPlane:
    """`images` and `models`: what the names that tenants use stand for; a model's server is its (URL, API key)."""

    def __init__(
        self,
        database: Database,
        images: dict[str, str],
        backends: tuple[str, ...],
        models: dict[str, tuple[str, str]] | None = None,
    ) -> None:
        self.database = database
        self.images = images
        self.models = models or {}
        self.backends = backends
        self.keyring = Keyring()
        self.tenants: dict[str, Tenant] = {}
        self.scheduler = Scheduler()
        self.live: dict[str, Record] = {}
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)  # of `live`, by tenant
        self.snapshots: dict[str, SnapshotRow] = {}
        self.transient: dict[str, str] = {}  # snapshots being taken, or used by a fork: id -> tenant
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="database")

    async def db(self, function: Callable[..., T], /, *arguments: object, **keywords: object) -> T:
        """Call the database, in its thread; once begun it is finished, whatever becomes of the caller."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._executor, lambda: function(*arguments, **keywords)))

    def close(self) -> None:
        self._executor.shutdown()
        self.database.close()

    # -- states
    def enter(self, record: Record) -> None:
        """From here on a sandbox is live, and counts against its tenant's quotas."""
        self.live[record.id] = record
        self.usage[record.row.tenant].add(record.limits, 1)

    def _leave(self, record: Record) -> None:
        if self.live.pop(record.id, None) is not None:
            self.usage[record.row.tenant].add(record.limits, -1)

    async def move(self, record: Record, new: State, reason: str, **values: object) -> bool:
        """Change a record's state, here and in the database. False when it cannot become `new` any more."""
        return await asyncio.shield(asyncio.ensure_future(self._move(record, new, reason, values)))

    async def _move(self, record: Record, new: State, reason: str, values: dict) -> bool:
        async with record.lock:
            old = record.state
            if new not in TRANSITIONS[old]:
                return False
            await self.db(self.database.move, record.id, old, new, reason, **values)
            for name, value in {**values, "state": str(new), "reason": reason}.items():
                setattr(record.row, name, value)
            if new.is_terminal:
                record.row.ended_at = time.time()
                self._leave(record)
                host = self.scheduler.hosts.get(record.row.worker or "")
                if host is not None:
                    self.scheduler.release(host)
            changed, record.changed = record.changed, asyncio.Event()
            changed.set()
            return True

    async def settled(self, record: Record, seconds: float) -> None:
        """Wait until a sandbox has started (or failed), at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while record.state in (State.PENDING, State.STARTING):
                    await record.changed.wait()

    async def find(self, who: Principal, id: str, scope: str) -> Record:
        """A sandbox that `who` may use in this way, live or not. Raises SandboxNotFound or Forbidden."""
        record = self.live.get(id)
        if record is None:
            if who.sandbox is not None:
                who.require(who.tenant, id, scope)
            record = Record(await self.db(self.database.sandbox, id))
        who.require(record.row.tenant, id, scope)
        return record

    # -- admission
    def _admit(self, tenant: str, count: int, limits: Limits) -> float:
        """Check the tenant's quotas for `count` more sandboxes. Returns their lifetime in seconds."""
        quota = self.tenants[tenant]
        usage = replace(self.usage[tenant])
        usage.add(limits, count)
        for name, bound in (("memory_bytes", quota.max_memory_bytes), ("cpus", quota.max_cpus)):
            if bound is None:
                continue
            if getattr(limits, name) is None:
                raise SpecError(f"limits.{name}: expected a number, as the tenant has a quota, got None")
            total = getattr(usage, name)
            if total > bound:
                raise QuotaExceeded(f"{name}: the tenant's quota is {bound:g}, this would make {total:g}")
        most, total = quota.max_sandboxes, usage.sandboxes
        if most is not None and total > most:
            raise QuotaExceeded(f"sandboxes: the tenant's quota is {most}, this would make {total}")
        lifetime = limits.lifetime_seconds
        if lifetime is not None and lifetime > quota.max_lifetime_seconds:
            raise QuotaExceeded(f"lifetime_seconds: the tenant's maximum is {quota.max_lifetime_seconds:g}")
        return quota.max_lifetime_seconds if lifetime is None else lifetime

    def _check_spec(self, spec: SandboxSpec) -> None:
        if spec.backend not in self.backends:
            raise SpecError(f"backend: expected one of {', '.join(self.backends)}, got {spec.backend!r}")
        if spec.image is not None and spec.image not in self.images:
            known = ", ".join(sorted(self.images)) or "none is configured"
            raise SpecError(f"image: expected the name of one of the admin's images ({known}), got {spec.image!r}")
        model = spec.model_proxy
        if model is not None and model.url and model.url not in self.models:
            known = ", ".join(sorted(self.models)) or "none is configured"
            raise SpecError(f"model_proxy.url: expected the name of one of the admin's models ({known})")
        if spec.readonly_binds:
            raise SpecError("readonly_binds: the host's files are not the tenants': expected none")

    def snapshot_of(self, who: Principal, id: str) -> SnapshotRow:
        row = self.snapshots.get(id)
        if row is None or not (who.is_admin or row.tenant == who.tenant):
            raise SandboxNotFound(f"no snapshot {id}")
        return row

    # -- start
    async def start(self, who: Principal, request: StartRequest) -> Record:
        """Admit and record a sandbox, and begin to bring it up. It is pending when this returns: see `settled`."""
        who.require_key()
        spec, kept, pinned = request.spec, None, None
        if request.snapshot is not None:
            row = self.snapshot_of(who, request.snapshot)
            kept, pinned = row.spec, row.worker
        if spec is not None:
            if spec.backend is None:
                spec = replace(spec, backend=self.backends[0] if kept is None else kept["backend"])
                request = replace(request, spec=spec)
            self._check_spec(spec)
            if kept is not None and spec.backend != kept["backend"]:
                raise SpecError(f"backend: the snapshot is of {kept['backend']!r}, the spec has {spec.backend!r}")
        elif kept is None:
            raise SpecError("spec: expected one, as no snapshot is given")
        public = public_spec(spec) if spec is not None else dict(kept or {})
        return await self._begin(who, request, public, pinned)

    async def _begin(self, who: Principal, request: StartRequest, public: dict, pinned: str | None) -> Record:
        limits = Limits(**public["limits"])
        lifetime = self._admit(who.tenant, 1, limits)
        idle = min(IDLE_SECONDS, lifetime) if request.idle_seconds is None else request.idle_seconds
        now = time.time()
        row = SandboxRow(
            id=secrets.token_hex(8),
            tenant=who.tenant,
            key=who.key,
            name=request.name,
            state=State.PENDING,
            reason="",
            spec={**public, "limits": {**public["limits"], "lifetime_seconds": lifetime}},
            idle_seconds=idle,
            created_at=now,
            deadline=now + lifetime,
        )
        record = Record(row)
        self.enter(record)
        try:
            await self.db(self.database.add_sandbox, row)
        except BaseException:
            self._leave(record)
            raise
        record.task = asyncio.create_task(self._bring_up(record, request, pinned))
        return record

    async def _bring_up(self, record: Record, request: StartRequest, pinned: str | None) -> None:
        """Never raises: what goes wrong is the record's failure."""
        host = None
        try:
            waiting = self.scheduler.acquire(record.row.tenant, request.queue_seconds, pinned)
            record.queued = asyncio.create_task(waiting)
            host = await record.queued
            where = {"worker": host.name, "incarnation": host.incarnation}
            if not await self.move(record, State.STARTING, f"on worker {host.name}", **where):
                self.scheduler.release(host)
                return
            reply = await self._start_on(host, record, request)
            known = {"audit_log": reply["log"], "audit_name": reply["name"]}
            await self.move(record, State.RUNNING, "", **known)
        except asyncio.CancelledError:  # of `queued`, by `stop`
            await self.move(record, State.STOPPED, "it was stopped before it started")
        except Exception as error:
            record.failure = error if isinstance(error, RockError) else RockError(f"{type(error).__name__}")
            if host is not None and record.row.worker is None:
                self.scheduler.release(host)
            await self.move(record, State.FAILED, str(record.failure))

    async def _start_on(self, host: Host, record: Record, request: StartRequest) -> dict:
        spec, wire, entries, blob = request.spec, None, [], b""
        if spec is not None:
            files = {path: e if isinstance(e, FileEntry) else FileEntry(e) for path, e in spec.files.items()}
            entries, blob = entries_of(files, {})
            wire = spec_to_wire(spec)
            wire["image"] = (self.images[spec.image] or None) if spec.image is not None else None
            if spec.model_proxy is not None and spec.model_proxy.url:
                wire["model_proxy"]["url"], wire["model_proxy"]["api_key"] = self.models[spec.model_proxy.url]
        arguments = {
            "id": record.id,
            "spec": wire,
            "entries": entries,
            "snapshot": request.snapshot,
            "idle_seconds": record.row.idle_seconds,
            "lifetime_seconds": max(0.001, record.row.deadline - time.time()),
        }
        reply, _ = await host.link.call("start", START_SECONDS, blob, **arguments)
        return reply

    # -- use
    async def call(self, record: Record, op: str, seconds: float, blob: bytes = b"", /, **arguments: object):
        """Ask a running sandbox's worker."""
        if record.state in (State.PENDING, State.STARTING, State.STOPPING):
            raise NotReady(f"sandbox {record.id} is {record.state}")
        if record.state.is_terminal:
            raise SandboxDead(f"sandbox {record.id} has ended ({record.state}): {record.row.reason}")
        host = self._host(record.row.worker, record.row.incarnation)
        try:
            return await host.link.call(op, seconds, blob, id=record.id, **arguments)
        except (SandboxDead, BackendUnavailable):
            host.wake.set()
            raise
        except SandboxNotFound as error:
            host.wake.set()
            raise SandboxDead(f"sandbox {record.id} was lost with its worker") from error

    async def put(self, record: Record, files: Mapping[str, FileEntry], links: Mapping[str, str]) -> None:
        """Write files into a running sandbox, each atomically."""
        entries, blob = entries_of(files, links)
        await self.call(record, "put", REQUEST_SECONDS, blob, entries=entries)

    def _host(self, name: str | None, incarnation: str | None) -> Host:
        host = self.scheduler.hosts.get(name or "")
        if host is None or host.incarnation != incarnation:
            raise BackendUnavailable(f"worker {name} is gone")
        return host

    async def stop(self, record: Record, reason: str) -> None:
        """End a sandbox, in whatever state it is. Idempotent. If its worker cannot be reached it remains "stopping",
        and the reconcile loop goes on with it."""
        if record.is_coming_up and record.task is not None:
            if record.queued is not None:
                record.queued.cancel()
            await asyncio.wait({record.task}, timeout=START_SECONDS + 5)
        if not await self.move(record, State.STOPPING, reason) and record.state is not State.STOPPING:
            return
        await self.finish_stop(record)

    async def finish_stop(self, record: Record) -> None:
        """The second half of a stop. Quietly leaves a record whose worker does not answer."""
        try:
            host = self._host(record.row.worker, record.row.incarnation)
            await host.link.call("stop", STOP_SECONDS, id=record.id)
        except (BackendUnavailable, RequestTimeout, NotReady):
            return
        await self.move(record, State.STOPPED, record.row.reason)
        with contextlib.suppress(BackendUnavailable, RequestTimeout):
            await host.link.call("forget", REQUEST_SECONDS, ids=[record.id])

    # -- copies
    async def snapshot(self, record: Record) -> SnapshotRow:
        quota = self.tenants[record.row.tenant].max_snapshots
        tenants = [row.tenant for row in self.snapshots.values()] + list(self.transient.values())
        if quota is not None and tenants.count(record.row.tenant) >= quota:
            raise QuotaExceeded(f"snapshots: the tenant's quota is {quota}")
        id = secrets.token_hex(8)
        self.transient[id] = record.row.tenant
        try:
            await self.call(record, "snapshot", REQUEST_SECONDS, snapshot=id)
            row = SnapshotRow(
                id=id,
                tenant=record.row.tenant,
                sandbox=record.id,
                state="ready",
                spec=record.row.spec,
                worker=record.row.worker,
                incarnation=record.row.incarnation,
                created_at=time.time(),
            )
            await self.db(self.database.add_snapshot, row)
            self.snapshots[id] = row
        finally:
            del self.transient[id]  # if it is not in `snapshots` now, the reconcile loop drops it
        return row

    async def drop_snapshot(self, row: SnapshotRow, state: str = "deleted") -> None:
        """Forget a snapshot; if its worker cannot be told now, the reconcile loop drops it."""
        self.snapshots.pop(row.id, None)
        await self.db(self.database.end_snapshot, row.id, state)
        with contextlib.suppress(BackendUnavailable, RequestTimeout):
            host = self._host(row.worker, row.incarnation)
            await host.link.call("drop_snapshot", REQUEST_SECONDS, snapshot=row.id)

    async def fork(self, who: Principal, record: Record, count: int) -> list[Record]:
        """`count` sandboxes that continue from this one's files and idle sessions; all of them, or none."""
        who.require_key()
        self._admit(who.tenant, count, record.limits)
        id = secrets.token_hex(8)
        self.transient[id] = record.row.tenant
        forks: list[Record] = []
        try:
            await self.call(record, "snapshot", REQUEST_SECONDS, snapshot=id)
            request = StartRequest(None, id, record.row.name, record.row.idle_seconds)
            for _ in range(count):
                forks.append(await self._begin(who, request, record.row.spec, record.row.worker))
            await asyncio.gather(*(self.settled(fork, QUEUE_SECONDS + START_SECONDS) for fork in forks))
            failed = next((fork for fork in forks if fork.state is not State.RUNNING), None)
            if failed is not None:
                raise failed.failure or NotReady(f"fork: a copy is {failed.state}: {failed.row.reason}")
            return forks
        except BaseException:
            await asyncio.gather(*(self.stop(fork, "another of its fork failed") for fork in forks))
            raise
        finally:
            del self.transient[id]
            with contextlib.suppress(RockError):
                host = self._host(record.row.worker, record.row.incarnation)
                await host.link.call("drop_snapshot", REQUEST_SECONDS, snapshot=id)

    # -- the audit log
    async def audit(self, record: Record) -> dict:
        """The audit records of a sandbox, also after its end, and whether its log is intact."""
        row = record.row
        if row.audit_log is None or row.audit_name is None:
            return {"records": [], "chain": None}
        host = self.scheduler.hosts.get(row.worker or "")
        if host is not None and host.is_up:
            _, blob = await host.link.call("audit", REQUEST_SECONDS, log=row.audit_log, name=row.audit_name)
        elif Path(row.audit_log).exists():  # a worker on this machine that has gone
            blob = await asyncio.to_thread(audit_report, row.audit_log, row.audit_name)
        else:
            raise BackendUnavailable(f"worker {row.worker}, which has the audit log, cannot be reached")
        return json.loads(blob)

"""A worker: holds sandboxes for an admin, and outlives it. Independent of how requests reach it (`handle`).

What must happen even when no admin is left happens here: a sandbox that is idle or past its deadline is ended, and a
worker that has been left alone with no sandbox ends itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rock_env import errors
from rock_env.admin import archive
from rock_env.audit import read_audit_log, verify_audit_log
from rock_env.backend import DEFAULT_BACKEND, Backend, get_backend
from rock_env.errors import RockError, SandboxDead, SandboxNotFound, SpecError
from rock_env.model_proxy.settings import ModelProxy
from rock_env.network import NetworkPolicy
from rock_env.spec import FileEntry, Limits, SandboxSpec

Reply = tuple[dict, bytes]
_TICK_SECONDS = 0.5
_LIVENESS_PER_TICK = 50  # sandboxes whose life is looked at in each tick
_PROBE_SECONDS = 5.0
# Counts what runs inside beside the first process and what was entered from outside (sessions' shells, this script).
_COUNT_PROCESSES = (
    "n=0; for f in /proc/[0-9]*/stat; do { IFS= read -r s < $f; } 2>/dev/null || continue; p=${f#/proc/};"
    " set -- ${s##*) }; [ $1 = Z ] || [ $2 = 0 ] || [ ${p%/stat} = 1 ] || n=$((n+1)); done; echo $n"
)


@dataclass
class Entry:
    """One sandbox, from the request to start it until the admin has taken note of its end."""

    id: str
    spec: SandboxSpec
    idle_seconds: float
    backend: Backend
    handle: str = ""
    log: str = ""
    ended: str = ""
    in_flight: int = 0
    last_used: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> str:
        return "ended" if self.ended else "running" if self.handle else "starting"


@dataclass(frozen=True)
class Kept:
    """A snapshot: whose backend has it, and what was running."""

    backend: Backend
    handle: str
    spec: SandboxSpec


def spec_to_wire(spec: SandboxSpec) -> dict:
    """A spec without its files, as JSON."""
    wire = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != "files"}
    binds, env = dict(spec.readonly_binds), dict(spec.env)
    network, limits = spec.network.to_wire(), spec.limits.to_wire()
    model = spec.model_proxy.to_wire() if spec.model_proxy is not None else None
    wire |= {"limits": limits, "network": network, "env": env, "readonly_binds": binds, "model_proxy": model}
    return wire


def spec_from_wire(wire: dict, files: dict[str, FileEntry]) -> SandboxSpec:
    """The inverse of spec_to_wire."""
    limits, network = Limits(**wire["limits"]), NetworkPolicy.from_wire(wire["network"])
    model = ModelProxy.from_wire(wire["model_proxy"]) if wire["model_proxy"] is not None else None
    return SandboxSpec(**{**wire, "limits": limits, "network": network, "files": files, "model_proxy": model})


def without_key(spec: SandboxSpec) -> SandboxSpec:
    """A spec that may be kept and shown."""
    model = spec.model_proxy
    return spec if model is None else replace(spec, model_proxy=replace(model, api_key=""))


class Worker:
    """Every `do_OP` may be called from any thread. `on_end` is called when there is nothing left to live for."""

    def __init__(self, name: str, orphan_seconds: float, on_end: Callable[[], None]) -> None:
        self.name = name
        self.incarnation = secrets.token_hex(8)
        self._orphan_seconds = orphan_seconds
        self._on_end = on_end
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._snapshots: dict[str, Kept] = {}
        self._last_contact = time.monotonic()
        self._next_look = 0
        self._stopping = threading.Event()

    # -- requests
    def handle(self, header: dict, blob: bytes) -> Reply:
        """Answer one request. Never raises: errors are replies."""
        self._last_contact = time.monotonic()
        try:
            operation = getattr(self, f"do_{header.pop('op', '')}", None)
            if operation is None:
                raise SpecError("op: no such operation")
            return operation(blob, **header)
        except RockError as error:
            return {"error": errors.to_wire(error)}, b""
        except Exception as error:  # a defect of ours must reach the caller, and not end every sandbox
            traceback.print_exc()
            return {"error": {"code": "error", "message": f"worker: {type(error).__name__}", "errno": ""}}, b""
        finally:
            self._last_contact = time.monotonic()

    def _entry(self, id: str) -> Entry:
        with self._lock:
            entry = self._entries.get(id)
        if entry is None:
            raise SandboxNotFound(f"no sandbox {id} on worker {self.name}")
        if entry.ended:
            raise SandboxDead(f"sandbox {id} has ended: {entry.ended}")
        return entry

    @contextlib.contextmanager
    def _using(self, id: str) -> Iterator[Entry]:
        """The live sandbox, which is not idle meanwhile. Takes note when the backend says that it is dead."""
        entry = self._entry(id)
        with entry.lock:
            entry.in_flight += 1
        try:
            yield entry
        except SandboxDead as error:
            self._note_end(entry, str(error))
            raise SandboxDead(f"sandbox {id} has ended: {entry.ended}") from error
        finally:
            with entry.lock:
                entry.in_flight -= 1
                entry.last_used = time.monotonic()

    @staticmethod
    def _note_end(entry: Entry, reason: str) -> None:
        with entry.lock:
            entry.ended = entry.ended or reason.partition("has ended: ")[2] or reason

    # -- life
    def do_hello(self, blob: bytes) -> Reply:
        return {"name": self.name, "incarnation": self.incarnation, "pid": os.getpid()}, b""

    def do_doctor(self, blob: bytes, *, backend: str) -> Reply:
        return {"report": get_backend(backend).doctor()}, b""

    def do_start(
        self,
        blob: bytes,
        *,
        id: str,
        spec: dict | None,
        entries: list[dict],
        snapshot: str | None,
        idle_seconds: float,
        lifetime_seconds: float,
    ) -> Reply:
        """Start a sandbox under the admin's id; `spec` None: the snapshot's. A repeated request changes nothing."""
        kept = self._kept(snapshot) if snapshot is not None else None
        files = archive.files_of(entries, blob)
        if spec is not None:
            full = spec_from_wire(spec, files)
        elif kept is not None:
            full = replace(kept.spec, files=files)
        else:
            raise SpecError("spec: expected one, as no snapshot is given")
        limits = replace(full.limits, lifetime_seconds=lifetime_seconds)
        full = replace(full, limits=limits)
        entry = Entry(id, replace(full, files={}), idle_seconds, get_backend(full.backend or DEFAULT_BACKEND))
        with self._lock:
            known = self._entries.setdefault(id, entry)
        if known is not entry:
            return self.do_where(b"", id=id)
        try:
            _require_enforceable(entry.backend, full.network)
            entry.handle = entry.backend.create(full, kept.handle if kept else None)
            entry.last_used = time.monotonic()
            entry.log = entry.backend.audit_log
        except BaseException:
            with self._lock:
                self._entries.pop(id, None)
            if entry.handle:
                entry.backend.destroy(entry.handle)
            raise
        return self.do_where(b"", id=id)

    def do_where(self, blob: bytes, *, id: str) -> Reply:
        """In which log, and under which name, a sandbox's acts are on record."""
        entry = self._entry(id)
        return {"state": entry.state, "log": entry.log, "name": _audit_name(entry.handle)}, b""

    def do_stop(self, blob: bytes, *, id: str) -> Reply:
        with self._lock:
            entry = self._entries.get(id)
        if entry is not None and not entry.ended:
            if not entry.handle:
                raise errors.NotReady(f"sandbox {id} is still starting")
            self._note_end(entry, "it was stopped")
            entry.backend.destroy(entry.handle)
        return {}, b""

    def do_list(self, blob: bytes) -> Reply:
        with self._lock:
            entries, snapshots = list(self._entries.values()), list(self._snapshots)
        rows = {e.id: {"state": e.state, "reason": e.ended, "in_flight": e.in_flight} for e in entries}
        return {**self.do_hello(b"")[0], "sandboxes": rows, "snapshots": snapshots}, b""

    def do_forget(self, blob: bytes, *, ids: list[str]) -> Reply:
        """The admin has taken note of these ends."""
        with self._lock:
            for id in ids:
                if id in self._entries and self._entries[id].ended:
                    del self._entries[id]
        return {}, b""

    def do_shutdown(self, blob: bytes) -> Reply:
        self.end()
        return {}, b""

    # -- commands and files
    def do_execute(
        self, blob: bytes, *, id: str, argv: list[str], seconds: float, cwd: str | None, env: dict, output_bytes: int
    ) -> Reply:
        with self._using(id) as entry:
            result = entry.backend.execute(_handle(entry), argv, seconds, cwd, env, output_bytes)
            return dataclasses.asdict(result), b""

    def do_run(self, blob: bytes, *, id: str, session: str, seconds: float, output_bytes: int) -> Reply:
        command = blob.decode("utf-8", "surrogateescape")
        with self._using(id) as entry:
            result = entry.backend.run(_handle(entry), session, command, seconds, output_bytes)
            return dataclasses.asdict(result), b""

    def do_call(self, blob: bytes, *, id: str, what: str, seconds: float, arguments: dict) -> Reply:
        """See Backend.call."""
        with self._using(id) as entry:
            return entry.backend.call(_handle(entry), what, seconds, blob, **arguments)

    def do_put(self, blob: bytes, *, id: str, entries: list[dict]) -> Reply:
        links = {e["path"]: e["target"] for e in entries if e["kind"] == "symlink"}
        with self._using(id) as entry:
            entry.backend.put(_handle(entry), archive.files_of(entries, blob), links)
            return {}, b""

    def do_read(self, blob: bytes, *, id: str, path: str, max_bytes: int) -> Reply:
        with self._using(id) as entry:
            return {}, entry.backend.read(_handle(entry), path, max_bytes)

    def do_list_files(self, blob: bytes, *, id: str, path: str, recursive: bool) -> Reply:
        with self._using(id) as entry:
            infos = entry.backend.list(_handle(entry), path, recursive)
            return {"entries": [dataclasses.asdict(info) for info in infos]}, b""

    def do_archive(self, blob: bytes, *, id: str, path: str, max_bytes: int) -> Reply:
        with self._using(id) as entry:
            return {}, archive.pack_tree(entry.backend, _handle(entry), path, max_bytes)

    def do_network(self, blob: bytes, *, id: str, policy: list[list]) -> Reply:
        new = NetworkPolicy.from_wire(policy)
        with self._using(id) as entry:
            _require_enforceable(entry.backend, new)
            entry.backend.set_network_policy(_handle(entry), new)
            entry.spec = replace(entry.spec, network=new)
            return {}, b""

    def do_kill_all(self, blob: bytes, *, id: str) -> Reply:
        with self._using(id) as entry:
            entry.backend.kill_all(_handle(entry))
            return {}, b""

    def do_stats(self, blob: bytes, *, id: str) -> Reply:
        entry = self._entry(id)  # looking is not using
        return dataclasses.asdict(entry.backend.stats(_handle(entry))), b""

    def do_spec(self, blob: bytes, *, id: str) -> Reply:
        """A spec, without the key of its model's server."""
        return {"spec": spec_to_wire(without_key(self._entry(id).spec))}, b""

    # -- snapshots
    def _kept(self, id: str) -> Kept:
        with self._lock:
            if id not in self._snapshots:
                raise SandboxNotFound(f"no snapshot {id} on worker {self.name}")
            return self._snapshots[id]

    def do_snapshot(self, blob: bytes, *, id: str, snapshot: str) -> Reply:
        with self._using(id) as entry:
            handle = entry.backend.snapshot(_handle(entry))
            with self._lock:
                self._snapshots[snapshot] = Kept(entry.backend, handle, entry.spec)
            return {}, b""

    def do_drop_snapshot(self, blob: bytes, *, snapshot: str) -> Reply:
        with self._lock:
            kept = self._snapshots.pop(snapshot, None)
        if kept is not None:
            kept.backend.drop_snapshot(kept.handle)
        return {}, b""

    # -- the audit log
    def do_audit(self, blob: bytes, *, log: str, name: str) -> Reply:
        """The records of one sandbox, and whether the whole log's chain is intact."""
        return {}, audit_report(log, name)

    # -- without an admin
    def run(self) -> None:
        """Look after the sandboxes until `end` is called."""
        while not self._stopping.wait(_TICK_SECONDS):
            try:
                self._tick()
            except Exception:  # the next tick may do better, and nobody else looks after them
                traceback.print_exc()

    def end(self) -> None:
        self._stopping.set()
        self._on_end()

    def _tick(self) -> None:
        with self._lock:
            running = [e for e in self._entries.values() if e.state == "running"]
            starting = any(e.state == "starting" for e in self._entries.values())
        now = time.monotonic()
        for entry in running:
            if not entry.in_flight and now - entry.last_used > entry.idle_seconds:
                self._expire(entry)
        for _ in range(min(_LIVENESS_PER_TICK, len(running))):
            self._next_look = (self._next_look + 1) % len(running)
            self._look(running[self._next_look])
        if not running and not starting and now - self._last_contact > self._orphan_seconds:
            print(f"worker {self.name}: no sandbox, and no admin for {self._orphan_seconds:g} s", flush=True)
            self.end()

    def _look(self, entry: Entry) -> None:
        if entry.ended or entry.in_flight or entry.backend.is_alive(entry.handle):
            return
        try:
            entry.backend.stats(entry.handle)
        except RockError as error:  # which says why
            self._note_end(entry, str(error))

    def _expire(self, entry: Entry) -> None:
        """End an idle sandbox, unless something that it started still runs."""
        if self._is_busy(entry):
            entry.last_used = time.monotonic()
            return
        with entry.lock:
            if entry.in_flight or entry.ended:
                return
            entry.ended = f"it was idle for {entry.idle_seconds:g} s"
        entry.backend.destroy(entry.handle)

    @staticmethod
    def _is_busy(entry: Entry) -> bool:
        argv = ["bash", "--norc", "--noprofile", "-c", _COUNT_PROCESSES]
        try:
            if "jobs" in entry.backend.capabilities:
                jobs = entry.backend.call(entry.handle, "job_list", 0.0)[0]["jobs"]
                if any(job["keeps_busy"] for job in jobs):
                    return True
            result = entry.backend.execute(entry.handle, argv, _PROBE_SECONDS, None, {}, 64)
        except SandboxDead:
            return False
        except RockError:
            return True  # it cannot be told: its deadline will end it
        return result.output.strip() != "0"


def audit_report(log: str, name: str) -> bytes:
    """JSON: {"records": those of sandbox `name`, "chain": of the whole log}."""
    try:
        records = [r for r in read_audit_log(Path(log)) if r.get("sandbox") == name]
        chain = dataclasses.asdict(verify_audit_log(log))
    except OSError as error:
        raise errors.BackendUnavailable(f"the audit log cannot be read: {error.strerror}") from error
    except ValueError as error:
        records, chain = [], {"ok": False, "problem": f"not JSON: {error}", "records": 0, "head": "", "closed": False}
    return json.dumps({"records": records, "chain": chain}).encode()


def _audit_name(handle: str) -> str:
    """What audit records call a sandbox: the end of its handle."""
    return handle.rpartition(":")[2]


def _handle(entry: Entry) -> str:
    if not entry.handle:
        raise errors.NotReady(f"sandbox {entry.id} is still starting")
    return entry.handle


def _require_enforceable(backend: Backend, policy: NetworkPolicy) -> None:
    if not policy.is_closed and "network_allowlist" not in backend.capabilities:
        raise errors.LimitNotEnforceable(f"network: backend {backend.name!r} can only keep the network closed")

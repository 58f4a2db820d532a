"""The Docker backend: an unprivileged container a sandbox, by the Docker Engine API, whose first process is a rocklet.

The container has a read-only root, no network but `lo`, no capabilities, no new privileges, a user of its own, and the
limits of its spec; the writable directories are memory-backed file systems that share `disk_bytes`. Whoever uses the
sandbox holds the container's standard input: when that process ends, however it ends, the container does, too.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import posixpath
import secrets
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from rock_env.calls import REQUEST_SECONDS, WireCalls, entries_of
from rock_env.client import audit_directory, audit_retention
from rock_env.docker.audit import ThreadedAuditLog
from rock_env.docker.channel import BOOT, Channel
from rock_env.docker.engine import LABEL, Engine, load, owner, translated
from rock_env.docker.images import USERS, Images, first_uid
from rock_env.docker.places import PLACES, places_of, shares_of, tmpfs_options
from rock_env.errors import (
    BackendUnavailable,
    LimitExceeded,
    LimitNotEnforceable,
    RockError,
    SandboxDead,
    SandboxNotFound,
    SpecError,
)
from rock_env.network import NetworkPolicy
from rock_env.spec import SandboxSpec
from rock_env.supervisor import linux

_START_SECONDS = 30.0
_FINISH_SECONDS = 3.0
_SILENCE_SECONDS = 300.0  # after which a rocklet gives us up: see Rocklet.do_start
_PART_BYTES = 1 << 20
_UNBOUNDED_BYTES = 2 << 30  # of a snapshot without disk_bytes
_HEADER_BYTES = 64 << 20  # of a snapshot's tar, beyond twice disk_bytes: they may be larger than the files
_LEAST_MEMORY = 24 << 20  # of which the rocklet takes about 12
_SHM_BYTES = 16 << 20
_OPEN_FILES = 5000  # a little more than what commands get: see rock_env.supervisor.process.open_files
# What the rocklet's filter (rock_env.supervisor.seccomp) neither records nor needs. All else must get past the
# container's profile to that filter: a call that is refused here is not seen there.
_REFUSED_UNSEEN = ("_sysctl", "create_module", "get_kernel_syms", "modify_ldt", "nfsservctl", "query_module")
_REFUSED_UNSEEN += ("sysfs", "uselib", "ustat")
# Docker's own choice in /proc, and all of /sys but the container's control group.
_HIDDEN = (
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/block", "/sys/bus", "/sys/class", "/sys/dev",
    "/sys/devices", "/sys/firmware", "/sys/fs/bpf", "/sys/fs/btrfs", "/sys/fs/ext4", "/sys/fs/fuse", "/sys/fs/pstore",
    "/sys/fs/xfs", "/sys/hypervisor", "/sys/kernel", "/sys/module", "/sys/power",
)  # fmt: skip
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_REMEMBERED_DEATHS = 10_000


def _profile() -> str:
    """The container's own system call filter, in Docker's format."""
    denied = {"names": list(_REFUSED_UNSEEN), "action": "SCMP_ACT_ERRNO"}
    native = [_ARCHITECTURES[linux.MACHINE]] if linux.MACHINE in _ARCHITECTURES else []
    return json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "architectures": native, "syscalls": [denied]})


class _Live:
    """One container in use. It keeps to the engine and the log that it began with."""

    def __init__(self, engine: Engine, log: ThreadedAuditLog, container: str, name: str, spec: SandboxSpec) -> None:
        self.engine, self.log = engine, log
        self.container, self.name, self.spec = container, name, spec
        self.handle = f"{container[:12]}:{name}"
        self.channel: Channel | None = None
        self.places: list[str] = []
        self.ended = False


class _Snapshot:
    """The writable directories of a sandbox as an unnamed file, and its sessions' states."""

    def __init__(self, live: _Live, file: IO[bytes], states: dict) -> None:
        self.image, self.places = live.spec.image, live.places
        self.file, self.states = file, states
        self.size = file.tell()


class DockerBackend(WireCalls):
    """See rock_env.backend.Backend.

    Args:
      base_url: of the Docker Engine API, e.g. "unix:///var/run/docker.sock"; None: as `docker` has it ($DOCKER_HOST).
    """

    name = "docker"

    def __init__(self, base_url: str | None = None) -> None:
        self._base_url = base_url
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._engine: Engine | None = None
        self._images: Images | None = None
        self._log: ThreadedAuditLog | None = None
        self._live: dict[str, _Live] = {}
        self._deaths: dict[str, str] = {}
        self._snapshots: dict[str, _Snapshot] = {}
        self._names = 0
        self._next_user = secrets.randbelow(USERS)

    # -- what there is
    def _connect(self) -> Engine:
        """The engine, the images and the audit log, made at first use."""
        if self._pid != os.getpid():
            raise SandboxDead("this process is a fork: sandboxes belong to the process that started them")
        with self._lock:
            if self._engine is None:
                engine = Engine(self._base_url)
                engine.sweep()
                try:
                    self._log = ThreadedAuditLog(audit_directory(), audit_retention())
                except OSError as error:
                    raise BackendUnavailable(f"docker: audit log: {error}") from error
                self._log.open(backend=self.name, daemon=engine.info.get("ID", ""), client_pid=self._pid)
                self._images = Images(engine)
                self._engine = engine
                atexit.register(self.close)
            return self._engine

    @property
    def capabilities(self) -> frozenset[str]:
        engine = self._connect()
        limits = {"memory_bytes": "memory", "pids": "pids", "cpus": "cpus"}
        enforced = {capability for limit, capability in limits.items() if engine.enforces(limit)}
        enforced |= {"readonly_binds"} if engine.is_local else set()
        always = {"disk", "network_closed", "audit", "seccomp", "session", "snapshot", "fork", "stats"}
        always |= {"jobs", "terminal", "forward"}
        return frozenset(enforced | always)

    @property
    def audit_log(self) -> str:
        """The path of this backend's audit log."""
        self._connect()
        return self._log.path

    def doctor(self) -> dict[str, dict]:
        try:
            engine = self._connect()
        except (RockError, NotImplementedError) as error:
            return {"backend": {"ok": False, "how": str(error)}}
        info = engine.info
        version = f"Docker Engine {info.get('ServerVersion')}, cgroup v{info.get('CgroupVersion', '1')}"
        rows = {"backend": {"ok": True, "how": f"{version}: {engine.url}"}}
        for limit in ("memory_bytes", "pids", "cpus"):
            ok = engine.enforces(limit)
            rows[limit] = {"ok": ok, "how": "by the daemon" if ok else "the daemon says that its machine cannot"}
        if rows["memory_bytes"]["ok"] and not info.get("SwapLimit"):
            rows["memory_bytes"]["how"] += ", without what is swapped"
        rows["disk_bytes"] = {"ok": True, "how": "size-limited tmpfs at each writable directory; read-only root"}
        rows["network"] = {"ok": True, "how": "a network namespace of its own, loopback only; no allowlist"}
        rows["user"] = {"ok": True, "how": f"a uid per sandbox from {first_uid(engine)} on, no capabilities"}
        rows["audit"] = {"ok": True, "how": self._log.path}
        return rows

    # -- start
    def create(self, spec: SandboxSpec, snapshot: str | None = None) -> str:
        engine = self._connect()
        self._check(engine, spec)
        origin = self._snapshot(snapshot, spec) if snapshot is not None else None
        places = places_of(spec)
        if origin is not None:
            places = list(dict.fromkeys([*places, *origin.places]))
        shares = shares_of(places, spec.limits.disk_bytes)
        image = self._images.prepare(spec.image)
        with self._lock:
            self._names += 1
            name = f"{self._names}"
            uid = first_uid(engine) + self._next_user
            self._next_user = (self._next_user + 1) % USERS
        mounts = {place: tmpfs_options(place, share, uid) for place, share in shares.items()}
        live = _Live(engine, self._log, self._make(engine, spec, image, mounts, uid), name, spec)
        live.places = places
        shown = {"image": spec.image, "limits": spec.limits.to_wire(), "readonly_binds": dict(spec.readonly_binds)}
        try:
            self._record("sandbox_starting", live, snapshot=snapshot, uid=uid, container=live.container[:12], **shown)
            self._start(live, image, uid, origin)
        except BaseException:
            self._discard(live, "start failed")
            raise
        return live.handle

    @staticmethod
    def _check(engine: Engine, spec: SandboxSpec) -> None:
        if not spec.network.is_closed:
            raise LimitNotEnforceable("network: the docker backend cannot enforce an allowlist, only a closed network")
        if spec.model_proxy is not None:
            raise LimitNotEnforceable("model_proxy: the docker backend has no way to reach into a container's network")
        engine.check(spec.limits)
        memory = spec.limits.memory_bytes
        if memory is not None and memory < _LEAST_MEMORY:
            raise LimitNotEnforceable(
                f"limits.memory_bytes={memory}: expected at least {_LEAST_MEMORY}: its first process needs some itself"
            )
        if spec.readonly_binds and not engine.is_local:
            raise LimitNotEnforceable(f"readonly_binds: {engine.url} is another machine's, without this one's files")
        for source in spec.readonly_binds:
            if not os.path.exists(source):
                raise SpecError(f"readonly_binds: no such path {source!r}")

    def _make(self, engine: Engine, spec: SandboxSpec, image: str, mounts: dict[str, str], uid: int) -> str:
        """Create the container; nothing runs yet."""
        docker, limits = load(), spec.limits
        ulimits = [docker.types.Ulimit(name="nofile", soft=_OPEN_FILES, hard=_OPEN_FILES)]
        ulimits.append(docker.types.Ulimit(name="core", soft=0, hard=0))
        binds = [
            docker.types.Mount(target, os.path.abspath(source), type="bind", read_only=True)
            for source, target in spec.readonly_binds.items()
        ]
        for bind in binds:  # what is mounted below would come along writable
            bind["BindOptions"] = {"Propagation": "rprivate", "NonRecursive": True}
        bounds: dict[str, Any] = {}
        if limits.memory_bytes is not None:
            bounds["mem_limit"] = limits.memory_bytes
            if engine.info.get("SwapLimit"):
                bounds["memswap_limit"] = limits.memory_bytes
        if limits.pids is not None:
            bounds["pids_limit"] = limits.pids
        if limits.cpus is not None:
            bounds |= {"cpu_period": 100_000, "cpu_quota": max(1000, round(limits.cpus * 100_000))}
        with translated("create a container"):
            config = engine.api.create_host_config(
                read_only=True, network_mode="none", privileged=False, cap_drop=["ALL"], ipc_mode="private",
                security_opt=["no-new-privileges:true", f"seccomp={_profile()}"], tmpfs=mounts, mounts=binds,
                shm_size=_SHM_BYTES, ulimits=ulimits, auto_remove=True, dns=["127.0.0.1"], dns_search=["."],
                log_config=docker.types.LogConfig(type="none"), **bounds,
            )  # fmt: skip
            config["MaskedPaths"] = list(_HIDDEN)
            made = engine.api.create_container(
                image, entrypoint=["python3"], command=["-I", "-S", "-c", BOOT], user=f"{uid}:{uid}", stdin_open=True,
                hostname="sandbox", working_dir="/", host_config=config, labels={LABEL: owner()},
                healthcheck={"test": ["NONE"]}, use_config_proxy=False,
            )  # fmt: skip
        refused = [text for text in made.get("Warnings") or [] if "discard" in text or "not support" in text]
        if refused:
            engine.remove(made["Id"])
            raise LimitNotEnforceable(f"limits: the Docker daemon would run without one: {' '.join(refused)}")
        return made["Id"]

    def _start(self, live: _Live, image: str, uid: int, origin: _Snapshot | None) -> None:
        """Run the container, see that it is confined as it should be, and place the files."""
        live.channel = Channel(
            *live.engine.attach(live.container),
            lambda event, fields: live.log.record(event, **fields),
            lambda reason, usage: self._on_end(live, reason, usage),
            _SILENCE_SECONDS / 4,
        )
        try:
            with translated("start a container"):
                live.engine.api.start(live.container)
        except BackendUnavailable as error:
            if "executable file not found" in str(error) or "no such file" in str(error):
                raise SpecError(f"image: {live.spec.image!r} has no python3, which the docker backend needs") from error
            raise
        live.channel.boot()
        spec = {
            "workdir": live.spec.workdir,
            "env": {**self._images.environment(image), **live.spec.env},
            "limits": live.spec.limits.to_wire(),
        }
        states = origin.states if origin is not None else {}
        facts = self._ask(
            live, "start", spec=spec, places=live.places, states=states, silence_seconds=_SILENCE_SECONDS
        )["facts"]
        _require_confined(facts, uid)
        if origin is not None:
            self._unpack(live, lambda at: os.pread(origin.file.fileno(), _PART_BYTES, at), origin.size, "/")
        new = [place for place in live.places if origin is None or place not in origin.places]
        for place, seed in self._images.seeds(image, new).items():
            parts = memoryview(seed)
            self._unpack(
                live, lambda at, parts=parts: parts[at : at + _PART_BYTES], len(seed), posixpath.dirname(place)
            )
        entries, blob = entries_of(live.spec.files, {})
        directories = [live.spec.workdir, *PLACES]
        self._ask(live, "begin", blob, entries=entries, directories=directories, fresh=origin is None)
        if live.log.fault:
            raise BackendUnavailable(f"docker: {live.log.fault}")
        with self._lock:
            if not live.ended:
                self._live[live.handle] = live

    def _unpack(self, live: _Live, part: Callable[[int], bytes], size: int, into: str) -> None:
        """Send a tar of `size` bytes, part by part."""
        for at in range(0, size, _PART_BYTES):
            self._ask(live, "unpack", bytes(part(at)), into=into, last=at + _PART_BYTES >= size)

    def _ask(self, live: _Live, op: str, blob: bytes = b"", **arguments: object) -> dict:
        try:
            return live.channel.call(op, _START_SECONDS, blob, None, id=live.name, **arguments)[0]
        except SandboxDead as error:
            told = live.channel.errors
            if op == "start" and told:
                raise BackendUnavailable(f"docker: the container did not start: {told[-500:]}") from error
            raise

    # -- use
    def _call(self, handle: str, op: str, seconds: float = REQUEST_SECONDS, blob: bytes = b"", /, **arguments: object):
        live = self._find(handle)
        return live.channel.call(op, seconds, blob, None, id=live.name, **arguments)

    def _find(self, handle: str) -> _Live:
        if self._pid != os.getpid():
            raise SandboxDead("this process is a fork: sandboxes belong to the process that started them")
        with self._lock:
            live = self._live.get(handle)
            if live is None:
                if handle in self._deaths:
                    raise SandboxDead(f"sandbox {handle} has ended: {self._deaths[handle]}")
                raise SandboxNotFound(f"no sandbox {handle!r}")
            return live

    def set_network_policy(self, sandbox: str, policy: NetworkPolicy) -> None:
        self._find(sandbox)
        if not policy.is_closed:
            raise LimitNotEnforceable("network: the docker backend cannot enforce an allowlist, only a closed network")

    def is_alive(self, sandbox: str) -> bool:
        try:
            return not self._find(sandbox).channel.dead
        except (SandboxDead, SandboxNotFound):
            return False

    # -- snapshots
    def snapshot(self, sandbox: str) -> str:
        live = self._find(sandbox)
        file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the snapshot)
        most = _HEADER_BYTES + 2 * (live.spec.limits.disk_bytes or _UNBOUNDED_BYTES)

        def take(part: bytes) -> None:
            if file.tell() + len(part) > most:
                raise LimitExceeded(f"snapshot: more than {most} bytes arrive, which limits.disk_bytes cannot hold")
            file.write(part)

        try:
            header, _ = live.channel.call("snapshot", REQUEST_SECONDS, b"", take, id=live.name)
        except BaseException:
            file.close()
            raise
        with self._lock:
            self._names += 1
            name = f"s{self._names}"
            self._snapshots[name] = _Snapshot(live, file, header["states"])
        self._record("snapshot_taken", live, snapshot=name)
        return name

    def _snapshot(self, name: str, spec: SandboxSpec) -> _Snapshot:
        with self._lock:
            origin = self._snapshots.get(name)
        if origin is None:
            raise SandboxNotFound(f"no snapshot {name!r}")
        if origin.image != spec.image:
            raise SpecError(f"image: the snapshot was taken on {origin.image!r}, the spec has {spec.image!r}")
        return origin

    def drop_snapshot(self, snapshot: str) -> None:
        with self._lock:
            origin = self._snapshots.pop(snapshot, None)
        if origin is not None:  # its file is freed with the last sandbox that is being started from it
            self._log.record("snapshot_dropped", snapshot=snapshot)

    # -- end
    def _record(self, event: str, live: _Live, **fields: object) -> None:
        live.log.record(event, sandbox=live.name, **fields)
        if live.log.fault and event == "sandbox_starting":
            raise BackendUnavailable(f"docker: {live.log.fault}")

    def _on_end(self, live: _Live, reason: str, usage: dict) -> None:
        """The container has ended, or can no longer be reached. Once for each."""
        with self._lock:
            if live.ended:
                return
            live.ended = True
            self._live.pop(live.handle, None)
            self._deaths[live.handle] = reason
            if len(self._deaths) > _REMEMBERED_DEATHS:
                del self._deaths[next(iter(self._deaths))]
        live.log.record("sandbox_ended", sandbox=live.name, reason=reason, **usage)

    def _discard(self, live: _Live, reason: str) -> None:
        """Remove a container, whatever state it is in. Where the daemon does not answer, it ends by itself."""
        if live.channel is not None:
            live.channel.dead = live.channel.dead or reason
        self._on_end(live, reason, {})
        if live.channel is not None:
            live.channel.close()
        with contextlib.suppress(RockError):
            live.engine.remove(live.container)

    def destroy(self, sandbox: str) -> None:
        with self._lock:
            live = self._live.get(sandbox) if self._pid == os.getpid() else None
        if live is None:
            return
        usage: dict = {}
        with contextlib.suppress(RockError):
            usage = live.channel.call("finish", _FINISH_SECONDS, b"", None, id=live.name)[0]
        self._on_end(live, "it was stopped", usage)
        self._discard(live, "it was stopped")

    def close(self) -> None:
        """End every sandbox now, instead of at the end of the process. The next `create` begins anew."""
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            return
        with self._lock:
            lives = list(self._live.values())
        for live in lives:
            with contextlib.suppress(RockError):
                self.destroy(live.handle)
        with self._lock:
            self._snapshots.clear()
            log, engine = self._log, self._engine
            self._log = self._engine = self._images = None
        if log is not None:
            log.close()
        if engine is not None:
            engine.api.close()


def _require_confined(facts: dict, uid: int) -> None:
    """Compare what the kernel says inside with what was asked of the daemon; refuses what is not so."""
    expected = {
        "uid": uid, "groups": [uid], "capabilities": 0, "no_new_privileges": True, "seccomp": True, "routes": [],
        "readonly_root": True, "first_process": True,
    }  # fmt: skip
    for name, value in expected.items():
        if facts.get(name) != value:
            raise LimitNotEnforceable(f"docker: {name}: expected {value!r} in the container, found {facts.get(name)!r}")

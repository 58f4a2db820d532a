"""The seam between the SDK and what runs sandboxes. A backend declares its capabilities; the SDK never assumes one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from rock_env.errors import BackendUnavailable
from rock_env.network import NetworkPolicy
from rock_env.spec import CommandResult, FileEntry, FileInfo, SandboxSpec, SandboxStats

CAPABILITIES = frozenset(
    {"memory", "pids", "cpus", "disk", "network_closed", "network_allowlist", "audit", "seccomp"}
    | {"session", "snapshot", "fork", "stats", "readonly_binds", "jobs", "terminal", "forward", "model_proxy"}
)


DEFAULT_BACKEND = "bubblewrap"


@runtime_checkable
class Backend(Protocol):
    """Runs sandboxes. Every method may be called from any thread, has a deadline, and raises rock_env.errors only.

    `capabilities` names what this backend enforces on this machine (a subset of CAPABILITIES). `create` raises
    LimitNotEnforceable for a limit it cannot enforce. Paths are the sandbox's; relative ones are below its workdir.
    """

    name: str

    @property
    def capabilities(self) -> frozenset[str]: ...

    def create(self, spec: SandboxSpec, snapshot: str | None = None) -> str: ...

    def execute(
        self, sandbox: str, argv: list[str], seconds: float, cwd: str | None, env: Mapping[str, str], output_bytes: int
    ) -> CommandResult: ...

    def run(self, sandbox: str, session: str, command: str, seconds: float, output_bytes: int) -> CommandResult: ...

    def call(
        self, sandbox: str, op: str, seconds: float, blob: bytes = b"", /, **arguments: object
    ) -> tuple[dict, bytes]:
        """What rock_env.jobs and rock_env.model_proxy ask of a sandbox; it may take `seconds` by itself."""
        ...

    def put(self, sandbox: str, files: Mapping[str, FileEntry], links: Mapping[str, str]) -> None: ...

    def read(self, sandbox: str, path: str, max_bytes: int) -> bytes: ...

    def list(self, sandbox: str, path: str, recursive: bool) -> list[FileInfo]: ...

    def snapshot(self, sandbox: str) -> str: ...

    def drop_snapshot(self, snapshot: str) -> None: ...

    def set_network_policy(self, sandbox: str, policy: NetworkPolicy) -> None: ...

    @property
    def audit_log(self) -> str: ...

    def kill_all(self, sandbox: str) -> None: ...

    def stats(self, sandbox: str) -> SandboxStats: ...

    def is_alive(self, sandbox: str) -> bool: ...

    def destroy(self, sandbox: str) -> None: ...

    def doctor(self) -> dict[str, dict]: ...

    def close(self) -> None: ...


_lock = threading.Lock()
_factories: dict[str, Callable[[], Backend]] = {}
_instances: dict[str, Backend] = {}


def register_backend(name: str, factory: Callable[[], Backend]) -> None:
    """Make `SandboxSpec(backend=name)` available; `factory` runs once, at first use."""
    with _lock:
        _factories[name] = factory
        _instances.pop(name, None)


def get_backend(name: str) -> Backend:
    """The process-wide instance of a backend."""
    with _lock:
        if name not in _instances:
            if name not in _factories:
                known = ", ".join(sorted(_factories))
                raise BackendUnavailable(f"backend: expected one of {known}, got {name!r}")
            _instances[name] = _factories[name]()
        return _instances[name]


def close_backends() -> None:
    """End every sandbox of this process now; the interpreter's exit does it, too."""
    with _lock:
        instances = list(_instances.values())
    for backend in instances:
        backend.close()

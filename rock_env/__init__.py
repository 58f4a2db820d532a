"""rock_env: secure sandboxes for agents. `Sandbox.start(SandboxSpec(...))`, then commands, files, snapshots, forks."""

from rock_env.audit import AuditVerdict, read_audit_log, verify_audit_log
from rock_env.backend import CAPABILITIES, Backend, get_backend, register_backend
from rock_env.bubblewrap import BubblewrapBackend
from rock_env.errors import (
    BackendUnavailable,
    FileError,
    Forbidden,
    ForwardFailed,
    JobNotFound,
    LeaseLost,
    LimitExceeded,
    LimitNotEnforceable,
    NoCapacity,
    NotReady,
    QuotaExceeded,
    RequestTimeout,
    RockError,
    SandboxDead,
    SandboxNotFound,
    SpecError,
    Unauthorized,
)
from rock_env.forward import Forward
from rock_env.jobs import Chunk, Dropped, Job, JobOutput, JobStatus
from rock_env.model_proxy.client import ModelRequest, ModelServer
from rock_env.model_proxy.settings import ModelProxy
from rock_env.network import NetworkPolicy, NetworkRule
from rock_env.sandbox import Sandbox, Session, Snapshot
from rock_env.spec import CommandResult, FileEntry, FileInfo, Limits, SandboxSpec, SandboxStats


def _docker() -> Backend:
    from rock_env.docker.backend import DockerBackend

    return DockerBackend()


register_backend("bubblewrap", BubblewrapBackend)
register_backend("docker", _docker)


def doctor(backend: str = "bubblewrap") -> dict[str, dict]:
    """What this machine can enforce: {item: {"ok": bool, "how": str}}. Never raises for what is missing."""
    return get_backend(backend).doctor()


__all__ = [
    "CAPABILITIES",
    "AuditVerdict",
    "Backend",
    "BackendUnavailable",
    "Chunk",
    "CommandResult",
    "Dropped",
    "FileEntry",
    "FileError",
    "FileInfo",
    "Forbidden",
    "Forward",
    "ForwardFailed",
    "Job",
    "JobNotFound",
    "JobOutput",
    "JobStatus",
    "LeaseLost",
    "LimitExceeded",
    "LimitNotEnforceable",
    "Limits",
    "ModelProxy",
    "ModelRequest",
    "ModelServer",
    "NetworkPolicy",
    "NetworkRule",
    "NoCapacity",
    "NotReady",
    "QuotaExceeded",
    "RequestTimeout",
    "RockError",
    "Sandbox",
    "SandboxDead",
    "SandboxNotFound",
    "SandboxSpec",
    "SandboxStats",
    "Session",
    "Snapshot",
    "SpecError",
    "Unauthorized",
    "doctor",
    "get_backend",
    "read_audit_log",
    "register_backend",
    "verify_audit_log",
]

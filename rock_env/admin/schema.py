"""Bodies of requests and answers, validated at the edge. An unknown field is an error."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rock_env.admin.auth import SCOPES
from rock_env.admin.control import QUEUE_SECONDS, StartRequest
from rock_env.admin.models import SandboxRow, SnapshotRow, State, Transition
from rock_env.errors import SpecError
from rock_env.model_proxy.settings import ModelProxy
from rock_env.network import NetworkPolicy, NetworkRule
from rock_env.spec import FileEntry, Limits, SandboxSpec

MAX_SECONDS = 30 * 86400.0
ID_PATTERN = "^[0-9a-f]{16}$"
NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Id = Annotated[str, Field(pattern=ID_PATTERN)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Label = Annotated[str, Field(max_length=128, pattern="^[^\\x00-\\x1f\\x7f]*$")]
TenantName = Annotated[str, Field(max_length=64, pattern=NAME_PATTERN)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileBody(Body):
    """A file: text, or bytes as base64; permission bits (default 0644)."""

    content: str = ""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    mode: Annotated[int, Field(ge=0, le=0o777)] | None = None

    def entry(self, path: str) -> FileEntry:
        if self.encoding == "utf-8":
            return FileEntry(self.content, self.mode)
        try:
            return FileEntry(base64.b64decode(self.content, validate=True), self.mode)
        except (binascii.Error, ValueError) as error:
            raise SpecError(f"files[{path!r}].content: expected base64 ({error})") from error


class LimitsBody(Body):
    """See rock_env.Limits; null lifts a limit (the tenant's lifetime always bounds)."""

    memory_bytes: Bytes | None = None
    pids: Annotated[int, Field(ge=4, le=1 << 22)] | None = None
    cpus: Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False)] | None = None
    disk_bytes: Bytes | None = None
    output_bytes: Annotated[int, Field(ge=16, le=1 << 30)] = 64 << 10
    command_seconds: Seconds = 10.0
    lifetime_seconds: Seconds | None = None


class RuleBody(Body):
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["http", "https", "tcp"]


class NetworkBody(Body):
    """An allowlist; empty: closed."""

    allow: list[RuleBody] = []

    def policy(self) -> NetworkPolicy:
        return NetworkPolicy(tuple(NetworkRule(r.host, r.port, r.protocol) for r in self.allow))


class ModelBody(Body):
    """See rock_env.ModelProxy. `url` is the name of one of the admin's models, for push."""

    mode: Literal["pull", "push"] = "pull"
    url: Annotated[str, Field(pattern="^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$")] = ""
    models: Annotated[list[str], Field(min_length=1, max_length=64)] = ["model"]
    request_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 600.0
    lease_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 120.0
    max_body_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = 4 << 20

    def proxy(self) -> ModelProxy:
        return ModelProxy(**{**self.model_dump(), "models": tuple(self.models)})


class SpecBody(Body):
    """See rock_env.SandboxSpec. `image` is the name of one of the admin's images; without `backend` it is its first."""

    image: str | None = None
    files: dict[str, str | FileBody] = {}
    workdir: str = "/app"
    env: dict[str, str] = {}
    limits: LimitsBody = LimitsBody()
    network: NetworkBody = NetworkBody()
    backend: str | None = None
    model_proxy: ModelBody | None = None

    def spec(self) -> SandboxSpec:
        files = {p: FileEntry(b) if isinstance(b, str) else b.entry(p) for p, b in self.files.items()}
        limits = Limits(**self.limits.model_dump(exclude_unset=True))
        model = self.model_proxy.proxy() if self.model_proxy is not None else None
        given = {
            "model_proxy": model,
            "image": self.image,
            "workdir": self.workdir,
            "env": self.env,
            "backend": self.backend,
        }
        return SandboxSpec(**given, files=files, limits=limits, network=self.network.policy())


class StartBody(Body):
    """`wait`: answer when the sandbox runs (201) or has failed; else at once (202)."""

    spec: SpecBody | None = None
    snapshot: Id | None = None
    name: Label = ""
    idle_seconds: Seconds | None = None
    queue_seconds: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = QUEUE_SECONDS
    wait: bool = True

    def request(self) -> StartRequest:
        body = self.spec if self.spec is not None or self.snapshot is not None else SpecBody()
        spec = None if body is None else body.spec()
        return StartRequest(spec, self.snapshot, self.name, self.idle_seconds, self.queue_seconds)


class ExecuteBody(Body):
    """One process: shell text by a fresh bash, or an argument list directly."""

    command: str | Annotated[list[str], Field(min_length=1)]
    timeout: Seconds | None = None
    cwd: str | None = None
    env: dict[str, str] = {}


class RunBody(Body):
    """Shell text for a persistent bash, which the first command of that name starts."""

    command: str
    session: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    timeout: Seconds | None = None


class ForkBody(Body):
    n: Annotated[int, Field(ge=1, le=1024)] = 1


class TokenBody(Body):
    scopes: Annotated[list[Literal[SCOPES]], Field(min_length=1)] = list(SCOPES)
    seconds: Seconds | None = None
    label: Label = ""


class KeyBody(Body):
    label: Label = ""
    seconds: Seconds | None = None


class QuotaBody(Body):
    """A tenant's quotas; null: no bound."""

    max_sandboxes: Annotated[int, Field(ge=0, le=1 << 30)] | None = 64
    max_memory_bytes: Bytes | None = None
    max_cpus: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = None
    max_snapshots: Annotated[int, Field(ge=0, le=1 << 30)] | None = 64
    max_lifetime_seconds: Seconds = 86400.0


class TenantBody(QuotaBody):
    name: TenantName


# -- answers, for the OpenAPI document
class ErrorOut(BaseModel):
    class Error(BaseModel):
        code: str
        message: str
        errno: str = ""

    error: Error


class SandboxOut(BaseModel):
    id: str
    tenant: str
    name: str
    state: State
    reason: str
    spec: dict
    idle_seconds: float
    worker: str | None
    created_at: float
    deadline: float
    ended_at: float | None


class CommandOut(BaseModel):
    exit_code: int
    output: str
    timed_out: bool
    truncated: bool
    signal: int | None
    oom_killed: bool
    seconds: float


def sandbox_out(row: SandboxRow) -> dict:
    names = ("id", "tenant", "name", "state", "reason", "idle_seconds", "worker", "created_at", "deadline", "ended_at")
    rules = [{"host": host, "port": port, "protocol": protocol} for host, port, protocol in row.spec["network"]]
    shown = {k: v for k, v in row.spec.items() if k not in ("env", "readonly_binds")}
    return {**{name: getattr(row, name) for name in names}, "spec": {**shown, "network": {"allow": rules}}}


def transition_out(row: Transition) -> dict:
    return {"state": row.state, "reason": row.reason, "at": row.at}


def snapshot_out(row: SnapshotRow) -> dict:
    return {name: getattr(row, name) for name in ("id", "tenant", "sandbox", "state", "created_at")}

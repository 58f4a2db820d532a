"""Bodies and answers of ROCK's published REST API (see compat.py): what its SDK, rl-rock 1.11, sends and reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from rock_env.admin.control import QUEUE_SECONDS, StartRequest
from rock_env.admin.http import Json
from rock_env.admin.models import SandboxRow, SnapshotRow, State, Transition
from rock_env.admin.schema import Id, Seconds
from rock_env.errors import SpecError
from rock_env.gem.text import MAX_TEXT
from rock_env.spec import Limits, SandboxSpec, check_env

OK, BAD_REQUEST, SERVER_ERROR, COMMAND_ERROR = 2000, 4000, 5000, 6000
COMMAND_SECONDS = 1200.0  # without a timeout of its own
OUTPUT_BYTES = 8 << 20  # the API has no limit: this one keeps an answer's size within reason
_PIDS = 4096  # nor has it one here, and its SDK leaves a shell behind for each `arun`
_MAX_QUEUE_SECONDS = 3600.0
_MAX_PARTS = 16
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([bkmgt]?)(?:i?b)?\s*", re.IGNORECASE)
_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SILENT = frozenset({"read_file", "stop"})  # the SDK does not look at these answers, but at their HTTP status
_OWN_STATUS = frozenset({"forbidden", "no_route", "method", "error"})
SessionName = Annotated[str, Field(min_length=1, max_length=256)]
ImageName = Annotated[str, Field(min_length=1, max_length=512, pattern="^[^\\x00-\\x20\\x7f]+$")]
Encoding = Literal["utf-8", "utf8", "utf-8-sig", "ascii", "latin-1", "iso-8859-1", "cp1252", "utf-16", "gbk", "gb18030"]


class PeerBody(BaseModel):
    """A field that is null counts as absent; an unknown one that is not null is an error."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class SandboxBody(PeerBody):
    sandbox_id: Id


class PeerStartBody(PeerBody):
    """`image`: one of the admin's images, or a tag that the tenant committed."""

    image: ImageName
    image_os: Literal["linux"] = "linux"
    auto_clear_time: int | None = None  # an older name of the next one, which is always sent beside it
    auto_clear_time_minutes: Annotated[int, Field(ge=1, le=43200)] | None = None
    startup_timeout: Seconds | None = None
    memory: str = "8g"
    cpus: Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False)] = 2.0
    limit_cpus: Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False)] | None = None
    disk: str | None = None
    pull: Literal["never", "always", "missing"] = "missing"
    registry_username: str | None = None
    registry_password: str | None = Field(None, repr=False)
    auto_delete_seconds: Annotated[int, Field(ge=0)] | None = None
    sandbox_id: str | None = None
    num_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    accelerator_type: str | None = None
    use_kata_runtime: bool = False
    auto_archive_seconds: int | None = None

    def request(self, backend: str, name: str, snapshot: SnapshotRow | None) -> StartRequest:
        """Raises SpecError for what a sandbox of ours cannot have."""
        for field in ("sandbox_id", "num_gpus", "accelerator_type", "use_kata_runtime", "auto_archive_seconds"):
            if getattr(self, field) not in (None, 0, False):
                raise SpecError(f"{field}: not supported here; expected none, got {getattr(self, field)!r}")
        limits = Limits(
            memory_bytes=size_of("memory", self.memory),
            cpus=self.limit_cpus or self.cpus,
            pids=_PIDS,
            disk_bytes=size_of("disk", self.disk) if self.disk is not None else Limits.disk_bytes,
            output_bytes=OUTPUT_BYTES,
            command_seconds=COMMAND_SECONDS,
            lifetime_seconds=None,
        )
        image = self.image
        if snapshot is not None:
            image, backend = snapshot.spec["image"], snapshot.spec["backend"]
        minutes = self.auto_clear_time_minutes
        return StartRequest(
            SandboxSpec(image=image, backend=backend, limits=limits),
            snapshot.id if snapshot is not None else None,
            name,
            60.0 * minutes if minutes is not None else None,
            min(self.startup_timeout or QUEUE_SECONDS, _MAX_QUEUE_SECONDS),
        )


class PeerExecuteBody(SandboxBody):
    """`shell` makes no difference: a text is for bash, a list is a program and its arguments."""

    command: str | Annotated[list[str], Field(min_length=1)]
    session_type: Literal["bash"] = "bash"
    timeout: Seconds | None = None
    cwd: str | None = None
    env: dict[str, str] = {}
    shell: bool = False
    check: bool = False
    error_msg: str = ""


class SessionBody(SandboxBody):
    session_type: Literal["bash"] = "bash"
    session: SessionName = "default"


class OpenSessionBody(SessionBody):
    """`env_enable`, `max_read_size`: no difference here."""

    startup_source: Annotated[list[str], Field(max_length=64)] = []
    startup_timeout: Seconds | None = None
    env: dict[str, str] = {}
    env_enable: bool = False
    max_read_size: int | None = None
    remote_user: str | None = None

    def commands(self) -> str:
        """What the new shell runs first; "" for nothing."""
        if self.remote_user is not None:
            raise SpecError("remote_user: a sandbox has one user; expected none")
        steps = [f"export {name}={shlex.quote(value)}" for name, value in check_env("env", self.env).items()]
        return " && ".join(steps + [f"source {shlex.quote(path)}" for path in self.startup_source])


class ActionBody(SandboxBody):
    """`check`: "raise": an exit code other than 0 is a failure; "silent": it is told; "ignore": it is not."""

    action_type: Literal["bash"] = "bash"
    session: SessionName = "default"
    command: str
    timeout: Seconds | None = None
    check: Literal["raise", "silent", "ignore"] = "raise"
    error_msg: str = ""
    is_interactive_command: bool = False
    is_interactive_quit: bool = False
    expect: list[str] = []

    def require_plain(self) -> None:
        for field in ("is_interactive_command", "is_interactive_quit", "expect"):
            if getattr(self, field):
                raise SpecError(f"{field}: not supported here (see jobs with a terminal); expected none")


class ReadBody(SandboxBody):
    path: str
    encoding: Encoding = "utf-8"
    errors: Literal["strict", "ignore", "replace", "backslashreplace"] = "strict"


class WriteBody(SandboxBody):
    path: str
    content: str


class UploadForm(SandboxBody):
    target_path: str


class CommitBody(SandboxBody):
    """No registry is spoken to: its credentials are not used."""

    image_tag: ImageName
    username: str = ""
    password: str = Field("", repr=False)


class GemMakeBody(PeerBody):
    env_id: Annotated[str, Field(min_length=1, max_length=512)]


class GemResetBody(SandboxBody):
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class GemStepBody(SandboxBody):
    action: Annotated[str, Field(max_length=MAX_TEXT)]


# -- sizes
def size_of(name: str, text: str) -> int:
    """Bytes of a size as Docker writes it ("8g", "512m", "50G")."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SpecError(f"{name}: expected a size like 512m or 8g, got {text[:64]!r}")
    return int(float(match[1]) * (1 << _UNITS[match[2].lower()]))


def size_text(size: int | None) -> str | None:
    if size is None:
        return None
    unit = next((u for u in "gmk" if size % (1 << _UNITS[u]) == 0), "b")
    return f"{size >> _UNITS[unit]}{unit}"


# -- answers
class Envelope(BaseModel):
    """Every answer. On failure `result` is {"code", "exit_code", "failure_reason"}."""

    status: Literal["Success", "Failed"]
    message: str | None
    error: str | None
    result: dict | str | None


def succeeded(result: dict | str) -> Json:
    return Json({"status": "Success", "message": None, "error": None, "result": result})


def failed(code: int, reason: str, *, kind: str, exit_code: int | None = None, status: int = 200) -> Json:
    result = {"code": code, "exit_code": exit_code, "failure_reason": reason}
    return Json({"status": "Failed", "message": kind, "error": reason, "result": result}, status)


def render_error(request: Request, status: int, error: dict[str, str]) -> Response:
    """An error in the envelope. The SDK reads the text of a failure only if HTTP says 200."""
    is_silent = request.url.path.rpartition("/")[2] in _SILENT
    http = status if is_silent or error["code"] in _OWN_STATUS else 200
    code = BAD_REQUEST if status < 500 else SERVER_ERROR
    return failed(code, error["message"], kind=error["code"], status=http)


def status_out(row: SandboxRow, history: Sequence[Transition] = ()) -> dict:
    """A sandbox as `get_status` tells it. Of the API's states it has pending, running and stopped."""
    state, limits = State(row.state), row.spec["limits"]
    phases = {State.PENDING: "pending", State.STARTING: "pending", State.RUNNING: "running"}
    before = [None, *history]
    return {
        "sandbox_id": row.id,
        "status": _phases(row, state),
        "state": phases.get(state, "stopped"),
        "is_alive": state is State.RUNNING,
        "host_name": row.worker or "",
        "image": row.spec["image"],
        "namespace": row.tenant,
        "experiment_id": row.name or None,
        "cpus": limits["cpus"],
        "memory": size_text(limits["memory_bytes"]),
        "disk": size_text(limits["disk_bytes"]),
        "port_mapping": {},
        "create_time": time_text(row.created_at),
        "stop_time": time_text(row.ended_at) if row.ended_at is not None else None,
        "state_history": [
            {
                "from_state": old.state if old is not None else "",
                "to_state": new.state,
                "event": new.reason,
                "timestamp": time_text(new.at),
            }
            for old, new in zip(before, history, strict=False)
        ],
    }


def _phases(row: SandboxRow, state: State) -> dict[str, dict[str, str]]:
    """How the start went, in two phases. The SDK takes a failed one as the reason to give up."""
    if state is State.PENDING:
        schedule, start, reason = "running", "waiting", ""
    elif state is State.STARTING:
        schedule, start, reason = "success", "running", ""
    elif row.audit_log is None:  # it never ran
        schedule, start, reason = "success" if row.worker else "failed", "failed", f"{state}: {row.reason}"
    else:
        schedule, start, reason = "success", "success", "" if state is State.RUNNING else f"{state}: {row.reason}"
    return {"schedule": {"status": schedule, "message": reason}, "start": {"status": start, "message": reason}}


def commit_out(sandbox: str, tag: str, at: float) -> dict:
    time = time_text(at)
    done = {"phase": "SUCCEEDED", "started_at": time, "completed_at": time, "exit_code": 0}
    return {"sandbox_id": sandbox, "image_tag": tag, **done}


def time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


# -- forms
def parse_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a multipart/form-data body (RFC 7578) by name. Raises SpecError."""
    header = Message()
    header["Content-Type"] = content_type.replace("\r", " ").replace("\n", " ")
    boundary = header.get_param("boundary")
    if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise SpecError("the body: expected multipart/form-data with a boundary")
    delimiter = b"--" + boundary.encode("utf-8", "replace")
    fields: dict[str, bytes] = {}
    at = len(delimiter) if body.startswith(delimiter) else -1
    while at >= 0 and body[at : at + 2] == b"\r\n" and len(fields) < _MAX_PARTS:
        middle = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + delimiter, middle + 4) if middle >= 0 else -1
        if end < 0:
            break
        part = BytesHeaderParser().parsebytes(body[at + 2 : middle + 4])
        name = part.get_param("name", header="content-disposition")
        if not isinstance(name, str) or name in fields:
            raise SpecError("the body: expected parts of different names")
        fields[name] = body[middle + 4 : end]
        at = end + 2 + len(delimiter)
    if at < 0 or body[at : at + 2] != b"--":
        raise SpecError(f"the body: expected at most {_MAX_PARTS} parts, and the boundary at its end")
    return fields

"""ROCK's published REST API (/apis/envs/sandbox/v1, /apis/v1/envs/gem), so that its SDK works against this admin.

Routes translate, and do nothing else: what happens is in control.py and gem.py. docs/rock.md says where we differ.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from rock_env import jobs
from rock_env.admin import compat_schema as schema
from rock_env.admin.auth import Principal
from rock_env.admin.compat_schema import COMMAND_ERROR, failed, succeeded
from rock_env.admin.control import REQUEST_SECONDS, START_SECONDS, ControlPlane, Record
from rock_env.admin.gem import Environments, Wanted
from rock_env.admin.gem_routes import step_out
from rock_env.admin.http import Json, install_errors, principal
from rock_env.admin.models import SnapshotRow
from rock_env.admin.schema import ID_PATTERN, Label
from rock_env.admin.streams import Call, caller
from rock_env.errors import LimitExceeded, NotReady, SandboxNotFound, SpecError
from rock_env.sandbox import argv_of
from rock_env.spec import FileEntry, check_env, check_path

SANDBOX_PREFIX = "/apis/envs/sandbox/v1"
GEM_PREFIX = "/apis/v1/envs/gem"
_POLL_SECONDS = 10.0  # the SDK asks for the state, and sleeps for 3 s while it is not alive
_CLOSE_SECONDS = 10.0
_BUFFER_BYTES = 256 << 10  # small enough for as many commands at once as a sandbox may have jobs
_MAX_READ_BYTES = 64 << 20
_KILL = 9
_FORM = {"file": {"type": "string", "format": "binary"}, "target_path": {"type": "string"}}
_FORM |= {"sandbox_id": {"type": "string", "pattern": ID_PATTERN}}
_UPLOAD = {"type": "object", "required": list(_FORM), "properties": _FORM}
Who = Annotated[Principal, Depends(principal)]
Asked = Annotated[str, Query(alias="sandbox_id", pattern=ID_PATTERN)]
InPath = Annotated[str, Path(pattern=ID_PATTERN)]


def create_peer_app(control: ControlPlane) -> FastAPI:
    """The sandbox API, to be mounted at SANDBOX_PREFIX behind the admin's Gate."""
    app = FastAPI(title="ROCK's sandbox API", version="1", openapi_url=None, docs_url=None, redoc_url=None)
    install_errors(app, schema.render_error)
    router = APIRouter(responses={200: {"model": schema.Envelope}})
    for routes in (life_routes, commit_routes, session_routes, file_routes, refused_routes):
        routes(router, control)
    app.include_router(router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Json(app.openapi())

    return app


def life_routes(router: APIRouter, control: ControlPlane) -> None:
    async def snapshot_of(who: Principal, image: str) -> SnapshotRow | None:
        """The snapshot that a tag of the tenant means. The admin's images come first."""
        if image in control.images:
            return None
        id = await control.db(control.database.tagged_snapshot, who.tenant, image)
        return control.snapshots.get(id or "")

    async def begin(who: Principal, body: schema.PeerStartBody, name: str | None) -> Record:
        who.require_key()
        snapshot = await snapshot_of(who, body.image)
        return await control.start(who, body.request(control.backends[0], name or "", snapshot))

    @router.post("/start_async")
    async def start_async(
        body: schema.PeerStartBody, who: Who, x_experiment_id: Annotated[Label | None, Header()] = None
    ) -> Response:
        """Begin to bring one up: see get_status."""
        return succeeded(schema.status_out((await begin(who, body, x_experiment_id)).row))

    @router.post("/start")
    async def start(
        body: schema.PeerStartBody, who: Who, x_experiment_id: Annotated[Label | None, Header()] = None
    ) -> Response:
        """Answers when it runs."""
        record = await begin(who, body, x_experiment_id)
        await control.settled(record, START_SECONDS + (body.startup_timeout or 0.0))
        if record.failure is not None:
            raise record.failure
        return succeeded(schema.status_out(record.row))

    @router.get("/get_status")
    async def get_status(id: Asked, who: Who, include_all_states: bool = False) -> Response:
        """Of a sandbox that comes up, once it has (or after a while)."""
        record = await control.find(who, id, "read")
        await control.settled(record, _POLL_SECONDS)
        history = await control.db(control.database.history, id) if include_all_states else ()
        return succeeded(schema.status_out(record.row, history))

    @router.get("/is_alive")
    async def is_alive(id: Asked, who: Who) -> Response:
        row = (await control.find(who, id, "read")).row
        status = schema.status_out(row)
        return succeeded({"is_alive": status["is_alive"], "message": row.reason or status["host_name"]})

    @router.post("/stop")
    async def stop(body: schema.SandboxBody, who: Who) -> Response:
        """Idempotent."""
        record = await control.find(who, body.sandbox_id, "manage")
        await control.stop(record, f"stopped by key {who.key}")
        return succeeded(f"{record.id} {record.state}")

    @router.post("/delete")
    async def delete(body: schema.SandboxBody, who: Who) -> Response:
        """A stopped sandbox was destroyed when it stopped: nothing is left but its record, which stays."""
        record = await control.find(who, body.sandbox_id, "manage")
        if not record.state.is_terminal:
            raise NotReady(f"sandbox {record.id} is {record.state}: stop it first")
        return succeeded(f"{record.id} deleted")


def commit_routes(router: APIRouter, control: ControlPlane) -> None:
    @router.post("/commit")
    async def commit(body: schema.CommitBody, who: Who) -> Response:
        """Take a snapshot under a tag of the tenant, which `start` takes as an image. It is done when this returns."""
        record = await control.find(who, body.sandbox_id, "manage")
        if body.image_tag in control.images:
            raise SpecError("image_tag: it is the name of one of the admin's images; expected another")
        row = await control.snapshot(record)
        before = await control.db(control.database.tag_snapshot, row.tenant, body.image_tag, row.id)
        if before in control.snapshots:  # nothing names it any more
            await control.drop_snapshot(control.snapshots[before])
        return succeeded(schema.commit_out(record.id, body.image_tag, row.created_at))

    @router.get("/commit/{sandbox_id}")
    async def status(sandbox_id: InPath, who: Who) -> Response:
        """The newest commit of a sandbox."""
        await control.find(who, sandbox_id, "manage")
        found = await control.db(control.database.last_tag, sandbox_id)
        if found is None:
            raise SandboxNotFound(f"sandbox {sandbox_id} has no commit")
        return succeeded(schema.commit_out(sandbox_id, found[0], found[1].created_at))


def session_routes(router: APIRouter, control: ControlPlane) -> None:
    call = caller(control)

    async def run(record: Record, session: str, command: str, timeout: float | None) -> dict:
        limit = record.limits.command_seconds if timeout is None else timeout
        arguments = {"session": session, "seconds": limit, "output_bytes": record.limits.output_bytes}
        reply, _ = await control.call(record, "run", limit + REQUEST_SECONDS, command.encode(), **arguments)
        return reply

    @router.post("/execute")
    async def execute(body: schema.PeerExecuteBody, who: Who) -> Response:
        """One process, both of its streams by themselves. A timeout gives 124 and what was written before it."""
        record = await control.find(who, body.sandbox_id, "exec")
        result = await _run_job(call, who, body, body.timeout or record.limits.command_seconds)
        if body.check and result["exit_code"] != 0:
            text = f"{body.error_msg}: " if body.error_msg else ""
            text += f"exit code {result['exit_code']}; stdout: {result['stdout']}; stderr: {result['stderr']}"
            return failed(COMMAND_ERROR, text, kind="command", exit_code=result["exit_code"])
        return succeeded(result)

    @router.post("/create_session")
    async def create_session(body: schema.OpenSessionBody, who: Who) -> Response:
        """A shell of a new name."""
        record, commands = await control.find(who, body.sandbox_id, "exec"), body.commands()
        await call(who, record.id, "session_open", session=body.session)
        if not commands:
            return succeeded({"output": "", "session_type": "bash"})
        result = await run(record, body.session, commands, body.startup_timeout and max(body.startup_timeout, 30.0))
        if result["exit_code"] != 0:
            await call(who, record.id, "session_close", _CLOSE_SECONDS, session=body.session, seconds=_CLOSE_SECONDS)
            text = f"startup_source, env: exit code {result['exit_code']}: {result['output']}"
            return failed(COMMAND_ERROR, text, kind="command", exit_code=result["exit_code"])
        return succeeded({"output": result["output"], "session_type": "bash"})

    @router.post("/run_in_session")
    async def run_in_session(body: schema.ActionBody, who: Who) -> Response:
        """Shell text in a session that was created."""
        record = await control.find(who, body.sandbox_id, "exec")
        body.require_plain()
        if "\0" in body.command:
            raise SpecError("command: expected text without NUL")
        reply, _ = await call(who, record.id, "session_list")
        if body.session not in reply["sessions"]:
            raise SpecError(f"session: {body.session!r} does not exist")
        result = await run(record, body.session, body.command, body.timeout)
        code, reason = result["exit_code"], ""
        if result["timed_out"]:
            reason = f"timed out after {result['seconds']:.3g} s"
        elif result["truncated"]:
            reason = f"the output is more than {record.limits.output_bytes} bytes: its middle was dropped"
        if body.check == "raise" and code != 0:
            text = f"{body.error_msg}: " if body.error_msg else ""
            text += f"{reason or f'exit code {code}'}; output: {result['output']}"
            return failed(COMMAND_ERROR, text, kind="command", exit_code=code)
        code = None if body.check == "ignore" and not reason else code
        seen = {"session_type": "bash", "output": result["output"].rstrip(), "exit_code": code, "expect_string": ""}
        return succeeded({**seen, "failure_reason": reason})

    @router.post("/close_session")
    async def close_session(body: schema.SessionBody, who: Who) -> Response:
        arguments = {"session": body.session, "seconds": _CLOSE_SECONDS}
        await call(who, body.sandbox_id, "session_close", _CLOSE_SECONDS, **arguments)
        return succeeded({"session_type": "bash"})


async def _run_job(call: Call, who: Principal, body: schema.PeerExecuteBody, seconds: float) -> dict:
    """A command as a job, whose streams arrive apart. One that writes too much is killed: half an answer is none."""
    id, job = body.sandbox_id, secrets.token_hex(8)
    asked = {"argv": argv_of(body.command), "env": check_env("env", body.env), "seconds": seconds}
    asked |= {"cwd": None if body.cwd is None else check_path("cwd", body.cwd), "stdin": False, "size": None}
    await call(who, id, "job_start", job=job, buffer_bytes=_BUFFER_BYTES, **asked)
    streams = {"stdout": bytearray(), "stderr": bytearray()}
    sequence, wait, until = 0, jobs.MAX_WAIT_SECONDS, time.monotonic() + seconds + REQUEST_SECONDS
    while True:
        reading = {"seq": sequence, "seconds": wait, "max_bytes": jobs.MAX_READ_BYTES}
        reply, data = await call(who, id, "job_read", wait, job=job, **reading)
        at = 0
        for _, stream, size in reply["pieces"]:
            if stream == "dropped":
                raise LimitExceeded(f"execute: {size} bytes of output were lost, as they were not read in time")
            streams[stream] += data[at : at + size]
            at += size
        sequence, status = reply["next"], reply["status"]
        if status["state"] != "running" and sequence >= status["output_bytes"]:
            text = {name: bytes(data).decode("utf-8", "backslashreplace") for name, data in streams.items()}
            return {**text, "exit_code": status["exit_code"], "timed_out": status["timed_out"]}
        is_large = sum(map(len, streams.values())) > schema.OUTPUT_BYTES
        if is_large or time.monotonic() > until:
            await call(who, id, "job_signal", job=job, number=_KILL)
            raise LimitExceeded(f"execute: expected at most {schema.OUTPUT_BYTES} bytes of output within {seconds:g} s")


def file_routes(router: APIRouter, control: ControlPlane) -> None:
    async def put(record: Record, path: str, data: bytes) -> None:
        if check_path("path", path).endswith("/"):
            raise SpecError(f"path: expected a file name, got {path!r}")
        await control.put(record, {path: FileEntry(data)}, {})

    @router.post("/read_file")
    async def read_file(body: schema.ReadBody, who: Who) -> Response:
        """A file's text; what is not text is an error."""
        record = await control.find(who, body.sandbox_id, "files")
        arguments = {"path": check_path("path", body.path), "max_bytes": _MAX_READ_BYTES}
        _, blob = await control.call(record, "read", REQUEST_SECONDS, **arguments)
        try:
            return succeeded({"content": blob.decode(body.encoding, body.errors)})
        except UnicodeDecodeError as error:
            raise SpecError(f"path: {body.path!r} is not {body.encoding} at byte {error.start}") from error

    @router.post("/write_file")
    async def write_file(body: schema.WriteBody, who: Who) -> Response:
        await put(await control.find(who, body.sandbox_id, "files"), body.path, body.content.encode())
        return succeeded({"success": True, "message": ""})

    upload_body = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}

    @router.post("/upload", openapi_extra={"requestBody": upload_body})
    async def upload(request: Request, who: Who) -> Response:
        """A file of a form, to `target_path`."""
        fields = schema.parse_form(request.headers.get("content-type", ""), await request.body())
        if "file" not in fields:
            raise SpecError("file: expected a part of this name")
        data = fields.pop("file")
        try:
            form = schema.UploadForm.model_validate({name: value.decode() for name, value in fields.items()})
        except UnicodeDecodeError as error:
            raise SpecError("the body: expected UTF-8 in all parts but the file") from error
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        await put(await control.find(who, form.sandbox_id, "files"), form.target_path, data)
        return succeeded({"success": True, "message": "", "file_name": form.target_path.rpartition("/")[2]})


def refused_routes(router: APIRouter, control: ControlPlane) -> None:
    """What the SDK may ask for and this admin does not have: a failure that says so."""

    @router.get("/get_token")
    async def get_token(who: Who) -> Response:
        raise SpecError("get_token: there is no object store; files are uploaded directly")

    @router.post("/restart")
    async def restart(body: schema.SandboxBody, who: Who) -> Response:
        await control.find(who, body.sandbox_id, "manage")
        raise SpecError("restart: what has stopped is gone; commit it before, and start from the tag")

    @router.post("/sandboxes/{sandbox_id}/archive")
    async def archive(sandbox_id: InPath, who: Who) -> Response:
        await control.find(who, sandbox_id, "manage")
        raise SpecError("archive: what has stopped is gone; commit it before, and start from the tag")


def peer_gem_routes(router: APIRouter, environments: Environments) -> None:
    """The GEM API: answers without an envelope, errors in the admin's own form, which the SDK shows."""

    @router.post("/make")
    async def make(body: schema.GemMakeBody, who: Who) -> Response:
        live = await environments.make(who, Wanted(body.env_id, None, "isolated", {}, None))
        return Json({"sandbox_id": live.id})

    @router.post("/reset")
    async def reset(body: schema.GemResetBody, who: Who) -> Response:
        observation, info = await environments.reset(who, body.sandbox_id, body.seed)
        return Json({"observation": observation, "info": info})

    @router.post("/step")
    async def step(body: schema.GemStepBody, who: Who) -> Response:
        return Json(step_out(*await environments.step(who, body.sandbox_id, body.action, None)))

    @router.post("/close")
    async def close(body: schema.SandboxBody, who: Who) -> Response:
        await environments.close(who, body.sandbox_id)
        return Json({"sandbox_id": body.sandbox_id})

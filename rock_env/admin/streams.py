"""Routes for jobs, forwarded connections, and the model of an agent. All wait by long polls: an answer is complete in
itself and says from where to go on, so that a client whose connection was cut asks again, and any proxy will do."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field

from rock_env import forward, jobs
from rock_env.admin import schema
from rock_env.admin.auth import Principal
from rock_env.admin.control import REQUEST_SECONDS, ControlPlane
from rock_env.admin.http import Json, principal
from rock_env.sandbox import argv_of
from rock_env.spec import check_env, check_path

Who = Annotated[Principal, Depends(principal)]
SandboxId = Annotated[str, Path(pattern=schema.ID_PATTERN)]
ConnectionId = Annotated[str, Path(pattern=schema.ID_PATTERN)]
JobName = Annotated[str, Path(pattern=f"^{jobs.JOB_PATTERN}$")]
Wait = Annotated[float, Query(ge=0, le=jobs.MAX_WAIT_SECONDS, allow_inf_nan=False)]
_MAX_NUMBER = 1 << 62
Side = Annotated[int, Field(ge=1, le=jobs.MAX_TERMINAL)]


class SizeBody(schema.Body):
    """A terminal's size, in characters."""

    rows: Side
    columns: Side


class JobBody(schema.Body):
    """A command to run by itself: shell text by a fresh bash, or an argument list directly.

    `id`: its name; if there is a job of that name, it is answered with, and nothing is started.
    """

    command: str | Annotated[list[str], Field(min_length=1)]
    id: Annotated[str, Field(pattern=f"^{jobs.JOB_PATTERN}$")] | None = None
    timeout: schema.Seconds | None = None
    cwd: str | None = None
    env: Annotated[dict[str, str], Field(default_factory=dict)]
    stdin: bool = False
    terminal: SizeBody | None = None
    buffer_bytes: Annotated[int, Field(ge=jobs.MIN_BUFFER_BYTES, le=jobs.MAX_BUFFER_BYTES)] = jobs.DEFAULT_BUFFER_BYTES


class PortBody(schema.Body):
    """A port of the sandbox's own loopback."""

    port: Annotated[int, Field(ge=1, le=65535)]


class SignalBody(schema.Body):
    signal: Annotated[int, Field(ge=1, le=64)]


class PieceOut(BaseModel):
    """Bytes of a stream (base64) from number `seq` on; or "dropped", with their number alone."""

    seq: int
    stream: str
    data: str = ""
    size: int


class OutputOut(BaseModel):
    pieces: list[PieceOut]
    next: int
    status: jobs.JobStatus


class AnswerBody(schema.Body):
    """`body`: a completion; with `at` (chunks given before) a list of chunks, the last ones if `done`; with a `status`
    from 400 on {"message", "code"}."""

    lease: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    body: dict | list
    status: Annotated[int, Field(ge=400, le=599)] | Literal[200] = 200
    at: Annotated[int, Field(ge=0, le=_MAX_NUMBER)] | None = None
    done: bool = True


Call = Callable[..., Awaitable[tuple[dict, bytes]]]


def caller(control: ControlPlane) -> Call:
    """`call(who, sandbox, what, seconds, blob, **arguments)`: see Backend.call; `who` needs the scope "exec"."""

    async def call(who: Principal, id: str, what: str, seconds: float = 0.0, blob: bytes = b"", /, **arguments: object):
        record = await control.find(who, id, "exec")
        limit = seconds + REQUEST_SECONDS
        return await control.call(record, "call", limit, blob, what=what, seconds=seconds, arguments=arguments)

    return call


def job_routes(router: APIRouter, control: ControlPlane) -> None:
    call = caller(control)

    @router.post("/sandboxes/{id}/jobs", status_code=201, response_model=jobs.JobStatus)
    async def start(id: SandboxId, body: JobBody, who: Who) -> Response:
        """Start a command that runs by itself until it ends, its timeout, or the sandbox's end."""
        arguments = {
            "job": body.id or secrets.token_hex(8),
            "argv": argv_of(body.command),
            "env": check_env("env", body.env),
            "cwd": None if body.cwd is None else check_path("cwd", body.cwd),
            "seconds": body.timeout,
            "stdin": body.stdin,
            "size": [body.terminal.rows, body.terminal.columns] if body.terminal is not None else None,
            "buffer_bytes": body.buffer_bytes,
        }
        return Json((await call(who, id, "job_start", **arguments))[0], 201)

    @router.get("/sandboxes/{id}/jobs", response_model=list[jobs.JobStatus])
    async def list_jobs(id: SandboxId, who: Who) -> Response:
        return Json((await call(who, id, "job_list"))[0]["jobs"])

    @router.get("/sandboxes/{id}/jobs/{job}", response_model=jobs.JobStatus)
    async def status(id: SandboxId, job: JobName, who: Who, wait_seconds: Wait = 0.0) -> Response:
        """How it is doing; once it has ended, or after `wait_seconds`."""
        return Json((await call(who, id, "job_status", wait_seconds, job=job, seconds=wait_seconds))[0])

    @router.get("/sandboxes/{id}/jobs/{job}/output", response_model=OutputOut)
    async def output(
        id: SandboxId,
        job: JobName,
        who: Who,
        seq: Annotated[int, Query(ge=0, le=_MAX_NUMBER)] = 0,
        wait_seconds: Wait = 0.0,
        max_bytes: Annotated[int, Query(ge=1, le=jobs.MAX_READ_BYTES)] = 256 << 10,
    ) -> Response:
        """What was written from byte number `seq` on; if there is nothing, waits for it. Ask on with `next`."""
        asked = {"seq": seq, "seconds": wait_seconds, "max_bytes": max_bytes}
        reply, data = await call(who, id, "job_read", wait_seconds, job=job, **asked)
        pieces, at = [], 0
        for number, stream, size in reply["pieces"]:
            piece = {"seq": number, "stream": stream, "size": size}
            if stream != "dropped":
                piece["data"] = base64.b64encode(data[at : at + size]).decode()
                at += size
            pieces.append(piece)
        return Json({**reply, "pieces": pieces})

    @router.post("/sandboxes/{id}/jobs/{job}/stdin")
    async def write(
        id: SandboxId,
        job: JobName,
        request: Request,
        who: Who,
        at: Annotated[int | None, Query(ge=0, le=_MAX_NUMBER)] = None,
        close: bool = False,
        wait_seconds: Wait = 10.0,
    ) -> Response:
        """The body goes to its standard input, as far as there is room in time; `close` then ends it.

        With `at` (bytes sent before), what has arrived already is not taken twice.
        """
        body = await request.body()
        sent = {"at": at, "close": close, "seconds": wait_seconds}
        return Json((await call(who, id, "job_write", wait_seconds, body, job=job, **sent))[0])

    @router.post("/sandboxes/{id}/jobs/{job}/signal")
    async def signal(id: SandboxId, job: JobName, body: SignalBody, who: Who) -> Response:
        """To its process group, or in a terminal to the one in the foreground; 9 goes to all that it started."""
        return Json((await call(who, id, "job_signal", job=job, number=body.signal))[0])

    @router.put("/sandboxes/{id}/jobs/{job}/terminal", status_code=204, response_class=Response)
    async def resize(id: SandboxId, job: JobName, body: SizeBody, who: Who) -> Response:
        await call(who, id, "job_resize", job=job, size=[body.rows, body.columns])
        return Response(status_code=204)


def connection_routes(router: APIRouter, control: ControlPlane) -> None:
    """Port forwarding: whoever asks has a socket of their own, and carries its bytes here (see rock_env.forward)."""
    call = caller(control)

    @router.put("/sandboxes/{id}/connections/{connection}", status_code=204, response_class=Response)
    async def connect(id: SandboxId, connection: ConnectionId, body: PortBody, who: Who) -> Response:
        """Connect to a port inside; `connection` is the caller's choice. 409 where nobody listens. May be repeated.

        It is closed when nobody has asked for its data for two minutes; a sandbox has at most 32.
        """
        await call(who, id, "forward_open", connection=connection, port=body.port)
        return Response(status_code=204)

    @router.get("/sandboxes/{id}/connections/{connection}/data", response_class=Response)
    async def receive(
        id: SandboxId,
        connection: ConnectionId,
        who: Who,
        seq: Annotated[int, Query(ge=0, le=_MAX_NUMBER)],
        wait_seconds: Wait = 0.0,
        max_bytes: Annotated[int, Query(ge=1, le=forward.READ_BYTES)] = forward.READ_BYTES,
    ) -> Response:
        """Bytes from inside, from number `seq` on; if there are none, waits. What came before `seq` is forgotten.

        The header Rock-End is "true" where nothing will follow.
        """
        asked = {"connection": connection, "seq": seq, "seconds": wait_seconds, "max_bytes": max_bytes}
        reply, data = await call(who, id, "forward_read", wait_seconds, **asked)
        headers = {"Rock-End": "true" if reply["is_end"] else "false"}
        return Response(data, media_type="application/octet-stream", headers=headers)

    @router.post("/sandboxes/{id}/connections/{connection}/data")
    async def send(
        id: SandboxId,
        connection: ConnectionId,
        request: Request,
        who: Who,
        at: Annotated[int, Query(ge=0, le=_MAX_NUMBER)],
        close: bool = False,
        wait_seconds: Wait = 10.0,
    ) -> Response:
        """The body goes inside, as far as there is room in time; `close` then ends this way. `accepted`: so far.

        With `at` (bytes sent before), what has arrived already is not taken twice.
        """
        sent = {"connection": connection, "at": at, "close": close, "seconds": wait_seconds}
        return Json((await call(who, id, "forward_write", wait_seconds, await request.body(), **sent))[0])

    @router.delete("/sandboxes/{id}/connections/{connection}", status_code=204, response_class=Response)
    async def close(id: SandboxId, connection: ConnectionId, who: Who) -> Response:
        """Idempotent."""
        await call(who, id, "forward_close", connection=connection)
        return Response(status_code=204)


def model_routes(router: APIRouter, control: ControlPlane) -> None:
    call = caller(control)

    @router.get("/sandboxes/{id}/model")
    async def status(id: SandboxId, who: Who) -> Response:
        """How many requests of the agent wait, are leased, and were answered."""
        return Json((await call(who, id, "model_status"))[0])

    @router.post("/sandboxes/{id}/model/next")
    async def next_request(id: SandboxId, who: Who, wait_seconds: Wait = 0.0) -> Response:
        """Take the agent's oldest request that nobody has, waiting for one; null if none came.

        It has to be answered within the lease, or else is handed out again.
        """
        reply, data = await call(who, id, "model_next", wait_seconds, seconds=wait_seconds)
        if reply["request"] is not None:
            reply["request"]["body"] = json.loads(data)
        return Json(reply)

    @router.post("/sandboxes/{id}/model/{request}/answer")
    async def answer(
        id: SandboxId, request: Annotated[str, Path(pattern="^[0-9a-f]{8}-[0-9]{1,12}$")], body: AnswerBody, who: Who
    ) -> Response:
        """Answer a request, once: 409 `lease_lost` when it is not the caller's any more."""
        given = {"lease": body.lease, "status": body.status, "at": body.at, "done": body.done}
        data = json.dumps(body.body).encode()
        return Json((await call(who, id, "model_answer", 0.0, data, request=request, **given))[0])

"""What every request goes through: authentication, a bound on its size, a line in the log, and one form of error."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rock_env import errors
from rock_env.admin.auth import Keyring, Principal
from rock_env.errors import FileError, RockError

log = logging.getLogger("rock.admin.requests")
OPEN_PATHS = frozenset({"/health"})
PEER_PATHS = "/apis/"  # see rock_env.admin.compat
MAX_BODY_BYTES = 512 << 20
_STATUS = {
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "no_entry": 404,
    "no_env": 404,
    "job_not_found": 404,
    "not_ready": 409,
    "version_taken": 409,
    "reset_needed": 409,
    "lease_lost": 409,
    "forward_failed": 409,
    "dead": 410,
    "limit_exceeded": 413,
    "spec": 422,
    "limit_not_enforceable": 422,
    "verifier_failed": 424,
    "env_failed": 424,
    "quota_exceeded": 429,
    "corrupt": 502,
    "no_capacity": 503,
    "unavailable": 503,
    "request_timeout": 504,
}


class Json(Response):
    """JSON in ASCII: file names that are not UTF-8 travel as lone surrogates."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


Render = Callable[[Request, int, dict[str, str]], Response]


def status_of(error: RockError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, FileError):
        return 404 if error.errno_name == "ENOENT" else 409
    return _STATUS.get(error.code, 500)


def error_response(error: RockError) -> Json:
    status = status_of(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return Json({"error": errors.to_wire(error)}, status, headers)


class TooLarge(errors.LimitExceeded):
    """A request's body is larger than this server takes."""


class Gate:
    """ASGI middleware. Everything but OPEN_PATHS needs a credential, what does not exist included."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        started, status, who = time.perf_counter(), 500, "-"

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                principal = self._keyring.identify(_authorization(scope))
                scope["principal"] = principal
                who = f"{principal.tenant}/{principal.key}"
            length = _header(scope, b"content-length") or "0"
            if not length.isdigit() or int(length) > MAX_BODY_BYTES:
                raise TooLarge(f"the body: expected at most {MAX_BODY_BYTES} bytes")
            await self._app(scope, _bounded(receive), note)
        except RockError as error:
            await error_response(error)(scope, receive, note)
        finally:
            milliseconds = 1e3 * (time.perf_counter() - started)
            log.info("%s %s %s %d %.1f ms", who, scope["method"], _one_line(scope["path"]), status, milliseconds)


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return None


def _authorization(scope: Scope) -> str | None:
    """The Authorization header. For a peer's SDK also its own header, and a password (the key in its base URL)."""
    given = _header(scope, b"authorization")
    if not scope["path"].startswith(PEER_PATHS):
        return given
    given = given or _header(scope, b"xrl-authorization") or ""
    scheme, _, encoded = given.partition(" ")
    if scheme.lower() != "basic":
        return given
    try:
        return "Bearer " + base64.b64decode(encoded, validate=True).decode("ascii").partition(":")[2]
    except ValueError:
        return None


def _one_line(path: str) -> str:
    return ascii(path[:200])[1:-1]


def _bounded(receive: Receive) -> Receive:
    """Bodies in chunks do not say how long they are."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise TooLarge(f"the body: expected at most {MAX_BODY_BYTES} bytes")
        return message

    return bounded


def principal(request: Request) -> Principal:
    """Who sent the request; as a dependency of routes."""
    return request.scope["principal"]


def _native(request: Request, status: int, error: dict[str, str]) -> Response:
    return Json({"error": error}, status)


def install_errors(app: FastAPI, render: Render = _native) -> None:
    """Every error as {"error": {"code", "message", "errno"}}, or as `render` has it; never with what was sent, which
    may be secret."""

    def answer(request: Request, error: RockError) -> Response:
        return render(request, status_of(error), errors.to_wire(error))

    @app.exception_handler(RockError)
    async def on_rock_error(request: Request, error: RockError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        lines = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()]
        return answer(request, errors.SpecError("; ".join(lines)[:2000]))

    @app.exception_handler(SQLAlchemyError)
    async def on_database(request: Request, error: SQLAlchemyError) -> Response:
        log.error("the database failed: %s", type(error).__name__)
        return answer(request, errors.BackendUnavailable("the admin's database cannot be used now"))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        code = {404: "no_route", 405: "method"}.get(error.status_code, "error")
        response = render(request, error.status_code, {"code": code, "message": str(error.detail), "errno": ""})
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> Response:
        return answer(request, RockError(f"internal error: {type(error).__name__}"))

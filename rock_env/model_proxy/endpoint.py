"""One sandbox's endpoint: HTTP/1.1 on a socket inside it. One request after another on each connection, in order."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Protocol

from rock_env.egress import protocol
from rock_env.egress.protocol import BadRequest
from rock_env.model_proxy import anthropic
from rock_env.model_proxy.queue import Answer, Queue
from rock_env.model_proxy.shapes import CHAT, TEXT, ApiError, Request, check_openai, chunks_of, compact, parse
from rock_env.model_proxy.tape import Recorder, Replay
from rock_env.model_proxy.upstream import Upstream
from rock_env.supervisor.unprivileged import TokenBucket

MESSAGES, MODELS = "/v1/messages", "/v1/models"
_POSTS = (CHAT, TEXT, MESSAGES)
_HEAD_SECONDS, _BODY_SECONDS, _SEND_SECONDS = 300.0, 60.0, 60.0
_LINGER_SECONDS = 1.0
_CONNECTIONS = 64
_BODIES = 4  # of the largest size, that may wait for answers at once: they take memory outside the sandbox
_BURST, _PER_SECOND = 200, 50.0  # of requests, each of which leaves a line or two in the audit log
_WATCH_SECONDS = 0.25
_CHUNK = 64 << 10
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}
Reporter = Callable[[dict], Awaitable[None]]


class Source(Protocol):
    """Where answers come from."""

    async def answer(self, request: Request) -> Answer: ...

    def close(self) -> None: ...


class _Incoming:
    """A request head, and its body."""

    def __init__(self, method: str, path: str, headers: dict[str, str], keeps: bool) -> None:
        self.method, self.path, self.headers, self.keeps = method, path, headers, keeps
        self.body = b""
        self.is_recorded = False

    @property
    def speaks_anthropic(self) -> bool:
        return self.path.startswith(MESSAGES) or "anthropic-version" in self.headers


class Endpoint:
    """`source` answers; `report` puts a line into the audit log."""

    def __init__(
        self, sandbox: str, settings: dict, source: Source, recorder: Recorder | None, report: Reporter
    ) -> None:
        self.sandbox, self.source = sandbox, source
        self._settings, self._recorder, self._report = settings, recorder, report
        self._server: asyncio.Server | None = None
        self._live: set[asyncio.Task] = set()
        self._turns = TokenBucket(_BURST, _PER_SECOND, pause=0.02)
        self._held = 0  # bytes of bodies whose requests are not answered yet
        self._names = 0
        self._prefix = secrets.token_hex(4)  # names are not used again when this process is replaced

    @property
    def queue(self) -> Queue | None:
        return self.source if isinstance(self.source, Queue) else None

    async def listen(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._accepted, sock=listener, limit=protocol.MAX_HEAD_BYTES)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._live:
            task.cancel()
        self.source.close()
        if self._recorder is not None:
            self._recorder.close()

    # -- connections
    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if len(self._live) >= _CONNECTIONS:
            writer.transport.abort()
            return
        self._live.add(task)
        try:
            while await self._serve(reader, writer):
                pass
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), _SEND_SECONDS)
        except (asyncio.CancelledError, OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the agent has gone, or the sandbox has
        finally:
            self._live.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer. False when the connection is at its end."""
        incoming = _Incoming("", "", {}, False)
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_SECONDS)
            incoming, size = _parse(head[:-4])
            await self._turns.take()
            with self._holding(size):
                if incoming.headers.get("expect", "").lower() == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                read = _read_body(reader, size, self._settings["max_body_bytes"])
                incoming.body = await asyncio.wait_for(read, _BODY_SECONDS)
                await self._handle(incoming, reader, writer)
            return incoming.keeps
        except asyncio.LimitOverrunError:
            error = ApiError(400, "invalid_request", "the request head is too long")
        except BadRequest as bad:
            error = ApiError(400, "invalid_request", str(bad))
        except ApiError as refused:
            error = refused
        if not incoming.is_recorded:
            shown = {"method": incoming.method[:20], "status": error.status, "code": error.code}
            await self._report_event("model_refused", **shown)
        keeps = incoming.keeps and bool(incoming.body)
        await _send_error(writer, incoming, error, keeps)
        if not keeps:
            await _linger(reader, writer)
        return keeps

    @contextlib.contextmanager
    def _holding(self, size: int | None) -> Iterator[None]:
        """Count a body, of a size that may not be known yet, until its request is answered. Raises ApiError."""
        limit = self._settings["max_body_bytes"]
        size = limit if size is None else size
        if size > limit:
            raise _too_large(limit)
        if self._held + size > _BODIES * limit:
            text = "the bodies of the requests that wait for answers are too large together"
            raise ApiError(429, "too_much_at_once", text)
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def _report_event(self, event: str, **fields: object) -> None:
        await self._report({"event": event, "sandbox": self.sandbox, **fields})

    # -- requests
    async def _handle(self, incoming: _Incoming, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if incoming.path == MODELS or incoming.path.startswith(f"{MODELS}/"):
            if incoming.method != "GET":
                raise ApiError(405, "method_not_allowed", f"{incoming.path}: expected GET")
            await self._report_event("model_request", method="GET", path=MODELS, bytes=0)
            await _send(writer, 200, await self._models(incoming), incoming.keeps)
            return
        if incoming.path not in _POSTS:
            known = ", ".join((*_POSTS, MODELS))
            raise ApiError(404, "unknown_url", f"no such path; expected one of {known}")
        if incoming.method != "POST":
            raise ApiError(405, "method_not_allowed", f"{incoming.path}: expected POST")
        try:
            body = parse(incoming.body)
        except ValueError as error:
            raise ApiError(400, "invalid_json", "body: expected JSON") from error
        if incoming.path == MESSAGES:
            path, chat = CHAT, anthropic.to_chat(body)
        else:
            path, chat = incoming.path, check_openai(incoming.path, body)
        self._names += 1
        request = Request(f"{self._prefix}-{self._names}", path, chat)
        shown = {"request": request.id, "method": "POST", "path": incoming.path, "model": ascii(request.model)[1:-1]}
        incoming.is_recorded = True
        await self._report_event("model_request", **shown, stream=request.is_stream, bytes=len(incoming.body))
        await self._until_gone(self._answer(request, incoming, writer), reader)

    async def _models(self, incoming: _Incoming) -> dict:
        if isinstance(self.source, Upstream):
            listed = await self.source.models()
            names = [str(row["id"]) for row in listed.get("data", []) if isinstance(row, dict) and "id" in row]
        else:
            names = list(self._settings["models"])
        if incoming.speaks_anthropic:
            rows = [{"type": "model", "id": n, "display_name": n, "created_at": "1970-01-01T00:00:00Z"} for n in names]
            listing = {"data": rows, "has_more": False, "first_id": names[0] if names else None}
            listing["last_id"] = names[-1] if names else None
        else:
            rows = [{"id": name, "object": "model", "created": 0, "owned_by": "rock"} for name in names]
            listing = {"object": "list", "data": rows}
        wanted = incoming.path.removeprefix(MODELS).removeprefix("/")
        if not wanted:
            return listing
        found = next((row for row in rows if row["id"] == wanted), None)
        if found is None:
            raise ApiError(404, "model_not_found", "no such model")
        return found

    @staticmethod
    async def _until_gone(work: Awaitable[None], reader: asyncio.StreamReader) -> None:
        """Do `work`, unless the agent hangs up first."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_WATCH_SECONDS)
                if reader.at_eof() and not task.done():
                    raise ConnectionResetError("the agent has gone")
            task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _answer(self, request: Request, incoming: _Incoming, writer: asyncio.StreamWriter) -> None:
        started, sent, status = time.monotonic(), 0, 499  # as nginx has it: the client closed the connection
        deadline = asyncio.get_running_loop().time() + self._settings["request_seconds"]
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    answer = await self.source.answer(request)
                if isinstance(answer, dict):
                    await self._record(request, {"body": answer})
                    if not request.is_stream:
                        sent = await self._send_whole(request, incoming, answer, writer)
                        status = 200
                        return
                    answer = _each(chunks_of(request, answer))
                    recorded = None
                else:
                    recorded = []
                if not request.is_stream:
                    raise ApiError(502, "invalid_answer", "the model streams an answer that was not asked for so")
            except TimeoutError as error:
                raise self._late() from error
            status = 200
            sent = await self._send_stream(request, incoming, answer, recorded, writer, deadline)
        except ApiError as error:
            status = error.status
            raise
        finally:
            seconds = round(time.monotonic() - started, 3)
            fields = {"request": request.id, "status": status, "bytes": sent, "seconds": seconds}
            await asyncio.shield(self._report_event("model_answer", **fields))

    def _late(self) -> ApiError:
        seconds = self._settings["request_seconds"]
        return ApiError(504, "model_timeout", f"the model did not answer within {seconds:g} s")

    async def _record(self, request: Request, answer: dict) -> None:
        if self._recorder is not None:
            await self._recorder.write(request, answer)

    async def _send_whole(
        self, request: Request, incoming: _Incoming, answer: dict, writer: asyncio.StreamWriter
    ) -> int:
        if incoming.path == MESSAGES:
            answer = anthropic.from_chat(answer, request.id)
        return await _send(writer, 200, answer, incoming.keeps)

    async def _send_stream(
        self,
        request: Request,
        incoming: _Incoming,
        chunks: AsyncIterator[dict],
        recorded: list[dict] | None,
        writer: asyncio.StreamWriter,
        deadline: float,
    ) -> int:
        """Server-sent events. What goes wrong after the first is an event itself, and the end of the connection."""
        is_anthropic = incoming.path == MESSAGES
        stream = anthropic.Stream(request.id, request.model)
        sent = 0
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
        keeps = "keep-alive" if incoming.keeps else "close"
        writer.write(f"{head}Transfer-Encoding: chunked\r\nConnection: {keeps}\r\n\r\n".encode())

        async def send(data: bytes) -> None:
            nonlocal sent
            if not data:  # an empty piece would be the end
                return
            sent += len(data)
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await asyncio.wait_for(writer.drain(), _SEND_SECONDS)

        try:
            async with asyncio.timeout_at(deadline):
                async with contextlib.aclosing(chunks):
                    async for chunk in chunks:
                        if recorded is not None:
                            recorded.append(chunk)
                        if is_anthropic:
                            await send(b"".join(_event(*event) for event in stream.feed(chunk)))
                        else:
                            await send(b"data: %s\n\n" % compact(chunk))
            if recorded is not None:
                await self._record(request, {"chunks": recorded})
            await send(b"".join(_event(*e) for e in stream.finish()) if is_anthropic else b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        except (ApiError, TimeoutError) as problem:
            error = problem if isinstance(problem, ApiError) else self._late()
            told = _event("error", error.anthropic()) if is_anthropic else b"data: %s\n\n" % compact(error.openai())
            await send(told)
            writer.write(b"0\r\n\r\n")
            incoming.keeps = False
        await asyncio.wait_for(writer.drain(), _SEND_SECONDS)
        return sent


def make_source(settings: dict, replay_fd: int | None) -> Source:
    """Raises ValueError for a recording that is none."""
    if settings["mode"] == "push":
        return Upstream(settings["url"], settings["api_key"], settings["request_seconds"], settings["max_body_bytes"])
    if replay_fd is not None:
        return Replay(replay_fd)
    return Queue(settings["lease_seconds"], settings["request_seconds"])


async def _each(chunks) -> AsyncIterator[dict]:
    for chunk in chunks:
        yield chunk


def _parse(head: bytes) -> tuple[_Incoming, int | None]:
    """(the request, the length of its body; None: chunked). Raises BadRequest."""
    method, target, minor, headers = protocol.parse_head(head)
    if not target.startswith("/"):
        raise BadRequest("expected a target that begins with /")
    named = {name.lower(): value for name, value in headers}
    connection = named.get("connection", "").lower()
    keeps = "close" not in connection and (minor == "1" or "keep-alive" in connection)
    path = target.partition("?")[0]
    return _Incoming(method, path, named, keeps), protocol.body_bytes(headers)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"the body: expected at most {limit} bytes")


async def _read_body(reader: asyncio.StreamReader, size: int | None, limit: int) -> bytes:
    """Raises ApiError, BadRequest."""
    if size is not None:
        return await reader.readexactly(size)
    body = bytearray()
    while size := protocol.chunk_size(await reader.readuntil(b"\r\n")):
        if len(body) + size > limit:
            raise _too_large(limit)
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise BadRequest("malformed chunk")
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers
    return bytes(body)


def _event(name: str, body: dict) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), compact(body))


async def _send(writer: asyncio.StreamWriter, status: int, body: dict, keeps: bool) -> int:
    data = compact(body)
    head = f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nContent-Type: application/json\r\n"
    keep = "keep-alive" if keeps else "close"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: {keep}\r\n\r\n".encode() + data)
    await asyncio.wait_for(writer.drain(), _SEND_SECONDS)
    return len(data)


async def _send_error(writer: asyncio.StreamWriter, incoming: _Incoming, error: ApiError, keeps: bool) -> None:
    await _send(writer, error.status, error.anthropic() if incoming.speaks_anthropic else error.openai(), keeps)


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read on for a moment: closing on unread input would reset the connection under the answer."""
    writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while await reader.read(_CHUNK):
                pass

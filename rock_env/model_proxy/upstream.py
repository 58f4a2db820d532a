"""Push mode: requests go to an OpenAI-compatible server on the host's loopback, with a key that is added here."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from rock_env.model_proxy.queue import Answer
from rock_env.model_proxy.shapes import ApiError, Request, check_answer, check_chunk, compact, parse

_THREADS = 16  # of a sandbox: requests that are under way at once
_CONNECT_SECONDS = 10.0
_END = b"[DONE]"


class Upstream:
    """Answers by asking the server. Threads do it: `http.client` is the standard library's, and blocks."""

    def __init__(self, url: str, api_key: str, seconds: float, max_bytes: int) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._base = parts.hostname or "", parts.port, parts.path.rstrip("/")
        self._key, self._seconds, self._max_bytes = api_key, seconds, max_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="upstream")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request) -> Answer:
        """Raises ApiError. When this, or the stream that it gave, is cancelled, the server is hung up on."""
        path = self._base + request.path.removeprefix("/v1")
        exchange = _Exchange(self, "POST", path, compact(request.body), request.is_stream)
        first = await exchange.start()
        if first is not None:
            return check_answer_of(request, first)
        return exchange.chunks()

    async def models(self) -> dict:
        """What the server's /models says."""
        body = await _Exchange(self, "GET", f"{self._base}/models", b"", False).start()
        return body if body is not None else {}

    def _scrubbed(self, text: str) -> str:
        """An error of the server's, which may quote the key."""
        return text.replace(self._key, "***") if self._key else text


def check_answer_of(request: Request, body: dict) -> dict:
    try:
        return check_answer(request, body)
    except ValueError as error:
        raise ApiError(502, "invalid_answer", f"the model server's answer is not a completion: {error}") from error


class _Exchange:
    """One request to the server, in a thread of its own; what comes is put into a queue of the event loop."""

    def __init__(self, upstream: Upstream, method: str, path: str, body: bytes, is_stream: bool) -> None:
        self._upstream, self._method, self._path = upstream, method, path
        self._body, self._is_stream = body, is_stream
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[dict | ApiError | None] = asyncio.Queue()
        self._started: asyncio.Future = self._loop.create_future()
        self._socket: socket.socket | None = None
        self._is_over = False

    async def start(self) -> dict | None:
        """The whole answer; None when it is a stream."""
        self._loop.run_in_executor(self._upstream._threads, self._run)
        try:
            return await self._started
        except asyncio.CancelledError:
            self._hang_up()
            raise

    async def chunks(self) -> AsyncIterator[dict]:
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, ApiError):
                    raise event
                yield event
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        self._is_over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _begin(self, answer: object) -> None:
        if not self._started.done():
            if isinstance(answer, ApiError):
                self._started.set_exception(answer)
            else:
                self._started.set_result(answer)

    # -- in the thread
    def _tell(self, what: Callable[[object], None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(what, value)

    def _run(self) -> None:
        up = self._upstream
        connection = http.client.HTTPConnection(up._host, up._port, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
            self._socket = connection.sock
            self._socket.settimeout(up._seconds)
            if self._is_over:
                return
            headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
            if up._key:
                headers["Authorization"] = f"Bearer {up._key}"
            connection.request(self._method, self._path, self._body or None, headers)
            self._read(connection.getresponse())
        except ApiError as error:
            self._fail(error)
        except Exception as error:  # whatever it was, the agent must not wait for it
            if not isinstance(error, OSError | http.client.HTTPException | ValueError):
                traceback.print_exc()
            text = f"the model server cannot be reached, or broke off ({type(error).__name__})"
            self._fail(ApiError(502, "model_unreachable", text))
        finally:
            connection.close()

    def _fail(self, error: ApiError) -> None:
        self._tell(self._begin, error)
        self._tell(self._events.put_nowait, error)

    def _read(self, response: http.client.HTTPResponse) -> None:
        kind = response.headers.get_content_type()
        if response.status == 200 and self._is_stream and kind == "text/event-stream":
            self._tell(self._begin, None)
            self._read_events(response)
            return
        data = response.read(self._upstream._max_bytes + 1)
        if len(data) > self._upstream._max_bytes:
            raise self._too_large()
        if response.status != 200:
            raise self._error_of(response.status, data)
        body = parse(data)
        if not isinstance(body, dict):
            raise ValueError("not an object")
        self._tell(self._begin, body)

    def _too_large(self) -> ApiError:
        limit = self._upstream._max_bytes
        return ApiError(502, "answer_too_large", f"the model's answer: expected at most {limit} bytes")

    def _error_of(self, status: int, data: bytes) -> ApiError:
        try:
            message = str(json.loads(data)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"the model server answered with status {status}"
        known = status if status in (400, 404, 413, 422, 429, 503, 504) else 502
        return ApiError(known, "model_error", self._upstream._scrubbed(message)[:2000])

    def _read_events(self, response: http.client.HTTPResponse) -> None:
        total = 0
        while line := response.readline(self._upstream._max_bytes):
            total += len(line)
            if total > self._upstream._max_bytes:
                raise self._too_large()
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == _END:
                self._tell(self._events.put_nowait, None)
                return
            event = parse(data)
            if isinstance(event, dict) and "error" in event:
                raise ApiError(502, "model_error", self._upstream._scrubbed(str(event["error"]))[:2000])
            self._tell(self._events.put_nowait, check_chunk(event))
        raise ApiError(502, "answer_broken_off", "the model server broke off in the middle of its answer")

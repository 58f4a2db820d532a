"""The process of all endpoints: without privileges, it accepts on sockets inside sandboxes, which the supervisor makes.

Two sockets lead to the supervisor: over one come requests in frames (rock_env.wire) and go replies and reports, in
order; over the other come descriptors, before the request that they belong to. It ends with its supervisor.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import socket

from rock_env import wire
from rock_env.model_proxy.endpoint import Endpoint, make_source
from rock_env.model_proxy.queue import LeaseLost, Queue
from rock_env.model_proxy.shapes import ApiError, compact, parse
from rock_env.model_proxy.tape import Recorder
from rock_env.supervisor import unprivileged

_MOST_FDS = 3
_LOADED_LATE = ("encodings.idna", "stringprep", "concurrent.futures.thread", "email.parser", "http.client")


class Refused(Exception):
    """An error for the supervisor's caller; `code` is one of rock_env.errors.ERRORS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Process:
    def __init__(self, descriptors: socket.socket) -> None:
        self._descriptors = descriptors
        self._endpoints: dict[str, Endpoint] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task] = set()

    async def run(self, channel: socket.socket) -> None:
        """Serve until the supervisor goes away."""
        reader, self._writer = await asyncio.open_connection(sock=channel)
        try:
            while True:
                header, blob = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
                request, data = json.loads(await reader.readexactly(header)), await reader.readexactly(blob)
                if request["op"] == "open":  # in order: its descriptors are the next ones
                    await self._reply(request, data)
                else:
                    task = asyncio.create_task(self._reply(request, data))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, OSError):
            return

    async def _send(self, header: dict, blob: bytes = b"") -> None:
        self._writer.write(wire.encode(header, blob))
        await self._writer.drain()

    async def _report(self, report: dict) -> None:
        await self._send({"report": report})

    async def _reply(self, request: dict, blob: bytes) -> None:
        rid, op = request.pop("rid"), request.pop("op")
        try:
            header, data = await getattr(self, f"_{op}")(blob, **request)
        except Refused as error:
            header, data = {"error": {"code": error.code, "message": str(error), "errno": ""}}, b""
        await self._send({"rid": rid, **header}, data)

    # -- requests
    async def _open(self, blob: bytes, *, sandbox: str, kinds: list[str]) -> tuple[dict, bytes]:
        """`blob` is the settings, `kinds` what the descriptors are."""
        _, fds, _, _ = socket.recv_fds(self._descriptors, 16, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        given = dict(zip(kinds, fds, strict=True))
        listener = socket.socket(fileno=given["listener"])
        listener.setblocking(False)
        settings = json.loads(blob)
        try:
            source = make_source(settings, given.get("replay"))
        except ValueError as error:
            listener.close()
            raise Refused("spec", f"model_proxy.{error}") from error
        recorder = Recorder(given["record"]) if "record" in given else None
        endpoint = self._endpoints[sandbox] = Endpoint(sandbox, settings, source, recorder, self._report)
        await endpoint.listen(listener)
        return {}, b""

    async def _close(self, blob: bytes, *, sandbox: str) -> tuple[dict, bytes]:
        endpoint = self._endpoints.pop(sandbox, None)
        if endpoint is not None:
            endpoint.close()
        return {}, b""

    def _queue(self, sandbox: str) -> Queue:
        endpoint = self._endpoints.get(sandbox)
        queue = endpoint.queue if endpoint is not None else None
        if queue is None:
            raise Refused("spec", "model_proxy.mode: expected pull, for requests to be taken and answered from outside")
        return queue

    async def _status(self, blob: bytes, *, sandbox: str) -> tuple[dict, bytes]:
        return self._queue(sandbox).status(), b""

    async def _next(self, blob: bytes, *, sandbox: str, seconds: float) -> tuple[dict, bytes]:
        ticket = await self._queue(sandbox).next(seconds)
        if ticket is None:
            return {"request": None}, b""
        request = ticket.request
        shown = {"id": request.id, "path": request.path, "lease": ticket.lease, "attempt": ticket.attempts}
        return {"request": {**shown, "deadline": ticket.deadline}}, compact(request.body)

    async def _answer(
        self, blob: bytes, *, sandbox: str, request: str, lease: str, status: int, at: int | None, done: bool
    ) -> tuple[dict, bytes]:
        """`blob` is a completion; with a `status` beyond 200, {"message", "code"?}; with `at`, a list of chunks."""
        queue = self._queue(sandbox)
        try:
            answer = parse(blob)
            if status != 200:
                message, code = str(answer["message"]), str(answer.get("code") or "model_error")
                queue.fail(request, lease, ApiError(status, code, message))
            elif at is not None:
                queue.give_chunks(request, lease, answer, at, done)
            else:
                queue.give(request, lease, answer)
        except LeaseLost as error:
            raise Refused("lease_lost", str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused("spec", f"answer: {error}") from error
        return {}, b""


def main(descriptors_fd: int, channel_fd: int, uid: int) -> None:
    """Entry point; runs as `uid` (0: who it is already) without privileges, once everything is loaded."""
    for name in _LOADED_LATE:  # what the standard library would only look for when it may no longer read itself
        importlib.import_module(name)
    descriptors, channel = socket.socket(fileno=descriptors_fd), socket.socket(fileno=channel_fd)
    for each in (descriptors, channel):
        each.set_inheritable(False)
    channel.setblocking(False)
    unprivileged.run("rock-model", uid, lambda: Process(descriptors).run(channel))

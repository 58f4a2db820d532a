"""Recording: a line of JSON for each request and its answer. Replaying: the same request gets the same answer."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator

from rock_env.model_proxy.queue import Answer
from rock_env.model_proxy.shapes import ApiError, Request


def fingerprint(request: Request) -> str:
    """SHA-256 over all that the request says, its id aside."""
    text = json.dumps([request.path, request.body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Recorder:
    """Appends to a file; a line is on the disk before the agent has the (end of the) answer."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._turn = asyncio.Lock()

    async def write(self, request: Request, answer: dict) -> None:
        """`answer`: {"body": whole} or {"chunks": [...]}. Raises ApiError when it cannot be kept."""
        line = {"time": round(time.time(), 6), "key": fingerprint(request), "path": request.path}
        data = json.dumps({**line, "request": request.body, **answer}, separators=(",", ":")).encode() + b"\n"
        async with self._turn:
            try:
                await asyncio.to_thread(self._append, data)
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise ApiError(500, "not_recorded", f"the answer cannot be recorded: {reason}") from error

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._fd).st_size
        if os.write(self._fd, data) != len(data):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, "the disk is full")
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Replay:
    """Answers from a recording. Where it has several answers to the same request, they come in its order; the last one
    stays. A line that was cut off at the end of the file, by a crash, is left out."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._used: dict[str, int] = {}
        at, lines = 0, 0
        with open(fd, "rb", closefd=False) as file:
            for line in file:
                lines += 1
                if not line.endswith(b"\n"):
                    break
                try:
                    key = json.loads(line)["key"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"replay: line {lines} is not one of a recording") from error
                self._places.setdefault(key, []).append((at, len(line)))
                at += len(line)

    async def answer(self, request: Request) -> Answer:
        key = fingerprint(request)
        places = self._places.get(key)
        if places is None:
            message = f"the recording has no answer to this request ({key[:16]})"
            raise ApiError(404, "replay_miss", message)
        number = self._used.get(key, 0)
        self._used[key] = min(number + 1, len(places) - 1)
        at, size = places[number]
        line = json.loads(os.pread(self._fd, size, at))
        return _each(line["chunks"]) if "chunks" in line else line["body"]

    def close(self) -> None:
        os.close(self._fd)


async def _each(chunks: list[dict]) -> AsyncIterator[dict]:
    for chunk in chunks:
        yield chunk

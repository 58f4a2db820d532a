"""Pull mode: requests wait until somebody takes them, and come back if whoever took one does not answer.

Each request is answered once. Who takes one gets a lease; only with the latest lease can it be answered, so that of a
trainer that was slow and the one that took over, exactly one is heard.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator

from rock_env.model_proxy.shapes import ApiError, Request, check_answer, check_chunk

_REMEMBERED = 1024
Answer = dict | AsyncIterator[dict]  # whole, or in chunks


class LeaseLost(Exception):
    """The request is not this caller's to answer: it was answered, has gone, or is in other hands."""


class _Ticket:
    """A request on its way."""

    def __init__(self, request: Request, deadline: float) -> None:
        self.request, self.deadline = request, deadline
        self.first: asyncio.Future = asyncio.get_running_loop().create_future()
        self.chunks: asyncio.Queue[dict | Exception | None] = asyncio.Queue()
        self.lease, self.attempts = "", 0
        self.timer: asyncio.TimerHandle | None = None
        self.is_streaming, self.given = False, 0


class Queue:
    def __init__(self, lease_seconds: float, request_seconds: float) -> None:
        self._lease_seconds, self._request_seconds = lease_seconds, request_seconds
        self._waiting: deque[_Ticket] = deque()
        self._tickets: dict[str, _Ticket] = {}
        self._answered: OrderedDict[str, str] = OrderedDict()  # request -> the lease that answered it
        self._arrived = asyncio.Event()
        self._is_closed = False
        self.total = 0

    def status(self) -> dict:
        waiting = len(self._waiting)
        return {"waiting": waiting, "leased": len(self._tickets) - waiting, "answered": self.total}

    # -- the agent's side
    async def answer(self, request: Request) -> Answer:
        """Wait for the answer. Raises ApiError. When this is cancelled, the request is withdrawn."""
        ticket = self._tickets[request.id] = _Ticket(request, time.time() + self._request_seconds)
        self._waiting.append(ticket)
        self._arrived.set()
        try:
            return await ticket.first
        finally:
            if not ticket.is_streaming:
                self._drop(ticket)

    async def _stream(self, ticket: _Ticket) -> AsyncIterator[dict]:
        try:
            while (chunk := await ticket.chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
        finally:
            self._drop(ticket)

    def _drop(self, ticket: _Ticket) -> None:
        self._tickets.pop(ticket.request.id, None)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket.timer is not None:
            ticket.timer.cancel()

    # -- the trainer's side
    async def next(self, seconds: float) -> _Ticket | None:
        """Take the oldest request, waiting at most `seconds` for one."""
        deadline = time.monotonic() + seconds
        while not self._waiting and not self._is_closed:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                break
        if not self._waiting:
            return None
        ticket = self._waiting.popleft()
        ticket.lease, ticket.attempts = secrets.token_hex(8), ticket.attempts + 1
        self._renew(ticket)
        return ticket

    def _renew(self, ticket: _Ticket) -> None:
        if ticket.timer is not None:
            ticket.timer.cancel()
        loop = asyncio.get_running_loop()
        ticket.timer = loop.call_later(self._lease_seconds, self._expire, ticket, ticket.lease)

    def _expire(self, ticket: _Ticket, lease: str) -> None:
        if ticket.lease != lease or ticket.request.id not in self._tickets:
            return
        if ticket.is_streaming:  # the agent has the beginning: another one's answer would not continue it
            ticket.chunks.put_nowait(ApiError(502, "answer_broken_off", "whoever answered stopped in the middle"))
            return
        self._waiting.appendleft(ticket)
        self._arrived.set()

    def _mine(self, id: str, lease: str) -> _Ticket | None:
        """The ticket; None when this very lease has answered it before. Raises LeaseLost."""
        if self._answered.get(id) == lease:
            return None
        ticket = self._tickets.get(id)
        if ticket is None or ticket.lease != lease or (ticket.first.done() and not ticket.is_streaming):
            raise LeaseLost(f"request {id} is no longer yours to answer: it has gone, or somebody else has it")
        if ticket in self._waiting:  # the lease is over, but nobody has taken it yet
            self._waiting.remove(ticket)
        return ticket

    def _finish(self, ticket: _Ticket) -> None:
        self.total += 1
        self._answered[ticket.request.id] = ticket.lease
        if len(self._answered) > _REMEMBERED:
            self._answered.popitem(last=False)

    def give(self, id: str, lease: str, answer: object) -> None:
        """Answer in whole. Raises LeaseLost; ValueError for what is no answer (the lease goes on)."""
        ticket = self._mine(id, lease)
        if ticket is None:
            return
        if ticket.is_streaming:
            raise ValueError("expected chunks: the answer has begun with some")
        ticket.first.set_result(check_answer(ticket.request, answer))
        self._finish(ticket)

    def fail(self, id: str, lease: str, error: ApiError) -> None:
        """Answer with an error."""
        ticket = self._mine(id, lease)
        if ticket is None:
            return
        if ticket.is_streaming:
            ticket.chunks.put_nowait(error)
        else:
            ticket.first.set_exception(error)
        self._finish(ticket)

    def give_chunks(self, id: str, lease: str, chunks: object, at: int, done: bool) -> None:
        """Answer in pieces, of which `at` were given before; renews the lease. A repeated call changes nothing."""
        ticket = self._mine(id, lease)
        if ticket is None:
            return
        if not ticket.request.is_stream:
            raise ValueError("expected a whole answer: the agent did not ask for a stream")
        if not isinstance(chunks, list):
            raise ValueError("expected a list of chunks")
        given = ticket.given
        if at > given:
            raise ValueError(f"at: expected at most {given}, which is how many chunks have arrived")
        fresh = [check_chunk(chunk) for chunk in chunks][given - at :]
        if not ticket.is_streaming:
            ticket.is_streaming = True
            ticket.first.set_result(self._stream(ticket))
        for chunk in fresh:
            ticket.chunks.put_nowait(chunk)
        ticket.given = given + len(fresh)
        if done:
            ticket.chunks.put_nowait(None)
            self._finish(ticket)
        else:
            self._renew(ticket)

    def close(self) -> None:
        """The sandbox has ended: nobody waits any more."""
        self._is_closed = True
        self._arrived.set()

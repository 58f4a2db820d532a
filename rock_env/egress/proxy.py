"""The proxy process: accepts on sockets inside sandboxes, checks, records, connects outside, relays.

The supervisor creates each listening socket in a sandbox's own network namespace and hands it over with the policy;
connections accepted from it belong to that sandbox and to no other. The process has no privileges and ends with its
supervisor. Reports are sent before the act: an attempt is on record before its first byte leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from rock_env.egress import protocol
from rock_env.egress.protocol import BadRequest, Request
from rock_env.network import NetworkPolicy, is_numeric, normalize_host
from rock_env.supervisor import unprivileged
from rock_env.supervisor.unprivileged import TokenBucket

_HEAD_SECONDS, _RESOLVE_SECONDS, _CONNECT_SECONDS, _IDLE_SECONDS = 15.0, 10.0, 10.0, 300.0
_LINGER_SECONDS = 1.0
_CONNECTIONS = 64  # per sandbox at once
_BURST, _PER_SECOND = 100, 20.0  # of new connections per sandbox
_CHUNK = 64 << 10
_MESSAGE_BYTES = 1 << 20
_ADDRESSES_TRIED = 4
Resolver = Callable[[str, int], Awaitable[list[str]]]
Reporter = Callable[[dict], Awaitable[None]]


class Denied(Exception):
    """The policy does not allow it; the message says why. `established`: the tunnel had been agreed to."""

    def __init__(self, message: str, established: bool = False) -> None:
        super().__init__(message)
        self.established = established


async def resolve(host: str, port: int) -> list[str]:
    """Numeric addresses of a name, by this machine's resolver. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(address[4][0] for address in found))


async def admit(policy: NetworkPolicy, host: str, port: int, protocols: tuple[str, ...], resolver: Resolver):
    """(protocol, addresses to connect to) of an allowed request, by the first of `protocols` that a rule allows.

    A name that no rule allows is not even resolved: a query would carry it out. Raises Denied, OSError or TimeoutError.
    """
    try:
        host = normalize_host(host)
    except ValueError as error:
        raise Denied(str(error)) from error
    chosen = next((p for p in protocols if policy.permits(host, port, p)), None)
    if chosen is None:
        raise Denied("no rule allows it")
    addresses = [host] if is_numeric(host) else await asyncio.wait_for(resolver(host, port), _RESOLVE_SECONDS)
    refusal = policy.refusal(host, port, chosen, addresses)
    if refusal:
        raise Denied(refusal)
    return chosen, addresses


class Gate:
    """One sandbox's way out."""

    def __init__(self, sandbox: str, policy: NetworkPolicy, report: Reporter, resolver: Resolver = resolve) -> None:
        self.sandbox = sandbox
        self.policy = policy
        self._report = report
        self._resolver = resolver
        self.opening: asyncio.Task | None = None
        self._server: asyncio.Server | None = None
        self._live: dict[asyncio.Task, tuple[str, int, str] | None] = {}
        self._turns = TokenBucket(_BURST, _PER_SECOND, pause=0.05)

    async def listen(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._accepted, sock=listener, limit=protocol.MAX_HEAD_BYTES)

    def apply(self, policy: NetworkPolicy) -> None:
        """Change the policy now: connections that it does not allow are cut."""
        self.policy = policy
        for task, target in self._live.items():
            if target is None or not policy.permits(*target):
                task.cancel()

    def close(self) -> None:
        self.apply(NetworkPolicy())
        if self._server is not None:
            self._server.close()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if len(self._live) >= _CONNECTIONS:
            await self._tell("denied", None, reason=f"more than {_CONNECTIONS} connections at once")
            writer.transport.abort()
            return
        self._live[task] = None
        try:
            await self._turns.take()
            await self._serve(reader, writer)
            writer.close()  # after what is still to be written
            await asyncio.wait_for(writer.wait_closed(), _IDLE_SECONDS)
        except (asyncio.CancelledError, OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # cut by a new policy, or an end has gone: the answer, if any, has been given
        finally:
            del self._live[task]
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request: read it, decide, record, carry it out."""
        request = None
        try:
            try:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_SECONDS)
            except asyncio.LimitOverrunError as error:
                raise BadRequest("the request head is too long", "431 Request Header Fields Too Large") from error
            request = protocol.parse_request(head[:-4])
            await self._carry_out(request, reader, writer)
        except BadRequest as error:
            await self._tell("denied", request, reason=str(error))
            await _answer(reader, writer, error.status, str(error))
        except Denied as error:
            await self._tell("denied", request, reason=str(error))
            if request.method != "CONNECT" or not error.established:  # within a tunnel, nobody listens for it
                text = f"denied by the sandbox's network policy: {error}"
                await _answer(reader, writer, "403 Forbidden", text)

    async def _carry_out(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tunnel = request.method == "CONNECT"
        protocols = ("tcp", "https") if tunnel else ("http",)
        try:
            chosen, addresses = await admit(self.policy, request.host, request.port, protocols, self._resolver)
        except (OSError, TimeoutError) as error:
            await self._tell("failed", request, reason=f"cannot resolve: {error or 'no answer'}")
            await _answer(reader, writer, "502 Bad Gateway", "cannot resolve the host")
            return
        host = normalize_host(request.host)
        self._live[asyncio.current_task()] = (host, request.port, chosen)
        first = request.forward
        if tunnel:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            first = await _client_hello(reader, host) if chosen == "https" else b""
        if not self.policy.permits(host, request.port, chosen):
            raise Denied("the policy has changed", established=tunnel)
        outside = await self._connect(request, chosen, addresses)
        if outside is None:
            if not tunnel:
                await _answer(reader, writer, "502 Bad Gateway", "cannot connect to the host")
            return
        body = None if tunnel else request
        await self._relay(
            (reader, writer), outside, first, body, {"protocol": chosen, "host": host, "port": request.port}
        )

    async def _connect(self, request: Request, chosen: str, addresses: list[str]):
        """Streams to the first address that answers; None if none does. Only checked addresses are tried."""
        for address in addresses[:_ADDRESSES_TRIED]:
            await self._tell("allowed", request, protocol=chosen, address=address)
            try:
                return await asyncio.wait_for(asyncio.open_connection(address, request.port), _CONNECT_SECONDS)
            except (OSError, TimeoutError) as error:
                reason = f"cannot connect: {error or 'no answer'}"
                await self._tell("failed", request, protocol=chosen, address=address, reason=reason)
        return None

    async def _relay(self, inside, outside, first: bytes, body: Request | None, told: dict) -> None:
        started = time.monotonic()
        counts = {"bytes_sent": 0, "bytes_received": 0}
        (reader, writer), (far_reader, far_writer) = inside, outside
        try:
            far_writer.write(first)
            counts["bytes_sent"] += len(first)
            download = asyncio.ensure_future(_copy(far_reader, writer, counts, "bytes_received"))
            if body is None:
                upload = asyncio.ensure_future(_copy(reader, far_writer, counts, "bytes_sent"))
                waited = {upload, download}
            else:
                upload = asyncio.ensure_future(_copy_body(reader, far_writer, body.body_bytes, counts))
                waited = {download}  # the answer's end ends the exchange
            try:
                await asyncio.wait(waited)
            finally:
                for task in (upload, download):
                    task.cancel()
                await asyncio.gather(upload, download, return_exceptions=True)
        finally:
            far_writer.transport.abort()
            seconds = round(time.monotonic() - started, 3)
            await self._report({"event": "egress_ended", "sandbox": self.sandbox, **told, **counts, "seconds": seconds})

    async def _tell(self, verdict: str, request: Request | None, **details: str) -> None:
        target = {"host": request.host[:253], "port": request.port} if request is not None else {}
        tunnel = request is not None and request.method == "CONNECT"
        kind = {} if request is None or "protocol" in details else {"protocol": "tunnel" if tunnel else "http"}
        await self._report(
            {"event": "egress", "sandbox": self.sandbox, "verdict": verdict, **target, **kind, **details}
        )


async def _client_hello(reader: asyncio.StreamReader, host: str) -> bytes:
    """The first bytes of a tunnel, once they are seen to be TLS for `host`. Raises Denied."""
    data, deadline = b"", time.monotonic() + _HEAD_SECONDS
    try:
        while (name := protocol.server_name(data)) is None:
            if len(data) > protocol.MAX_HEAD_BYTES:
                raise BadRequest("the TLS ClientHello is too long")
            more = await asyncio.wait_for(reader.read(_CHUNK), max(0.001, deadline - time.monotonic()))
            if not more:
                raise BadRequest("the tunnel ended before a TLS ClientHello")
            data += more
        named = normalize_host(name) if name else ""
    except (BadRequest, ValueError, TimeoutError) as error:
        raise Denied(str(error) or "no TLS ClientHello came", established=True) from error
    if named != host and not (is_numeric(host) and not named):
        raise Denied(f"the TLS ClientHello names {name!r}", established=True)
    return data


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: dict, key: str) -> None:
    while data := await asyncio.wait_for(reader.read(_CHUNK), _IDLE_SECONDS):
        counts[key] += len(data)
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _copy_body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int | None, counts: dict
) -> None:
    """Exactly one body, so that no second request rides along under the first one's name."""
    try:
        if size is not None:
            await _copy_bytes(reader, writer, size, counts)
            return
        while True:
            line = await asyncio.wait_for(reader.readuntil(b"\r\n"), _IDLE_SECONDS)
            writer.write(line)
            if not (chunk := protocol.chunk_size(line)):
                writer.write(b"\r\n")  # trailers are left out
                return
            await _copy_bytes(reader, writer, chunk, counts)
            if await asyncio.wait_for(reader.readexactly(2), _IDLE_SECONDS) != b"\r\n":
                raise BadRequest("malformed chunk")
            writer.write(b"\r\n")
    except (BadRequest, OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        writer.transport.abort()


async def _copy_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, counts: dict) -> None:
    while size:
        data = await asyncio.wait_for(reader.read(min(size, _CHUNK)), _IDLE_SECONDS)
        if not data:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(data)
        counts["bytes_sent"] += len(data)
        writer.write(data)
        await writer.drain()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: str, text: str) -> None:
    """Answer, then read on for a moment: closing on unread input would reset the connection under the answer."""
    body = f"{text}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while await reader.read(_CHUNK):
                pass


class Proxy:
    """All gates, and the conversation with the supervisor: one JSON message per packet."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._gates: dict[str, Gate] = {}
        self._turn = asyncio.Lock()
        self._last: asyncio.Future | None = None  # the latest confirmation
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Serve until the supervisor goes away."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(32))
        self._control.setblocking(False)
        loop.add_reader(self._control.fileno(), self._on_control)
        await self._ended.wait()

    def _on_control(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._ended.set()
            return
        message = json.loads(data)
        listener = socket.socket(fileno=fds[0]) if fds else None
        name, policy = message["sandbox"], NetworkPolicy.from_wire(message["policy"])
        gate = self._gates.get(name)
        if policy.is_closed:
            if gate is not None:
                self._gates.pop(name).close()
        elif gate is not None:
            gate.apply(policy)
        else:
            gate = self._gates[name] = Gate(name, policy, self._send)
            listener.setblocking(False)
            gate.opening = asyncio.ensure_future(gate.listen(listener))
        self._last = asyncio.ensure_future(self._applied(message["serial"], self._last))

    async def _applied(self, serial: int, earlier: asyncio.Future | None) -> None:
        if earlier is not None:
            await earlier
        await self._send({"applied": serial})

    async def _send(self, message: dict) -> None:
        async with self._turn:
            await asyncio.get_running_loop().sock_sendall(self._control, json.dumps(message).encode())


def main(control_fd: int, uid: int) -> None:
    """Entry point; runs as `uid` (0: who it is already) without privileges, once everything is loaded."""
    "a".encode("idna")
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    unprivileged.run("rock-egress", uid, lambda: Proxy(control).run())

"""What clients of the proxy say: HTTP/1 request heads (RFC 9112) and TLS ClientHellos (RFC 8446). No sockets.

Strict where leniency could let two readers of the same bytes see different requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 32 << 10
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REQUEST = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])")
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#]+))(?::([0-9]{1,5}))?")
_NOT_FORWARDED = {
    "host",
    "connection",
    "proxy-connection",
    "proxy-authorization",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
}


class BadRequest(Exception):
    """The client's bytes are not what this proxy serves; `status` is the answer's."""

    def __init__(self, message: str, status: str = "400 Bad Request") -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A request head.

    Attributes:
      method: e.g. "CONNECT".
      host, port: where to, as written (brackets removed, port 80 if none is given).
      forward: the head to send on to the origin; empty for CONNECT.
      body_bytes: length of the body that follows; None: it is chunked.
    """

    method: str
    host: str
    port: int
    forward: bytes
    body_bytes: int | None


def parse_head(head: bytes) -> tuple[str, str, str, list[tuple[str, str]]]:
    """(method, target, the x of HTTP/1.x, headers) of a head without its final empty line. Raises BadRequest."""
    try:
        lines = head.decode("ascii").split("\r\n")
    except UnicodeDecodeError as error:
        raise BadRequest("the request head is not ASCII") from error
    match = _REQUEST.fullmatch(lines[0])
    if not match:
        raise BadRequest("expected METHOD TARGET HTTP/1.x")
    return *match.groups(), [_header(line) for line in lines[1:]]


def parse_request(head: bytes) -> Request:
    """A proxy's request, of a head without its final empty line. Raises BadRequest."""
    method, target, minor, headers = parse_head(head)
    if method == "CONNECT":
        host, port = _authority(target)
        if port is None:
            raise BadRequest("CONNECT: expected HOST:PORT")
        return Request(method, host, port, b"", 0)
    if not target.lower().startswith("http://"):
        raise BadRequest("expected an absolute http:// target: this is a proxy")
    authority, path = re.fullmatch(r"([^/?#]*)(.*)", target[7:]).groups()
    host, port = _authority(authority)
    path = path.partition("#")[0]
    path = path if path.startswith("/") else f"/{path}"
    forward = _forwarded(f"{method} {path} HTTP/1.{minor}", authority, headers)
    return Request(method, host, 80 if port is None else port, forward, body_bytes(headers))


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not _TOKEN.fullmatch(name) or any((c < " " and c != "\t") or c == "\x7f" for c in value):
        raise BadRequest("malformed header")
    return name, value.strip(" \t")


def _authority(text: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(text)
    if not match:
        raise BadRequest("expected HOST or HOST:PORT, without user names")
    six, name, port = match.groups()
    if port is not None and not 1 <= int(port) <= 65535:
        raise BadRequest("the port is out of range")
    return six or name, None if port is None else int(port)


def body_bytes(headers: list[tuple[str, str]]) -> int | None:
    """The one length of the body that the headers agree on; None for chunked."""
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    codings = [value.lower() for name, value in headers if name.lower() == "transfer-encoding"]
    if codings:
        if codings != ["chunked"] or lengths:
            raise BadRequest("expected Content-Length or Transfer-Encoding: chunked, once")
        return None
    if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
        raise BadRequest("expected one Content-Length")
    return int(lengths[0]) if lengths else 0


def _forwarded(request_line: str, authority: str, headers: list[tuple[str, str]]) -> bytes:
    """The head for the origin: Host is the authority that was checked; one request per connection."""
    named = {n.strip().lower() for name, value in headers if name.lower() == "connection" for n in value.split(",")}
    dropped = _NOT_FORWARDED | (named - {"content-length", "transfer-encoding"})
    kept = [f"{name}: {value}" for name, value in headers if name.lower() not in dropped]
    return "\r\n".join((request_line, f"Host: {authority}", *kept, "Connection: close", "", "")).encode()


def chunk_size(line: bytes) -> int:
    """The size in a line (with CRLF) that begins a chunk. Raises BadRequest."""
    match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})(;[^\r\n]*)?\r\n", line)
    if not match:
        raise BadRequest("malformed chunk")
    return int(match[1], 16)


def server_name(data: bytes) -> str | None:
    """The server name in the TLS ClientHello that `data` begins with, "" if it has none; None: more bytes are needed.

    Raises BadRequest if it is something else.
    """
    hello, at = b"", 0
    while len(hello) < 4 or len(hello) < 4 + int.from_bytes(hello[1:4], "big"):
        record = data[at : at + 5]
        if (record and record[0] != 22) or (len(record) > 1 and record[1] != 3) or (hello and hello[0] != 1):
            raise BadRequest("the tunnel does not begin with TLS")
        size = int.from_bytes(record[3:5], "big")
        if len(record) < 5 or len(data) < at + 5 + size:
            return None
        if not size:
            raise BadRequest("the tunnel does not begin with TLS")
        hello += data[at + 5 : at + 5 + size]
        at += 5 + size
    if hello[0] != 1:
        raise BadRequest("the tunnel does not begin with TLS")
    return _server_name_of(_Reader(hello[4 : 4 + int.from_bytes(hello[1:4], "big")]))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> bytes:
        if len(self.data) < size:
            raise BadRequest("malformed TLS ClientHello")
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def vector(self, length_bytes: int) -> bytes:
        return self.take(int.from_bytes(self.take(length_bytes), "big"))


def _server_name_of(hello: _Reader) -> str:
    hello.take(2 + 32)  # version, random
    for length_bytes in (1, 2, 1):  # session id, cipher suites, compression methods
        hello.vector(length_bytes)
    extensions = _Reader(hello.vector(2) if hello.data else b"")
    while extensions.data:
        kind, body = extensions.take(2), extensions.vector(2)
        if kind == b"\0\0":
            names = _Reader(_Reader(body).vector(2))
            if names.take(1) != b"\0":
                raise BadRequest("malformed TLS ClientHello")
            name = names.vector(2)
            if names.data or not name.isascii():
                raise BadRequest("malformed TLS ClientHello")
            return name.decode()
    return ""

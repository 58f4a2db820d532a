"""Network policies: what they allow as pure functions, and the proxy that enforces them, in real sandboxes.

Every connection goes to 127.0.0.0/8. Addresses of other networks appear only in checks with an injected resolver: no
packet is ever sent to one.
"""

import asyncio
import contextlib
import http.server
import os
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from rock_env import (
    LimitNotEnforceable,
    NetworkPolicy,
    NetworkRule,
    Sandbox,
    SandboxSpec,
    SpecError,
    get_backend,
    register_backend,
)
from rock_env.audit import read_audit_log
from rock_env.bubblewrap import BubblewrapBackend
from rock_env.egress import protocol
from rock_env.egress.protocol import BadRequest
from rock_env.egress.proxy import Denied, Gate, admit
from rock_env.network import is_public, normalize_host


def _policy(*rules):
    return NetworkPolicy(tuple(NetworkRule(*rule) for rule in rules))


# -- names and addresses
@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("PyPI.org.", "pypi.org"),
        ("a_b.example", "a_b.example"),
        ("127.0.0.1", "127.0.0.1"),
        ("::FFFF:127.0.0.1", "127.0.0.1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_hosts_have_one_form(text, normal):
    assert normalize_host(text) == normal


_NO_HOSTS = "127.1 2130706433 0x7f000001 0x7f.0.0.1 127.0.0.01 017700000001 fe80::1%lo a..b . -a.b a/b a.b:80 [::1]"


@pytest.mark.parametrize(
    "text", [*_NO_HOSTS.split(), "", "a b", "bücher.example", "a\n.org", "a\0", "x" * 64, "a." * 130]
)
def test_what_resolvers_might_read_in_another_way_is_no_host(text):
    with pytest.raises(ValueError):
        normalize_host(text)
    with pytest.raises(SpecError, match=r"network\.host"):
        NetworkRule(text, 80, "tcp")


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


_INNER = (
    "127.0.0.1 127.255.255.254 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 169.254.169.254 224.0.0.1 240.0.0.1 "
    "255.255.255.255 192.0.2.1 198.18.0.1 ::1 :: fe80::1 fd00:ec2::254 ff02::1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 "
    "64:ff9b::a9fe:a9fe 64:ff9b::808:808 2002:a00:1::1 2001:0:a00:1::1 2001:db8::1 ::7f00:1 fec0::1"
)


@pytest.mark.parametrize("address", _INNER.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (("a.org", 0, "tcp"), "port"),
        (("a.org", 65536, "tcp"), "port"),
        (("a.org", "80", "tcp"), "port"),
        (("a.org", True, "tcp"), "port"),
        (("a.org", 80, "udp"), "protocol"),
        (("*", 80, "tcp"), "host"),
        (("*.10.0.0.1", 80, "tcp"), "host"),
        (("a.*.org", 80, "tcp"), "host"),
        ((None, 80, "tcp"), "host"),
    ],
)
def test_bad_rules_are_refused_by_name(rule, field):
    with pytest.raises(SpecError, match=f"network.{field}"):
        NetworkRule(*rule)


def test_bad_policies_are_refused():
    with pytest.raises(SpecError, match=r"network\.allow"):
        NetworkPolicy(("a.org",))
    with pytest.raises(SpecError, match="at most"):
        NetworkPolicy(tuple(NetworkRule(f"h{i}.org", 80, "tcp") for i in range(257)))
    with pytest.raises(SpecError, match="network"):
        SandboxSpec(network="none")


def test_rules_cover_what_they_say_and_nothing_else():
    policy = _policy(("Example.org", 443, "https"), ("*.sub.example.org", 80, "http"), ("127.0.0.9", 1, "tcp"))
    assert policy.permits("example.org", 443, "https")
    assert policy.permits("a.b.sub.example.org", 80, "http")
    assert policy.permits("127.0.0.9", 1, "tcp")
    for target in (
        ("example.org", 443, "tcp"),
        ("example.org", 80, "https"),
        ("www.example.org", 443, "https"),
        ("sub.example.org", 80, "http"),
        ("evilsub.example.org", 80, "http"),
        ("sub.example.org.evil.org", 80, "http"),
        ("127.0.0.8", 1, "tcp"),
    ):
        assert not policy.permits(*target), target
    assert NetworkPolicy().is_closed
    assert NetworkPolicy.from_wire(policy.to_wire()) == policy


# -- resolution
def _admit(policy, host, port, protocols, answers):
    asked = []

    async def resolver(name, port):
        asked.append(name)
        if name not in answers:
            raise socket.gaierror("unknown")
        return answers[name]

    return asyncio.run(admit(policy, host, port, protocols, resolver)), asked


def test_a_public_name_is_resolved_once_and_connected_to_by_address():
    policy = _policy(("pypi.org", 443, "https"))
    answers = {"pypi.org": ["8.8.8.8", "2606:4700::1"]}
    assert _admit(policy, "PyPI.org", 443, ("tcp", "https"), answers) == (("https", answers["pypi.org"]), ["pypi.org"])


@pytest.mark.parametrize("address", _INNER.split())
def test_a_name_that_is_rebound_to_an_inner_address_is_denied(address):
    policy = _policy(("pypi.org", 443, "https"))
    for addresses in ([address], ["8.8.8.8", address], [address, "8.8.8.8"]):
        with pytest.raises(Denied, match="not a public address"):
            _admit(policy, "pypi.org", 443, ("https",), {"pypi.org": addresses})


def test_an_inner_address_can_be_named_explicitly():
    answers = {"db.internal": ["10.1.2.3"]}
    named = _policy(("db.internal", 5432, "tcp"), ("10.1.2.3", 5432, "tcp"))
    assert _admit(named, "db.internal", 5432, ("tcp",), answers)[0] == ("tcp", ["10.1.2.3"])
    for other in (("10.1.2.4", 5432, "tcp"), ("10.1.2.3", 5433, "tcp"), ("10.1.2.3", 5432, "http")):
        with pytest.raises(Denied, match="not a public address"):
            _admit(_policy(("db.internal", 5432, "tcp"), other), "db.internal", 5432, ("tcp",), answers)


@pytest.mark.parametrize(
    "host", ["evil.org", "secret.evil.org", "127.1", "169.254.169.254", "2852039166", "x.pypi.org", "[::1"]
)
def test_what_no_rule_names_is_not_even_resolved(host):
    policy = _policy(("pypi.org", 443, "https"))

    async def resolver(name, port):
        raise AssertionError(f"{name} was looked up: the query itself carries data out")

    with pytest.raises(Denied):
        asyncio.run(admit(policy, host, 443, ("tcp", "https", "http"), resolver))


# -- requests
def test_plain_requests_are_rewritten_for_their_origin():
    head = (
        b"POST http://Example.org:8080/a/b?c#d HTTP/1.1\r\nHost: other.org\r\nX-A: 1\r\nConnection: close, X-Drop\r\n"
        b"X-Drop: 2\r\nProxy-Authorization: secret\r\nContent-Length: 5"
    )
    request = protocol.parse_request(head)
    assert (request.method, request.host, request.port, request.body_bytes) == ("POST", "Example.org", 8080, 5)
    assert request.forward == (
        b"POST /a/b?c HTTP/1.1\r\nHost: Example.org:8080\r\nX-A: 1\r\nContent-Length: 5\r\nConnection: close\r\n\r\n"
    )
    assert protocol.parse_request(b"GET http://a.org HTTP/1.0").forward.startswith(b"GET / HTTP/1.0\r\nHost: a.org\r\n")
    six = protocol.parse_request(b"CONNECT [::1]:22 HTTP/1.1")
    assert (six.method, six.host, six.port, six.forward) == ("CONNECT", "::1", 22, b"")
    assert protocol.parse_request(b"GET http://a.org?x HTTP/1.1").forward.startswith(b"GET /?x ")
    assert protocol.parse_request(b"PUT http://a.org/ HTTP/1.1\r\nTransfer-Encoding: chunked").body_bytes is None


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a.org",
        b"GET http://a.org/ HTTP/2.0",
        b"GET http://a.org/ HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6",
        b"POST http://a.org/ HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        b"POST http://a.org/ HTTP/1.1\r\nTransfer-Encoding: gzip, chunked",
        b"POST http://a.org/ HTTP/1.1\r\nContent-Length: -1",
        b"POST http://a.org/ HTTP/1.1\r\nContent-Length: 0x5",
        b"GET http://a.org/ HTTP/1.1\r\nA: b\n\nGET http://b.org/ HTTP/1.1",
        b"GET http://a.org/ HTTP/1.1\r\nA : b",
        b"GET http://a.org/ HTTP/1.1\r\n folded",
        b"GET http://user@a.org/ HTTP/1.1",
        b"GET http://a.org:99999/ HTTP/1.1",
        b"GET http:///x HTTP/1.1",
        b"GET ftp://a.org/ HTTP/1.1",
        b"CONNECT a.org HTTP/1.1",
        b"CONNECT a.org:0 HTTP/1.1",
        b"CONNECT http://a.org:80 HTTP/1.1",
        b"GET  http://a.org/ HTTP/1.1",
        b"SSH-2.0-OpenSSH_9.2",
        b"\x16\x03\x01\x02",
        b"GET http://b\xc3\xbccher.org/ HTTP/1.1",
        b"",
    ],
)
def test_ambiguous_requests_are_refused(head):
    with pytest.raises(BadRequest):
        protocol.parse_request(head)


def _client_hello(host):
    """The first bytes that OpenSSL sends."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=host)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_server_names_are_read_from_openssl_hellos_however_they_arrive():
    hello = _client_hello("www.example.org")
    assert protocol.server_name(hello) == "www.example.org"
    assert protocol.server_name(hello + b"more") == "www.example.org"
    assert all(protocol.server_name(hello[:cut]) is None for cut in range(len(hello)))
    assert protocol.server_name(_client_hello("127.0.0.1")) == ""  # no name is sent for addresses
    body = hello[5:]
    pieces = b"".join(
        b"\x16\x03\x01" + len(body[i : i + 7]).to_bytes(2, "big") + body[i : i + 7] for i in range(0, len(body), 7)
    )
    assert protocol.server_name(pieces) == "www.example.org"


_NOT_TLS = [b"SSH-2.0-x\r\n", b"GET / HTTP/1.1\r\n", b"stratum+tcp", b"\x16\x02", b"\x16\x03\x01\0\0"]
_NOT_HELLO = [b"\x17\x03\x03\0\x05hello", b"\x16\x03\x01\0\x05\x02\0\0\x01x", b"\x16\x03\x01\0\x06\x01\0\0\x02ab"]


@pytest.mark.parametrize("data", _NOT_TLS + _NOT_HELLO)
def test_what_is_not_tls_is_refused(data):
    with pytest.raises(BadRequest):
        protocol.server_name(data)


def test_no_cut_or_flipped_hello_crashes_the_reader():
    hello = bytearray(_client_hello("a.example"))
    for at in range(len(hello)):
        for value in (0, 1, 0xFF):
            broken = bytes((*hello[:at], value, *hello[at + 1 :]))
            with contextlib.suppress(BadRequest):
                assert protocol.server_name(broken) is None or isinstance(protocol.server_name(broken), str)


# -- the proxy on sockets of this process
async def _with_gate(policy, answers, client):
    """Run `client(port)` in a thread against a Gate; returns (its result, reports)."""
    reports = []

    async def report(message):
        reports.append(message)

    async def resolver(name, port):
        return answers[name]

    gate = Gate("1", policy, report, resolver)
    listener = socket.create_server(("127.0.0.1", 0))
    await gate.listen(listener)
    try:
        return await asyncio.to_thread(client, listener.getsockname()[1], gate), reports
    finally:
        gate.close()


def _talk(port, data, then=b""):
    """Send, and read to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(data)
        received = b""
        while piece := client.recv(65536):
            received += piece
            if then and b"\r\n\r\n" in received:
                client.sendall(then)
                then = b""
        return received


class _Target(threading.Thread):
    """A listener where a server would be: remembers what it was sent, and answers it."""

    def __init__(self, host="127.0.0.2", answer=b"welcome", until=b""):
        super().__init__(daemon=True)
        self.socket = socket.create_server((host, 0))
        self.port = self.socket.getsockname()[1]
        self.seen = []
        self._answer, self._until = answer, until
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    data = b""
                    while not data or (self._until and self._until not in data):
                        piece = connection.recv(65536)
                        if not piece:  # it was closed: the loop would spin for the rest of the tests
                            break
                        data += piece
                    self.seen.append(data)
                    connection.sendall(self._answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def test_names_are_tunnelled_to_the_address_that_was_checked():
    with _Target() as target:
        policy = _policy(("db.test", target.port, "tcp"), ("127.0.0.2", target.port, "tcp"))
        connect = f"CONNECT db.test:{target.port} HTTP/1.1\r\n\r\n".encode()
        answers = {"db.test": ["127.0.0.2"]}
        received, reports = asyncio.run(
            _with_gate(policy, answers, lambda port, gate: _talk(port, connect, b"anything"))
        )
    assert received == b"HTTP/1.1 200 Connection established\r\n\r\nwelcome"
    assert target.seen == [b"anything"]
    assert [(r["event"], r.get("verdict"), r["host"]) for r in reports] == [
        ("egress", "allowed", "db.test"),
        ("egress_ended", None, "db.test"),
    ]
    assert reports[0]["address"] == "127.0.0.2"
    assert (reports[1]["bytes_sent"], reports[1]["bytes_received"]) == (8, 7)


def test_an_https_tunnel_carries_nothing_but_tls_for_its_host():
    """Not SSH, not a miner's protocol, not TLS for another host: and the target never sees a connection."""
    with _Target() as target:
        policy = _policy(("web.test", target.port, "https"), ("127.0.0.2", target.port, "https"))
        connect = f"CONNECT web.test:{target.port} HTTP/1.1\r\n\r\n".encode()
        answers = {"web.test": ["127.0.0.2"]}
        for first in (b"SSH-2.0-OpenSSH_9.2\r\n", b'{"method":"mining.subscribe"}\n', _client_hello("evil.test")):
            received, reports = asyncio.run(
                _with_gate(policy, answers, lambda port, gate, first=first: _talk(port, connect, first))
            )
            assert received == b"HTTP/1.1 200 Connection established\r\n\r\n"
            assert [r["verdict"] for r in reports] == ["denied"]
        assert target.seen == []
        hello = _client_hello("web.test")
        received, reports = asyncio.run(_with_gate(policy, answers, lambda port, gate: _talk(port, connect, hello)))
        assert received.endswith(b"welcome")
        assert target.seen == [hello]


def test_only_one_request_rides_on_a_connection():
    """A second request on the same connection could name another virtual host of the same server."""
    with _Target(until=b"ab") as target:
        policy = _policy(("127.0.0.2", target.port, "http"))
        url = f"http://127.0.0.2:{target.port}/"
        first = f"POST {url} HTTP/1.1\r\nContent-Length: 2\r\n\r\nab"
        chunked = f"POST {url} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
        second = "GET /evil HTTP/1.1\r\nHost: evil.test\r\n\r\n"
        for request in (first, chunked):
            asyncio.run(_with_gate(policy, {}, lambda port, gate, r=request: _talk(port, (r + second).encode())))
    assert len(target.seen) == 2
    assert all(b"evil" not in seen for seen in target.seen)
    assert all(f"Host: 127.0.0.2:{target.port}".encode() in seen for seen in target.seen)


def test_a_new_policy_cuts_what_it_does_not_allow():
    with _Target(until=b"never") as target:
        rules = [("127.0.0.2", target.port, "tcp"), ("127.0.0.9", 1, "tcp")]

        def client(port, gate):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as tunnel:
                tunnel.sendall(f"CONNECT 127.0.0.2:{target.port} HTTP/1.1\r\n\r\n".encode())
                assert tunnel.recv(100).startswith(b"HTTP/1.1 200")
                tunnel.sendall(b"x")
                time.sleep(0.1)
                loop.call_soon_threadsafe(gate.apply, _policy(rules[0]))
                tunnel.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    tunnel.recv(1)  # still allowed, still open
                loop.call_soon_threadsafe(gate.apply, _policy(rules[1]))
                tunnel.settimeout(30)
                with contextlib.suppress(ConnectionResetError):
                    assert tunnel.recv(1) == b""
                return True

        async def both():
            nonlocal loop
            loop = asyncio.get_running_loop()
            return await _with_gate(_policy(*rules), {}, client)

        loop = None
        assert asyncio.run(both())[0]


def test_connections_are_bounded_and_the_surplus_is_on_record():
    def client(port, gate):
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            with socket.create_connection(("127.0.0.1", port), timeout=60) as surplus, contextlib.suppress(OSError):
                assert surplus.recv(1) == b""

    reports = asyncio.run(_with_gate(_policy(("127.0.0.2", 9, "tcp")), {}, client))[1]
    assert [(r["verdict"], r["reason"]) for r in reports] == [("denied", "more than 64 connections at once")]


# -- in sandboxes
class _Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{self.command} {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web():
    """A web server on the host's 127.0.0.2; yields its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def _events(sandbox, event):
    name = sandbox.id.partition(":")[2]
    return [
        record
        for record in read_audit_log(get_backend("bubblewrap").audit_log)
        if record.get("sandbox") == name and record["event"] == event
    ]


def _get(port, path="/x", host="127.0.0.2"):
    code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=60).read().decode())"
    return ["/usr/bin/python3", "-c", code, f"http://{host}:{port}{path}"]


def test_clients_find_the_proxy_and_policies_change_live(web):
    with Sandbox.start(SandboxSpec(network=_policy(("127.0.0.2", web, "http")))) as sandbox:
        assert sandbox.execute(_get(web)).output == "GET /x\n"
        session = sandbox.session()
        get = " ".join(f"'{part}'" for part in _get(web))
        assert session.run(f"v=1; (exit 7); {get}").output == "GET /x\n"
        session.run("(exit 7)")
        sandbox.set_network_policy(NetworkPolicy())
        assert session.run("echo $? $v [$http_proxy$HTTPS_PROXY$no_proxy]").output == "7 1 []\n"
        assert session.run(get).exit_code == 1
        assert sandbox.execute(_get(web)).exit_code == 1
        sandbox.set_network_policy(_policy(("127.0.0.2", web, "http")))
        assert session.run(get).output == "GET /x\n"
        sandbox.set_network_policy(_policy(("127.0.0.3", web, "http")))
        assert "403" in session.run(get).output
        session.run("exit 3")  # a restored shell has the proxy that its sandbox has now
        sandbox.set_network_policy(NetworkPolicy())
        assert session.run("echo $v [$http_proxy$NO_PROXY]").output == "1 []\n"
    verdicts = [(e["verdict"], e["host"], e.get("reason")) for e in _events(sandbox, "egress")]
    allowed, denied = ("allowed", "127.0.0.2", None), ("denied", "127.0.0.2", "no rule allows it")
    assert verdicts == [allowed, allowed, allowed, denied]
    assert [len(e["allow"]) for e in _events(sandbox, "network_policy")] == [1, 0, 1, 1, 0]
    assert all(e["bytes_received"] > 0 for e in _events(sandbox, "egress_ended"))


def test_a_fork_keeps_the_policy_of_the_moment(web):
    with Sandbox.start() as sandbox:
        sandbox.set_network_policy(_policy(("127.0.0.2", web, "http")))
        sandbox.session().run("true")
        (fork,) = sandbox.fork()
        with fork:
            assert fork.execute(_get(web)).output == "GET /x\n"
            sandbox.set_network_policy(NetworkPolicy())
            assert fork.execute(_get(web)).output == "GET /x\n"
            assert sandbox.execute(_get(web)).exit_code == 1


def test_one_sandboxs_way_out_is_not_anothers(web):
    with Sandbox.start(SandboxSpec(network=_policy(("127.0.0.2", web, "http")))) as one, Sandbox.start() as other:
        proxied = {"http_proxy": "http://127.0.0.1:3128"}
        assert one.execute(_get(web)).output == "GET /x\n"
        assert "refused" in other.execute(_get(web), env=proxied).output
        assert _events(other, "egress") == []


def test_a_program_on_the_proxys_port_does_not_get_its_place(web):
    with Sandbox.start() as sandbox:
        squat = "import socket, time; s = socket.create_server(('127.0.0.1', 3128)); time.sleep(20)"
        sandbox.session().run(f'python3 -c "{squat}" & sleep 0.5')
        sandbox.set_network_policy(_policy(("127.0.0.2", web, "http")))
        assert sandbox.execute(_get(web)).output == "GET /x\n"


def _proxy_pid():
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "comm").read_text() == "rock-egress\n":
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                keeper = get_backend("bubblewrap").supervisor().keeper_pid
                children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
                if parent in children:
                    return int(folder.name)
    return None


def test_the_proxy_has_no_privileges(web):
    with Sandbox.start(SandboxSpec(network=_policy(("127.0.0.2", web, "http")))):
        status = dict(line.split(":\t") for line in Path(f"/proc/{_proxy_pid()}/status").read_text().splitlines())
    assert {status[k] for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    if os.geteuid() == 0:
        assert set(status["Uid"].split()) == {"1499999999"}


def test_a_killed_proxy_is_replaced_and_meanwhile_nothing_gets_out(web):
    with Sandbox.start(SandboxSpec(network=_policy(("127.0.0.2", web, "http")))) as sandbox:
        assert sandbox.execute(_get(web)).exit_code == 0
        os.kill(_proxy_pid(), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while sandbox.execute(_get(web)).exit_code and time.monotonic() < deadline:
            time.sleep(0.2)
        assert sandbox.execute(_get(web)).output == "GET /x\n"
        assert sandbox.is_alive


def test_a_backend_that_cannot_enforce_a_policy_refuses():
    class ClosedOnly(BubblewrapBackend):
        name = "closed-only"
        capabilities = frozenset({"network_closed"})

    register_backend("closed-only", ClosedOnly)
    policy = _policy(("pypi.org", 443, "https"))
    with pytest.raises(LimitNotEnforceable, match="closed-only"):
        Sandbox.start(SandboxSpec(backend="closed-only", network=policy))
    with Sandbox.start(SandboxSpec(backend="closed-only")) as sandbox:
        with pytest.raises(LimitNotEnforceable, match="allowlist"):
            sandbox.set_network_policy(policy)
    get_backend("closed-only").close()


def test_a_policy_must_be_a_policy(fresh):
    with pytest.raises(SpecError, match="network"):
        fresh.set_network_policy("closed")

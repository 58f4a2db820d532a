"""Port forwarding on every backend: a real HTTP server inside, which no route leads to."""

import hashlib
import http.client
import socket
import threading
import time
import urllib.request

import pytest

from rock_env import ForwardFailed, SandboxDead, SpecError

SECONDS = 60.0  # a bound for what takes a moment
_ECHO = """
import socket, threading
def serve(c):
    while data := c.recv(65536):
        c.sendall(data)
    c.sendall(b"end"); c.close()
s = socket.create_server(("127.0.0.1", 7000), backlog=64); print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""


def start_server(box, command, wanted=b""):
    """A job that serves; waits for a word of it."""
    job = box.start_job(command)
    seen, seq, deadline = b"", 0, time.monotonic() + SECONDS
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        output = job.read(seq, 5)
        assert output.status.is_running, seen
        seen, seq = seen + b"".join(p.data for p in output.pieces), output.next
    return job


def exchange(port, data, seconds=SECONDS):
    """All that comes back for `data`, which is sent while it is read, and then ended."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:

        def send():
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = b""
        while piece := connection.recv(1 << 16):
            got += piece
        sender.join()
    return got


@pytest.fixture(scope="module")
def echo(box):
    start_server(box, ["python3", "-c", _ECHO], b"ready")
    with box.forward(7000) as forward:
        yield forward


def test_a_web_server_inside_answers_outside(box):
    box.write_file("/tmp/site/page.txt", "from inside\n")
    serve = "python3 -u -m http.server 7001 --bind 127.0.0.1 --directory /tmp/site"
    job = start_server(box, serve, b"Serving")
    with box.forward(7001) as forward:
        for _ in range(3):
            with urllib.request.urlopen(f"{forward.url}/page.txt", timeout=SECONDS) as answer:
                assert answer.read() == b"from inside\n"
        client = http.client.HTTPConnection("127.0.0.1", forward.local_port, timeout=SECONDS)
        client.request("GET", "/missing")
        assert client.getresponse().status == 404
        client.close()
        local = forward.local_port
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", local), timeout=SECONDS)
    job.kill()


def test_bytes_are_neither_lost_nor_changed(echo):
    data = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(40_000))  # ten windows each way
    assert exchange(echo.local_port, data) == data + b"end"
    assert exchange(echo.local_port, b"") == b"end"


def test_several_connections_at_once(echo):
    found = {}

    def talk(number):
        found[number] = exchange(echo.local_port, str(number).encode() * 1000)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == {number: str(number).encode() * 1000 + b"end" for number in range(8)}


def test_a_request_that_is_repeated_changes_nothing(box, echo):
    """As after an answer that was lost on its way."""
    call = lambda op, blob=b"", **arguments: box._backend.call(  # noqa: E731
        box.id, f"forward_{op}", 5.0, blob, connection="0123456789abcdef", **arguments
    )
    for _ in range(2):
        call("open", port=7000)
    for _ in range(2):
        assert call("write", b"hello", at=0, close=False, seconds=5.0)[0] == {"accepted": 5}
    got = b""
    while len(got) < 5:
        reply, data = call("read", seq=len(got), seconds=5.0, max_bytes=3)
        again, same = call("read", seq=len(got), seconds=5.0, max_bytes=3)
        assert (same[: len(data)], again["is_end"], reply["is_end"]) == (data, False, False)
        got += data
    assert got == b"hello"
    for seq, match in ((6, "expected a number in"), (0, "expected a number in")):
        with pytest.raises(SpecError, match=match):
            call("read", seq=seq, seconds=0.0, max_bytes=3)
    with pytest.raises(SpecError, match="at: expected at most 5"):
        call("write", b"x", at=6, close=False, seconds=0.0)
    for _ in range(2):
        call("close")
    with pytest.raises(ForwardFailed, match="no forwarded connection"):
        call("read", seq=5, seconds=0.0, max_bytes=3)


def test_nobody_listens(box):
    with box.forward(7999) as forward:
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=SECONDS) as connection:
            assert connection.recv(1) == b""
        deadline = time.monotonic() + SECONDS
        while forward.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(forward.failure, ForwardFailed) and "refused" in str(forward.failure)


def test_one_that_accepts_nothing_holds_nobody(box):
    """Its backlog is full, so that a connection neither opens nor fails."""
    full = "import socket, time; s = socket.create_server(('127.0.0.1', 7002), backlog=0)"
    full += "; c = [socket.socket() for _ in 'abcd']; [x.setblocking(False) for x in c]"
    full += "; [x.connect_ex(('127.0.0.1', 7002)) for x in c]; print('full', flush=True)"
    job = start_server(box, ["python3", "-c", f"{full}; time.sleep(600)"], b"full")
    opening = threading.Thread(target=_refusal, args=(box, found := []))
    opening.start()
    assert box.execute("echo on").output == "on\n"
    opening.join(SECONDS)
    assert len(found) == 1 and isinstance(found[0], ForwardFailed) and "timed out" in str(found[0])
    job.kill()


def _refusal(box, found):
    try:
        box._backend.call(box.id, "forward_open", 30.0, connection="f" * 16, port=7002)
    except ForwardFailed as error:
        found.append(error)


def test_there_is_a_bound(box, echo):
    opened = []
    try:
        with pytest.raises(Exception, match="at most 32 connections"):
            for number in range(40):
                box._backend.call(box.id, "forward_open", 5.0, connection=f"{number:016x}", port=7000)
                opened.append(f"{number:016x}")
        assert len(opened) > 24
    finally:
        for connection in opened:
            box._backend.call(box.id, "forward_close", 5.0, connection=connection)
    assert exchange(echo.local_port, b"again") == b"againend"


@pytest.mark.parametrize("port", [0, 65536, "80", True, None])
def test_a_port_is_a_number(box, port):
    with pytest.raises(SpecError, match=r"port: expected an integer in 1\.\.65535"):
        box.forward(port)


def test_the_end_of_a_sandbox_is_the_end_of_its_connections(fresh):
    start_server(fresh, ["python3", "-c", _ECHO], b"ready")
    with fresh.forward(7000) as forward:
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=SECONDS) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            fresh.stop()
            assert connection.recv(1) == b""
        deadline = time.monotonic() + SECONDS
        while forward.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(forward.failure, SandboxDead)

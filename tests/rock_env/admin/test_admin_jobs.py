"""Jobs over REST: the same methods, tokens, and connections that are cut in the middle."""

import contextlib
import hashlib
import os
import socket
import threading
import time

import pytest
from waiting import wait_until

from rock_env import Dropped, Forbidden, SandboxDead, SpecError
from rock_env.remote import Client

SECONDS = 90.0


class CuttingRelay:
    """A loopback relay before the admin that cuts every connection after it has carried some bytes."""

    def __init__(self, target, after_bytes):
        self._target, self._after = target, after_bytes
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                inside = self._listener.accept()[0]
                outside = socket.create_connection(self._target)
                for pair, is_cut in (((inside, outside), False), ((outside, inside), True)):
                    threading.Thread(target=self._carry, args=(*pair, is_cut), daemon=True).start()

    def _carry(self, source, sink, is_cut):
        carried = 0
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if is_cut and carried + len(data) > self._after:
                    sink.sendall(data[: max(0, self._after - carried)])  # in the middle of an answer
                    self.cuts += 1
                    break
                carried += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


@pytest.fixture(scope="module")
def user(admin):
    return admin.new_tenant("jobs")


@pytest.fixture(scope="module")
def box(user):
    with user.start() as sandbox:
        yield sandbox


def test_the_same_methods_as_in_process(box):
    job = box.start_job("cat; echo err >&2; exit 4", stdin=True, env={"A": "1"}, id="one")
    job.write(b"\xff\x00bytes")
    job.close_stdin()
    pieces = list(job.stream())
    assert b"".join(p.data for p in pieces if p.stream == "stdout") == b"\xff\x00bytes"
    assert b"".join(p.data for p in pieces if p.stream == "stderr") == b"err\n"
    assert job.wait(SECONDS).exit_code == 4
    assert box.job("one").status().id == "one"
    assert box.jobs()[0].id == "one"
    shell = box.start_job(["bash", "--norc", "-i"], terminal=(20, 70))
    shell.resize(21, 71)
    shell.write("stty size; sleep 100\n")
    wait_until(lambda: b"21 71" in b"".join(p.data for p in shell.read().pieces), SECONDS)
    assert shell.interrupt()
    shell.write("exit 5\n")
    assert shell.wait(SECONDS).exit_code == 5
    unread = box.start_job("head -c 200000 /dev/zero", buffer_bytes=16384)
    unread.wait(SECONDS)
    assert isinstance(unread.read().pieces[0], Dropped)
    with pytest.raises(SpecError, match="seq"):
        job.read(1000)


def test_cut_connections_neither_lose_nor_double_a_byte(admin, user, box):
    host, port = admin.url.removeprefix("http://").split(":")
    relay = CuttingRelay((host, int(port)), 150_000)
    lines = 60_000
    try:
        with Client(relay.url, user.token) as client:
            far = client.sandbox(box.id)
            job = far.start_job(f"seq {lines}")
            data = b"".join(piece.data for piece in job.stream())
            assert data == b"".join(b"%d\n" % n for n in range(1, lines + 1))
            assert relay.cuts >= 2
            cuts = relay.cuts
            echo = far.start_job("sha256sum", stdin=True)
            relay._after = 400  # now every answer or two
            sent = os.urandom(2_000_000)
            echo.write(sent, timeout=SECONDS)
            echo.close_stdin()
            relay._after = 100_000
            digest = b"".join(piece.data for piece in echo.stream()).decode().split()[0]
            assert digest == hashlib.sha256(sent).hexdigest()
            assert relay.cuts > cuts
    finally:
        relay.close()


def test_what_a_token_may_do(admin, user, box):
    job = box.start_job("sleep 100")
    token = user.post(f"/v1/sandboxes/{box.id}/tokens", {"scopes": ["read"]})["token"]
    reader = admin.client(token)
    for path in ("/jobs", f"/jobs/{job.id}", f"/jobs/{job.id}/output"):
        with pytest.raises(Forbidden):
            reader.get(f"/v1/sandboxes/{box.id}{path}")
    other = admin.new_tenant("jobs-other")
    with pytest.raises(Exception, match="no sandbox"):
        other.get(f"/v1/sandboxes/{box.id}/jobs/{job.id}/output")
    job.kill()


@pytest.mark.parametrize(
    "body",
    [
        {"command": "true", "terminal": {"rows": 0, "columns": 1}},
        {"command": [], "id": "x"},
        {"command": "true", "id": "../x"},
        {"command": "a\0b"},
        {"command": "true", "unknown": 1},
        {"command": "true", "buffer_bytes": 1},
    ],
)
def test_bad_requests(user, box, body):
    with pytest.raises(SpecError):
        user.post(f"/v1/sandboxes/{box.id}/jobs", body)


def test_a_running_job_keeps_an_idle_sandbox_and_a_waiting_shell_does_not(user):
    busy = user.start(idle_seconds=3.0)
    waiting = user.start(idle_seconds=3.0)
    busy.start_job(["sleep", "100"])
    waiting.start_job(["bash", "--norc", "-i"], terminal=(24, 80))
    state = lambda box: user.get(f"/v1/sandboxes/{box.id}")["state"]  # noqa: E731
    wait_until(lambda: state(waiting) == "stopped", SECONDS)
    time.sleep(4)
    assert state(busy) == "running"
    busy.stop()


def test_a_reader_learns_that_the_sandbox_was_stopped(user):
    sandbox = user.start()
    job = sandbox.start_job("sleep 100")
    threading.Timer(1.0, sandbox.stop).start()
    with pytest.raises(SandboxDead):
        list(job.stream())


def test_jobs_survive_the_admin(start_admin):
    """kill -9 of the admin: the job goes on, and the next admin's reader goes on where the last one stopped."""
    admin = start_admin(port=_free_port())
    box = admin.client().start()
    job = box.start_job("for i in 1 2 3 4 5 6 7 8 9; do echo $i; sleep 0.3; done; exit 3")
    stream = job.stream(patience=SECONDS)
    seen = next(stream).data
    admin.kill()
    threading.Thread(target=admin.start).start()
    seen += b"".join(piece.data for piece in stream)
    assert seen == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    assert job.status().exit_code == 3


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

"""Port forwarding over REST: the same methods, whose it is, cut connections, what is on record, and `rock forward`."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from test_admin_jobs import CuttingRelay

import rock_env
from rock_env import Forbidden, RockError, SandboxNotFound
from rock_env.remote import Client

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from test_conformance_forward import _ECHO, exchange, start_server

SECONDS = 90.0


@pytest.fixture(scope="module")
def user(admin):
    return admin.new_tenant("forward")


@pytest.fixture(scope="module")
def box(user):
    with user.start() as started:
        started.write_file("/tmp/site/page", "over REST\n")
        start_server(started, ["python3", "-c", _ECHO], b"ready")
        serve = "python3 -u -m http.server 7001 --bind 127.0.0.1 --directory /tmp/site"
        start_server(started, serve, b"Serving")
        yield started


def test_a_web_server_inside_and_what_is_on_record(user, box):
    with box.forward(7001) as forward:
        with urllib.request.urlopen(f"{forward.url}/page", timeout=SECONDS) as answer:
            assert answer.read() == b"over REST\n"
    with box.forward(7000) as forward:
        data = os.urandom(300_000)
        assert exchange(forward.local_port, data) == data + b"end"
    with box.forward(7999) as forward:
        assert exchange(forward.local_port, b"") == b""
    records = user.audit(box.id)["records"]
    opened = [(r["port"], r["verdict"]) for r in records if r["event"] == "forward"]
    assert opened == [(7001, "opened"), (7000, "opened"), (7999, "failed")]
    ended = [r for r in records if r["event"] == "forward_ended"]
    assert (ended[1]["bytes_sent"], ended[1]["bytes_received"]) == (300_000, 300_003)


def test_cut_connections_lose_nothing(admin, user, box):
    relay = CuttingRelay(("127.0.0.1", int(admin.url.rpartition(":")[2])), 60_000)
    try:
        with Client(relay.url, user.token) as client, client.sandbox(box.id).forward(7000) as forward:
            data = os.urandom(250_000)
            assert exchange(forward.local_port, data, 300.0) == data + b"end"
        assert relay.cuts > 2
    finally:
        relay.close()


def test_whose_it_is(admin, user, box):
    stranger = admin.new_tenant("forward-stranger")
    body = {"json": {"port": 7001}}
    path = f"/v1/sandboxes/{box.id}/connections/{'a' * 16}"
    with pytest.raises(SandboxNotFound):
        stranger.request("PUT", path, **body)
    for scopes, error in ((["read", "files", "manage"], Forbidden), (["exec"], None)):
        token = user.post(f"/v1/sandboxes/{box.id}/tokens", {"scopes": scopes})["token"]
        client = admin.client(token)
        if error is None:
            client.request("PUT", path, **body)
            client.request("DELETE", path)
            continue
        for verb, where in (("PUT", path), ("GET", f"{path}/data"), ("POST", f"{path}/data"), ("DELETE", path)):
            with pytest.raises(error):
                client.request(verb, where, **(body if verb == "PUT" else {"params": {"seq": 0, "at": 0}}))
    with admin.http("nonsense") as nobody:
        assert nobody.put(path, **body).status_code == 401
    for port in (0, 65536, "x", None):
        with pytest.raises(RockError, match="port"):
            user.request("PUT", path, json={"port": port})


def test_the_command(user, box):
    env = {k: v for k, v in os.environ.items() if not k.startswith("ROCK_")}
    env |= {"ROCK_URL": user.url, "ROCK_API_KEY": user.token, "PYTHONPATH": str(Path(rock_env.__file__).parents[1])}
    command = [sys.executable, "-m", "rock_env.cli", "forward", box.id, "7001"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            address = process.stdout.readline().split()[0]
            with urllib.request.urlopen(f"http://{address}/page", timeout=SECONDS) as answer:
                assert answer.read() == b"over REST\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()

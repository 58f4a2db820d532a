"""ROCK's published REST API: requests as its SDK sends them, and the SDK itself where there is one."""

import base64
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hub_tasks import write_task
from waiting import wait_until

from rock_env import gem
from rock_env.admin.compat_schema import parse_form, size_of, size_text
from rock_env.errors import SpecError
from rock_env.hub.remote import RemoteHub

IMAGE = "python:3.11"
API = "/apis/envs/sandbox/v1"
# What the SDK sends for a configuration of nothing but an image and a size.
START = {
    "image": IMAGE,
    "image_os": "linux",
    "auto_clear_time": 5,
    "auto_clear_time_minutes": 5,
    "startup_timeout": 180.0,
    "memory": "256m",
    "cpus": 1,
    "num_gpus": None,
    "accelerator_type": None,
    "registry_username": None,
    "registry_password": None,
    "use_kata_runtime": False,
    "limit_cpus": None,
    "sandbox_id": None,
    "auto_archive_seconds": None,
    "auto_delete_seconds": None,
    "disk": "50G",
}


@pytest.fixture(scope="module")
def peer_admin(start_admin):
    """Its image stands for a minimal tree over this machine's programs."""
    admin = start_admin(images={IMAGE: ""})
    yield admin
    admin.stop()


class Peer:
    """The API as a tenant's SDK speaks it."""

    def __init__(self, admin, token):
        headers = {"X-Cluster": "zb", "XRL-Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=admin.url + API, headers=headers, timeout=120, trust_env=False)

    def post(self, path, /, **body):
        return self.http.post(f"/{path}", json=body)

    def ok(self, path, /, **body):
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "Success", answer.text
        return answer.json()["result"]

    def failed(self, path, /, **body):
        """(code, reason) of what has to fail."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "Failed", answer.text
        result = answer.json()["result"]
        assert result["failure_reason"] == answer.json()["error"]
        return result["code"], result["failure_reason"]

    def status(self, id, **query):
        answer = self.http.get("/get_status", params={"sandbox_id": id, **query}).json()
        assert answer["status"] == "Success", answer
        return answer["result"]

    def start(self, **changes):
        id = self.ok("start_async", **{**START, **changes})["sandbox_id"]
        wait_until(lambda: self.status(id)["is_alive"])
        return id


@pytest.fixture(scope="module")
def user(peer_admin):
    return peer_admin.new_tenant("peer")


@pytest.fixture(scope="module")
def peer(peer_admin, user):
    peer = Peer(peer_admin, user.token)
    yield peer
    peer.http.close()


@pytest.fixture(scope="module")
def box(peer):
    return peer.start()


def test_a_sandbox_is_started_and_told_of(peer, user, box):
    status = peer.status(box, include_all_states="True")
    assert (status["state"], status["is_alive"], status["image"]) == ("running", True, IMAGE)
    assert (status["cpus"], status["memory"], status["disk"]) == (1, "256m", "50g")
    assert {phase["status"] for phase in status["status"].values()} == {"success"}
    assert [step["to_state"] for step in status["state_history"]] == ["pending", "starting", "running"]
    assert [step["from_state"] for step in status["state_history"]] == ["", "pending", "starting"]
    assert peer.http.get("/is_alive", params={"sandbox_id": box}).json()["result"]["is_alive"] is True
    row = user.get(f"/v1/sandboxes/{box}")
    assert (row["idle_seconds"], row["spec"]["network"]["allow"]) == (300, [])


def test_stop_is_idempotent_and_the_end_is_told(peer):
    id = peer.start()
    assert peer.failed("delete", sandbox_id=id)[0] == 4000
    for _ in range(2):
        assert peer.ok("stop", sandbox_id=id) == f"{id} stopped"
    status = peer.status(id)
    assert (status["state"], status["is_alive"]) == ("stopped", False)
    assert status["stop_time"] > status["create_time"]
    assert peer.http.get("/is_alive", params={"sandbox_id": id}).json()["result"]["is_alive"] is False
    assert "has ended" in peer.failed("execute", sandbox_id=id, command="true")[1]
    assert "commit it before" in peer.failed("restart", sandbox_id=id)[1]
    assert peer.ok("delete", sandbox_id=id) == f"{id} deleted"


def test_execute_keeps_the_streams_apart(peer, box):
    result = peer.ok("execute", sandbox_id=box, command="echo out; echo err >&2; exit 3", timeout=60, env={"A": "b"})
    assert (result["exit_code"], result["stdout"], result["stderr"]) == (3, "out\n", "err\n")
    result = peer.ok("execute", sandbox_id=box, command=["sh", "-c", "pwd; echo $A"], cwd="/tmp", env={"A": "b c"})
    assert result["stdout"] == "/tmp\nb c\n"
    result = peer.ok("execute", sandbox_id=box, command=r"printf 'a\xffb'")
    assert result["stdout"] == "a\\xffb"
    result = peer.ok("execute", sandbox_id=box, command="seq 300000; echo end >&2", timeout=60)
    assert (result["stdout"], result["stderr"]) == ("".join(f"{i}\n" for i in range(1, 300001)), "end\n")
    with ThreadPoolExecutor(24) as pool:
        said = pool.map(lambda i: peer.ok("execute", sandbox_id=box, command=f"sleep 1; echo {i}")["stdout"], range(48))
        assert list(said) == [f"{i}\n" for i in range(48)]
    code, reason = peer.failed("execute", sandbox_id=box, command="echo out; exit 3", check=True, error_msg="mine")
    assert (code, "mine" in reason, "exit code 3" in reason, "out" in reason) == (6000, True, True, True)


def test_a_timeout_is_not_a_success(peer, box):
    """Where the peer says Success, with the exit code -1 and nothing of the output."""
    result = peer.ok("execute", sandbox_id=box, command="echo begun; sleep 60", timeout=3)
    assert (result["exit_code"], result["timed_out"], result["stdout"]) == (124, True, "begun\n")
    code, reason = peer.failed("execute", sandbox_id=box, command="yes | head -c 30000000", timeout=60)
    assert (code, "8388608 bytes" in reason) == (4000, True)
    peer.ok("create_session", sandbox_id=box, session="slow")
    slow = {"sandbox_id": box, "session": "slow", "command": "echo begun; sleep 60", "timeout": 3}
    code, reason = peer.failed("run_in_session", **slow, check="raise")
    assert (code, "timed out" in reason, "begun" in reason) == (6000, True, True)
    result = peer.ok("run_in_session", **slow, check="silent")
    assert (result["exit_code"], result["output"].startswith("begun")) == (124, True)
    assert "timed out" in result["failure_reason"]
    assert peer.ok("run_in_session", sandbox_id=box, session="slow", command="echo well")["output"] == "well"


def test_sessions_are_created_used_and_closed(peer, box):
    peer.ok("write_file", sandbox_id=box, path="/tmp/rc", content="B=sourced; echo loaded")
    opened = {"session_type": "bash", "session": "s", "startup_source": ["/tmp/rc"], "env_enable": False}
    created = peer.ok("create_session", sandbox_id=box, env={"A": "it's"}, remote_user=None, **opened)
    assert created == {"output": "loaded\n", "session_type": "bash"}
    assert "exists already" in peer.failed("create_session", sandbox_id=box, session="s")[1]

    def run(command, **more):
        action = {"action_type": "bash", "session": "s", "command": command, "timeout": None, **more}
        return peer.ok("run_in_session", sandbox_id=box, **action)

    assert run("cd /; X=5; echo $A $B")["output"] == "it's sourced"
    assert run("echo \"$X $PWD\"; printf '\\n\\n'")["output"] == "5 /"
    assert run("(exit 3)", check="silent")["exit_code"] == 3
    assert run("(exit 3)", check="ignore")["exit_code"] is None
    failing = {
        "sandbox_id": box,
        "session": "s",
        "command": "echo why; (exit 3)",
        "check": "raise",
        "error_msg": "mine",
    }
    code, reason = peer.failed("run_in_session", **failing)
    assert (code, reason) == (6000, "mine: exit code 3; output: why\n")

    left = run("sleep 300 & echo $! $$")["output"].split()
    peer.ok("close_session", sandbox_id=box, session="s")
    alive = "kill -0 {} 2>/dev/null && echo alive || echo gone"
    said = [peer.ok("execute", sandbox_id=box, command=alive.format(pid))["stdout"] for pid in left]
    assert said == ["alive\n", "gone\n"]
    for path in ("close_session", "run_in_session"):
        body = {"command": "true"} if path == "run_in_session" else {}
        assert "'s'" in peer.failed(path, sandbox_id=box, session="s", **body)[1]
    peer.ok("create_session", sandbox_id=box, session="s")
    assert run("echo [$X$A]")["output"] == "[]"


def test_a_session_that_cannot_begin_is_not_left_behind(peer, box):
    code, reason = peer.failed("create_session", sandbox_id=box, session="t", startup_source=["/nowhere"])
    assert (code, "/nowhere" in reason) == (6000, True)
    assert "one user" in peer.failed("create_session", sandbox_id=box, session="t", remote_user="root")[1]
    peer.ok("create_session", sandbox_id=box, session="t")
    interactive = {"sandbox_id": box, "session": "t", "command": "cat", "is_interactive_command": True}
    assert "is_interactive_command" in peer.failed("run_in_session", **interactive)[1]


def test_closing_a_session_waits_for_its_command_and_ends_what_is_behind_it(peer, box):
    peer.ok("create_session", sandbox_id=box, session="w")
    answers = {}

    def send(name, path, **body):
        answers[name] = peer.post(path, sandbox_id=box, session="w", **body).json()

    busy = "touch /tmp/busy; until [ -e /tmp/go ]; do sleep 0.05; done"
    threads = [threading.Thread(target=send, args=("busy", "run_in_session"), kwargs={"command": busy})]
    threads[0].start()
    wait_until(lambda: peer.ok("execute", sandbox_id=box, command=["test", "-e", "/tmp/busy"])["exit_code"] == 0)
    for name, path, body in (("close", "close_session", {}), ("late", "run_in_session", {"command": "true"})):
        threads.append(threading.Thread(target=send, args=(name, path), kwargs=body))
        threads[-1].start()
        time.sleep(1)  # so that they arrive in this order
    peer.ok("write_file", sandbox_id=box, path="/tmp/go", content="")
    for thread in threads:
        thread.join()
    assert (answers["busy"]["result"]["exit_code"], answers["close"]["status"]) == (0, "Success")
    assert "was closed meanwhile" in answers["late"]["error"]


def test_files(peer, box):
    text = "line\r\nü\n\n"
    peer.ok("write_file", sandbox_id=box, path="/tmp/deep/er/f", content=text)
    read = {"sandbox_id": box, "path": "/tmp/deep/er/f", "encoding": None, "errors": None}
    assert peer.ok("read_file", **read) == {"content": text}
    assert peer.ok("read_file", **{**read, "encoding": "latin-1"})["content"] == text.encode().decode("latin-1")
    data = b"\r\n--x\r\n" + os.urandom(2 << 20) + b"\r\n"
    form = {"target_path": "/tmp/up/blob", "sandbox_id": box}
    files = {"file": ('odd "name".eml', data, "message/rfc822")}
    answer = peer.http.post("/upload", data=form, files=files).json()
    assert answer["result"] == {"success": True, "message": "", "file_name": "blob"}, answer
    encoded = peer.ok("execute", sandbox_id=box, command=["base64", "-w0", "/tmp/up/blob"])["stdout"]
    assert base64.b64decode(encoded) == data
    refused = peer.http.post("/upload", data={**form, "sandbox_id": "x"}, files=files).json()
    assert (refused["status"], refused["result"]["code"]) == ("Failed", 4000)
    assert "sandbox_id" in refused["error"]
    for path in ("/proc/x", "/tmp/deep/"):
        assert peer.failed("write_file", sandbox_id=box, path=path, content="")[0] == 4000


def test_a_file_that_cannot_be_read_is_no_empty_file(peer, box):
    """The SDK looks at the HTTP status alone here; the peer says Success, with an empty content."""
    for path, status in (("/tmp/nowhere", 404), ("/tmp", 409)):
        answer = peer.post("read_file", sandbox_id=box, path=path)
        assert (answer.status_code, answer.json()["status"]) == (status, "Failed")
    peer.ok("execute", sandbox_id=box, command=r"printf '\xff' >/tmp/binary")
    answer = peer.post("read_file", sandbox_id=box, path="/tmp/binary")
    assert (answer.status_code, "not utf-8" in answer.json()["error"]) == (422, True)
    assert peer.ok("read_file", sandbox_id=box, path="/tmp/binary", errors="replace")["content"] == "\ufffd"
    assert peer.post("stop", sandbox_id="0" * 16).status_code == 404


def test_commit_makes_an_image_of_that_name(peer, peer_admin, user):
    tag = {"image_tag": "registry.example/me/work:1", "username": "u", "password": "hush"}
    id = peer.start()
    assert "no commit" in peer.http.get(f"/commit/{id}").json()["error"]
    for content in ("one", "two"):
        peer.ok("write_file", sandbox_id=id, path="/app/f", content=content)
        done = peer.ok("commit", sandbox_id=id, **tag)
        assert (done["sandbox_id"], done["image_tag"], done["phase"]) == (id, tag["image_tag"], "SUCCEEDED")
    assert peer.http.get(f"/commit/{id}").json()["result"] == done
    assert len(user.get("/v1/snapshots")) == 1  # the name has moved; nothing else knew of the first
    peer.ok("stop", sandbox_id=id)
    copy = peer.start(image=tag["image_tag"], memory="128m")
    assert peer.ok("read_file", sandbox_id=copy, path="/app/f")["content"] == "two"
    assert peer.status(copy)["memory"] == "128m"
    assert "image_tag" in peer.failed("commit", sandbox_id=copy, image_tag=IMAGE)[1]
    peer.ok("stop", sandbox_id=copy)
    other, asked = Peer(peer_admin, peer_admin.new_tenant("stranger").token), {"image": tag["image_tag"]}
    assert "expected the name of one of the admin's images" in other.failed("start_async", **START | asked)[1]
    assert "hush" not in peer_admin.log.read_text()
    with peer_admin.http(user.token) as http:
        assert http.delete(f"/v1/snapshots/{user.get('/v1/snapshots')[0]['id']}").status_code == 204
    assert peer.failed("start_async", **START | asked)[0] == 4000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "nobody/knows:1"}, "expected the name of one of the admin's images (python:3.11)"),
        ({"image": " "}, "image"),
        ({"image_os": "windows"}, "image_os"),
        ({"memory": "lots"}, "memory: expected a size"),
        ({"memory": "1k"}, "limits.memory_bytes"),
        ({"num_gpus": 1}, "num_gpus: not supported"),
        ({"use_kata_runtime": True}, "use_kata_runtime: not supported"),
        ({"sandbox_id": "mine"}, "sandbox_id: not supported"),
        ({"auto_archive_seconds": 5}, "auto_archive_seconds: not supported"),
        ({"auto_clear_time_minutes": 0}, "auto_clear_time_minutes"),
        ({"new_field": 1}, "new_field"),
    ],
)
def test_a_start_that_cannot_be_as_asked_fails(peer, changes, message):
    code, reason = peer.failed("start_async", **{**START, **changes})
    assert code == 4000
    assert message in reason


def test_nobody_gets_in_without_a_key(peer_admin, peer, user, box):
    def get(token=None, path=f"{API}/get_status", **headers):
        given = {"Authorization": token} if token else {}
        url = f"{peer_admin.url}{path}"
        return httpx.get(url, params={"sandbox_id": box}, headers=given | headers, trust_env=False).status_code

    assert get() == get("Bearer x") == get(**{"X-Key": user.token}) == get(path=f"{API}/nothing") == 401
    assert get("Basic !") == get("Basic " + base64.b64encode(b"u:p").decode()) == 401
    assert get(path="/apis/v1/envs/gem/make") == get(path=f"{API}/openapi.json") == get(path="/apis/") == 401
    assert get(f"Bearer {user.token}") == 200
    basic = "Basic " + base64.b64encode(f"key:{user.token}".encode()).decode()
    assert get(basic) == 200
    assert get(basic, path=f"/v1/sandboxes/{box}") == 401  # the admin's own API has one way in
    assert get(path=f"/v1/sandboxes/{box}", **{"XRL-Authorization": f"Bearer {user.token}"}) == 401
    token = user.post(f"/v1/sandboxes/{box}/tokens", {"scopes": ["read"]})["token"]
    assert get(f"Bearer {token}") == 200
    reader = Peer(peer_admin, token)
    for path, body in (("execute", {"command": "true"}), ("stop", {}), ("commit", {"image_tag": "t"})):
        assert reader.post(path, sandbox_id=box, **body).status_code == 403
    assert reader.post("start_async", **START).status_code == 403
    stranger = Peer(peer_admin, peer_admin.new_tenant("other").token)
    assert "no sandbox" in stranger.failed("execute", sandbox_id=box, command="true")[1]
    answer = peer.http.get("/nothing")
    assert (answer.status_code, answer.json()["status"]) == (404, "Failed")
    assert user.token not in peer_admin.log.read_text()


def test_gem(peer_admin, user, tmp_path):
    RemoteHub(user).push(write_task(tmp_path / "task"), "wire@1")
    headers = {"Authorization": f"Bearer {user.token}"}
    with httpx.Client(base_url=peer_admin.url, headers=headers, timeout=120, trust_env=False) as http:

        def ask(what, **body):
            answer = http.post(f"/apis/v1/envs/gem/{what}", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        id = ask("make", env_id="wire@1")["sandbox_id"]
        assert set(ask("reset", sandbox_id=id, seed=1)) == {"observation", "info"}
        step = ask("step", sandbox_id=id, action="echo hello")
        assert (step["reward"], step["terminated"], "hello" in step["observation"]) == (0.0, False, True)
        assert ask("step", sandbox_id=id, action=gem.STOP)["terminated"] is True
        assert ask("close", sandbox_id=id) == {"sandbox_id": id}
        assert http.post("/apis/v1/envs/gem/step", json={"sandbox_id": id, "action": ""}).status_code == 404


def test_sizes():
    assert size_of("m", "8g") == 8 << 30
    assert size_of("m", "1.5GiB") == 3 << 29
    assert size_of("m", "64kb") == 64 << 10
    assert size_of("m", "4096") == 4096
    assert [size_text(n) for n in (8 << 30, 3 << 29, 5000, None)] == ["8g", "1536m", "5000b", None]
    for text in ("", "-1g", "8x", "g", "1e3g", "9" * 16):
        with pytest.raises(SpecError, match="m: expected a size"):
            size_of("m", text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n",
        b"--b\r\nA: b\r\n\r\nno end",
        b"x--b--",
        b"--b\r\n\r\n\r\n--bX\r\n",
        b"--b\r\nA: b\r\n\r\n\r\n--b--",
    ],
)
def test_forms_that_are_none(body):
    with pytest.raises(SpecError, match="the body"):
        parse_form("multipart/form-data; boundary=b", body)
    with pytest.raises(SpecError, match="boundary"):
        parse_form("application/json", body)


# -- the SDK itself, in an interpreter of its own
_SDK = Path(__file__).with_name("peer_sdk.py")


@pytest.mark.slow
@pytest.mark.skipif(
    "ROCK_COMPAT_PYTHON" not in os.environ, reason="$ROCK_COMPAT_PYTHON: no interpreter that has rl-rock"
)
def test_the_sdk_works_against_this_admin(peer_admin, user, tmp_path):
    RemoteHub(user).push(write_task(tmp_path / "task"), "sdk@1")
    scheme, _, rest = peer_admin.url.partition("://")
    base = {"ROCK_BASE_URL": f"{scheme}://key:{user.token}@{rest}", "ROCK_LOGGING_LEVEL": "ERROR", "NO_PROXY": "*"}
    command = [os.environ["ROCK_COMPAT_PYTHON"], str(_SDK), peer_admin.url, user.token, str(tmp_path)]
    environment = {**os.environ, **base}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "passed": ["life", "commands", "files", "commit", "faults", "gem"]
    }

"""The REST API and the remote SDK, against a real admin: what a user does with sandboxes."""

import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import time

import httpx
import pytest
from test_rock_cli import Rock
from waiting import wait_until

from rock_env import (
    BackendUnavailable,
    FileEntry,
    FileError,
    LimitExceeded,
    Limits,
    NetworkPolicy,
    NetworkRule,
    RockError,
    Sandbox,
    SandboxDead,
    SandboxNotFound,
    SandboxSpec,
    SpecError,
)


@pytest.fixture(scope="module")
def user(admin):
    return admin.new_tenant("api")


@pytest.fixture(scope="module")
def box(user):
    with user.start(SandboxSpec(files={"hello.txt": "hello\n", "run.sh": FileEntry("echo ran", 0o755)})) as sandbox:
        yield sandbox


def test_commands_are_as_in_a_local_sandbox(box):
    result = box.execute("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.output) == (3, "out\nerr\n")
    assert box.execute(["cat", "hello.txt"]).output == "hello\n"
    assert box.execute("./run.sh; echo $A; pwd", cwd="/app", env={"A": "a b"}).output == "ran\na b\n/app\n"
    slow = box.execute("echo begun; sleep 60", timeout=2)
    assert (slow.timed_out, slow.exit_code, slow.output) == (True, 124, "begun\n")


def test_sessions_keep_their_state(box):
    session = box.session("a/b ü")
    assert session.run("cd /tmp; X=5").exit_code == 0
    assert session.run("exit 3").exit_code == 3
    assert session.run("echo $X $PWD").output == "5 /tmp\n"
    assert box.session("other").run("echo [$X]").output == "[]\n"


def test_files_travel_whole(box, tmp_path):
    data = os.urandom(3 << 20)
    box.write_file("deep/er/blob", data, 0o640)
    assert box.read_file("deep/er/blob") == data
    assert box.execute("stat -c %a deep/er/blob").output == "640\n"
    box.write_file("deep/er/blob", b"kept mode")
    assert box.execute("stat -c %a deep/er/blob").output == "640\n"
    with pytest.raises(FileError) as missing:
        box.read_file("nowhere")
    assert missing.value.errno_name == "ENOENT"
    with pytest.raises(FileError) as directory:
        box.read_file("deep")
    assert directory.value.errno_name == "EISDIR"
    with pytest.raises(FileError) as large:
        box.read_file("deep/er/blob", max_bytes=3)
    assert large.value.errno_name == "EFBIG"
    box.execute(r"touch $'odd-\xff'")
    names = {info.name for info in box.list_files("/app")}
    assert {"hello.txt", "deep", "odd-\udcff"} <= names
    with pytest.raises(SpecError, match="UTF-8"):
        box.read_file("odd-\udcff")

    (tmp_path / "up" / "empty").mkdir(parents=True)
    (tmp_path / "up" / "exe").write_bytes(b"#!/bin/sh\necho $0\n")
    (tmp_path / "up" / "exe").chmod(0o755)
    (tmp_path / "up" / "link").symlink_to("exe")
    box.upload(tmp_path / "up", "/tmp/up")
    assert box.execute("/tmp/up/link; ls /tmp/up").output == "/tmp/up/link\nempty\nexe\nlink\n"
    assert box.download("/tmp/up", tmp_path / "down") == []
    assert (tmp_path / "down" / "link").readlink().name == "exe"
    assert (tmp_path / "down" / "exe").stat().st_mode & 0o777 == 0o755


def test_archives_over_http(admin, user, box):
    """What curl and tar see; and an archive's names mean nothing outside the sandbox."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("in.txt", "../../../../escaped.txt", "/absolute.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
        device = tarfile.TarInfo("device")
    at = f"/v1/sandboxes/{box.id}/archive"
    with admin.http(user.token) as http:
        assert http.put(at, params={"path": "/tmp/arc"}, content=buffer.getvalue()).status_code == 204
        assert box.read_file("/tmp/arc/in.txt") == box.read_file("/escaped.txt") == box.read_file("/absolute.txt")
        assert not os.path.exists("/escaped.txt")
        with tarfile.open(fileobj=io.BytesIO(http.get(at, params={"path": "/tmp/arc"}).content)) as tar:
            assert {m.name: m.size for m in tar} == {"in.txt": 4}
        with tarfile.open(fileobj=io.BytesIO(http.get(at, params={"path": "/tmp/arc/in.txt"}).content)) as tar:
            assert tar.getnames() == ["in.txt"]
        assert http.put(at, content=b"no archive" * 100).status_code == 422
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            device.type = tarfile.CHRTYPE
            tar.addfile(device)
        refused = http.put(at, content=buffer.getvalue())
        assert refused.status_code == 422
        assert "device" in refused.json()["error"]["message"]
        assert http.put(f"/v1/sandboxes/{box.id}/files", params={"path": "put", "mode": 0o600}, content=b"x").is_success
        assert box.execute("stat -c '%a %s' put").output == "600 1\n"


def test_snapshots_and_forks(user):
    with user.start(SandboxSpec(env={"SECRET": "s"}, limits=Limits(command_seconds=5))) as origin:
        session = origin.session()
        session.run("echo one > f; V=7; cd /tmp")
        with origin.snapshot() as snapshot:
            origin.write_file("f", "two")
            with Sandbox.start(snapshot=snapshot) as copy, user.start(snapshot=snapshot) as bare:
                assert copy.read_file("f") == bare.read_file("f") == b"one\n"
                assert copy.session().run("echo $V $PWD $SECRET").output == "7 /tmp s\n"
                assert bare.session().run("echo $V $PWD $SECRET").output == "7 /tmp s\n"
        with pytest.raises(SandboxNotFound):
            user.start(snapshot=snapshot)
        connected = user.sandbox(origin.id)
        assert connected.spec.limits == origin.spec.limits
        forks = [*connected.fork(2), *user.fork(origin.id, 2)]
        assert [fork.read_file("f") for fork in forks] == [b"two"] * 4
        assert {fork.session().run("echo $V $SECRET").output for fork in forks} == {"7 s\n"}
        for fork in forks:
            fork.stop()
        assert user.get("/v1/snapshots") == []


def test_a_stopped_sandbox_says_so_and_keeps_its_history(user):
    box = user.start()
    assert box.is_alive
    box.stop()
    box.stop()
    assert not box.is_alive
    with pytest.raises(SandboxDead, match="stopped by key"):
        box.execute("true")
    with pytest.raises(SandboxDead):
        user.sandbox(box.id)
    history = user.get(f"/v1/sandboxes/{box.id}/history")
    assert [row["state"] for row in history] == ["pending", "starting", "running", "stopping", "stopped"]
    assert sorted(row["at"] for row in history) == [row["at"] for row in history]
    assert user.get("/v1/sandboxes", state="stopped", limit=1)[0]["id"] == box.id


def test_async_start_shows_its_phases(user):
    id = user.begin(SandboxSpec(files={"a": b"\xff"}), name="mine")
    box = user.wait(id, 30)
    assert box.read_file("a") == b"\xff"
    assert user.get(f"/v1/sandboxes/{id}")["name"] == "mine"
    box.stop()
    broken = user.begin(SandboxSpec(files={"big": b"x" * (1 << 20)}, limits=Limits(disk_bytes=100 << 10)))
    with pytest.raises(SandboxDead, match=r"failed.*no space"):
        user.wait(broken, 30)
    assert [row["state"] for row in user.get(f"/v1/sandboxes/{broken}/history")] == ["pending", "starting", "failed"]
    with pytest.raises(LimitExceeded):
        user.start(SandboxSpec(files={"big": b"x" * (1 << 20)}, limits=Limits(disk_bytes=100 << 10)))


def test_idle_sandboxes_end_but_not_those_in_which_something_runs(user):
    idle = user.start(idle_seconds=2.0)
    idle.session().run("true")  # its idle shell does not count
    busy = user.start(idle_seconds=2.0)
    busy.session().run("sleep 300 &")
    waiting = user.start(idle_seconds=2.0)
    slow = threading.Thread(target=lambda: waiting.execute("sleep 6", timeout=60))
    slow.start()
    wait_until(lambda: not idle.is_alive)
    row = user.get(f"/v1/sandboxes/{idle.id}")
    assert (row["state"], row["reason"]) == ("stopped", "it was idle for 2 s")
    slow.join()
    assert busy.is_alive
    assert waiting.is_alive
    busy.kill_all()
    wait_until(lambda: not (busy.is_alive or waiting.is_alive))


def test_the_deadline_is_absolute(user):
    started = time.monotonic()
    box = user.start(SandboxSpec(limits=Limits(lifetime_seconds=3.0)))
    with pytest.raises(SandboxDead):
        while time.monotonic() - started < 60:
            box.execute("sleep 0.1")
    assert 3.0 < time.monotonic() - started < 40
    wait_until(lambda: user.get(f"/v1/sandboxes/{box.id}")["state"] == "stopped")
    assert "lifetime" in user.get(f"/v1/sandboxes/{box.id}")["reason"]


def test_stats_kill_and_network(user, box):
    assert box.stats().memory_bytes > 0
    session = box.session("k")
    session.run("sleep 300 & echo $! > pid")
    box.kill_all()
    assert session.run("kill -0 $(cat pid)").exit_code == 1
    assert "http_proxy" not in session.run("env").output
    box.set_network_policy(NetworkPolicy((NetworkRule("example.org", 443, "https"),)))
    assert "http_proxy=http://127.0.0.1:" in session.run("env").output
    assert user.get(f"/v1/sandboxes/{box.id}")["spec"]["network"]["allow"][0]["host"] == "example.org"
    box.set_network_policy(NetworkPolicy())
    assert "http_proxy" not in session.run("env").output


def test_the_audit_records_of_a_sandbox_are_its_own(user, box):
    other = user.start()
    other.execute("mount -t tmpfs none /tmp")  # a call that is denied
    other.execute(["/usr/bin/python3", "-c", "import ctypes; ctypes.CDLL(None).mount(0, 0, 0, 0, 0)"])
    other.stop()
    report = wait_until(lambda: (r := user.audit(other.id))["records"][-1]["event"] == "sandbox_ended" and r)
    events = {record["event"] for record in report["records"]}
    assert {"sandbox_starting", "syscall_denied", "sandbox_ended"} <= events
    assert report["chain"]["ok"]
    assert len({record["sandbox"] for record in report["records"]}) == 1
    assert not any(record["event"] == "sandbox_ended" for record in user.audit(box.id)["records"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"image": "/"}, "image: expected the name"),
        ({"imag": "x"}, "Extra inputs"),
        ({"limits": {"memory_bytes": 1}}, "limits.memory_bytes: expected an integer >= 4194304"),
        ({"limits": {"memory_bytes": "lots"}}, "valid integer"),
        ({"workdir": "relative"}, "workdir: expected an absolute path"),
        ({"env": {"1": "x"}}, "env: expected names"),
        ({"files": {"a": {"content": "?", "encoding": "base64"}}}, "base64"),
        ({"network": {"allow": [{"host": "0x7f.1", "port": 80, "protocol": "http"}]}}, "network.host"),
        ({"backend": "none"}, "backend: expected one of bubblewrap"),
    ],
)
def test_a_bad_spec_gets_one_clear_error(user, spec, message):
    with pytest.raises(SpecError, match=message):
        user.post("/v1/sandboxes", {"spec": spec})


def test_binds_of_the_hosts_files_are_refused(user):
    with pytest.raises(SpecError, match="readonly_binds"):
        user.start(SandboxSpec(readonly_binds={"/etc": "/etc"}))


def test_images_by_name(start_admin, tmp_path):
    """Tenants name images; what lies behind a name is the operator's."""
    image = tmp_path / "image"
    for name in ("bash", "cat"):
        source = shutil.which(name, path="/usr/bin:/bin")
        libraries = subprocess.run(["ldd", source], capture_output=True, text=True, check=True).stdout
        for path, target in ((source, f"bin/{name}"), *((p, p[1:]) for p in re.findall(r"(/\S+)", libraries))):
            (image / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, image / target)
    (image / "mark").write_text("of the image\n")
    admin = start_admin(images={"tiny": str(image)})
    with admin.client().start(SandboxSpec(image="tiny", files={"f": "x"})) as box:
        assert box.execute("cat /mark").output == "of the image\n"
        assert box.spec.image == "tiny"
    rock = Rock(ROCK_URL=admin.url, ROCK_API_KEY=admin.key)
    assert rock("run", "tiny", "--", "cat", "/mark") == "of the image\n"
    admin.stop()


def test_long_polls_end_at_their_time(admin, user):
    started = time.monotonic()
    with admin.http(user.token) as http:
        assert http.get(f"/v1/sandboxes/{'0' * 16}", params={"wait_seconds": 30}).status_code == 404
        assert http.get("/v1/sandboxes/not-an-id").status_code == 422
    assert time.monotonic() - started < 25


def test_errors_have_one_form(admin, user):
    with admin.http(user.token) as http:
        for response in (
            http.get("/v1/nothing"),
            http.patch("/v1/sandboxes"),
            http.post("/v1/sandboxes", content=b"{"),
            http.post("/v1/sandboxes", json={"spec": {"env": {"A": 5, "B": "hush"}}}),
        ):
            assert 400 <= response.status_code < 500
            assert set(response.json()["error"]) == {"code", "message", "errno"}
            assert "hush" not in response.text
    with socket.create_connection((httpx.URL(admin.url).host, httpx.URL(admin.url).port), timeout=60) as raw:
        raw.sendall(
            f"POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {user.token}\r\n"
            f"Content-Length: {1 << 40}\r\n\r\n".encode()
        )
        assert b" 413 " in raw.recv(1000).splitlines()[0]


def test_nobody_there_is_named(admin):
    from rock_env.remote import Client

    with pytest.raises(RockError, match="cannot be reached"):
        Client("http://127.0.0.1:9", "rk_x").start()
    with pytest.raises(SpecError, match="url"):
        Client("", "x")
    client = Client(admin.url, admin.key)
    client.close()
    with pytest.raises(BackendUnavailable, match="this client has been closed"):
        client.get("/v1/whoami")
    assert httpx.get(f"{admin.url}/health", trust_env=False).json() == {"status": "ok"}

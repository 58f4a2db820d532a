"""The `rock` command."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from waiting import wait_until

import rock_env
import rock_env.cli

_ENV = {k: v for k, v in os.environ.items() if not k.startswith("ROCK_")}
_ENV["PYTHONPATH"] = str(Path(rock_env.__file__).parents[1])


_COMMANDS = "run exec shell ps logs jobs kill forward cp snapshot fork restore stop token audit admin hub worker doctor"


class Rock:
    """Runs `rock` with an environment of its own. In this process: to start Python for each is most of the time."""

    def __init__(self, **env):
        self.env = {**_ENV, **env}

    def __call__(self, *arguments, code=0):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with (
            mock.patch.dict(os.environ, self.env, clear=True),
            mock.patch.object(sys, "argv", ["rock", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                rock_env.cli.main()
            except SystemExit as end:
                status = end.code or 0
        assert status == code, (status, out.getvalue(), err.getvalue())
        return out.getvalue() if code == 0 else out.getvalue() + err.getvalue()


@pytest.fixture(scope="module")
def rock(admin):
    user = admin.new_tenant("cli")
    return Rock(ROCK_URL=admin.url, ROCK_API_KEY=user.token)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Without an admin."""
    folder = tmp_path_factory.mktemp("alone")
    return Rock(ROCK_ADMIN_DIR=str(folder / "none"), ROCK_AUDIT_DIR=str(folder))


def test_run_alone_exits_as_the_command(alone):
    assert alone("run", "-e", "A=b c", "--", "sh", "-c", "echo $A; exit 7", code=7) == "b c\n"
    assert alone("run", "--", "printf", "--", "%s", "x") == "x"
    assert "expected a root file system directory" in alone("run", "/no/such/root", "--", "true", code=125)
    assert "--image: expected it alone" in alone("run", "--image", "a", "b", "--", "true", code=125)
    assert "--limit: expected one of" in alone("run", "-l", "mem=1", "--", "true", code=125)
    assert "pids: expected an integer >= 4" in alone("run", "-l", "pids=1", "true", code=125)
    assert "no admin" in alone("ps", code=125)
    assert "--model: expected NAME=URL" in alone("admin", "start", "--model", "x", code=125)
    assert "key file /none cannot" in alone("admin", "start", "--model", "x=http://127.0.0.1:1/v1=/none", code=125)
    assert "http://LOOPBACK:PORT" in alone("admin", "start", "--model", "x=http://models.invalid:1/v1", code=125)


def test_doctor_and_audit(alone, tmp_path):
    table = alone("doctor")
    assert "seccomp" in table
    assert "memory_bytes" in table
    assert "expected one of bubblewrap, docker" in alone("doctor", "--backend", "none", code=125)
    log = table.split("audit ", 1)[1].split()[1]
    assert ": intact" in alone("audit", "verify", log)
    forged = tmp_path / "log.jsonl"
    forged.write_bytes(Path(log).read_bytes().replace(b"log_opened", b"log_0pened"))
    Path(f"{forged}.head").write_bytes(Path(f"{log}.head").read_bytes())
    assert "rock" not in alone("audit", "verify", str(forged), code=1)
    assert "No such file" in alone("audit", "verify", str(tmp_path / "none"), code=125)


def test_a_sandboxs_life(rock, tmp_path):
    id = rock("run", "-d", "-e", "GREETING=hi", "--", "sh", "-c", "echo $GREETING there; sleep 300").strip()
    assert id in rock("ps")
    assert rock("exec", id, "--", "cat", "run.log") == "hi there\n"
    assert rock("exec", "--session", "s", id, "cd /tmp; X=1") == ""
    assert rock("exec", "--session", "s", id, "--", "echo $X $PWD") == "1 /tmp\n"
    assert rock("exec", id, "sh", "-c", "exit 9", code=9) == ""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("content")
    rock("cp", str(tmp_path / "d"), f"{id}:/tmp/d")
    rock("cp", str(tmp_path / "d" / "f"), f"{id}:/tmp/into/")
    rock("cp", f"{id}:/tmp/into", f"{tmp_path}/")
    rock("cp", f"{id}:/tmp/into/f", str(tmp_path / "into" / "copy"))
    assert [(tmp_path / "into" / name).read_text() for name in ("f", "copy")] == ["content"] * 2
    assert "Not a directory" in rock("cp", f"{id}:/tmp/into", f"{tmp_path}/into/f/x", code=125)
    rock("exec", id, "ln", "-s", "/etc/passwd", "/tmp/d/link")
    rock("cp", f"{id}:/tmp/d", str(tmp_path / "back"))
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["f"]
    kept = rock("snapshot", id).strip()
    copies = [*rock("fork", "-n", "2", id).split(), rock("restore", kept).strip()]
    assert {rock("exec", copy, "cat", "/tmp/d/f") for copy in copies} == {"content"}
    token = rock("token", "--scope", "read", id).strip()
    rock("stop", id, *copies)
    assert id not in rock("ps")
    assert "stopped by key" in rock("ps", "-a")
    lines = rock("logs", id)
    assert lines.index(" pending") < lines.index(" sandbox_starting ") < lines.index(" stopped ")
    assert ": intact" in rock("audit", "verify", id)
    assert "has ended" in rock("exec", id, "true", code=125)
    assert token.startswith("rt_")


def test_admin_start_serves_this_machine(tmp_path):
    """`rock admin start`, then commands that find it by its directory; tenants; Ctrl-C leaves nothing."""
    rock = Rock(ROCK_ADMIN_DIR=str(tmp_path / "admin"), ROCK_AUDIT_DIR=str(tmp_path / "audit"))
    command = [sys.executable, "-m", "rock_env.cli", "admin", "start", "--port", "0", "--capacity", "7"]
    with (tmp_path / "log").open("wb") as log:
        admin = subprocess.Popen(command, env=rock.env, stdout=log, stderr=log, start_new_session=True)
    try:
        url = tmp_path / "admin" / "url"
        wait_until(lambda: url.exists() or admin.poll() is not None, 60)
        assert admin.poll() is None, (tmp_path / "log").read_text()
        assert rock("run", "echo", "served") == "served\n"
        rock("admin", "tenant", "team", "--max-sandboxes", "5")
        rock("admin", "tenant", "team", "--max-sandboxes", "6")
        assert "team 6" in " ".join(rock("admin", "tenants").split())
        key = rock("admin", "key", "team").strip()
        member = Rock(ROCK_URL=url.read_text().strip(), ROCK_API_KEY=key)
        assert member("run", "--", "echo", "mine") == "mine\n"
        assert "admin's API key" in member("admin", "tenants", code=125)
        rock("admin", "revoke", key.split("_")[1])
        assert "unknown, or was revoked" in member("ps", code=125)
        assert " ".join(rock("admin", "workers").split()[5:9]) == "w1 yes 0 7"
        pid = int((tmp_path / "admin" / "workers" / "w1" / "lock").read_text())
        os.killpg(admin.pid, signal.SIGINT)
        assert admin.wait(60) == 0
        assert not url.exists()
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60)
    finally:
        if admin.poll() is None:
            admin.kill()
            admin.wait()


def test_help_names_every_command(alone):
    text = alone("--help")
    assert {name for name in _COMMANDS.split() if name not in text} == set()

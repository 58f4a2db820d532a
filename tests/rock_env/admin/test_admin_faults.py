"""What is left when processes are killed: sandboxes are found again or declared lost, and none is leaked."""

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from processes import descendants, stat, still_there
from waiting import wait_until

from rock_env import BackendUnavailable, RockError, SandboxDead, SandboxSpec
from rock_env.admin.link import Link, LinkServer, read_secret


def is_gone(processes):
    """But for zombies, whom the machine's first process reaps when it likes."""
    return all((fields := stat(pid)) is None or fields[0] == "Z" for pid in still_there(processes))


@pytest.fixture(scope="module")
def admin(start_admin):
    """One for all, as each test leaves it well; a worker that was killed may still be on its way back."""
    started = start_admin()
    yield started
    started.stop()


def test_a_killed_admin_finds_its_sandboxes_again(admin):
    user = admin.new_tenant("survivor")
    box = user.start(SandboxSpec(env={"E": "kept"}), idle_seconds=300)
    box.session().run("cd /tmp; V=5; (while :; do sleep 0.1; date +%N > beat; done) &")
    stopped = user.start()
    stopped.stop()
    snapshot = box.snapshot()
    token = user.post(f"/v1/sandboxes/{box.id}/tokens", {})["token"]
    worker, row = admin.worker_pid(), user.get(f"/v1/sandboxes/{box.id}")
    admin.kill()
    with pytest.raises(BackendUnavailable):
        box.execute("true")
    admin.start()
    again = admin.client(user.token)
    assert admin.worker_pid() == worker
    assert again.get(f"/v1/sandboxes/{box.id}") == row
    found = again.sandbox(box.id)
    assert found.session().run("echo $V $PWD $E").output == "5 /tmp kept\n"
    beat = found.read_file("/tmp/beat")
    wait_until(lambda: found.read_file("/tmp/beat") not in (beat, b""))
    assert admin.client(token).sandbox(box.id).is_alive
    with again.start(snapshot=snapshot) as copy:
        assert copy.session().run("echo $V").output == "5\n"
    assert again.get(f"/v1/sandboxes/{stopped.id}")["state"] == "stopped"
    assert [w["used"] for w in admin.client().get("/v1/workers")] == [1]
    again.request("DELETE", f"/v1/snapshots/{snapshot.id}")
    found.stop()
    assert [w["used"] for w in admin.client().get("/v1/workers")] == [0]


def test_a_start_that_the_admins_end_cuts_in_two(admin):
    """Whatever the record said at that moment, afterwards it agrees with the worker, and each has one outcome."""
    user = admin.new_tenant("halved")
    ids = []

    def start():
        for _ in range(6):
            try:
                ids.append(user.begin())
            except RockError:
                return

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(ids) > 3)
    admin.kill()
    for thread in threads:
        thread.join()
    admin.start()
    again = admin.client(user.token)
    rows = wait_until(
        lambda: (r := again.get("/v1/sandboxes")) and all(x["state"] not in ("pending", "starting") for x in r) and r
    )
    assert {row["id"] for row in rows} >= set(ids)
    for row in rows:
        assert row["state"] in ("running", "failed", "lost"), row
        if row["state"] == "running":
            assert again.sandbox(row["id"]).execute("echo ok").output == "ok\n"
            again.request("DELETE", f"/v1/sandboxes/{row['id']}")
    # Nothing but the worker, its keeper and its supervisor is left.
    wait_until(lambda: len(descendants(admin.worker_pid())) <= 3)


def test_sandboxes_that_nobody_has_on_record_are_ended(admin):
    """As if the admin had died between its request and its record: started behind its back."""
    import asyncio

    from rock_env.admin.link import Link
    from rock_env.admin.worker import spec_to_wire

    directory = admin.directory / "workers" / "w1"
    link = Link("w1", f"unix:{directory / 'socket'}", read_secret(directory / "secret"))

    async def behind_its_back():
        arguments = {"entries": [], "snapshot": None, "idle_seconds": 100.0, "lifetime_seconds": 100.0}
        await link.call("start", 30, id="f" * 16, spec=spec_to_wire(SandboxSpec()), **arguments)
        await link.call("snapshot", 30, id="f" * 16, snapshot="e" * 16)
        deadline = time.monotonic() + 60
        while True:
            listed, _ = await link.call("list", 10)
            if not listed["sandboxes"] and not listed["snapshots"]:
                return
            assert time.monotonic() < deadline, listed
            await asyncio.sleep(0.1)

    asyncio.run(behind_its_back())


def test_a_killed_worker_loses_its_sandboxes_and_is_replaced(admin):
    user = admin.new_tenant("lost")
    box = user.start()
    box.session().run("(setsid sleep 300 &)")
    snapshot = box.snapshot()
    worker = admin.worker_pid()
    processes = descendants(worker)
    assert len(processes) > 5
    os.kill(worker, signal.SIGKILL)
    row = wait_until(lambda: (r := user.get(f"/v1/sandboxes/{box.id}"))["state"] == "lost" and r)
    assert row["reason"] == "its worker has ended"
    wait_until(lambda: is_gone(processes))
    with pytest.raises(SandboxDead, match="lost"):
        box.execute("true")
    assert user.get("/v1/snapshots") == []
    events = [r["event"] for r in user.audit(box.id)["records"]]  # the log outlives the worker
    assert "sandbox_starting" in events
    with user.start(queue_seconds=30) as new:
        assert new.execute("echo new").output == "new\n"
    assert admin.worker_pid() != worker
    box.stop()
    snapshot.delete()


def test_admin_and_worker_killed_together(admin):
    user = admin.new_tenant("both")
    boxes = [user.start() for _ in range(2)]
    processes = descendants(admin.worker_pid())
    admin.kill()
    os.kill(admin.worker_pid(), signal.SIGKILL)
    wait_until(lambda: is_gone(processes))
    admin.start()
    again = admin.client(user.token)
    assert {again.get(f"/v1/sandboxes/{box.id}")["state"] for box in boxes} == {"lost"}
    with again.start() as new:
        assert new.execute("true").exit_code == 0


def test_a_worker_that_hangs_is_killed(admin):
    user = admin.new_tenant("hung")
    box = user.start()
    worker = admin.worker_pid()
    processes = descendants(worker)
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: user.get(f"/v1/sandboxes/{box.id}")["state"] == "lost", 40)
    wait_until(lambda: is_gone(processes))
    with user.start() as new:
        assert new.execute("true").exit_code == 0


def test_a_sandbox_that_dies_alone_is_noted(admin):
    user = admin.new_tenant("alone")
    box, other = user.start(), user.start()
    box.session().run("sleep 300 &")

    def running(command):
        found = descendants(admin.worker_pid())
        return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(command)]

    # The first process of the first sandbox: the one whose namespace the `sleep` shares.
    sleeper = wait_until(lambda: running(b"sleep\0"))[0]
    firsts = running(b"cat\0")
    assert len(firsts) == 2
    victim = next(p for p in firsts if os.readlink(f"/proc/{p}/ns/net") == os.readlink(f"/proc/{sleeper}/ns/net"))
    os.kill(victim, signal.SIGKILL)
    row = wait_until(lambda: (r := user.get(f"/v1/sandboxes/{box.id}"))["ended_at"] and r)
    assert (row["state"], row["reason"]) == ("stopped", "its first process was killed")
    assert other.is_alive
    other.stop()


def test_an_orderly_stop_leaves_nothing(start_admin):
    admin = start_admin(workers=2)
    user = admin.new_tenant("last")
    boxes = [user.start() for _ in range(4)]
    for box in boxes:
        box.session().run("(setsid sleep 300 &)")
    boxes[0].snapshot()
    assert {user.get(f"/v1/sandboxes/{box.id}")["worker"] for box in boxes} == {"w1", "w2"}
    processes = {}
    for name in ("w1", "w2"):
        processes |= descendants(admin.worker_pid(name))
    admin.stop()
    assert is_gone(processes)
    assert admin.process.returncode == 0
    admin.start()
    again = admin.client(user.token)
    assert {row["state"] for row in again.get("/v1/sandboxes")} == {"stopped"}
    assert again.get("/v1/snapshots") == []
    admin.stop()


def test_an_abandoned_worker_ends_when_its_sandboxes_have(start_admin):
    admin = start_admin(orphan_seconds=1.0)
    user = admin.new_tenant("abandoned")
    user.start(idle_seconds=3.0).execute("true")
    processes = descendants(admin.worker_pid())
    admin.kill()
    wait_until(lambda: is_gone(processes), 30)
    assert "no admin for 1 s" in (admin.directory / "workers" / "w1" / "log").read_text()


def test_a_server_that_was_closed_answers_nothing_more(tmp_path):
    """On connections from before, either: what an ending worker takes down is lost, and did not end by itself."""
    address, secret = f"unix:{tmp_path / 'socket'}", b"x" * 64
    server = LinkServer(address, secret, lambda header, blob: (header, blob))
    server.start()

    async def calls():
        link = Link("w", address, secret)
        assert (await link.call("first", 60))[0] == {"op": "first"}
        server.close()
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await link.call("second", 60)

    asyncio.run(calls())


def test_a_worker_started_elsewhere_joins(start_admin, tmp_path):
    """`rock worker` on loopback; who does not know its secret gets nothing from it."""
    import sys

    secret = tmp_path / "secret"
    secret.write_text("x" * 64)
    secret.chmod(0o600)
    code = "import sys; from rock_env.admin.worker_main import serve\n"
    code += "serve('far', 'tcp:127.0.0.1:0', sys.argv[1], None, 30)"
    worker = subprocess.Popen([sys.executable, "-c", code, str(secret)], stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"tcp:\S+", worker.stdout.readline())[0]
        admin = start_admin(workers=0, joined=[["far", address, str(secret)]])
        user = admin.client()
        with user.start() as box:
            assert box.execute("echo far").output == "far\n"
        wrong = tmp_path / "wrong"
        wrong.write_text("y" * 64)
        wrong.chmod(0o600)
        stranger = start_admin(workers=0, joined=[["far", address, str(wrong)]])
        assert stranger.client().get("/v1/workers")[0]["is_up"] is False
        lost = user.start()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        wait_until(lambda: user.get(f"/v1/sandboxes/{lost.id}")["state"] == "lost")
        for each in (admin, stranger):
            each.stop()
    finally:
        worker.kill()
        worker.wait()

"""Snapshots and forks: what was, stays; what follows is each sandbox's own."""

import pytest

from rock_env import Limits, RockError, Sandbox, SandboxDead, SandboxNotFound, SandboxSpec, get_backend


def test_forks_are_independent(fresh):
    session = fresh.session()
    session.run("mkdir -p d/e; echo base > d/e/f; echo gone > gone; cd d; export A=1; x=2; f() { echo fun; }")
    one, two = fresh.fork(2)
    with one, two:
        for box in (one, two):
            assert box.session().run("pwd; cat e/f; echo $A $x; f").output == "/app/d\nbase\n1 2\nfun\n"
        one.session().run("echo one > e/f; rm ../gone; mv e moved")
        two.session().run("echo two >> e/f")
        session.run("echo original > e/f")
        assert one.execute("cat d/moved/f; ls").output == "one\nd\n"
        assert two.execute("cat d/e/f; ls").output == "base\ntwo\nd\ngone\n"
        assert fresh.execute("cat d/e/f; ls").output == "original\nd\ngone\n"
        assert one.execute("stat -c %U d d/moved/f").output == "agent\nagent\n"


def test_snapshot_restores_deletions_links_and_modes(fresh):
    fresh.execute(
        "mkdir a; echo 1 > a/x; ln a/x a/hard; ln -s x a/soft; chmod 640 a/x; touch -d @1000000000 a/x; mkfifo a/p;"
        "mkdir a/sub; echo 2 > a/sub/y; ln a/sub/y top; mkdir old; touch old/z"
    )
    with fresh.snapshot() as first, Sandbox.start(snapshot=first) as second:
        second.execute("rm -r old; mkdir old; touch old/new; rm a/soft")
        with second.snapshot() as later, Sandbox.start(snapshot=later) as third:
            look = "stat -c '%n %a %h %Y' a/x a/hard; cat a/hard top; readlink a/soft; test -p a/p && echo fifo; ls old"
            assert fresh.execute(look).output == "a/x 640 2 1000000000\na/hard 640 2 1000000000\n1\n2\nx\nfifo\nz\n"
            assert third.execute(look).output == "a/x 640 2 1000000000\na/hard 640 2 1000000000\n1\n2\nfifo\nnew\n"


def test_snapshot_outlives_its_sandbox_and_starts_many():
    with Sandbox.start(SandboxSpec(files={"f": "start"}, env={"E": "1"})) as sandbox:
        sandbox.session().run("echo more >> f")
        snapshot = sandbox.snapshot()
    boxes = [Sandbox.start(snapshot=snapshot) for _ in range(3)]
    snapshot.delete()
    snapshot.delete()
    for number, box in enumerate(boxes):
        box.session().run(f"echo {number} >> f")
    assert [box.execute("cat f; echo $E").output for box in boxes] == [f"startmore\n{n}\n1\n" for n in range(3)]
    for box in boxes:
        box.stop()
    with pytest.raises(SandboxNotFound):
        Sandbox.start(snapshot=snapshot)


def test_snapshot_with_another_spec():
    with Sandbox.start(SandboxSpec(files={"f": "old"})) as sandbox, sandbox.snapshot() as snapshot:
        spec = SandboxSpec(files={"f": "new", "g": "g"}, limits=Limits(pids=16))
        with Sandbox.start(spec, snapshot=snapshot) as other:
            assert other.execute("cat f g").output == "newg"
        assert sandbox.read_file("f") == b"old"


def test_snapshot_of_a_busy_sandbox_is_of_one_moment(fresh):
    """Two files that a running process keeps equal (but for one step) are so in the snapshot: it was frozen."""
    fresh.session().run(
        "(i=0; while :; do i=$((i+1)); echo $i > a; echo $i > b; done) >/dev/null 2>&1 & until test -s b; do :; done"
    )
    for _ in range(5):
        with fresh.snapshot() as snapshot, Sandbox.start(snapshot=snapshot) as copy:
            a, b = (copy.read_file(name).decode().strip() or "0" for name in "ab")
            assert b == "0" or a == "0" or 0 <= int(a) - int(b) <= 1
    assert fresh.session().run("echo running").output == "running\n"


def test_a_busy_session_does_not_block_a_snapshot(fresh):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fresh.session().run, "sleep 1; echo done")
        forks = fresh.fork()
        assert forks[0].execute("echo fork").output == "fork\n"
        assert running.result().output == "done\n"
        forks[0].stop()


def test_fork_failure_leaves_nothing(fresh):
    backend = get_backend("bubblewrap")
    before = backend.supervisor().call("ping", 5)[0]
    with pytest.raises(RockError):
        fresh.fork(0)
    assert backend.supervisor().call("ping", 5)[0] == before


def test_snapshot_and_forks_are_freed(fresh):
    supervisor = get_backend("bubblewrap").supervisor()
    before = supervisor.call("ping", 5)[0]
    for box in fresh.fork(3):
        box.stop()
    assert supervisor.call("ping", 5)[0] == before


def test_after_stop(fresh):
    fresh.stop()
    fresh.stop()
    assert not fresh.is_alive
    for call in (fresh.session().run, fresh.execute, fresh.read_file):
        with pytest.raises(SandboxDead, match="stopped"):
            call("x")
    with pytest.raises(SandboxDead):
        fresh.fork()

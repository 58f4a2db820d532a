"""Limits hold: memory, processes, CPU, disk, output, lifetime. And one that cannot hold refuses to start."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import rock_env
from rock_env import LimitNotEnforceable, Limits, Sandbox, SandboxDead, SandboxSpec, doctor

MIB = 1 << 20
_REPOSITORY = Path(rock_env.__file__).parents[1]


def _start(**limits):
    return Sandbox.start(SandboxSpec(limits=Limits(**limits)))


def test_memory_bomb_is_killed_and_the_sandbox_lives():
    with _start(memory_bytes=48 * MIB) as sandbox:
        bomb = "python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'"
        for run in (sandbox.session().run, sandbox.execute):
            result = run(bomb)
            assert (result.exit_code, result.signal, result.oom_killed, result.timed_out) == (137, 9, True, False)
        assert sandbox.session().run("echo ok").output == "ok\n"
        assert not sandbox.session().run("echo ok").oom_killed
        assert sandbox.stats().memory_peak_bytes <= 48 * MIB


def test_memory_counts_all_processes_together():
    with _start(memory_bytes=64 * MIB) as sandbox:
        one = "python3 -c 'import time; x = bytearray(40 << 20); time.sleep(100)'"
        assert sandbox.execute(f"{one} & {one} & wait -n; kill %1 %2; wait", timeout=60).oom_killed


def test_shell_that_eats_the_memory_itself():
    with _start(memory_bytes=32 * MIB) as sandbox:
        result = sandbox.session().run("x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo survived")
        assert result.oom_killed
        assert sandbox.session().run("echo ok").output == "ok\n"


def test_at_the_memory_limit_the_sandboxs_own_processes_go_last():
    """A killed shell may linger; the kernel's next choice must not be what keeps the sandbox alive."""
    with _start() as sandbox:
        scores = "cat /proc/self/oom_score_adj /proc/1/oom_score_adj"
        for output in (sandbox.session().run(scores).output, sandbox.execute(scores).output):
            agents, first_process = (int(line) for line in output.split())
            assert agents == 1000 > first_process


def test_fork_bomb_is_bounded_and_ends_with_its_command():
    with _start(pids=32) as sandbox:
        session = sandbox.session()
        start = time.monotonic()
        result = session.run("bomb() { bomb | bomb & bomb; }; bomb 2>/dev/null", timeout=1)
        assert time.monotonic() - start < 30
        assert result.timed_out or result.exit_code != 0
        deadline = time.monotonic() + 60
        while sandbox.stats().pids > 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sandbox.stats().pids <= 32
        assert sandbox.session("other").run("echo ok").output == "ok\n"


def test_pids_limit_is_what_the_spec_says():
    with _start(pids=20) as sandbox:
        script = "for i in $(seq 40); do sleep 50 & done; ls /proc | grep -c '^[0-9]'"
        result = sandbox.execute(["sh", "-c", script], timeout=40)  # (bash would try again for 15 seconds)
        assert "fork" in result.output or "Resource temporarily unavailable" in result.output
        assert sandbox.stats().pids <= 20


def test_disk_fill_stops_at_the_limit():
    with _start(disk_bytes=4 * MIB) as sandbox:
        for place in ("/app/f", "/tmp/f", "/home/agent/f"):
            result = sandbox.execute(f"head -c 20000000 /dev/zero > {place}; stat -c %s {place}")
            assert "No space left" in result.output
            assert int(result.output.split()[-1]) <= 4 * MIB
            assert sandbox.stats().disk_bytes <= 4 * MIB
            sandbox.execute(f"rm {place}")
        assert sandbox.execute("echo ok > /app/g && cat /app/g").output == "ok\n"


def test_disk_limit_has_no_way_around():
    """Nothing else that is writable is larger than the disk limit."""
    with _start(disk_bytes=1 * MIB) as sandbox:
        assert (
            sandbox.execute("touch /dev/x /usr/x /proc/x /sys/x 2>/dev/null; ls /dev/x /sys/x 2>/dev/null").output == ""
        )
        result = sandbox.execute("head -c 100000000 /dev/zero > /dev/shm/f; stat -c %s /dev/shm/f")
        assert int(result.output.split()[-1]) <= 16 * MIB
        many = "for i in $(seq 20000); do : > /app/$i || break; done 2>/dev/null; ls /app | wc -l"
        assert int(sandbox.execute(many, timeout=60).output) < 5000


def test_cpu_limit():
    if not doctor()["cpus"]["ok"]:
        pytest.skip("no cpu controller")
    with _start(cpus=0.2) as sandbox:
        before, start = sandbox.stats().cpu_seconds, time.monotonic()
        sandbox.execute("for i in 1 2; do while :; do :; done & done; sleep 1.5; kill %1 %2", timeout=60)
        used = sandbox.stats().cpu_seconds - before
        assert used < 0.2 * (time.monotonic() - start) + 0.35


def test_lifetime():
    with _start(lifetime_seconds=3.0) as sandbox:
        assert sandbox.is_alive
        start = time.monotonic()
        with pytest.raises(SandboxDead, match="lifetime_seconds"):
            sandbox.execute("sleep 60")
        assert time.monotonic() - start < 30
        assert not sandbox.is_alive


def test_default_command_timeout_comes_from_the_spec():
    with _start(command_seconds=0.3) as sandbox:
        assert sandbox.execute("sleep 60").timed_out
        assert sandbox.session().run("sleep 60").timed_out
        assert not sandbox.session().run("sleep 0.5", timeout=60).timed_out


def test_output_limit_comes_from_the_spec():
    with _start(output_bytes=100) as sandbox:
        result = sandbox.execute("seq 1000")
        assert result.truncated
        assert len(result.output) < 200
        assert result.output.startswith("1\n2\n")
        assert result.output.endswith("999\n1000\n")
        assert not sandbox.execute("seq 20").truncated


def test_stats_follow_use():
    with _start() as sandbox:
        before = sandbox.stats()
        sandbox.execute("head -c 3000000 /dev/zero > f; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
        after = sandbox.stats()
        assert after.disk_bytes - before.disk_bytes >= 2_900_000
        assert after.cpu_seconds > before.cpu_seconds
        assert after.memory_peak_bytes >= 3_000_000
        sandbox.session().run("sleep 60 &")
        assert sandbox.stats().pids > after.pids


_UNPRIVILEGED = """
import sys
sys.path.insert(0, sys.argv[1])
from rock_env import *
free = Limits(memory_bytes=None, pids=None, cpus=None, disk_bytes=1 << 20)
try:
    Sandbox.start()
except LimitNotEnforceable as error:
    print("refused", error)
with Sandbox.start(SandboxSpec(files={"a": "a"}, limits=free)) as box:
    print(box.session().run("cd /tmp; id -un; cat /app/a; touch x; grep CapEff /proc/self/status").output)
    print(box.session().run("exit 3").exit_code, box.session().run("pwd").output)
    print(box.execute("sleep 9", timeout=0.3).timed_out, box.execute("kill -9 $$").signal)
    print("disk" if "No space" in box.execute("head -c 9000000 /dev/zero > /app/f").output else "no disk limit")
    box.execute("rm /app/f")
    box.write_file("b", "b")
    fork, = box.fork()
    fork.write_file("b", "c")
    seen = fork.session().run("pwd; rm /app/a; ls /app").output
    print(box.read_file("b"), fork.read_file("b"), seen, box.stats().cpu_seconds)
import socket, threading
server = socket.create_server(("127.0.0.2", 0))
threading.Thread(target=lambda: server.accept()[0].sendall(b"reached"), daemon=True).start()
target = ("127.0.0.2", server.getsockname()[1])
call = f"exec 3<>/dev/tcp/127.0.0.1/3128; printf 'CONNECT {target[0]}:{target[1]} HTTP/1.1\\r\\n\\r\\n' >&3; cat <&3"
with Sandbox.start(SandboxSpec(limits=free, network=NetworkPolicy((NetworkRule(*target, "tcp"),)))) as box:
    print(box.execute(call).output.split()[-1])
log = get_backend("bubblewrap").audit_log
get_backend("bubblewrap").close()
seen = {record["event"] for record in read_audit_log(log)}
print("audit", verify_audit_log(log).ok, sorted(seen & {"network_call", "egress", "sandbox_ended"}))
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_without_privileges(tmp_path):
    """An ordinary user without control groups: what cannot be enforced is refused by name, the rest works."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("needs an interpreter that another user can execute")
    bwrap = rock_env.bubblewrap.find_bwrap()
    command = ["/usr/bin/python3", "-c", _UNPRIVILEGED, str(_REPOSITORY)]
    audit = tempfile.mkdtemp(dir="/tmp")
    os.chown(audit, 61234, 61234)
    env = {"PATH": os.defpath, "ROCK_BWRAP": bwrap, "PYTHONDONTWRITEBYTECODE": "1", "ROCK_AUDIT_DIR": audit}
    result = subprocess.run(
        command, env=env, user=61234, group=61234, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=60
    )
    shutil.rmtree(audit)
    if "Permission denied" in result.stderr and "rock_env" in result.stderr:
        pytest.skip("the repository is not readable by others")
    assert result.returncode == 0, result.stderr
    assert "refused limits.memory_bytes" in result.stdout
    assert "Limits(memory_bytes=None)" in result.stdout
    assert "agent\na" in result.stdout
    assert "CapEff:\t0000000000000000" in result.stdout
    assert "3 /tmp" in result.stdout
    assert "True 9" in result.stdout
    assert "disk\n" in result.stdout
    assert "b'b' b'c' /tmp\nb\n None" in result.stdout
    assert "reached\n" in result.stdout
    assert "audit True ['egress', 'network_call', 'sandbox_ended']" in result.stdout
    assert result.stdout.endswith("done\n")
    leftovers = Path("/tmp/rock-61234")
    assert not leftovers.exists() or list(leftovers.iterdir()) == []
    assert sys.executable


def test_unenforceable_limit_is_a_spec_error():
    assert issubclass(LimitNotEnforceable, rock_env.SpecError)

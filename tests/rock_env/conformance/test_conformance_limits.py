"""Limits hold on every backend, or it says that it cannot enforce them and refuses."""

import time
from pathlib import Path

import pytest

from rock_env import CAPABILITIES, LimitNotEnforceable, NetworkPolicy, NetworkRule, SpecError
from rock_env.audit import read_audit_log, verify_audit_log

MIB = 1 << 20
_NETWORK = NetworkPolicy((NetworkRule("127.0.0.1", 9, "tcp"),))


def test_capabilities_are_declared(backend):
    assert backend.capabilities <= CAPABILITIES
    assert backend.capabilities >= {"network_closed", "audit", "seccomp", "session", "snapshot", "fork", "stats"}
    assert backend.doctor()["backend"]["ok"]


def test_memory(start):
    bomb = "python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'"
    with start(limits={"memory_bytes": 64 * MIB}) as sandbox:
        for run in (sandbox.session().run, sandbox.execute):
            result = run(bomb, timeout=30)
            assert (result.exit_code, result.signal, result.oom_killed, result.timed_out) == (137, 9, True, False)
        assert sandbox.session().run("echo ok").output == "ok\n"
        assert not sandbox.session().run("echo ok").oom_killed
        assert sandbox.stats().memory_peak_bytes <= 64 * MIB


_SPAWN = """
import subprocess
try:
    for _ in range(40): subprocess.Popen(["sleep", "60"])
except BlockingIOError: print("no more")
"""


def test_pids(start):
    with start(limits={"pids": 24}) as sandbox:
        assert sandbox.execute(["python3", "-c", _SPAWN], timeout=50).output == "no more\n"
        assert 16 < sandbox.stats().pids <= 24
        sandbox.kill_all()
        assert sandbox.session().run("echo ok").output == "ok\n"
        bomb = sandbox.session().run("bomb() { bomb | bomb & bomb; }; bomb 2>/dev/null", timeout=0.5)
        assert bomb.timed_out or bomb.exit_code != 0
        sandbox.kill_all()
        assert sandbox.session().run("echo ok").output == "ok\n"


def test_disk(start):
    with start(limits={"disk_bytes": 4 * MIB}) as sandbox:
        for place in ("/app/f", "/tmp/f", "/home/agent/f"):
            result = sandbox.execute(f"head -c 20000000 /dev/zero > {place}; stat -c %s {place}")
            assert "No space left" in result.output
            assert 0 < int(result.output.split()[-1]) <= 4 * MIB
            assert 0 < sandbox.stats().disk_bytes <= 4 * MIB
            sandbox.execute(f"rm {place}")
        assert sandbox.execute("echo ok > /app/g && cat /app/g").output == "ok\n"
        many = "for i in $(seq 20000); do : > /app/$i || break; done 2>/dev/null; ls /app | wc -l"
        assert int(sandbox.execute(many, timeout=90).output) < 5000
        result = sandbox.execute("head -c 100000000 /dev/zero > /dev/shm/f; stat -c %s /dev/shm/f")
        assert int(result.output.split()[-1]) <= 16 * MIB


def test_cpus_and_stats(start):
    with start(limits={"cpus": 0.2}) as sandbox:
        before, start = sandbox.stats(), time.monotonic()
        sandbox.execute("for i in 1 2; do while :; do :; done & done; sleep 1.5; kill %1 %2", timeout=60)
        after = sandbox.stats()
        assert 0 < after.cpu_seconds - before.cpu_seconds < 0.2 * (time.monotonic() - start) + 0.5
        sandbox.execute("head -c 3000000 /dev/zero > f")
        sandbox.kill_all()
        idle = sandbox.stats()
        sandbox.session().run("sleep 60 &")
        last = sandbox.stats()
        assert last.disk_bytes - before.disk_bytes >= 2_900_000
        assert last.memory_peak_bytes >= 3_000_000
        assert last.pids > idle.pids


def test_output_and_default_timeout_come_from_the_spec(start):
    with start(limits={"output_bytes": 100, "command_seconds": 0.4}) as sandbox:
        result = sandbox.execute("seq 1000")
        assert result.truncated
        assert len(result.output) < 200
        assert result.output.startswith("1\n2\n")
        assert result.output.endswith("999\n1000\n")
        assert sandbox.execute("sleep 60").timed_out
        assert sandbox.session().run("sleep 60").timed_out


def test_a_network_policy_is_enforced_or_refused(backend, start, box):
    if "network_allowlist" in backend.capabilities:
        box.set_network_policy(_NETWORK)
        assert box.execute("exec 3<>/dev/tcp/127.0.0.1/3128").exit_code == 0
        box.set_network_policy(NetworkPolicy())
        return
    with pytest.raises(LimitNotEnforceable, match="allowlist"):
        start(network=_NETWORK)
    with pytest.raises(LimitNotEnforceable, match="allowlist"):
        box.set_network_policy(_NETWORK)
    box.set_network_policy(NetworkPolicy())  # closed it is


def test_what_cannot_be_is_refused_before_anything_starts(start, box):
    with pytest.raises(SpecError):
        start(readonly_binds={"/no/such/path": "/bound"})
    with pytest.raises(SpecError):
        start(image="/no/such/image")
    with box.snapshot() as snapshot, pytest.raises(SpecError, match="image"):
        type(box).start(type(box.spec)(image="/", backend=box.spec.backend), snapshot=snapshot)
    assert issubclass(LimitNotEnforceable, SpecError)


def test_readonly_binds(backend, start, tmp_path):
    assert "readonly_binds" in backend.capabilities
    (tmp_path / "file").write_text("bound")
    tmp_path.chmod(0o755)
    with start(readonly_binds={str(tmp_path): "/opt/bound", "/dev": "/opt/devices"}) as sandbox:
        assert sandbox.execute("cat /opt/bound/file").output == "bound"
        assert "Read-only" in sandbox.execute("echo no > /opt/bound/file").output
        # What is mounted below a bound directory: here a file system that everybody may write to.
        assert sandbox.execute("echo no > /opt/devices/shm/planted-by-a-test").exit_code != 0
    assert not Path("/dev/shm/planted-by-a-test").exists()
    assert (tmp_path / "file").read_text() == "bound"


def test_what_happened_is_on_record(backend, start):
    """Life, limits, calls that name an address and calls that are denied; the chain is whole."""
    with start(limits={"pids": 32, "output_bytes": 1000}) as sandbox:
        sandbox.execute("sleep 60", timeout=0.2)
        sandbox.execute("head -c 200000 /dev/zero")
        sandbox.execute("exec 3<>/dev/tcp/127.0.0.5/9 || true")
        code = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))"
        assert sandbox.execute(["python3", "-c", code]).output == "-1\n"
        sandbox.snapshot().delete()
    name = sandbox.id.partition(":")[2]
    deadline = time.monotonic() + 60
    records = []
    while not any(r["event"] == "sandbox_ended" for r in records) and time.monotonic() < deadline:
        records = [r for r in read_audit_log(backend.audit_log) if r.get("sandbox") == name]
    assert records[0]["event"] == "sandbox_starting"
    assert records[0]["limits"]["pids"] == 32
    assert (records[-1]["event"], records[-1]["reason"]) == ("sandbox_ended", "it was stopped")
    assert records[-1]["cpu_seconds"] > 0
    assert {r["limit"] for r in records if r["event"] == "limit_hit"} == {"command_seconds", "output_bytes"}
    assert [(r["host"], r["program"]) for r in records if r["event"] == "network_call"] == [("127.0.0.5", "bash")]
    assert [r["syscall"] for r in records if r["event"] == "syscall_denied"] == ["unshare"]
    assert verify_audit_log(backend.audit_log).ok

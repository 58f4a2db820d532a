"""The audit log: what is in it, what its verification notices, and that no kill loses a record."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import rock_env
from rock_env import BackendUnavailable, Limits, NetworkPolicy, NetworkRule, Sandbox, SandboxSpec, get_backend
from rock_env.audit import read_audit_log, verify_audit_log
from rock_env.bubblewrap import BubblewrapBackend
from rock_env.supervisor.journal import GENESIS, AuditLog, Notes, head_text
from rock_env.supervisor.loop import Loop
from rock_env.supervisor.retention import Retention

_REPOSITORY = Path(rock_env.__file__).parents[1]
_ALL = Retention(1000, 1 << 30)


def _records(sandbox, event=None):
    name = sandbox.id.partition(":")[2]
    records = read_audit_log(get_backend("bubblewrap").audit_log)
    return [r for r in records if r.get("sandbox") == name and event in (None, r["event"])]


@pytest.fixture
def log(tmp_path):
    """A log of seven records, closed."""
    writer = AuditLog(Loop(), str(tmp_path), 1, _ALL)
    for number in range(6):
        writer.record("test", number=number, text="é\n")
    writer.close()
    return Path(writer.path)


def test_an_untouched_log_is_intact(log):
    verdict = verify_audit_log(log)
    assert (verdict.ok, verdict.problem, verdict.records, verdict.closed) == (True, "", 7, True)
    assert [r["event"] for r in read_audit_log(log)] == ["test"] * 6 + ["log_closed"]
    assert next(read_audit_log(log))["previous"] == GENESIS
    assert Path(f"{log}.head").read_bytes() == head_text(7, verdict.head)
    assert log.stat().st_mode & 0o777 == 0o600
    assert verify_audit_log(log, verdict.head).ok
    assert not verify_audit_log(log, "ab" * 32).ok


def _swap(lines, i, j):
    lines[i], lines[j] = lines[j], lines[i]


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (lambda lines: lines.__setitem__(2, lines[2].replace(b'"number":2', b'"number":9')), 4),
        (lambda lines: lines.__setitem__(0, lines[0].replace(b'"number":0', b'"number":9')), 2),
        (lambda lines: lines.__delitem__(3), 4),
        (lambda lines: lines.__delitem__(0), 1),
        (lambda lines: _swap(lines, 1, 4), 2),
        (lambda lines: lines.insert(2, lines[2]), 4),
        (lambda lines: lines.insert(0, lines[0]), 2),
        (lambda lines: lines.__setitem__(3, b"nonsense"), 4),
        (lambda lines: lines.__setitem__(3, b"[]"), 4),
    ],
)
def test_edits_deletions_and_reordering_are_found_at_their_line(log, tamper, line):
    lines = log.read_bytes().splitlines()
    tamper(lines)
    log.write_bytes(b"\n".join(lines) + b"\n")
    verdict = verify_audit_log(log)
    assert not verdict.ok
    assert verdict.problem.startswith(f"line {line}:")


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_cut_at_the_end_disagrees_with_the_head(log, cut):
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-cut]))
    assert not verify_audit_log(log).ok


def test_the_last_record_is_covered_too(log):
    log.write_bytes(log.read_bytes().replace(b'"event":"log_closed"', b'"event":"log_opened"'))
    assert "the end" in verify_audit_log(log).problem
    log.with_name(log.name + ".head").unlink()
    assert "head file" in verify_audit_log(log).problem


def test_a_writer_killed_between_its_two_writes_is_no_tampering(log):
    lines = log.read_bytes().splitlines(keepends=True)
    fifth = json.loads(lines[5])["previous"]
    Path(f"{log}.head").write_bytes(head_text(5, fifth))
    log.write_bytes(b"".join(lines[:6]))
    verdict = verify_audit_log(log)
    assert (verdict.ok, verdict.records, verdict.closed) == (True, 6, False)
    log.write_bytes(b"".join(lines))  # two records beyond the head: not what one kill can leave
    assert not verify_audit_log(log).ok


def test_a_log_may_be_verified_while_it_is_written(tmp_path, monkeypatch):
    """Records come between the verification's reads; what was there before must still be there."""
    writer = AuditLog(Loop(), str(tmp_path), 1, _ALL)
    for number in range(3):
        writer.record("test", number=number)
    log, read = Path(writer.path), Path.read_bytes

    def read_and_write(path):
        content = read(path)
        if path == log:
            writer.record("test", number=3)
            writer.record("test", number=4)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_and_write)
        verdict = verify_audit_log(log)
        assert (verdict.ok, verdict.problem, verdict.records) == (True, "", 3)
        patch.setattr(
            Path, "read_bytes", lambda path: b"".join(read_and_write(path).splitlines(True)[: 4 if path == log else 1])
        )
        verdict = verify_audit_log(log)  # its fifth record has been cut off
        assert not verdict.ok
        assert verdict.problem.startswith("the end: 4 records")
    assert verify_audit_log(log).ok
    writer.close()


def test_the_command(log):
    def run(*arguments):
        command = [sys.executable, "-m", "rock_env.audit", "verify", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=_REPOSITORY, timeout=60)

    good = run(str(log))
    assert (good.returncode, good.stderr) == (0, "")
    assert "intact, 7 records, closed" in good.stdout
    log.write_bytes(log.read_bytes().replace(b'"number":3', b'"number":8'))
    bad = run(str(log))
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "line 5" in bad.stderr
    assert run(str(log) + "-absent").returncode == 2


def test_repeats_are_counted_and_the_log_stays_small(tmp_path):
    loop = Loop()
    writer = AuditLog(loop, str(tmp_path), 1, _ALL)
    notes = Notes(writer, loop, "7")
    for _ in range(10_000):
        notes.note("tried", port=1, _once={"program": "x"})
    for port in range(2000):
        notes.note("tried", port=port)
    notes.flush()
    notes.flush()
    writer.close()
    records = list(read_audit_log(writer.path))
    assert len(records) < 510
    assert records[0]["program"] == "x"
    told = sum(r.get("repeats", 1) for r in records if r["event"] in ("tried", "other_events"))
    assert told == 12_000


def test_a_full_disk_loses_no_more_than_it_says(tmp_path, monkeypatch):
    """Faults cannot be had from a real disk record by record, so the one system call is made to fail."""
    writer = AuditLog(Loop(), str(tmp_path), 1, _ALL)
    writer.record("one")
    faults = []
    writer.on_fault = lambda: faults.append(writer.fault)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        writer.record("cut short")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
        writer.record("lost")
    assert len(faults) == 2
    writer.record("two")
    assert writer.fault == ""
    writer.close()
    assert verify_audit_log(writer.path).ok
    assert [r.get("records_lost_before") for r in read_audit_log(writer.path)] == [None, 2, None]


def test_life_and_limits_are_on_record():
    spec = SandboxSpec(limits=Limits(memory_bytes=32 << 20, pids=16, disk_bytes=1 << 20))
    with Sandbox.start(spec) as sandbox:
        sandbox.snapshot().delete()
        sandbox.execute("sleep 60", timeout=0.2)
        sandbox.session().run("sleep 60", timeout=0.2)
        sandbox.execute("head -c 5000000 /dev/zero > /app/f; head -c 200000 /dev/zero")
        sandbox.execute(["sh", "-c", "for i in $(seq 30); do sleep 50 & done"], timeout=40)  # (bash would try for long)
        sandbox.kill_all()
        sandbox.execute("x=$(head -c 90000000 /dev/zero | tr '\\0' x)")
    with Sandbox.start(SandboxSpec(limits=Limits(cpus=0.01))) as slow:  # less than a crowded machine gives it
        slow.execute("while :; do :; done", timeout=3)
    assert {r["limit"] for r in _records(slow, "limit_hit")} == {"cpus", "command_seconds"}
    events = [r["event"] for r in _records(sandbox)]
    assert events[0] == "sandbox_starting"
    assert "snapshot_taken" in events
    end = _records(sandbox)[-1]
    assert (end["event"], end["reason"]) == ("sandbox_ended", "it was stopped")
    assert end["cpu_seconds"] > 0
    limits = {r["limit"] for r in _records(sandbox, "limit_hit")}
    assert limits - {"cpus"} == {"command_seconds", "output_bytes", "disk_bytes", "pids", "memory_bytes"}
    assert _records(sandbox, "sandbox_starting")[0]["limits"]["pids"] == 16
    assert verify_audit_log(get_backend("bubblewrap").audit_log).ok


def test_a_quiet_sandbox_hits_no_limit(fresh):
    fresh.execute("echo quiet")
    fresh.session().run("ls /; cat /etc/hostname")
    assert [r["event"] for r in _records(fresh)] == ["sandbox_starting"]


def test_calls_of_every_process_are_recorded(fresh):
    """Of shells, of their background children, and when sessions and commands run beside each other."""
    call = "python3 -c \"import socket; socket.socket().connect_ex(('127.0.0.{n}', 9))\""
    fresh.session("a").run(call.format(n=2) + " & wait")
    fresh.session("b").run("(setsid " + call.format(n=3) + "; touch done &); until [ -e done ]; do sleep 0.05; done")
    fresh.execute(call.format(n=4))
    fresh.execute("exec 3<>/dev/tcp/127.0.0.5/9 || true")
    hosts = {r["host"] for r in _records(fresh, "network_call")}
    assert hosts == {"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}
    assert {r["program"] for r in _records(fresh, "network_call")} == {"python3", "bash"}


def test_a_flood_of_calls_is_slowed_and_harms_nobody(fresh):
    code = "import socket\nfor i in range(100_000): socket.socket().connect_ex(('127.0.0.1', 9))"
    with Sandbox.start() as other:
        other.session().run("true")
        fresh.session("flood").run(f'python3 -c "{code}" & sleep 2')
        start = time.monotonic()
        for _ in range(20):
            assert other.session().run("true").exit_code == 0
        assert time.monotonic() - start < 30
    counts = sum(r.get("repeats", 1) for r in _records(fresh, "network_call"))
    assert counts == 1  # the repeats are told later
    fresh.stop()
    counts = sum(r.get("repeats", 1) for r in _records(fresh, "network_call"))
    assert 100 < counts < 20_000


def test_kill_of_the_trainer_loses_no_record(tmp_path):
    """Neither the client's kill -9 nor the supervisor's: all that happened before is there, and the chain is whole."""
    body = f"""
import sys; sys.path.insert(0, {str(_REPOSITORY)!r})
from rock_env import *
box = Sandbox.start()
for port in range(1, 200):
    box.execute(f"exec 3<>/dev/tcp/127.0.0.1/{{port}} || true")
    print(port, get_backend("bubblewrap").audit_log, get_backend("bubblewrap").supervisor().keeper_pid, flush=True)
import time; time.sleep(60)
"""
    for victim in ("client", "supervisor"):
        env = {**os.environ, "ROCK_AUDIT_DIR": str(tmp_path / victim)}
        process = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(10):
            port, path, keeper = process.stdout.readline().split()
        if victim == "client":
            process.kill()
        else:
            supervisor = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
            os.kill(supervisor, signal.SIGKILL)
            time.sleep(0.2)
            process.kill()
        process.wait(60)
        deadline = time.monotonic() + 60
        while victim == "client" and not verify_audit_log(path).closed and time.monotonic() < deadline:
            time.sleep(0.02)
        verdict = verify_audit_log(path)
        assert (verdict.ok, verdict.closed) == (True, victim == "client"), verdict
        seen = {r["port"] for r in read_audit_log(path) if r["event"] == "network_call"}
        assert seen >= set(range(1, int(port) + 1))
        process.stdout.close()


def test_no_log_no_sandbox(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROCK_AUDIT_DIR", str(tmp_path / "file" / "below"))
    backend = BubblewrapBackend()
    with pytest.raises(BackendUnavailable, match="below"):
        backend.create(SandboxSpec())
    backend.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_log_that_is_full_stops_everything_that_it_should_record(monkeypatch):
    """No new sandbox starts and the way out of the living ones is closed; with room again, new ones start."""
    place = tempfile.mkdtemp(dir="/tmp")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "tiny", place], check=True)
    monkeypatch.setenv("ROCK_AUDIT_DIR", place)
    backend = BubblewrapBackend()
    policy = NetworkPolicy((NetworkRule("127.0.0.2", 9, "tcp"),))
    listening = "exec 3<>/dev/tcp/127.0.0.1/3128"
    try:
        id = backend.create(SandboxSpec(network=policy))
        assert backend.execute(id, ["bash", "-c", listening], 10, None, {}, 1000).exit_code == 0
        with pytest.raises(BackendUnavailable, match="audit log"):
            for _ in range(100):
                backend.destroy(backend.create(SandboxSpec()))
        assert "refused" in backend.execute(id, ["bash", "-c", listening], 10, None, {}, 1000).output
        with pytest.raises(BackendUnavailable, match="audit log"):
            backend.set_network_policy(id, policy)
        subprocess.run(["mount", "-o", "remount,size=1m", place], check=True)
        backend.destroy(backend.create(SandboxSpec()))  # its first record ends the fault
        backend.set_network_policy(id, policy)
        assert backend.execute(id, ["bash", "-c", listening], 10, None, {}, 1000).exit_code == 0
        assert verify_audit_log(backend.audit_log).ok
        assert any("records_lost_before" in record for record in read_audit_log(backend.audit_log))
    finally:
        backend.close()
        subprocess.run(["umount", place], check=True)
        os.rmdir(place)

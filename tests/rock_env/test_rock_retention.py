"""Audit logs do not grow without bound: the oldest go, whole, on record, and never one that is being written."""

import os
from pathlib import Path

import pytest

from rock_env import SandboxSpec, SpecError
from rock_env.audit import read_audit_log, verify_audit_log
from rock_env.bubblewrap import BubblewrapBackend
from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.loop import Loop
from rock_env.supervisor.retention import Retention

_PLENTY = Retention(1000, 1 << 30)


def _write(folder, age, records=3, close=True):
    """A log whose last change lies `age` seconds back. Returns (path, writer)."""
    log = AuditLog(Loop(), str(folder), age, _PLENTY)
    for number in range(records):
        log.record("test", number=number, text="x" * 100)
    if close:
        log.close()
    now = os.stat(log.path).st_mtime
    os.utime(log.path, (now - age, now - age))
    return Path(log.path), log


def _names(folder):
    return {path.name for path in Path(folder).iterdir()}


def test_the_oldest_go_beyond_the_number(tmp_path):
    paths = [_write(tmp_path, age)[0] for age in (10, 50, 40, 20, 30)]
    heads = {path.name: Path(f"{path}.head").read_text().strip() for path in paths}
    new = AuditLog(Loop(), str(tmp_path), 0, Retention(3, 1 << 30))
    new.open()
    new.close()
    kept = [paths[0], paths[3], Path(new.path)]
    assert _names(tmp_path) == {name for path in kept for name in (path.name, f"{path.name}.head")}
    assert all(verify_audit_log(path).ok for path in kept)
    removed = [r for r in read_audit_log(new.path) if r["event"] == "log_removed"]
    assert [r["log"] for r in removed] == [paths[i].name for i in (1, 2, 4)]
    assert [r["head"] for r in removed] == [heads[r["log"]] for r in removed]


def test_the_oldest_go_beyond_the_size(tmp_path):
    small, large = _write(tmp_path, 30)[0], _write(tmp_path, 20, records=200)[0]
    last = _write(tmp_path, 10)[0]
    limit = Retention(1000, small.stat().st_size + last.stat().st_size + 10)
    new = AuditLog(Loop(), str(tmp_path), 0, limit)
    assert not small.exists()  # older than what really takes the room
    assert not large.exists()
    assert last.exists()
    new.close()


def test_one_that_is_being_written_stays(tmp_path):
    old, writer = _write(tmp_path, 100, close=False)
    closed = _write(tmp_path, 50)[0]
    new = AuditLog(Loop(), str(tmp_path), 0, Retention(1, 1))
    assert old.exists()
    assert not closed.exists()
    writer.record("still", here=True)
    writer.close()
    new.close()
    assert verify_audit_log(old).ok
    AuditLog(Loop(), str(tmp_path), 0, Retention(1, 1)).close()
    assert not old.exists()
    assert not Path(f"{old}.head").exists()


def test_a_supervisor_keeps_to_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("ROCK_AUDIT_DIR", str(tmp_path))
    monkeypatch.setenv("ROCK_AUDIT_MAX_FILES", "2")
    logs = []
    for _ in range(4):
        backend = BubblewrapBackend()
        backend.destroy(backend.create(SandboxSpec()))
        logs.append(backend.audit_log)
        backend.close()
    left = {path.name for path in tmp_path.glob("*.jsonl")}
    assert left == {os.path.basename(log) for log in logs[-2:]}
    assert all(verify_audit_log(log).closed for log in logs[-2:])


@pytest.mark.parametrize(("name", "value"), [("ROCK_AUDIT_MAX_FILES", "0"), ("ROCK_AUDIT_MAX_BYTES", "1G")])
def test_a_setting_that_makes_no_sense_is_refused(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=name):
        BubblewrapBackend().create(SandboxSpec())

"""Attacks: each is a program that really runs in a real sandbox, fails at everything, and is on record.

Every connection attempt goes to 127.0.0.0/8: to listeners of this test on the host's loopback.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from catalogue import ATTACKS, CALL_GROUPS, calls_of, name_of, split_document, table

from rock_env import (
    FileError,
    LimitNotEnforceable,
    Limits,
    NetworkPolicy,
    NetworkRule,
    Sandbox,
    SandboxSpec,
    get_backend,
    verify_audit_log,
)
from rock_env.audit import read_audit_log

_PROGRAMS = Path(__file__).parent / "attacks"
_FILES = {path.name: path.read_text() for path in _PROGRAMS.glob("*.py")}
_SECRET = "carried-out.exfil.test"
_PROXY_PORT = 3128
_MINER_CPUS = 0.1  # little, so that a busy machine gives the miner more than that


class Listener(threading.Thread):
    """Where the attacker's server would be: a loopback socket that answers, and counts who came."""

    def __init__(self, kind, greeting):
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET, kind)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.visitors = 0
        self._stream, self._greeting = kind == socket.SOCK_STREAM, greeting
        if self._stream:
            self.socket.listen()
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                if self._stream:
                    connection, _ = self.socket.accept()
                    with connection, contextlib.suppress(OSError):
                        self.visitors += 1
                        connection.settimeout(2)
                        connection.sendall(self._greeting)
                        connection.recv(1000)
                else:
                    _, sender = self.socket.recvfrom(1000)
                    self.visitors += 1
                    self.socket.sendto(self._greeting, sender)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What lies outside: a file, a process, listeners. {"parameters of a program": ...}"""
    folder = tmp_path_factory.mktemp("host")
    (folder / "canary").write_text("secret of the host")
    sentinel = subprocess.Popen(["sleep", "300"], start_new_session=True)
    tcp, udp = Listener(socket.SOCK_STREAM, b"SSH-2.0-ours\r\n"), Listener(socket.SOCK_DGRAM, b"answer")
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0rock-escape-{os.getpid()}")
    abstract.listen()
    yield {
        "folder": str(folder), "path": str(folder / "canary"), "pid": sentinel.pid, "sentinel": sentinel,
        "tcp": tcp, "udp": udp, "name": f"rock-escape-{os.getpid()}",
    }  # fmt: skip
    sentinel.kill()
    sentinel.wait()
    for one in (tcp.socket, udp.socket, abstract):
        one.close()


@pytest.fixture(scope="module", params=["bubblewrap", "docker"])
def backend(request):
    if request.param == "docker":
        request.getfixturevalue("docker_daemon")
    return get_backend(request.param)


def _start(backend, host=None, cpus=0.5):
    """A sandbox for one attack: closed, or one that may reach one host for TLS only."""
    rules = (NetworkRule("127.0.0.1", host["tcp"].port, "https"),) if host else ()
    limits = Limits(memory_bytes=64 << 20, pids=32, cpus=cpus, disk_bytes=4 << 20, command_seconds=60)
    spec = SandboxSpec(files=_FILES, limits=limits, network=NetworkPolicy(rules), backend=backend.name)
    return Sandbox.start(spec)


def _parameters(attack, host):
    """What a program has to know: where the outside is."""
    if attack.program == "system_calls":
        return {"calls": calls_of(attack.title)}
    return {
        "path": host["path"], "folder": host["folder"], "pid": host["pid"],
        "port": (host["udp"] if attack.program in ("udp", "dns") else host["tcp"]).port, "host": "127.0.0.1",
        "name": host["name"] if attack.program == "abstract_sockets" else _SECRET, "resolver": True,
        "mebibytes": 64 if attack.program == "memory_bomb" else 4, "cpu_seconds": _MINER_CPUS * 1.5 + 0.1,
        "proxy": _PROXY_PORT if "proxy" in attack.title else None,
    }  # fmt: skip


def _launch(sandbox, program, parameters):
    return sandbox.execute(["/usr/bin/python3", f"/app/{program}.py", json.dumps(parameters)])


def _records(sandbox):
    name = sandbox.id.partition(":")[2]
    return [r for r in read_audit_log(get_backend(sandbox.spec.backend).audit_log) if r.get("sandbox") == name]


def _assert_contained(attack, sandbox, result):
    lines = result.output.splitlines()
    assert result.exit_code == 0, result.output
    assert lines
    assert all(line.startswith("contained: ") for line in lines), result.output
    if attack.lines is not None:
        assert len(lines) == attack.lines, result.output
    records = _records(sandbox)
    for expected in attack.records:
        assert any(expected.items() <= record.items() for record in records), (expected, records)


_SPECIAL = ("other_sandboxes", "links")


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.program not in _SPECIAL], ids=name_of)
def test_attack(attack, host, backend):
    visitors = host["tcp"].visitors, host["udp"].visitors
    cpus = _MINER_CPUS if attack.program == "miner" else 0.5
    if attack.needs not in backend.capabilities:
        with pytest.raises(LimitNotEnforceable):
            _start(backend, host)
        return
    with _start(backend, host if "proxy" in attack.title else None, cpus) as sandbox:
        result = _launch(sandbox, attack.program, _parameters(attack, host))
        _assert_contained(attack, sandbox, result)
        assert sandbox.execute("echo alive").output == "alive\n"
    assert (host["tcp"].visitors, host["udp"].visitors) == visitors
    assert Path(host["path"]).read_text() == "secret of the host"
    assert host["sentinel"].poll() is None


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.control], ids=name_of)
def test_the_attack_succeeds_where_nothing_stops_it(attack, host):
    """Outside, each program reaches its aim: a containment is not an attack that never worked."""
    parameters = {**_parameters(attack, host), "resolver": False}
    command = [sys.executable, f"{_PROGRAMS}/{attack.program}.py", json.dumps(parameters)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    Path(host["path"]).write_text("secret of the host")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines
    lines = [line for line in lines if "/proc/1/" not in line]  # which out here may be another container's
    assert all(line.startswith("ESCAPED: ") for line in lines), result.stdout


def test_other_sandboxes(backend):
    """And in the victim itself, the same program finds everything."""
    attack = next(a for a in ATTACKS if a.program == "other_sandboxes")
    server = "import socket, time; s = socket.create_server(('127.0.0.1', 4711)); time.sleep(60)"
    victims = SandboxSpec(files={**_FILES, "canary-of-the-victim": "secret"}, backend=backend.name)
    with Sandbox.start(victims) as victim, _start(backend) as sandbox:
        victim.session().run(f'python3 -c "{server}" & sleep 61.5 & sleep 0.5')
        parameters = {"marker": "canary-of-the-victim", "command": "61.5", "port": 4711}
        _assert_contained(attack, sandbox, _launch(sandbox, attack.program, parameters))
        control = _launch(victim, attack.program, parameters).output.splitlines()
        assert [line.split(":")[0] for line in control] == ["ESCAPED"] * 3


def test_links(host, tmp_path, backend):
    """What a sandbox plants, the host neither reads, nor writes, nor copies through."""
    folder = host["folder"]
    with _start(backend) as sandbox:
        assert _launch(sandbox, "links", {"folder": folder}).output == "planted\n"
        for link in ("absolute", "relative", "hidden", "magic"):
            with pytest.raises(FileError):
                sandbox.read_file(f"bait/{link}/canary")
            with contextlib.suppress(FileError):  # it may well write: inside
                sandbox.write_file(f"bait/{link}/planted", "planted")
        left_out = sandbox.download("bait", tmp_path / "copy")
    assert set(left_out) >= {"absolute", "relative", "hidden", "magic"}
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    assert sorted(os.listdir(folder)) == ["canary"]
    assert Path(host["path"]).read_text() == "secret of the host"


def test_every_attack_is_tested_and_every_program_is_used():
    assert len({name_of(attack) for attack in ATTACKS}) == len(ATTACKS)
    assert {a.program for a in ATTACKS} | {"attack"} == {path.stem for path in _PROGRAMS.glob("*.py")}
    assert {a.title for a in ATTACKS if a.program == "system_calls"} == set(CALL_GROUPS)
    for program in _SPECIAL:
        assert f"test_{program}" in globals()


def test_the_document_shows_this_table():
    assert split_document()[1] == table(), "run: python tests/rock_env/escapes/catalogue.py"


def test_the_record_of_all_this_is_intact(backend):
    assert verify_audit_log(backend.audit_log).ok

"""`rock shell`, `exec --stream`, `logs`, `jobs` as a person has them: real processes, a real pseudo-terminal."""

import contextlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

import rock_env

SECONDS = 90.0
_COMMAND = [sys.executable, "-m", "rock_env.cli"]
_ENV = {k: v for k, v in os.environ.items() if not k.startswith("ROCK_")}
_ENV |= {"PYTHONPATH": str(Path(rock_env.__file__).parents[1]), "TERM": "xterm"}


class Terminal:
    """A program in a pseudo-terminal of ours, as `pexpect` would have it."""

    def __init__(self, arguments, env, rows=33, columns=101):
        self.master, slave = pty.openpty()
        self.slave = slave  # kept open, to look at its modes
        self.before = termios.tcgetattr(slave)
        self.resize(rows, columns)

        def in_child():
            os.setsid()
            ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*_COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=in_child
        )
        self.seen = b""

    def resize(self, rows, columns):
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, wanted):
        """Read until `wanted` comes; what came before it is returned, and forgotten."""
        deadline = time.monotonic() + SECONDS
        while wanted.encode() not in self.seen:
            assert time.monotonic() < deadline, self.seen
            assert self.process.poll() is None or select.select([self.master], [], [], 0)[0], self.seen
            if select.select([self.master], [], [], 0.5)[0]:
                self.seen += os.read(self.master, 65536)
        before, _, self.seen = self.seen.partition(wanted.encode())
        return before

    @property
    def is_raw(self):
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def wait(self):
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:  # what it still writes must not block it
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.returncode

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture(scope="module")
def places(admin, tmp_path_factory):
    """{"local", "remote"}: the environment and arguments of `rock shell` there."""
    user = admin.new_tenant("shell")
    box = user.start()
    folder = tmp_path_factory.mktemp("shell")
    local = {**_ENV, "ROCK_ADMIN_DIR": str(folder / "none"), "ROCK_AUDIT_DIR": str(folder)}
    remote = {**_ENV, "ROCK_URL": admin.url, "ROCK_API_KEY": user.token}
    return {"local": (local, ["shell"]), "remote": (remote, ["shell", box.id]), "box": box}


@pytest.fixture(params=["local", "remote"])
def shell(request, places):
    env, arguments = places[request.param]
    terminal = Terminal(arguments, env)
    yield terminal
    terminal.close()


def test_a_shell_in_a_real_terminal(shell):
    shell.expect("/app $ ")
    assert shell.is_raw
    shell.type("stty size; tput cols 2>/dev/null; echo $TERM\n")
    shell.expect("33 101\r\n")
    shell.expect("xterm\r\n")
    shell.type("sleep 100; echo code=$?\n")
    shell.expect("code=$?\r\n")
    time.sleep(1)
    shell.type("\x03")  # Ctrl-C: to the sleep, not to us
    shell.expect("/app $ ")
    shell.type("stty size | tr ' ' x\n")
    shell.expect("33x101\r\n")
    shell.resize(44, 55)
    while True:  # it takes a moment to get there
        shell.type("stty size | tr ' ' x; echo e''nd\n")
        if b"44x55\r" in shell.expect("\nend\r\n"):
            break
    shell.type("exit 37\n")
    assert shell.wait() == 37
    assert termios.tcgetattr(shell.slave) == shell.before


def test_end_of_input_ends_it(shell):
    shell.expect("/app $ ")
    shell.type("false\n")
    shell.expect("/app $ ")
    shell.type("\x04")
    assert shell.wait() == 1
    assert termios.tcgetattr(shell.slave) == shell.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_the_terminal(shell, number):
    shell.expect("/app $ ")
    assert shell.is_raw
    shell.process.send_signal(number)
    assert shell.wait() == 128 + number
    assert termios.tcgetattr(shell.slave) == shell.before


def test_the_terminal_is_restored_when_the_sandbox_is_stopped(places, admin):
    env, _ = places["remote"]
    user = admin.new_tenant("shell-stopped")
    box = user.start()
    terminal = Terminal(["shell", box.id], {**env, "ROCK_API_KEY": user.token})
    try:
        terminal.expect("/app $ ")
        box.stop()
        assert terminal.wait() == 125
        assert b"rock: sandbox" in terminal.seen
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def _rock(places, *arguments, stdin=b"", code=0):
    done = subprocess.run(
        [*_COMMAND, *arguments], input=stdin, capture_output=True, env=places["remote"][0], timeout=90
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def test_exec_streams_and_passes_input_on(places):
    id = places["box"].id
    done = _rock(places, "exec", "--stdin", id, "--", "sh", "-c", "cat; echo err >&2; exit 6", stdin=b"in\0put", code=6)
    assert (done.stdout, done.stderr) == (b"in\0put", b"err\n")
    assert _rock(places, "shell", id, stdin=b"cd /tmp\npwd\nfalse\n", code=1).stdout == b"/tmp\n"


def test_output_comes_as_it_is_written_and_ctrl_c_interrupts(places):
    command = [*_COMMAND, "exec", "-s", places["box"].id, "--", "bash", "-c"]
    script = "trap 'echo caught; exit 8' INT; echo first; sleep 100 & wait"
    process = subprocess.Popen([*command, script], stdout=subprocess.PIPE, env=places["remote"][0])
    try:
        assert process.stdout.readline() == b"first\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(SECONDS) == 8
        stubborn = subprocess.Popen(
            [*command, "trap '' INT; echo on; while :; do sleep 1; done"],
            stdout=subprocess.PIPE,
            env=places["remote"][0],
        )
        assert stubborn.stdout.readline() == b"on\n"
        stubborn.send_signal(signal.SIGINT)
        time.sleep(1)
        stubborn.send_signal(signal.SIGINT)
        assert stubborn.wait(SECONDS) == 137
    finally:
        for each in (process, stubborn):
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.wait()


def test_detached_jobs_their_logs_and_signals(places):
    id = places["box"].id
    job = (
        _rock(places, "exec", "-d", id, "sh", "-c", "echo a; echo b >&2; sleep 1; echo c; exit 3")
        .stdout.decode()
        .strip()
    )
    done = _rock(places, "logs", "-f", id, job, code=3)
    assert (done.stdout, done.stderr) == (b"a\nc\n", b"b\n")
    assert _rock(places, "logs", id, job).stdout == b"a\nc\n"
    table = _rock(places, "jobs", id).stdout.decode()
    assert any(line.split()[:3] == [job, "exited", "3"] for line in table.splitlines())
    waiting = _rock(places, "exec", "-d", id, "sleep", "100").stdout.decode().strip()
    _rock(places, "kill", id, waiting)
    assert _rock(places, "logs", "-f", id, waiting, code=143).stdout == b""
    assert b"has ended already" in _rock(places, "kill", id, waiting, code=125).stderr
    assert b"no job" in _rock(places, "logs", id, "none", code=125).stderr

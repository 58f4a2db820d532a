"""What every backend does with commands, sessions, signals, timeouts and background jobs."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import wait_until

from rock_env import SandboxDead, SandboxNotFound


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("true", 0, ""),
        ("false", 1, ""),
        ("(exit 42)", 42, ""),
        ("echo out; echo err >&2; echo out", 0, "out\nerr\nout\n"),
        ("not-a-command", 127, "bash: line 1: not-a-command: command not found\n"),
        ("cat", 0, ""),  # standard input is empty, not the command stream
        ("cat <<'X'\nline $1\nX", 0, "line $1\n"),
        ("", 0, ""),
    ],
)
def test_exit_codes_and_output(box, command, code, output):
    result = box.session("results").run(command)
    assert (result.exit_code, result.output, result.timed_out, result.truncated) == (code, output, False, False)


def test_a_session_keeps_directory_variables_and_functions(box):
    session = box.session("keep")
    assert session.run("mkdir -p k && cd k && export A=1 B='x y' && c=3 && f() { echo f:$1; }").exit_code == 0
    assert session.run('pwd; echo "$A|$B|$c"; f 7').output == "/app/k\n1|x y|3\nf:7\n"
    assert box.session("another").run("pwd; echo [$c]").output == "/app\n[]\n"


@pytest.mark.parametrize(
    ("command", "code"), [("exit 3", 3), ("set -e; false; echo no", 1), ("exec sh -c 'exit 5'", 5)]
)
def test_exit_returns_its_code_and_the_session_recovers(box, command, code):
    session = box.session(f"exit {code}")
    session.run("mkdir -p exits; cd exits; export A='1 \"2\"'; f() { echo f; }")
    result = session.run(command)
    assert (result.exit_code, result.signal, result.timed_out) == (code, None, False)
    if not command.startswith("exec"):
        assert session.run('pwd; echo "$A"; f').output == '/app/exits\n1 "2"\nf\n'
    assert session.run("echo alive").output == "alive\n"


def test_the_exit_status_is_not_read_from_the_output(box):
    """Its descriptor is not the command's, and output that looks like a report is output."""
    result = box.session("forged").run(r"printf 'S0\0' >&201; printf 'S0\0'; (exit 9)")
    assert result.exit_code == 9
    assert "Bad file descriptor" in result.output
    assert result.output.endswith("S0\0")


def test_signals(box):
    by_shell = box.session("signals").run("bash -c 'kill -9 $$'")
    assert (by_shell.exit_code, by_shell.signal) == (137, 9)
    direct = box.execute(["bash", "-c", "kill -TERM $$"])
    assert (direct.exit_code, direct.signal) == (143, 15)
    itself = box.session("signals").run("kill -9 $$")
    assert (itself.exit_code, itself.signal, itself.oom_killed) == (137, 9, False)
    assert box.session("signals").run("echo back").output == "back\n"


@pytest.mark.parametrize(
    "command",
    [
        "echo partial; sleep 61.5; echo never",
        "echo partial; while :; do :; done",
        "echo partial; (trap '' INT TERM HUP; sleep 61.5); echo never",
        "echo partial; setsid sleep 61.5",
    ],
)
def test_a_timeout_returns_partial_output_and_keeps_the_session(box, command):
    session = box.session("timeouts")
    session.run("cd /tmp; export A=kept; f() { echo fun; }")
    start = time.monotonic()
    result = session.run(command, timeout=2)
    assert time.monotonic() - start < 40
    assert (result.exit_code, result.timed_out, result.signal) == (124, True, None)
    assert result.output.startswith("partial\n")
    assert "never" not in result.output
    assert session.run("pwd; echo $A; f").output == "/tmp\nkept\nfun\n"
    assert "61.5" not in box.execute("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").output.replace("[0-9]", "")


def test_a_timeout_of_a_single_process_kills_its_group(box):
    result = box.execute("echo partial; sleep 62.5 & sleep 62.5", timeout=2)
    assert (result.exit_code, result.timed_out, result.output) == (124, True, "partial\n")
    assert "62.5" not in box.execute(["bash", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).output


def test_background_jobs_do_not_block_and_are_spared_by_a_later_timeout(box):
    session = box.session("jobs")
    start = time.monotonic()
    result = session.run("sleep 63.5 & echo started; sleep 0.1")
    assert (result.exit_code, result.output) == (0, "started\n")
    assert time.monotonic() - start < 40
    assert session.run("sleep 60", timeout=0.3).timed_out
    assert "63.5" in box.execute("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").output


def test_background_jobs_tell_their_true_exit_code(box):
    assert box.session("codes").run("(exit 6) & wait $!").exit_code == 6


def test_arguments_directory_and_environment(box):
    assert box.execute(["printf", "%s|", "a b", "$HOME", "*"]).output == "a b|$HOME|*|"
    assert box.execute("pwd; echo $X", cwd="/tmp", env={"X": "1"}).output == "/tmp\n1\n"
    assert box.execute(["no-such-program"]).exit_code == 127
    assert box.execute(["/etc/passwd"]).exit_code == 126
    assert box.execute("pwd", cwd="/nowhere").exit_code == 126


def test_the_environment_is_the_same_everywhere(box):
    lines = box.session("environment").run("env").output.splitlines()
    names = {line.split("=")[0] for line in lines} - {"_", "SHLVL", "PWD", "OLDPWD"}
    assert names == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "EXTRA"}
    facts = box.execute("id -un; hostname; echo ~; date +%Z; stat -c %Y hello.txt; id -u")
    *constant, uid = facts.output.splitlines()
    assert constant == ["agent", "sandbox", "/home/agent", "UTC", "1735689600"]
    assert int(uid) >= 1000
    tools = "bash ls sed grep awk tar gzip sha256sum base64 find sort python3"
    assert box.execute(f"for t in {tools}; do command -v $t >/dev/null || echo missing $t; done").output == ""


def test_binary_output_and_long_commands(box):
    assert box.session("binary").run(r"printf 'a\xff\x00\xfeb'; printf '\xc3\xa9'").output == "a\ufffd\x00\ufffdbé"
    result = box.session("binary").run(f"v={'x' * 200_000}; echo ${{#v}}")
    assert (result.exit_code, result.output) == (0, "200000\n")


def test_output_is_capped_while_draining(box):
    result = box.session("flood").run("head -c 5000000 /dev/zero | tr '\\0' x; echo END")
    assert (result.exit_code, result.truncated) == (0, True)
    assert len(result.output) < box.spec.limits.output_bytes + 100
    assert result.output.startswith("xxx")
    assert result.output.endswith("xxxEND\n")
    endless = box.session("flood").run("yes", timeout=2)
    assert (endless.exit_code, endless.timed_out, endless.truncated) == (124, True, True)
    assert box.session("flood").run("echo ok").output.endswith("ok\n")


def test_sessions_do_not_wait_for_each_other(box):
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: box.session(f"s{i}").run(f"sleep 4; echo {i}"), range(8)))
    assert [r.output for r in results] == [f"{i}\n" for i in range(8)]
    assert time.monotonic() - start < 25


def test_the_sandbox_outlives_what_happens_inside(fresh):
    """Killing everything, orphans, and then kill_all while a command runs."""
    fresh.session().run("cd /tmp; mkdir /app/work; echo kept > /app/work/file")
    fresh.execute("kill -9 -1")
    assert fresh.session().run("pwd; echo here").output == "/tmp\nhere\n"
    fresh.execute("for i in $(seq 20); do (sleep 0.05 &) ; done")
    zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z ' || true"
    wait_until(lambda: fresh.execute(zombies).output == "0\n")
    fresh.execute("(while :; do (sleep 0.01 &) ; done) >/dev/null 2>&1 &")  # never the same processes twice
    fresh.session("other").run("trap '' TERM HUP INT; setsid nohup sleep 100 >/dev/null 2>&1 &")
    results = []
    waiting = threading.Thread(target=lambda: results.append(fresh.session().run("sleep 50; echo no")))
    waiting.start()
    wait_until(lambda: "sleep\x0050" in fresh.execute("cat /proc/[0-9]*/cmdline").output)
    fresh.kill_all()
    waiting.join(30)
    assert (results[0].exit_code, results[0].signal, results[0].output) == (137, 9, "")
    assert fresh.stats().pids <= 2  # the sandbox's own
    assert fresh.read_file("work/file") == b"kept\n"
    assert fresh.session().run("pwd; cat /app/work/file").output == "/tmp\nkept\n"
    fresh.kill_all()
    fresh.kill_all()  # nothing to do is fine


def test_a_lifetime_ends_the_sandbox(start):
    with start(limits={"lifetime_seconds": 4.0}) as sandbox:
        assert sandbox.is_alive
        begun = time.monotonic()
        with pytest.raises(SandboxDead, match="lifetime_seconds"):
            sandbox.execute("sleep 60")
        assert time.monotonic() - begun < 40
        assert not sandbox.is_alive


def test_a_stopped_sandbox_is_gone_with_all_that_ran(backend, fresh):
    fresh.session().run("sleep 98.76543 & setsid sleep 98.76543 & disown -a")
    assert _becomes(2)
    fresh.stop()
    fresh.stop()
    assert not fresh.is_alive
    assert _becomes(0)
    for call in (fresh.session().run, fresh.execute, fresh.read_file):
        with pytest.raises(SandboxDead, match="stopped"):
            call("x")
    with pytest.raises((SandboxNotFound, SandboxDead)):
        backend.stats("no:such")


def _becomes(count):
    """Whether so many `sleep 98.76543` run on this machine, now or soon."""
    deadline = time.monotonic() + 60
    while _running() != count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _running():
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count += path.read_bytes().split(b"\0")[:2] == [b"sleep", b"98.76543"]
    return count

"""Commands: exit codes, signals, timeouts and output are what they say they are, and a session survives everything."""

import threading
import time

import pytest
from waiting import wait_until

from rock_env import Sandbox, SandboxDead, SandboxSpec, SpecError


def test_session_keeps_directory_variables_and_functions(box):
    session = box.session("keep")
    assert session.run("mkdir -p k && cd k && export A=1 B='x y' && c=3 && f() { echo f:$1; }").exit_code == 0
    assert session.run('pwd; echo "$A|$B|$c"; f 7').output == "/app/k\n1|x y|3\nf:7\n"


def test_sessions_are_separate_and_named(box):
    box.session("one").run("cd /tmp; v=1")
    assert box.session("two").run("pwd; echo [$v]").output == "/app\n[]\n"
    assert box.session("one").run("pwd; echo [$v]").output == "/tmp\n[1]\n"


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("true", 0, ""),
        ("false", 1, ""),
        ("(exit 42)", 42, ""),
        ("echo out; echo err >&2; echo out", 0, "out\nerr\nout\n"),
        ("not-a-command", 127, "bash: line 1: not-a-command: command not found\n"),
        ("cat", 0, ""),  # standard input is empty, not the command stream
        ("read x; echo $?", 0, "1\n"),
        ("echo 'a b'  \"c\" \\\\", 0, "a b c \\\n"),
        ("printf 'no newline'", 0, "no newline"),
        ("for i in 1 2; do echo $i; done; break; continue; echo after", 0, None),
        ("cat <<'X'\nline $1\nX", 0, "line $1\n"),
        ("", 0, ""),
        ("# nothing", 0, ""),
    ],
)
def test_session_results(box, command, code, output):
    result = box.session("results").run(command)
    assert (result.exit_code, result.timed_out, result.truncated) == (code, False, False)
    if output is not None:
        assert result.output == output


@pytest.mark.parametrize(
    "command", ["if then", 'echo "open', "echo $(", "cat <<E\nx", "break 9", "continue 2", "return 3"]
)
def test_session_survives_broken_commands(box, command):
    session = box.session("broken")
    session.run("cd /tmp; v=kept")
    session.run(command)
    assert session.run("pwd; echo $v").output == "/tmp\nkept\n"


def test_last_exit_code_is_visible_to_the_next_command(box):
    session = box.session("last")
    session.run("(exit 9)")
    assert session.run("echo $?").output == "9\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("exit 3", 3),
        ("(exit 7); exit", 7),
        ("set -e; false; echo no", 1),
        ("exec sh -c 'exit 5'", 5),
        ("set -u; : $no", 127),
    ],
)
def test_exit_returns_its_code_and_the_session_recovers(fresh, command, code):
    session = fresh.session()
    session.run("mkdir -p d; cd d; export A='1 \"2\"'; x=$'a\\nb'; readonly R=5; f() { echo f; }; umask 077")
    result = session.run(command)
    assert (result.exit_code, result.signal, result.timed_out) == (code, None, False)
    if not command.startswith("exec"):
        assert session.run('pwd; echo "$A" "$x" $R; f; umask').output == '/app/d\n1 "2" a\nb 5\nf\n0077\n'
    assert session.run("echo alive").output == "alive\n"


def test_signals(box):
    by_shell = box.session("signals").run("bash -c 'kill -9 $$'")
    assert (by_shell.exit_code, by_shell.signal) == (137, 9)
    direct = box.execute(["bash", "-c", "kill -TERM $$"])
    assert (direct.exit_code, direct.signal) == (143, 15)
    itself = box.session("signals").run("kill -9 $$")
    assert (itself.exit_code, itself.signal, itself.oom_killed) == (137, 9, False)
    assert box.session("signals").run("echo back").output == "back\n"
    assert box.execute("exit 200").signal is None


@pytest.mark.parametrize(
    "command",
    [
        "echo partial; sleep 60; echo never",
        "echo partial; while :; do :; done",
        "echo partial; (trap '' INT TERM HUP; sleep 60) ; echo never",
        "echo partial; sleep 60 | cat",
        "echo partial; sleep 60 & wait",
        "echo partial; setsid sleep 60",
    ],
)
def test_timeout_returns_partial_output_and_keeps_the_session(fresh, command):
    session = fresh.session()
    session.run("cd /tmp; export A=kept; b=kept; f() { echo fun; }")
    start = time.monotonic()
    result = session.run(command, timeout=2)
    assert time.monotonic() - start < 30
    assert (result.exit_code, result.timed_out, result.signal) == (124, True, None)
    assert result.output.startswith("partial\n")
    assert "never" not in result.output
    assert session.run("pwd; echo $A $b; f").output == "/tmp\nkept kept\nfun\n"
    assert "sleep" not in fresh.execute("cat /proc/[0-9]*/comm").output


def test_timeout_of_a_shell_that_ignores_everything(fresh):
    session = fresh.session()
    session.run("cd /tmp")
    result = session.run("trap '' RTMAX EXIT; while :; do :; done", timeout=0.3)
    assert (result.exit_code, result.timed_out) == (124, True)
    assert session.run("pwd").output == "/tmp\n"


def test_timeout_spares_earlier_background_jobs(fresh):
    session = fresh.session()
    session.run("sleep 77 & sleep 0.1")
    assert session.run("sleep 60", timeout=0.3).timed_out
    assert fresh.execute("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").output.count("sleep 77") == 1


def test_background_jobs_do_not_block(fresh):
    for run in (fresh.session().run, fresh.execute):
        start = time.monotonic()
        result = run("sleep 30 & echo started")
        assert (result.exit_code, result.output) == (0, "started\n")
        assert time.monotonic() - start < 25


def test_background_exit_codes_are_true(box):
    assert box.session("jobs").run("(exit 6) & wait $!").exit_code == 6


def test_execute_timeout_kills_the_group(fresh):
    result = fresh.execute("echo partial; sleep 50 & sleep 50", timeout=2)
    assert (result.exit_code, result.timed_out, result.output) == (124, True, "partial\n")
    assert "sleep" not in fresh.execute("cat /proc/[0-9]*/comm").output


def test_execute_arguments_directory_and_environment(box):
    assert box.execute(["printf", "%s|", "a b", "$HOME", "*"]).output == "a b|$HOME|*|"
    assert box.execute("pwd; echo $X", cwd="/tmp", env={"X": "1"}).output == "/tmp\n1\n"
    assert box.execute(["no-such-program"]).exit_code == 127
    assert box.execute(["/etc/passwd"]).exit_code == 126
    assert box.execute("pwd", cwd="/nowhere").exit_code == 126
    assert box.execute(["bash", "-c", "exit 137"]).exit_code == 137


def test_binary_and_invalid_utf8_output_survives(box):
    result = box.session("binary").run(r"printf 'a\xff\x00\xfeb'; printf '\xc3\xa9'")
    assert result.output == "a\ufffd\x00\ufffdbé"


def test_unicode_and_long_commands(box):
    assert box.session("long").run("echo héllo ✓").output == "héllo ✓\n"
    text = "x" * 200_000
    result = box.session("long").run(f"v={text}; echo ${{#v}}")
    assert (result.exit_code, result.output) == (0, "200000\n")


def test_output_is_capped_while_draining(box):
    result = box.session("flood").run("head -c 5000000 /dev/zero | tr '\\0' x; echo END")
    assert result.exit_code == 0
    assert result.truncated
    assert len(result.output) < box.spec.limits.output_bytes + 100
    assert result.output.startswith("xxx")
    assert result.output.endswith("xxxEND\n")


def test_endless_output_ends_at_the_timeout(fresh):
    result = fresh.session().run("yes", timeout=2)
    assert (result.exit_code, result.timed_out, result.truncated) == (124, True, True)
    assert fresh.session().run("echo ok").output.endswith("ok\n")


def test_concurrent_sessions_do_not_wait_for_each_other(fresh):
    from concurrent.futures import ThreadPoolExecutor

    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: fresh.session(f"s{i}").run(f"sleep 4; echo {i}"), range(8)))
    assert [r.output for r in results] == [f"{i}\n" for i in range(8)]
    assert time.monotonic() - start < 25


def test_environment_is_minimal_and_constant(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t")
    with Sandbox.start(SandboxSpec(env={"EXTRA": "1"})) as sandbox:
        lines = sandbox.session().run("env").output.splitlines()
        names = {line.split("=")[0] for line in lines} - {"_", "SHLVL", "PWD", "OLDPWD"}
        assert names == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "EXTRA"}
        facts = sandbox.execute(
            "id -un; hostname; echo ~; date +%Z; ls -l --time-style=+%s / | grep -c 1735689600"
        ).output
        assert facts.splitlines()[:4] == ["agent", "sandbox", "/home/agent", "UTC"]
        assert int(facts.splitlines()[4]) >= 10


def test_base_offers_the_usual_tools(box):
    tools = "bash ls sed grep awk tar gzip sha256sum base64 find sort python3"
    assert box.execute(f"for t in {tools}; do command -v $t >/dev/null || echo missing $t; done").output == ""
    assert box.execute(["python3", "-c", "print(6 * 7)"]).output == "42\n"


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), "5", True])
def test_bad_timeouts_are_refused(box, bad):
    with pytest.raises(SpecError, match="timeout"):
        box.execute("true", timeout=bad)


def test_bad_commands_are_refused(box):
    for bad in ("a\0b", 5, ["a", 5]):
        with pytest.raises((SpecError, TypeError)):
            box.execute(bad)
    with pytest.raises(SpecError, match="command"):
        box.execute([])


def test_killing_everything_inside_does_not_kill_the_sandbox(fresh):
    fresh.session().run("cd /tmp")
    fresh.execute("kill -9 -1")
    assert fresh.is_alive
    assert fresh.session().run("pwd; echo here").output == "/tmp\nhere\n"


def test_orphans_are_reaped(fresh):
    fresh.execute("for i in $(seq 20); do (sleep 0.05 &) ; done")
    zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z ' || true"
    wait_until(lambda: fresh.execute(zombies).output == "0\n")


def test_kill_all_ends_every_process_and_keeps_the_files(fresh):
    session = fresh.session()
    session.run("mkdir work; cd work; x=1; sleep 100 & echo kept > file")
    fresh.session("other").run("trap '' TERM HUP INT; setsid nohup sleep 100 >/dev/null 2>&1 &")
    fresh.execute("(while :; do (sleep 0.01 &) ; done) >/dev/null 2>&1 &")  # never the same processes twice
    fresh.execute("f() { while :; do f & sleep 0.02; wait; done; }; (f >/dev/null 2>&1 &)")
    wait_until(lambda: fresh.stats().pids > 5)
    fresh.kill_all()
    idle = fresh.stats().pids
    assert idle <= 2  # the sandbox's own
    assert fresh.read_file("work/file") == b"kept\n"
    assert session.run("pwd; echo [$x]; ls").output == "/app/work\n[]\nfile\n"
    fresh.session("other").run("echo again > again")
    assert fresh.read_file("again") == b"again\n"
    fresh.kill_all()
    fresh.kill_all()  # nothing to do is fine
    assert fresh.is_alive
    fresh.stop()
    with pytest.raises(SandboxDead):
        fresh.kill_all()


def test_kill_all_ends_a_command_that_another_thread_waits_for(fresh):
    results = []
    thread = threading.Thread(target=lambda: results.append(fresh.session().run("sleep 50; echo no")))
    thread.start()
    wait_until(lambda: "sleep" in fresh.execute("cat /proc/[0-9]*/comm").output)
    fresh.kill_all()
    thread.join(30)
    assert not thread.is_alive()
    assert (results[0].exit_code, results[0].signal, results[0].output) == (137, 9, "")

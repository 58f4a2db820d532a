"""Jobs on every backend: output by number, input, signals, deadlines, terminals, and what is left of them."""

import hashlib
import signal
import time

import pytest

from rock_env import Dropped, FileError, JobNotFound, RequestTimeout, SandboxDead, SandboxNotFound, SpecError

SECONDS = 60.0  # a bound for what takes a moment


def text(job, stream=None):
    """All that a job writes, until it has ended."""
    pieces = list(job.stream())
    assert not any(isinstance(piece, Dropped) for piece in pieces)
    return b"".join(piece.data for piece in pieces if stream in (None, piece.stream)).decode()


def read_until(job, wanted, seq=0):
    """(what was written from number `seq` on until it has `wanted`, the number after it)."""
    seen, deadline = b"", time.monotonic() + SECONDS
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        output = job.read(seq, 5)
        seen += b"".join(piece.data for piece in output.pieces)
        seq = output.next
    return seen, seq


@pytest.mark.parametrize(
    ("command", "code", "number"),
    [("exit 7", 7, None), (["true"], 0, None), ("kill -TERM $$", 143, 15), (["no-such-program"], 127, None)],
)
def test_the_exit_code_and_the_signal_are_true(box, command, code, number):
    status = box.start_job(command).wait(SECONDS)
    assert (status.exit_code, status.signal, status.timed_out, status.state) == (code, number, False, "exited")


def test_output_is_told_apart_and_numbered(box):
    job = box.start_job("echo one; echo two >&2; sleep 0.3; printf three")
    pieces = list(job.stream())
    assert b"".join(p.data for p in pieces if p.stream == "stdout") == b"one\nthree"
    assert b"".join(p.data for p in pieces if p.stream == "stderr") == b"two\n"
    at = 0
    for piece in pieces:
        assert piece.seq == at
        at += len(piece.data)
    assert job.status().output_bytes == at == 13
    whole = b"".join(p.data for p in pieces)
    for begin in range(at + 1):  # from any number on, by any steps
        seq, got = begin, b""
        while not (output := job.read(seq, max_bytes=2)).is_end or output.pieces:
            got += b"".join(p.data for p in output.pieces)
            seq = output.next
        assert got == whole[begin:]
    with pytest.raises(SpecError, match="seq: expected at most 13"):
        job.read(14)


def test_a_reader_waits_for_output(box):
    job = box.start_job("cat", stdin=True)
    assert job.read(0, wait=0.2).pieces == ()
    job.write("later\n")
    assert read_until(job, b"later\n") == (b"later\n", 6)
    assert job.status().is_running
    job.close_stdin()
    assert job.wait(SECONDS).exit_code == 0


def test_a_flood_is_whole_for_a_reader_and_does_not_block_without_one(box):
    size = 3_000_000
    command = f"head -c {size} /dev/zero | tr '\\0' x; echo end"
    job = box.start_job(command, buffer_bytes=64 << 10)
    assert text(job) == "x" * size + "end\n"
    unread = box.start_job(command, buffer_bytes=64 << 10)
    assert unread.wait(SECONDS).exit_code == 0
    marker, *rest = unread.read(0, max_bytes=1 << 20).pieces
    assert isinstance(marker, Dropped)
    assert marker.seq == 0
    kept = b"".join(piece.data for piece in rest)
    assert marker.size + len(kept) == size + 4
    assert kept.endswith(b"xend\n")
    assert 32 << 10 <= len(kept) <= 192 << 10
    assert unread.status().dropped_bytes == marker.size


def test_input_of_any_size_arrives_once(box):
    job = box.start_job("sha256sum; echo done", stdin=True)
    data = bytes(range(256)) * 8192
    job.write(data)
    assert job.status().stdin_bytes == len(data)
    again = box.job(job.id)  # as after a lost connection: what has arrived already is not taken again
    again._sent = 0
    reply, _ = again._call("job_write", 1.0, data[:1000], at=0, close=False, seconds=1.0)
    assert reply == {"stdin_bytes": len(data), "accepted": True}
    with pytest.raises(SpecError, match="at: expected at most"):
        again._call("job_write", 1.0, b"x", at=len(data) + 1, close=False, seconds=1.0)
    job.close_stdin()
    assert text(job) == f"{hashlib.sha256(data).hexdigest()}  -\ndone\n"


def test_input_that_nobody_reads(box):
    deaf = box.start_job("sleep 100", stdin=True)
    with pytest.raises(RequestTimeout, match="were not accepted"):
        deaf.write(b"x" * (3 << 20), timeout=0.5)
    assert deaf.kill()
    assert deaf.wait(SECONDS).signal == signal.SIGKILL
    with pytest.raises(FileError) as raised:
        deaf.write(b"x")
    assert raised.value.errno_name == "EPIPE"
    with pytest.raises(SpecError, match="without one"):
        box.start_job("sleep 100", timeout=30).write(b"x")


def test_signals_reach_the_process_group(box):
    job = box.start_job("trap 'echo got; exit 9' INT; echo ready; sleep 100 & wait; wait")
    read_until(job, b"ready\n")
    assert job.interrupt()
    status = job.wait(SECONDS)
    assert (status.exit_code, status.signal) == (9, None)
    assert not job.interrupt()
    plain = box.start_job("sleep 100 | sleep 100")
    assert plain.signal(signal.SIGTERM)
    assert plain.wait(SECONDS).signal == signal.SIGTERM
    with pytest.raises(SpecError, match="signal: expected a number"):
        job.signal(0)


def test_a_deadline_kills_everything_that_the_job_started(box):
    job = box.start_job("echo partial; trap '' TERM INT; (setsid sleep 64.5) & sleep 64.5", timeout=3.0)
    status = job.wait(SECONDS)
    assert (status.exit_code, status.timed_out, status.signal) == (124, True, None)
    assert text(job) == "partial\n"
    assert "64.5" not in box.execute(["bash", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).output


def test_jobs_outlive_other_commands_and_their_timeouts(fresh):
    job = fresh.start_job("sleep 2; echo survived")
    assert fresh.execute("sleep 50", timeout=0.3).timed_out
    assert fresh.session().run("sleep 50", timeout=0.3).timed_out
    assert text(job) == "survived\n"


def test_a_job_is_started_once_by_its_id_and_found_again(fresh):
    first = fresh.start_job("echo x >>count; sleep 0.2; cat count", id="build-1")
    second = fresh.start_job("echo y", id="build-1")
    assert text(first) == text(second) == text(fresh.job("build-1")) == "x\n"
    fresh.start_job("exit 3").wait(SECONDS)
    assert [(job.state, job.exit_code) for job in fresh.jobs()] == [("exited", 0), ("exited", 3)]
    with pytest.raises(JobNotFound, match="no job"):
        fresh.job("other")
    with pytest.raises(SpecError, match="job: expected"):
        fresh.start_job("true", id="a/b")
    for _ in range(70):
        fresh.start_job(["true"]).wait(SECONDS)
    assert len(fresh.jobs()) <= 64


def test_environment_directory_and_bounds(box):
    job = box.start_job('echo "$PWD $A"', cwd="/tmp", env={"A": "1 2"})
    assert text(job) == "/tmp 1 2\n"
    with pytest.raises(SpecError, match="buffer_bytes"):
        box.start_job("true", buffer_bytes=1)
    with pytest.raises(SpecError, match="terminal"):
        box.start_job("true", terminal=(0, 80))


def test_everything_ends_with_the_sandbox(start):
    sandbox = start()
    job = sandbox.start_job("sleep 100")
    sandbox.start_job(["bash"], terminal=(24, 80))
    sandbox.stop()
    with pytest.raises((SandboxDead, SandboxNotFound)):
        job.read(0, 30)


def test_kill_all_ends_jobs(fresh):
    job = fresh.start_job("sleep 100")
    fresh.kill_all()
    assert job.wait(SECONDS).signal == signal.SIGKILL


# -- terminals
@pytest.fixture
def shell(box):
    job = box.start_job(["bash", "--norc", "--noprofile", "-i"], env={"PS1": "$ "}, terminal=(31, 97))
    yield job
    job.kill()


def test_a_terminal_has_a_size_that_changes(shell):
    _, seq = read_until(shell, b"$ ")
    shell.write("stty size; tty; test -O $(tty) && echo mine\n")
    seen, seq = read_until(shell, b"\nmine\r\n", seq)
    assert b"31 97\r\n/dev/pts/" in seen
    shell.write("trap 'stty size' WINCH\n")
    _, seq = read_until(shell, b"$ ", seq)
    shell.resize(40, 120)
    shell.write("stty size\n")
    assert b"40 120\r\n" in read_until(shell, b"40 120", seq)[0]


def test_ctrl_c_reaches_the_foreground_and_not_the_shell(shell):
    _, seq = read_until(shell, b"$ ")
    for press in (lambda: shell.write(b"\x03"), shell.interrupt):
        shell.write("sleep 100; echo code $?\n")
        _, seq = read_until(shell, b"code $?\r\n", seq)
        time.sleep(0.5)
        press()
        _, seq = read_until(shell, b"$ ", seq)
    shell.write("echo alive$((1+1))\n")
    read_until(shell, b"alive2", seq)


def test_end_of_input_and_exit_status_of_a_terminal(box, shell):
    _, seq = read_until(shell, b"$ ")
    shell.write("(exit 6)\n")
    _, seq = read_until(shell, b"$ ", seq)
    shell.close_stdin()
    assert shell.wait(SECONDS).exit_code == 6
    left = box.start_job("cat; echo bye", terminal=(24, 80))
    left.write("typed\n")
    read_until(left, b"typed\r\ntyped\r\n")
    left.close_stdin()
    assert text(left) in ("typed\r\ntyped\r\nbye\r\n", "typed\r\n^D\x08\x08typed\r\nbye\r\n")
    with pytest.raises(SpecError, match="has no terminal"):
        box.start_job("true").resize(3, 3)


def test_a_terminal_that_closes_takes_its_programs_with_it(box):
    job = box.start_job(["bash", "--norc", "-i"], terminal=(24, 80))
    job.write("sleep 65.5\n")
    read_until(job, b"65.5")
    assert job.signal(signal.SIGKILL)
    job.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while "65.5" in box.execute(["bash", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).output:
        assert time.monotonic() < deadline
        time.sleep(0.1)

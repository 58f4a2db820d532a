"""TerminalEnv in real sandboxes: rewards, hidden tests, attacks on the reward, faults of the infrastructure."""

from __future__ import annotations

import itertools
import os
import signal
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gymnasium
import psutil
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from rome.envs import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    EnvFailure,
    HarborTask,
    TaskFile,
    TaskFormatError,
    TerminalEnv,
    Verifier,
    draft_task,
    expert_actions,
    generate_task,
    load_task,
)
from rome.trajectory import Status, Task

ALL = (*FAMILIES, *HELD_OUT_FAMILIES)


def call(command: str) -> str:
    return f"<tool_call>{command}</tool_call>"


def play(env: TerminalEnv, task: HarborTask, actions: list[str | None]) -> tuple[float, list[str], list[bool], dict]:
    """Reward, observations, error flags and last info of a scripted episode."""
    env.reset(options={"task": task})
    observations, errors = [], []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step("" if action is None else call(action))
        observations.append(observation)
        errors.append(info["error"])
        if terminated or truncated:
            break
    return reward, observations, errors, info


def hand_made(test: str, files: dict[str, TaskFile] | None = None, **verifier: object) -> HarborTask:
    """A task with a test script of its own."""
    return HarborTask(
        task=Task("hand-made", "Do it."),
        files=files or {"/app/a.txt": TaskFile(b"a\n")},
        verifier=Verifier({"test.sh": TaskFile(test.encode(), 0o755)}, **verifier),
    )


WRITE = "mkdir -p /logs/verifier; echo {} > /logs/verifier/reward.txt"
ALWAYS_ZERO = hand_made(WRITE.format(0))


@pytest.fixture
def env() -> Iterator[TerminalEnv]:
    env = TerminalEnv()
    yield env
    env.close()


# --- rewards ----------------------------------------------------------------------------------------------------------


def in_parallel(cells: list[tuple[str, int]], one: object) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cell: one(*cell), cells))


@pytest.mark.parametrize("family", ALL)
def test_reference_gets_one_and_nothing_else_does(family: str) -> None:
    def one(horizon: int, seed: int) -> None:
        env = TerminalEnv()
        try:
            task = draft_task(family, seed, horizon)
            reward, observations, errors, info = play(env, task, expert_actions(task, seed, flawed=False))
            assert (reward, info["status"], info["chunks"]) == (1.0, "completed", horizon), (
                horizon,
                seed,
                observations,
            )
            assert not any(errors), observations
            assert all(len(observation) <= 200 for observation in observations)
            reward, *_ = play(env, task, [None])
            assert reward == 0.0, (horizon, seed)
            for flaw in range(2):
                actions = expert_actions(task, flaw, flawed=True)
                reward, observations, errors, info = play(env, task, actions)
                assert (reward, info["status"]) == (0.0, "completed"), (horizon, seed, actions)
                assert not any(errors), (actions, observations)
        finally:
            env.close()

    in_parallel([(horizon, horizon * 7 + seed) for horizon in (2, 3, 4, 7, 12) for seed in range(1)], one)


def test_the_solution_script_solves_a_folder(env: TerminalEnv, tmp_path: Path) -> None:
    task = generate_task("build_archive", 3, 6, tmp_path)
    env.reset(options={"task": task.task.path})
    script = task.solution.removeprefix("#!/bin/sh\n").strip().replace("\n", "; ")
    env.step(call(script))
    assert env.step("done")[1] == 1.0


def test_fractional_and_json_rewards(env: TerminalEnv) -> None:
    folder = "mkdir -p /logs/verifier; echo '{}' > /logs/verifier/reward.json"
    for test, expected in [
        (WRITE.format("0.25"), 0.25),
        (folder.format('{"reward": 0.5, "speed": 3}'), 0.5),
        (folder.format('{"accuracy": 0.75}'), 0.75),
        (folder.format("1"), 1.0),
    ]:
        assert play(env, hand_made(test), [None])[0] == expected


# --- the interface ----------------------------------------------------------------------------------------------------


def test_gymnasium_accepts_it_and_finds_it_by_name() -> None:
    env = gymnasium.make("rome/Terminal-v0", max_chunks=4)
    assert isinstance(env.unwrapped, TerminalEnv)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_shell_state_persists_within_an_episode_and_not_beyond(env: TerminalEnv) -> None:
    env.reset(options={"task": ALWAYS_ZERO})
    env.step(call("mkdir deep && cd deep && export NAME=value && f() { echo from $NAME; } && touch mark"))
    assert env.step(call("pwd; f; ls"))[0] == "/app/deep\nfrom value\nmark"
    env.reset(options={"task": ALWAYS_ZERO})
    assert env.step(call('pwd; echo "[$NAME]"; ls'))[0] == "/app\n[]\na.txt"


def test_observations_show_output_errors_and_exit_codes(env: TerminalEnv) -> None:
    env.reset(options={"task": ALWAYS_ZERO})
    observation, reward, terminated, truncated, info = env.step(call("echo out; echo err >&2; (exit 3)"))
    assert observation == "out\nerr\n[exit 3]"
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["error"], info["exit_code"]) == (True, 3)
    observation, *_, info = env.step(f"I look first. {call('cat a.txt')}")
    assert (observation, info["error"], info["exit_code"]) == ("a", False, 0)
    assert env.step(call("false"))[0] == "[exit 1]"
    assert env.step(call("exit 7"))[0].endswith("[exit 7]")
    assert env.step(call("cat a.txt"))[0] == "a"  # the shell is back
    assert env.step(call("echo 'unclosed"))[-1]["error"]
    assert env.step(call("echo a\0b"))[-1]["error"]
    assert env.step(call(""))[0] == ""


def test_long_output_is_cut_and_marked() -> None:
    env = TerminalEnv(max_observation_chars=100)
    env.reset(options={"task": ALWAYS_ZERO})
    assert len(env.step(call("printf 'x%.0s' $(seq 100)"))[0]) == 100
    observation = env.step(call("seq 100000"))[0]
    assert len(observation) == 100
    assert observation.startswith("1\n2\n3\n") and observation.endswith("\n[cut]")
    assert env.step(call("seq 1000; false"))[0].endswith("[cut]\n[exit 1]")
    env.close()


def test_a_command_past_its_deadline_is_killed_and_the_shell_goes_on() -> None:
    env = TerminalEnv(command_seconds=2.0)
    env.reset(options={"task": ALWAYS_ZERO})
    start = time.monotonic()
    observation, *_, info = env.step(call("echo before; sleep 60"))
    assert time.monotonic() - start < 40
    assert observation.startswith("before\n") and observation.endswith("[exit 124]")
    assert info["timed_out"] and info["error"]
    assert env.step(call("cat a.txt"))[0] == "a"
    env.close()


def test_the_last_chunk_allowed_truncates_and_is_still_verified() -> None:
    env = TerminalEnv(max_chunks=3)
    task = draft_task("move_files", 1, 4)  # three commands and the stop
    actions = expert_actions(task, 0, flawed=False)
    reward, _, _, info = play(env, task, actions)
    assert (reward, info["status"], info["chunks"]) == (1.0, "truncated", 3)
    with pytest.raises(ResetNeeded):
        env.step("more")
    env.close()


def test_an_episode_that_used_up_its_time_is_truncated(env: TerminalEnv) -> None:
    task = replace(ALWAYS_ZERO, limits=replace(ALWAYS_ZERO.limits, agent_seconds=0.2))
    env.reset(options={"task": task})
    *_, truncated, info = env.step(call("sleep 0.3"))
    assert truncated and info["status"] == Status.TRUNCATED.value


def test_misuse_is_refused(env: TerminalEnv, tmp_path: Path) -> None:
    with pytest.raises(ResetNeeded):
        env.step(call("ls"))
    with pytest.raises(ValueError, match="unknown key 'tsak'"):
        env.reset(options={"tsak": ALWAYS_ZERO})
    with pytest.raises(TaskFormatError, match="expected a task folder"):
        env.reset(options={"task": tmp_path / "none"})
    with pytest.raises(ValueError, match="max_chunks"):
        TerminalEnv(max_chunks=0)
    env.close()
    env.close()


def test_modes_and_missing_python_are_provided(env: TerminalEnv) -> None:
    task = hand_made(WRITE.format(0), {"/app/run.sh": TaskFile(b"#!/bin/sh\necho ran\n", 0o750)})
    env.reset(options={"task": replace(task, programs=("python3",))})
    assert env.step(call("./run.sh; stat -c %a run.sh"))[0] == "ran\n750"
    assert env.step(call("python3 -c 'print(6 * 7)'"))[0] == "42"


def test_python_is_lent_where_the_machine_has_none(env: TerminalEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    from rock_env.harbor import setup

    monkeypatch.setattr(setup, "_PROGRAM_FOLDERS", ("/nowhere",))
    env.reset(options={"task": replace(ALWAYS_ZERO, programs=("python3",))})
    python = f"{setup._PYTHON_HOME}/bin/python3"
    assert (
        env.step(call(f"type -ap python3 | tail -1; {python} -c 'import json, hashlib; print(1)'"))[0] == f"{python}\n1"
    )


# --- tests stay hidden, and the reward can't be forged ----------------------------------------------------------------


def test_tests_are_not_in_the_sandbox_before_the_agent_stops(env: TerminalEnv) -> None:
    task = draft_task("follow_hints", 2, 5)
    *_, read, write, _ = expert_actions(task, 0, flawed=False)
    last, code = str(read).split()[1], str(write).split()[1]
    env.reset(options={"task": task})
    for path in ("/tests", "/logs", "/solution", "/app/task.toml", "/app/instruction.md"):
        assert env.step(call(f"ls {path}"))[-1]["error"], path
    found = env.step(call(f"grep -rl {code} / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr"))[0]
    assert [line for line in found.splitlines() if line.startswith("/")] == [f"/app/{last}"], found


FORGERIES = [
    "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt",
    "mkdir -p /logs/verifier; echo '{\"reward\": 1}' > /logs/verifier/reward.json",
    "mkdir -p /logs/verifier/reward.txt; chmod 000 /logs/verifier",
    "mkdir -p /tests/test.sh /tests/x; chmod 555 /tests",
    "ln -s /app /logs; mkdir -p /app/verifier; echo 1 > /app/verifier/reward.txt",
    "ln -s /app /tests; printf '#!/bin/sh\\necho 1 > /logs/verifier/reward.txt' > /app/test.sh; chmod 555 /app/test.sh",
    "(while :; do mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; done) > /dev/null 2>&1 &",
    "setsid nohup sh -c 'trap \"\" TERM HUP; while :; do echo 1 > /logs/verifier/reward.txt; done' >/dev/null 2>&1 &",
    "f() { f & f & sleep 0.01; mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; }; (f &) 2>/dev/null; true",
    "TMOUT=1; trap 'while :; do echo 1 > /logs/verifier/reward.txt; done' EXIT",
    "head() { echo 1; }; export -f head; alias sh='echo 1'; export PATH=/app ENV=/app/e BASH_ENV=/app/e; true",
    "for d in /usr/bin /bin ~ /etc; do printf '#!/bin/sh\\necho 1' > $d/head; chmod 755 $d/head; done; true",
    "echo 'echo 1 > /logs/verifier/reward.txt; exit' | tee ~/.bashrc ~/.profile /app/.bashrc /etc/profile; true",
]


@pytest.fixture
def brisk() -> Iterator[TerminalEnv]:
    """An environment that soon loses patience with a command."""
    env = TerminalEnv(command_seconds=1.0)
    yield env
    env.close()


@pytest.mark.parametrize("attack", FORGERIES)
def test_the_reward_cannot_be_forged(brisk: TerminalEnv, attack: str) -> None:
    env, task = brisk, draft_task("follow_hints", 2, 5)
    env.reset(options={"task": task})
    env.step(call(attack))
    _, reward, _, _, info = env.step("done")
    assert (reward, info["status"]) == (0.0, "completed")


@pytest.mark.parametrize("attack", FORGERIES[:9])
def test_an_attack_does_not_cost_an_honest_solution_either(brisk: TerminalEnv, attack: str) -> None:
    env, task = brisk, draft_task("follow_hints", 2, 3)
    env.reset(options={"task": task})
    env.step(call(attack))
    for action in expert_actions(task, 0, flawed=False)[:-1]:
        env.step(call(str(action)))
    assert env.step("done")[1] == 1.0 or "f &" in attack  # a fork bomb may starve its own shell


ESCAPES = [
    "mkfifo answer.txt",
    "ln -s /dev/zero answer.txt",
    "mkdir answer.txt",
    "rm -rf /app; true",
    "chmod 000 /app",
    "head -c 100000000 /dev/zero > answer.txt; true",
    "touch f{1..40000}; true",
    "tail /dev/zero; true",
    "kill -9 -1",
    "kill -9 $$",
    "exec false",
    "ulimit -f 0; ulimit -n 3; true",
    "exec 0<&- 1>&- 2>&-",
]


@pytest.mark.parametrize("attack", ESCAPES)
def test_an_agent_cannot_escape_its_zero(brisk: TerminalEnv, attack: str) -> None:
    """What breaks the verification by the agent's own doing is a reward of 0, not an episode to be sampled again."""
    env = brisk
    env.reset(options={"task": draft_task("follow_hints", 2, 4)})
    env.step(call(attack))
    env.step(call("echo still here"))
    _, reward, _, _, info = env.step("done")
    assert (reward, info["status"]) == (0.0, "completed")


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("exit 0", "no usable reward"),
        (WRITE.format("excellent"), "no usable reward"),
        (WRITE.format("nan"), "no usable reward"),
        (WRITE.format("1 1"), "no usable reward"),
        ("mkdir -p /logs/verifier; echo '[1]' > /logs/verifier/reward.json", "no usable reward"),
        ('mkdir -p /logs/verifier; echo \'{"a": 1, "b": 2}\' > /logs/verifier/reward.json', "no usable reward"),
        ("mkdir -p /logs/verifier/reward.txt", "no usable reward"),
    ],
)
def test_a_verifier_without_a_usable_reward_is_a_failure(env: TerminalEnv, test: str, message: str) -> None:
    env.reset(options={"task": hand_made(test)})
    with pytest.raises(EnvFailure, match=message) as caught:
        env.step("done")
    assert caught.value.status is Status.VERIFIER_FAILURE
    with pytest.raises(ResetNeeded):
        env.step("done")


def test_a_verifier_past_its_deadline_is_a_failure(env: TerminalEnv) -> None:
    env.reset(options={"task": hand_made(WRITE.format(1) + "; sleep 60", timeout_seconds=0.5)})
    start = time.monotonic()
    with pytest.raises(EnvFailure, match=r"more than 0\.5 s") as caught:
        env.step("done")
    assert caught.value.status is Status.VERIFIER_FAILURE
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("when", ["command", "verification", "snapshot"])
def test_a_dead_sandbox_is_an_infrastructure_failure(env: TerminalEnv, when: str) -> None:
    env.reset(options={"task": ALWAYS_ZERO})
    env._sandbox.stop()
    act = {"command": lambda: env.step(call("ls")), "verification": lambda: env.step("done"), "snapshot": env.snapshot}
    with pytest.raises(EnvFailure) as caught:
        act[when]()
    assert caught.value.status is Status.INFRA_FAILURE
    assert play(env, ALWAYS_ZERO, [None])[0] == 0.0  # and the next episode is fine


def test_a_killed_supervisor_is_an_infrastructure_failure(env: TerminalEnv) -> None:
    env.reset(options={"task": ALWAYS_ZERO})
    supervisors = [
        child for child in psutil.Process().children() if any("rock_env" in word for word in child.cmdline())
    ]
    assert supervisors
    for process in supervisors:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EnvFailure) as caught:
        env.step(call("ls"))
    assert caught.value.status is Status.INFRA_FAILURE
    assert play(env, ALWAYS_ZERO, [None])[0] == 0.0


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_snapshots_continue_alike_and_apart(env: TerminalEnv) -> None:
    task = draft_task("move_files", 6, 7)
    actions = expert_actions(task, 0, flawed=False)
    env.reset(options={"task": task})
    env.step(call("mkdir -p sub && cd sub && NAME='a  b' && g() { echo $NAME; } && cd .. "))
    for action in actions[:3]:
        shown = env.step(call(str(action)))[0]
    saved = env.snapshot()
    other = TerminalEnv()
    try:
        observation, info = other.restore(saved)
        assert (observation, info["chunks"]) == (shown, 4)
        assert other.step(call('pwd; echo "$NAME"; g'))[0] == "/app\na  b\na b"
        assert env.step(call("rm -rf /app/*"))[0] == ""  # the first goes astray; the copy doesn't notice
        for action in actions[3:-1]:
            other.step(call(str(action)))
        assert other.step("done")[1] == 1.0
        assert env.step("done")[1] == 0.0
        for _ in range(2):  # the snapshot serves again
            other.restore(saved)
            assert other.step("done")[1] == 0.0
    finally:
        other.close()


def test_observations_do_not_depend_on_the_run(env: TerminalEnv) -> None:
    """The same actions give the same text, `ls -l` included."""
    task = draft_task("repair_permissions", 3, 6)
    looks = ["ls -l", "ls -la /app | head -3", "env | sort", "whoami; hostname; pwd", "cat *.txt"]
    seen = [play(env, task, looks)[1] for _ in range(2)]
    assert seen[0] == seen[1]


def test_no_sandbox_outlives_its_episode() -> None:
    env = TerminalEnv()
    for _ in range(3):
        env.reset(options={"task": ALWAYS_ZERO})
    env.step("done")
    assert env._sandbox is None
    env.reset(options={"task": ALWAYS_ZERO})
    sandbox = env._sandbox
    env.close()
    assert not sandbox.is_alive


def test_folders_keep_modes(tmp_path: Path, env: TerminalEnv) -> None:
    folder = Path(generate_task("make_links", 1, 4, tmp_path).task.path)
    script = folder / "environment" / "files" / "tool.sh"
    script.write_text("#!/bin/sh\necho tool\n")
    script.chmod(0o755)
    assert stat.S_IMODE(load_task(folder).files["/app/tool.sh"].mode) == 0o755
    env.reset(options={"task": folder})
    assert env.step(call("./tool.sh"))[0] == "tool"


def test_environments_run_side_by_side() -> None:
    cells = list(itertools.islice(itertools.product(range(2), ALL), 16))

    def one(seed: int, family: str) -> float:
        env = TerminalEnv()
        try:
            task = draft_task(family, seed, 5)
            return play(env, task, expert_actions(task, seed, flawed=False))[0]
        finally:
            env.close()

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda cell: one(*cell), cells)) == [1.0] * 16

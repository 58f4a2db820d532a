"""The GEM API in process, in real sandboxes: episodes, hidden tests, seeds, several agents, typed failures."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env
from hub_tasks import TOML, write_environment, write_task

import rock_env
from rock_env import SandboxDead, SpecError, gem
from rock_env.errors import EntryNotFound, ResetNeeded, VerifierFailed
from rock_env.hub import LocalHub

SECRET = "tangerine-7351"
HIDDEN_TEST = f"""#!/bin/sh
# {SECRET}
reward=1
grep -qs {SECRET} /app/leak* && reward=-5
echo $reward > /logs/verifier/reward.txt
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gem")
    store = LocalHub(folder / "hub")
    store.push(write_task(folder / "answer"), "answer@1")
    store.push(write_task(folder / "hidden", test=HIDDEN_TEST), "hidden@1")
    store.push(write_environment(folder / "bare"), "bare@1")
    return store


@pytest.fixture
def env(hub):
    made = gem.make("answer@1", hub=hub)
    yield made
    made.close()


def test_it_is_a_gymnasium_environment(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*alternative render modes.*")  # it has none
        check_env(env)


def test_an_episode(env):
    observation, info = env.reset(seed=5)
    assert (observation, info) == (
        "Write the answer that hint.txt gives into answer.txt.",
        {"task": "answer", "seed": 5},
    )
    assert env.observation_space.contains(observation)
    assert env.step("cat hint.txt") == (
        "the answer is 42", 0.0, False, False, {"exit_code": 0, "timed_out": False, "step": 1}
    )  # fmt: skip
    assert env.step("cd /tmp; X=4; false").observation == "[exit 1]"
    assert env.step("echo $X$PWD").observation == "4/tmp"
    assert env.step("exit 3").info["exit_code"] == 3
    assert env.step("a\0b").info["exit_code"] == 2
    env.step("echo 42 > /app/answer.txt")
    last = env.step(f" {gem.STOP}\n")
    assert last == ("", 1.0, True, False, {"exit_code": None, "timed_out": False, "step": 7, "verified": True})
    with pytest.raises(ResetNeeded):
        env.step("echo more")
    env.reset()
    assert env.step("ls answer.txt").info["exit_code"] == 2  # a fresh sandbox
    assert env.step(gem.STOP).reward == 0.25


def test_the_last_step_and_the_time_truncate(hub, tmp_path):
    env = gem.make("hub://answer@1", hub=hub, max_steps=2, max_observation_chars=20, command_seconds=0.5)
    env.reset()
    assert env.step("echo 42 > answer.txt; seq 100").observation == "1\n2\n3\n4\n5\n6\n7\n\n[cut]"
    slow = env.step("echo begun; sleep 60")
    assert slow.observation.startswith("begun\n")
    assert slow.observation.endswith("\n[exit 124]")
    assert slow[1:4] == (1.0, False, True)
    assert slow.info == {"exit_code": 124, "timed_out": True, "step": 2, "verified": True}
    folder = write_task(tmp_path / "t")
    (folder / "task.toml").write_text(f"{TOML}[agent]\ntimeout_sec = 0.2\n")
    hub.push(folder, "hasty@1")
    env = gem.make("hasty@1", hub=hub)
    env.reset()
    assert env.step("sleep 0.3")[2:4] == (False, True)


def test_long_outputs_are_seen_as_far_as_asked(hub):
    env = gem.make("answer@1", hub=hub, max_observation_chars=300_000)
    env.reset()
    assert len(env.step("head -c 200000 /dev/zero | tr '\\0' x").observation) == 200_000
    env.close()


def test_tests_stay_hidden_until_the_agent_is_gone(hub):
    env = gem.make("hidden@1", hub=hub)
    env.reset()
    for path in ("/tests", "/logs", "/solution", "/app/task.toml", "/app/instruction.md"):
        assert env.step(f"ls {path}").info["exit_code"] == 2
    found = env.step(f"grep -rl {SECRET} / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr 2>/dev/null")
    assert found.observation in ("[exit 1]", "[exit 2]")  # no file; 2 says that some could not be read
    spy = "while :; do cat /tests/* >> /app/leak$$ 2>/dev/null; done"
    env.step(f"(trap '' TERM HUP; {spy}) > /dev/null 2>&1 &")
    env.step(f"setsid nohup sh -c '{spy}' > /dev/null 2>&1 &")
    both = "for i in $(seq 500); do set -- /app/leak*; [ $# = 2 ] && exit; sleep 0.02; done; exit 1"
    assert env.step(f"({both})").info["exit_code"] == 0  # the spies are at work
    assert env.step(gem.STOP).reward == 1.0


def play(env, actions, seed):
    return [env.reset(seed=seed), *(env.step(action) for action in actions)]


DRAWS = ("echo $RANDOM $RANDOM", "echo $ROCK_SEED $PYTHONHASHSEED", "echo $((RANDOM % 6))", gem.STOP)


def test_a_seed_makes_an_episode_the_same_again(hub, env):
    other = gem.make("answer@1", hub=hub)
    assert play(env, DRAWS, 7) == play(other, DRAWS, 7) == play(env, DRAWS, 7)
    assert play(env, DRAWS, 8)[1:3] != play(other, DRAWS, 7)[1:3]
    env.reset(seed=2**40 + 1)
    assert env.step("echo $ROCK_SEED $PYTHONHASHSEED").observation == f"{2**40 + 1} 1"

    def stream(which):
        which.reset(seed=3)
        return [which.reset()[1]["seed"] for _ in range(3)]

    seeds = stream(env)
    assert seeds == stream(other)
    assert len(set(seeds)) == 3
    other.close()


def test_what_is_wrong_is_refused(hub, env):
    with pytest.raises(ResetNeeded):
        env.step("ls")
    for seed in (-1, 1.5, "1", True):
        with pytest.raises(SpecError, match="seed: expected"):
            env.reset(seed=seed)
    with pytest.raises(SpecError, match="options: expected none, got 'task'"):
        env.reset(options={"task": "/etc"})
    env.reset()
    for action in (3, None, b"ls", "\udcff", "x" * (2**20 + 1)):
        with pytest.raises(SpecError, match="action: expected text"):
            env.step(action)
    assert env.step("echo well").observation == "well"
    for options, message in (
        ({"max_steps": 0}, "max_steps: expected an integer in 1"),
        ({"max_observation_chars": 6}, "max_observation_chars: expected"),
        ({"command_seconds": float("nan")}, "command_seconds: expected"),
        ({"max_stepps": 3}, "options: a task takes max_steps, .*, got 'max_stepps'"),
        ({"agents": []}, "agents: expected 1 to 64"),
        ({"agents": ["a", "a"]}, "agents: expected 1 to 64 different names"),
        ({"agents": ["a/b"]}, "agents: expected"),
        ({"agents": "ab"}, "agents: expected"),
        ({"agents": ["a"], "sandboxes": "both"}, "sandboxes: expected 'shared' or 'isolated'"),
    ):
        with pytest.raises(SpecError, match=message):
            gem.make("answer@1", hub=hub, **options)
    with pytest.raises(SpecError, match="local/bare@1 is an environment without instruction and tests"):
        gem.make("bare@1", hub=hub)
    with pytest.raises(EntryNotFound):
        gem.make("answer@9", hub=hub)
    for env_id in ("NoSuch-v0", "rome/NoSuch-v0", 3):
        with pytest.raises(SpecError, match="env_id: expected"):
            gem.make(env_id)
    with pytest.raises(SpecError, match="agents: rome/Terminal-v0 is for one agent"):
        gem.make("rome/Terminal-v0", agents=["a"])
    with pytest.raises(SpecError, match="max_chunks"):
        gem.make("rome/Terminal-v0", max_chunks=0)


def test_a_failure_of_the_sandbox_is_an_error_and_no_reward(env):
    env.reset()
    env._episode._sandbox.stop()
    with pytest.raises(SandboxDead):
        env.step("echo 1")
    with pytest.raises(ResetNeeded):
        env.step("echo 1")
    env.reset()
    env._episode._sandbox.stop()
    with pytest.raises(SandboxDead):
        env.step(gem.STOP)
    env.reset()
    assert env.step("echo well").observation == "well"


@pytest.mark.parametrize(
    ("test", "message"),
    [("#!/bin/sh\necho nothing; exit 3\n", "no usable reward.*exit code 3, output 'nothing"),
     ("#!/bin/sh\necho nan > /logs/verifier/reward.txt\n", "no usable reward"),
     ("#!/bin/sh\nsleep 60\n", r"took more than 0\.5 s")],
)  # fmt: skip
def test_tests_that_fail_are_an_error_and_no_reward(hub, tmp_path, test, message):
    folder = write_task(tmp_path / "t", test=test)
    (folder / "task.toml").write_text(f"{TOML}[verifier]\ntimeout_sec = 0.5\n")
    env = gem.make(f"broken@{hub.push(folder, f'broken@{len(test)}').digest}", hub=hub)
    env.reset()
    sandbox = env._episode._sandbox
    with pytest.raises(VerifierFailed, match=message):
        env.step(gem.STOP)
    assert not sandbox.is_alive
    with pytest.raises(ResetNeeded):
        env.step("ls")


# -- several agents


def test_agents_that_share_a_sandbox(hub):
    env = gem.make("answer@1", hub=hub, agents=["reader", "writer"], sandboxes="shared", max_steps=3)
    with pytest.raises(ResetNeeded):
        env.step("ls", agent="reader")
    observations, infos = env.reset(seed=1)
    assert observations == dict.fromkeys(("reader", "writer"), "Write the answer that hint.txt gives into answer.txt.")
    assert infos["writer"] == {"task": "answer", "seed": 1}
    env.step("X=mine; cd /tmp; echo 42 > /app/found", "reader")
    assert env.step("cat found; echo [$X] $PWD", "writer").observation == "42\n[] /app"  # files, but no shell
    assert env.step(gem.STOP, "reader")[1:4] == (0.0, True, False)
    with pytest.raises(ResetNeeded, match="agent 'reader' has stopped"):
        env.step("ls", "reader")
    assert not env.step("ls /tests", "writer").info.get("verified")
    last = env.step("cp found answer.txt", "writer")
    assert last[1:4] == (1.0, False, True)
    assert last.info["verified"]
    with pytest.raises(SpecError, match="agent: expected one of reader, writer, got 'other'"):
        env.step("ls", "other")
    env.close()


def test_agents_with_sandboxes_of_their_own(hub):
    env = gem.make("answer@1", hub=hub, agents=["a", "b"], sandboxes="isolated")
    env.reset(seed=1)
    env.step("echo 42 > answer.txt", "a")
    assert env.step("ls answer.txt", "b").info["exit_code"] == 2
    assert env.step("echo $RANDOM", "a").observation == env.step("echo $RANDOM", "b").observation
    assert env.step(gem.STOP, "a").reward == 1.0
    env.step("echo still here", "b")
    assert env.step(gem.STOP, "b").reward == 0.25
    env.close()


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_agents_act_at_the_same_time(hub, sharing):
    """One waits for what the other does, in a step that began earlier."""
    env = gem.make("answer@1", hub=hub, agents=["a", "b"], sandboxes=sharing, command_seconds=60)
    env.reset()
    began, steps = threading.Event(), {}

    def wait():
        began.set()
        steps["a"] = env.step("until [ -e go ]; do sleep 0.02; done; echo went", "a")

    thread = threading.Thread(target=wait)
    thread.start()
    began.wait(60)
    assert env.step("touch go; echo gone", "b").observation == "gone"
    if sharing == "shared":
        thread.join(60)
        assert steps["a"].observation == "went"
        assert env.step(gem.STOP, "a").reward == 0.0
        assert env.step(gem.STOP, "b").reward == 0.25
    else:
        assert thread.is_alive()
        assert env.step(gem.STOP, "b").reward == 0.25
        env._episodes["a"]._sandbox.write_file("go", "")
        thread.join(60)
        assert steps["a"].observation == "went"
    env.close()


# -- environments of others


def test_an_environment_of_rome_is_made_by_its_id():
    """In a process of its own: rock_env.gem imports nothing of rome before it is asked to."""
    script = """
import sys
from rock_env import gem
assert not [name for name in sys.modules if name.partition(".")[0] in ("rome", "jax", "fastapi", "httpx")]
env = gem.make("rome/Terminal-v0", families=["count_matches"], max_chunks=3)
first, second = env.reset(seed=3), env.reset(seed=3)
assert first == second and first[1]["task_id"].startswith("count_matches"), first
assert env.step("<tool_call>echo $((6 * 7))</tool_call>")[0] == "42"
env.close()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(rock_env.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=env)

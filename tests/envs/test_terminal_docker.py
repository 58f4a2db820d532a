"""Episodes in Docker: rewards are what they are elsewhere, and an agent has no more ways to them."""

from collections.abc import Iterator

import pytest

from rome.envs import FAMILIES, HELD_OUT_FAMILIES, TerminalEnv, draft_task, expert_actions


@pytest.fixture
def env(docker_daemon: object) -> Iterator[TerminalEnv]:
    env = TerminalEnv(command_seconds=2.0, backend="docker")
    yield env
    env.close()


def call(command: str) -> str:
    return f"<tool_call>{command}</tool_call>"


def play(env: TerminalEnv, task: object, actions: list[str | None]) -> tuple[float, str]:
    env.reset(options={"task": task})
    for action in actions:
        _, reward, terminated, truncated, info = env.step("" if action is None else call(action))
        if terminated or truncated:
            return reward, info["status"]
    raise AssertionError("the episode did not end")


QUICK = ("follow_hints", "fix_function", "build_archive")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *HELD_OUT_FAMILIES) if name not in QUICK]


@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_the_reference_gets_one_and_doing_nothing_does_not(env: TerminalEnv, family: str) -> None:
    task = draft_task(family, 3, 4)
    assert play(env, task, expert_actions(task, 3, flawed=False)) == (1.0, "completed")
    assert play(env, task, [None]) == (0.0, "completed")


def test_an_episode_goes_on_from_a_snapshot(env: TerminalEnv) -> None:
    task = draft_task("follow_hints", 2, 4)
    first, *rest = expert_actions(task, 0, flawed=False)
    env.reset(options={"task": task})
    env.step(call(str(first)))
    snapshot = env.snapshot()
    env.step(call("rm -rf /app/*"))
    env.restore(snapshot)
    snapshot.delete()
    for action in rest:
        _, reward, terminated, _, _ = env.step("" if action is None else call(action))
    assert (reward, terminated) == (1.0, True)


ATTACKS = [
    # Places that are file systems of their own here, and so always there: /logs and /tests.
    "mkdir -p /tests/test.sh /tests/x /logs/verifier/reward.txt; chmod 000 /logs/verifier /tests /logs /app",
    "printf '#!/bin/sh\\necho 1 > /logs/verifier/reward.txt' > /tests/test.sh; chmod 555 /tests/test.sh /tests",
    "mkdir /logs/verifier; echo 1 > /logs/verifier/reward.txt; chmod -R 500 /logs",
    "head -c 99999999 /dev/zero > /logs/x; head -c 99999999 /dev/zero > /tests/x; touch /logs/{1..9999}; true",
    "(while :; do mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; done) > /dev/null 2>&1 &",
    "ln -s /app /logs/verifier; ln -s /app /tests/test.sh; echo 1 > /app/reward.txt",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_reward_cannot_be_forged(env: TerminalEnv, attack: str) -> None:
    assert play(env, draft_task("follow_hints", 2, 4), [attack, "echo still here", None]) == (0.0, "completed")

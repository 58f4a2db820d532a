"""The GEM API at an admin: the same results as in process, tenants, quotas, and what is left behind."""

import contextlib
import os
import signal
import threading
import time

import pytest
from hub_tasks import write_environment, write_task
from waiting import wait_until

from rock_env import Forbidden, QuotaExceeded, RockError, SandboxDead, SpecError, gem
from rock_env.errors import EntryNotFound, EnvNotFound, ResetNeeded, VerifierFailed
from rock_env.hub import LocalHub
from rock_env.hub.remote import RemoteHub


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "answer")
    write_task(folder / "broken", test="#!/bin/sh\nexit 3\n")
    write_environment(folder / "bare")
    return folder


@pytest.fixture(scope="module")
def user(admin, tasks):
    client = admin.new_tenant("gem")
    for name in ("answer", "broken", "bare"):
        RemoteHub(client).push(tasks / name, f"{name}@1")
    return client


@pytest.fixture(scope="module")
def local(tasks, tmp_path_factory):
    hub = LocalHub(tmp_path_factory.mktemp("local") / "hub")
    for name in ("answer", "broken"):
        hub.push(tasks / name, f"{name}@1")
    return hub


@pytest.fixture
def make():
    """`gem.make`, whose environments are closed at the end, however that comes."""
    made = []

    def make(*arguments, **options):
        made.append(gem.make(*arguments, **options))
        return made[-1]

    yield make
    for env in made:
        with contextlib.suppress(RockError):
            env.close()


def sandboxes_of(client):
    """Live ones, as the tenant sees them."""
    return [row for row in client.get("/v1/sandboxes") if row["ended_at"] is None]


def outcome(function):
    """What a call gives, or the type of what it raises."""
    try:
        return function()
    except RockError as error:
        return type(error)


COMMANDS = (
    "cat hint.txt; echo $RANDOM $ROCK_SEED",
    "cd /tmp; X=$((RANDOM % 1000)); false",
    "echo $X $PWD; ls /tests",
    "a\0b",
    "seq 2000",
    "exit 4",
    "sleep 60",
    "printf '\\377\\303\\244'",
    "echo 42 > /app/answer.txt",
)


# -- the same as in process


@pytest.mark.parametrize("last", [(gem.STOP,), ("echo 9 > answer.txt", gem.STOP, "more"), ("true",) * 3])
def test_one_agents_episode_is_the_same_step_by_step(user, local, last, make):
    options = {"max_steps": 11, "max_observation_chars": 300, "command_seconds": 0.7}
    here = make("answer@1", hub=local, **options)
    there = make("answer@1", client=user, **options)
    assert outcome(lambda: there.step("ls")) == outcome(lambda: here.step("ls")) == ResetNeeded
    for seed in (11, 12):
        assert there.reset(seed=seed) == here.reset(seed=seed)
        for action in (*COMMANDS, *last):
            mine, theirs = outcome(lambda a=action: here.step(a)), outcome(lambda a=action: there.step(a))
            if action == "sleep 60":  # bash tells of the killed process with its number
                assert theirs[1:] == mine[1:]
                assert mine.info["timed_out"]
            else:
                assert theirs == mine, action
        assert outcome(lambda: there.step("ls")) == outcome(lambda: here.step("ls")) == ResetNeeded
    there.close()
    there.close()
    assert outcome(lambda: there.step("ls")) == EnvNotFound
    assert sandboxes_of(user) == []


@pytest.mark.parametrize("sandboxes", ["shared", "isolated"])
def test_several_agents_episode_is_the_same_step_by_step(user, local, sandboxes, make):
    here = make("answer@1", hub=local, agents=["a", "b"], sandboxes=sandboxes)
    there = make("answer@1", client=user, agents=["a", "b"], sandboxes=sandboxes)
    assert (there.agents, there.sandboxes) == (("a", "b"), sandboxes)
    assert there.reset(seed=4) == here.reset(seed=4)
    assert len(sandboxes_of(user)) == (1 if sandboxes == "shared" else 2)
    steps = (
        ("a", "echo 42 > answer.txt; X=1; cd /tmp; echo $RANDOM"),
        ("b", "cat answer.txt; echo [$X] $PWD $RANDOM"),
        ("c", "ls"),
        ("a", gem.STOP),
        ("a", "ls"),
        ("b", "ls /tests"),
        ("b", gem.STOP),
    )
    outcomes = [outcome(lambda s=step: there.step(s[1], s[0])) for step in steps]
    assert outcomes == [outcome(lambda s=step: here.step(s[1], s[0])) for step in steps]
    assert [o.reward for o in outcomes if isinstance(o, tuple)] == (
        [0, 0, 0, 0, 1.0] if sandboxes == "shared" else [0, 0, 1.0, 0, 0.25]
    )
    there.close()
    assert sandboxes_of(user) == []


def test_an_environment_of_rome_is_the_same_step_by_step(user, make):
    options = {"families": ["count_matches"], "horizons": [3], "max_chunks": 3, "max_observation_chars": 100}
    here, there = make("rome/Terminal-v0", **options), make("rome/Terminal-v0", client=user, **options)
    assert outcome(lambda: there.step("ls")) == ResetNeeded
    for seed in (1, 2):
        assert there.reset(seed=seed) == here.reset(seed=seed)
        assert [row["name"] for row in sandboxes_of(user)] == ["gem rome/Terminal-v0"]
        with pytest.raises(SpecError, match="options"):  # in process, a folder of this machine
            user.post("/v1/gem/reset", {"id": there.id, "options": {"task": "/etc"}})
        for action in ("<tool_call>ls -a</tool_call>", "<tool_call>ls /tests</tool_call>", "done"):
            assert there.step(action) == here.step(action)
    assert outcome(lambda: there.step("more")) == ResetNeeded
    there.close()
    assert sandboxes_of(user) == []


def test_failures_are_the_same_errors(user, local, make):
    for env in (make("broken@1", hub=local), make("broken@1", client=user)):
        env.reset()
        with pytest.raises(VerifierFailed, match=r"no usable reward in /logs/verifier; exit code 3"):
            env.step(gem.STOP)
        with pytest.raises(ResetNeeded):
            env.step("ls")
        for seed in (-1, "x"):
            with pytest.raises(SpecError, match="seed"):
                env.reset(seed=seed)
        with pytest.raises(SpecError, match="options: expected none, got 'task'"):
            env.reset(options={"task": "/etc"})
        with pytest.raises(SpecError):
            env.step("\udcff")
        env.close()


# -- whose they are


def test_sandboxes_of_an_environment_are_the_tenants(admin, user, make):
    env = make("answer@1", client=user)
    assert sandboxes_of(user) == []
    env.reset()
    (row,) = sandboxes_of(user)
    assert (row["tenant"], row["name"], row["state"]) == ("gem", "gem answer@1", "running")
    assert row["spec"]["limits"]["memory_bytes"] == 128 << 20
    env.step("echo from-gem > note")
    assert user.sandbox(row["id"]).read_file("note") == b"from-gem\n"
    assert user.audit(row["id"])["chain"]["ok"]
    env.reset()
    (again,) = sandboxes_of(user)
    assert again["id"] != row["id"]
    assert user.get(f"/v1/sandboxes/{row['id']}")["reason"] == "its environment was closed"
    env.close()


def test_other_tenants_and_tokens_have_no_part_in_it(admin, user, make):
    other = admin.new_tenant("gem-other")
    env = make("answer@1", client=user)
    env.reset()
    (box,) = sandboxes_of(user)
    token = admin.client(user.post(f"/v1/sandboxes/{box['id']}/tokens", {})["token"])
    for path, body in (("reset", {}), ("step", {"action": "ls"}), ("close", {})):
        with pytest.raises(EnvNotFound):
            other.request("POST", f"/v1/gem/{path}", json={"id": env.id, **body})
        with pytest.raises(Forbidden):
            token.request("POST", f"/v1/gem/{path}", json={"id": env.id, **body})
        with admin.http("rk_0000000000000000_" + "A" * 43) as http:
            assert http.post(f"/v1/gem/{path}", json={"id": env.id, **body}).status_code == 401
    with pytest.raises(Forbidden):
        make("answer@1", client=token)
    for env_id in ("answer@1", "gem/answer@1"):
        with pytest.raises(EntryNotFound):
            make(env_id, client=other)
    user.request("PUT", "/v1/hub/entries/answer/1", params={"public": True}, content=_archive(user, "answer@1"))
    shown = make("gem/answer@1", client=other)
    assert shown.reset(seed=1)[0] == env.reset(seed=1)[0]
    shown.close()
    assert env.step("echo well").observation == "well"
    env.close()


def _archive(client, reference):
    name, _, version = reference.partition("@")
    return client.request("GET", f"/v1/hub/entries/{name}/{version}/archive").content


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("CartPole-v1", {}, "expected NAME@VERSION of the hub, or one of rome/Terminal-v0"),
        ("os:anything-v0", {}, "expected NAME@VERSION"),
        ("bare@1", {}, "without instruction and tests"),
        ("no reference@1", {}, "hub reference: expected"),
        ("rome/Terminal-v0", {"task": "/etc"}, "task"),
        ("rome/Terminal-v0", {"max_steps": 3}, "takes .*, got 'max_steps'"),
        ("rome/Terminal-v0", {"backend": "docker"}, "backend: expected one of bubblewrap"),
        ("rome/Terminal-v0", {"agents": ["a"]}, "for one agent"),
        ("answer@1", {"families": ["x"]}, "a task takes .*, got 'families'"),
        ("answer@1", {"images": {"a": "/etc"}}, "images"),
        ("answer@1", {"command_seconds": 1e9}, "command_seconds"),
        ("answer@1", {"backend": "none"}, "backend: expected one of bubblewrap"),
        ("answer@1", {"agents": ["a", "a"]}, "different names"),
        ("answer@1", {"agents": ["a"], "sandboxes": "both"}, "sandboxes"),
    ],
)
def test_what_is_not_the_tenants_to_choose_is_refused(user, env_id, options, message, make):
    with pytest.raises(SpecError, match=message):
        make(env_id, client=user, **options).reset()


def test_quotas_bound_environments(admin, tasks, make):
    small = admin.new_tenant("gem-small", max_sandboxes=2)
    RemoteHub(small).push(tasks / "answer", "answer@1")
    pair = make("answer@1", client=small, agents=["a", "b"])
    with pytest.raises(QuotaExceeded, match="quota is 2 sandboxes, this would make 3"):
        make("answer@1", client=small)
    pair.close()
    with pytest.raises(QuotaExceeded, match="would make 3"):
        make("answer@1", client=small, agents=["a", "b", "c"])
    env = make("answer@1", client=small, agents=["a", "b", "c"], sandboxes="shared")
    with small.start(), small.start():  # sandboxes that are no environment's count as well
        with pytest.raises(QuotaExceeded):
            env.reset()
    env.reset()
    env.close()


# -- many at once, and what is left behind


def test_steps_do_not_wait_for_each_other(admin, user, make):
    """A step waits for what another request does, and so do more than the server has cores."""
    envs = [make("answer@1", client=user, command_seconds=60) for _ in range(12)]
    steps = {}

    def play(number):
        envs[number].reset(seed=number)
        steps[number] = envs[number].step("until [ -e go ]; do sleep 0.05; done; echo $ROCK_SEED")

    threads = [threading.Thread(target=play, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len([row for row in sandboxes_of(user) if row["state"] == "running"]) == 12, 60)
    with admin.http() as http:
        assert http.get("/health").is_success
    assert steps == {}
    for row in sandboxes_of(user):
        user.sandbox(row["id"]).write_file("go", "")
    for thread in threads:
        thread.join(120)
    assert {number: step.observation for number, step in steps.items()} == {n: str(n) for n in range(12)}
    for env in envs:
        env.close()
    assert sandboxes_of(user) == []


def test_a_close_ends_a_step_that_is_under_way(user, make):
    env = make("answer@1", client=user, command_seconds=600)
    env.reset()
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome(lambda: env.step("touch begun; sleep 500"))))
    thread.start()
    (row,) = sandboxes_of(user)
    wait_until(lambda: "begun" in [info.name for info in user.sandbox(row["id"]).list_files()])
    env.close()
    thread.join(60)
    assert outcomes == [SandboxDead]
    assert sandboxes_of(user) == []


def test_a_forgotten_environment_is_closed(user, make):
    """Also one in which something still runs; one that is used is not."""
    used = make("answer@1", client=user, idle_seconds=10)
    forgotten = make("answer@1", client=user, idle_seconds=4)
    empty = make("answer@1", client=user, idle_seconds=1)
    used.reset()
    forgotten.reset()
    forgotten.step("sleep 600 &")
    deadline = time.monotonic() + 60
    while len(sandboxes_of(user)) > 1:
        used.step("true")
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for env in (forgotten, empty):
        with pytest.raises(EnvNotFound, match="was idle for too long"):
            env.reset()
    assert used.step("echo well").observation == "well"
    used.close()


def test_an_environment_whose_sandbox_died_says_so(admin, user, make):
    env = make("answer@1", client=user)
    env.reset()
    (row,) = sandboxes_of(user)
    user.request("DELETE", f"/v1/sandboxes/{row['id']}")
    with pytest.raises(SandboxDead, match="has ended"):
        env.step("ls")
    with pytest.raises(ResetNeeded):
        env.step("ls")
    env.reset()
    os.kill(admin.worker_pid(), signal.SIGKILL)
    kind = outcome(lambda: env.step("ls"))
    assert issubclass(kind, RockError), kind
    assert kind is not ResetNeeded
    with pytest.raises(ResetNeeded):
        env.step("ls")
    wait_until(lambda: outcome(env.reset) is not None and outcome(lambda: env.step("echo well"))[0] == "well", 60)
    env.close()


def test_environments_end_with_their_admin(start_admin, tasks):
    """Killed: they are gone, and their sandboxes end when they were idle. Told to end: at once, steps and all."""
    admin = start_admin()
    user = admin.new_tenant("ender")
    RemoteHub(user).push(tasks / "answer", "answer@1")
    env = gem.make("answer@1", client=user, idle_seconds=5)
    env.reset()
    admin.kill()
    admin.start()
    user = admin.client(user.token)
    with pytest.raises(EnvNotFound, match="went with its admin"):
        user.post("/v1/gem/step", {"id": env.id, "action": "ls"})
    wait_until(lambda: sandboxes_of(user) == [], 60)
    env = gem.make("answer@1", client=user, command_seconds=600)
    env.reset()
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome(lambda: env.step("touch begun; sleep 500"))))
    thread.start()
    (row,) = sandboxes_of(user)
    wait_until(lambda: "begun" in [info.name for info in user.sandbox(row["id"]).list_files()])
    admin.process.send_signal(signal.SIGTERM)
    assert admin.process.wait(60) == 0
    thread.join(60)
    assert issubclass(outcomes[0], RockError)
    admin.stop()

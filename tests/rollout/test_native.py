"""Agents that speak to their model themselves: real sandboxes, a real program inside, a real engine and verifier."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rome.data import collect_episodes, fixed_tasks
from rome.envs import TerminalEnv, draft_task
from rome.ipa import ObjectiveConfig
from rome.models import ChatRenderer, ModelConfig, init_params, token_log_probs, train_tokenizer
from rome.rollout import GroupRequest
from rome.rollout.native import NativeConfig, NativeRollouts
from rome.rollout.service import RomeChat, Scheduler
from rome.rollout.stream import StreamConfig, StreamEngine
from rome.training.packing import pack_trajectories
from rome.training.policy import PolicySettings, PolicyTrainer
from rome.training.state import OptimizerConfig, init_state, make_optimizer
from rome.trajectory import Status

pytestmark = [pytest.mark.usefixtures("sandbox_machine"), pytest.mark.timeout(500)]
LENGTH = 400

# What an agent is made of, with nothing but the standard library. `MODE` chooses what else it does.
AGENT = r"""
import json, os, subprocess, sys, threading, urllib.request
MODE = sys.argv[1]
TOOLS = [{"type": "function", "function": {"name": "shell", "parameters": {"type": "object",
          "properties": {"command": {"type": "string"}}, "required": ["command"]}}}]

def ask(messages, **more):
    body = json.dumps({"model": "policy", "messages": messages, "tools": TOOLS, **more}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.load(answer)["choices"][0]["message"]

def act(message):
    calls = message.get("tool_calls")
    if not calls:
        return None
    command = json.loads(calls[0]["function"]["arguments"])["command"]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=5, errors="replace")
    return {"role": "tool", "tool_call_id": calls[0]["id"], "content": (done.stdout + done.stderr)[:40]}

def loop(messages, steps):
    for _ in range(steps):
        message = ask(messages)
        answer = act(message)
        if answer is None:
            return messages + [message]
        messages = messages + [message, answer]
    return messages

task = [{"role": "user", "content": os.environ["ROME_INSTRUCTION"]}]
if MODE == "plain":
    loop(task, 4)
elif MODE == "team":
    threads = [threading.Thread(target=loop, args=([{"role": "user", "content": "part %d" % n}], 2)) for n in range(3)]
    [thread.start() for thread in threads]
    history = loop(task, 2)
    [thread.join() for thread in threads]
    loop([{"role": "user", "content": "summary of %d messages" % len(history)}], 2)
elif MODE == "solve":
    ask(task)
    subprocess.run(["bash", "-c", os.environ["ROME_SOLUTION"]])
elif MODE == "idle":
    print("nothing to say")
elif MODE == "hang":
    ask(task)
    import time
    time.sleep(1000)
elif MODE == "greedy":
    for n in range(10):
        try:
            ask(task)
        except urllib.error.HTTPError as error:
            print(error.code, error.read())
            break
"""


@pytest.fixture(scope="module")
def policy():
    """A policy that knows the tasks' words, and whose chunks end: (parameters, config, renderer)."""
    specs = fixed_tasks(("follow_hints", "count_matches"), (2, 3), 16, 5_000)
    episodes = collect_episodes(specs, 0.0, 0, functools.partial(TerminalEnv, max_chunks=8))
    renderer = ChatRenderer(train_tokenizer((text for e in episodes for text in e.texts()), 320))
    config = ModelConfig(
        vocab_size=renderer.tokenizer.vocab_size,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        tie_embeddings=True,
    )
    return init_params(config, jax.random.key(0)), config, renderer


@pytest.fixture(scope="module")
def scheduler(policy):
    params, config, renderer = policy
    settings = StreamConfig(slots=8, max_length=LENGTH, extend_buckets=(16, 64))
    engine = StreamEngine(params, config, settings, renderer.stop_ids, renderer.tokenizer.pad_id)
    engine.warmup()
    scheduler = Scheduler(engine, queue_limit=64)
    yield scheduler
    scheduler.close()


def roll(policy, scheduler, mode, groups=1, size=2, **changes):
    renderer = policy[2]
    settings = {"agent_seconds": 100.0, "request_seconds": 90.0, "max_tokens": 12, "workers": 4, **changes}
    config = NativeConfig(program={"/work/agent.py": AGENT}, command=f"python3 /work/agent.py {mode}", **settings)
    native = NativeRollouts(scheduler, renderer, RomeChat(renderer), config)
    requests = [GroupRequest(draft_task("follow_hints", 9_000 + g, 2), f"g{g}", size, 40 + g) for g in range(groups)]
    return native.run(requests), native


def check_logps(policy, trajectories):
    """What the engine recorded is what the training path computes for the same tokens."""
    params, config, _ = policy
    rows = pack_trajectories(trajectories, LENGTH, 16, 1)
    logp = np.asarray(token_log_probs(params, config, rows.tokens, rows.positions, rows.segment_ids)[0])
    sampled = rows.chunk_ids >= 0
    assert sampled.any()
    np.testing.assert_allclose(logp[sampled], rows.behavior_logp[sampled], atol=1e-4)


def test_a_program_that_speaks_openai_is_rolled_out_and_trained_on(policy, scheduler):
    groups, native = roll(policy, scheduler, "plain", groups=2, size=2)
    assert native.lost == {}
    assert [len(group) for group in groups] == [2, 2]
    trajectories = [t for group in groups for t in group]
    assert {t.id for t in trajectories} == {"g0/0", "g0/1", "g1/0", "g1/1"}
    assert all(t.status is Status.COMPLETED for t in trajectories)
    assert all(
        t.prompt.text == draft_task("follow_hints", 9_000 + int(t.id[1]), 2).task.instruction for t in trajectories
    )
    check_logps(policy, trajectories)

    params, config, _ = policy
    optimizer = OptimizerConfig(learning_rate=1e-2)
    settings = PolicySettings(1, 2, 2, LENGTH, 16, 2, optimizer)
    transformation = make_optimizer(optimizer, 1)
    trainer = PolicyTrainer(config, ObjectiveConfig(failure_reward=-1.0), transformation, settings)
    state = init_state(jax.tree.map(np.array, params), transformation)
    state, update = trainer.update(state, trajectories, 0)
    assert update.metrics["train/grad_norm"] > 0
    assert update.metrics["mismatch/chunk_mean"] == pytest.approx(1.0, abs=1e-3)


def test_the_same_seed_gives_the_same_tokens(policy, scheduler):
    def tokens(groups):
        return {t.id: [c.tokens.tolist() for c in t.chunks] for group in groups for t in group}

    first, second = roll(policy, scheduler, "plain")[0], roll(policy, scheduler, "plain")[0]
    assert tokens(first) == tokens(second)
    assert len({str(value) for value in tokens(first).values()}) == 2  # samples of a group differ


def test_sub_agents_and_a_compacted_history_are_segments_with_one_reward(policy, scheduler):
    ((*segments,),) = roll(policy, scheduler, "team", size=1)[0]
    assert len(segments) == 5
    texts = sorted(t.prompt.text for t in segments)
    assert texts[1:4] == ["part 0", "part 1", "part 2"]
    assert texts[4].startswith("summary of")
    assert len({t.final_reward for t in segments}) == 1
    trained = [chunk.id for t in segments for chunk in t.chunks[t.prefix_chunks :]]
    assert len(trained) == len(set(trained))
    check_logps(policy, segments)


def test_the_verifier_judges_what_the_program_did(policy, scheduler):
    solution = draft_task("follow_hints", 9_000, 2).solution
    renderer = policy[2]
    config = NativeConfig(
        program={"/work/agent.py": AGENT.replace('os.environ["ROME_SOLUTION"]', repr(solution))},
        command="python3 /work/agent.py solve",
        max_tokens=12,
    )
    native = NativeRollouts(scheduler, renderer, RomeChat(renderer), config)
    ((t,),) = native.run([GroupRequest(draft_task("follow_hints", 9_000, 2), "g", 1, 0)])
    assert t.final_reward == 1.0
    ((other,),) = roll(policy, scheduler, "plain", size=1)[0]
    assert other.final_reward == 0.0


def test_a_program_that_does_not_end_is_stopped_and_judged(policy, scheduler):
    ((t,),) = roll(policy, scheduler, "hang", size=1, agent_seconds=8.0)[0]
    assert t.status is Status.TRUNCATED
    assert t.final_reward == 0.0


def test_a_program_that_never_asks_is_no_sample(policy, scheduler):
    groups, native = roll(policy, scheduler, "idle", size=1, max_retries=1)
    assert groups == []
    assert set(native.lost) == {"g0/0", "g0/0+1"}
    assert all("never asked its model: nothing to say" in reason for reason in native.lost.values())


def test_a_program_that_asks_too_much_is_told_so(policy, scheduler):
    ((*segments,),) = roll(policy, scheduler, "greedy", size=1, max_requests=3)[0]
    assert len(segments) == 3  # the same request three times: three answers


@pytest.mark.parametrize("field", ["agent_seconds", "request_seconds", "max_requests", "max_tokens", "workers"])
def test_config_errors_name_the_field(field):
    config = NativeConfig(program={"/a": "x"}, command="a")
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(config, **{field: 0})

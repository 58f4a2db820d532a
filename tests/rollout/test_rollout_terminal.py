"""Rollouts in real sandboxes, with the real renderer."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rome.envs import TerminalEnv, draft_task, expert_actions
from rome.models import ChatRenderer, ModelConfig, init_params, token_log_probs, train_tokenizer
from rome.rollout import DecodeEngine, EngineConfig, GroupRequest, RolloutConfig, RolloutRunner
from rome.trajectory import Chunk, Observation, Status, Trajectory

LENGTH = 384


@pytest.fixture(scope="module")
def tasks():
    return [draft_task(family, seed, 4) for seed, family in enumerate(["follow_hints", "count_matches", "move_files"])]


@pytest.fixture(scope="module")
def renderer(tasks):
    texts = [task.task.instruction for task in tasks]
    texts += [action or "" for task in tasks for action in expert_actions(task, 0, flawed=False)]
    return ChatRenderer(train_tokenizer(texts, 384))


@pytest.fixture(scope="module")
def policy(renderer):
    config = ModelConfig(
        vocab_size=renderer.tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
    )
    return config, init_params(config, jax.random.key(0))


def expert_prefix(task, renderer):
    """The expert's commands as a trajectory (its last chunk is the final answer)."""
    chunks = []
    for index, command in enumerate(expert_actions(task, 0, flawed=False)):
        tokens = np.array(renderer.chunk(command), np.int32)
        chunks.append(Chunk(f"e#{index}", tokens, np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32)))
    nothing = Observation(np.array([1], np.int32))
    answers = (nothing,) * (len(chunks) - 1)
    return Trajectory("e", "e", task.task, 0, nothing, tuple(chunks), answers, 1.0, Status.COMPLETED, 0)


def roll(policy, renderer, requests, **engine):
    config, params = policy
    settings = EngineConfig(slots=6, max_length=LENGTH, extend_buckets=(32,), max_chunk_tokens=8, **engine)
    engine = DecodeEngine(params, config, settings, renderer.stop_ids, renderer.tokenizer.pad_id)
    with RolloutRunner(engine, renderer, TerminalEnv, RolloutConfig(env_threads=6)) as runner:
        groups = runner.run(requests)
    assert not runner.stats.failures
    return [sample for group in groups for sample in group], runner


def test_the_experts_prefix_is_replayed_for_real_and_earns_the_reward(policy, renderer, tasks):
    requests = []
    for task in tasks:
        expert = expert_prefix(task, renderer)
        whole = len(expert.chunks) - 1
        requests.append(GroupRequest(task, f"{task.task.id}/whole", 2, 0, prefix=expert, prefix_chunks=whole))
        requests.append(GroupRequest(task, f"{task.task.id}/none", 2, 0))
    samples, runner = roll(policy, renderer, requests)
    assert len(samples) == 12
    for sample in samples:
        whole = sample.group_id.endswith("whole")
        # the random policy does not stop in 8 tokens: what it said is taken as the final answer
        assert sample.final_reward == (1.0 if whole else 0.0)
        assert sample.status is Status.COMPLETED
        assert sample.prompt.text == sample.task.instruction
    check_log_probs(policy, samples)
    given = sum(len(p) for s in samples for k, p in s.segments() if k < s.prefix_chunks)
    stats = runner.engine.stats
    assert stats.prefilled_tokens + stats.copied_tokens == given


def check_log_probs(policy, samples):
    config, params = policy
    path = jax.jit(token_log_probs, static_argnums=1)
    for sample in samples:
        tokens = np.concatenate([part for _, part in sample.segments()])
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        segments = (np.arange(LENGTH) < len(tokens)).astype(np.int32)[None]
        logp = np.asarray(path(params, config, row, np.arange(LENGTH, dtype=np.int32)[None], segments)[0][0])
        start = 0
        for index, part in sample.segments():
            if index >= sample.prefix_chunks:
                expected = logp[start : start + len(part)]
                np.testing.assert_allclose(sample.chunks[index].behavior_logp, expected, atol=1e-4)
            start += len(part)


def test_reruns_in_real_sandboxes_are_bit_identical(policy, renderer, tasks):
    def once():
        expert = expert_prefix(tasks[0], renderer)
        request = GroupRequest(tasks[0], "g", 6, 3, prefix=expert, prefix_chunks=2)
        return roll(policy, renderer, [request])[0]

    for a, b in zip(once(), once(), strict=True):
        assert [part.tobytes() for _, part in a.segments()] == [part.tobytes() for _, part in b.segments()]
        assert [c.behavior_logp.tobytes() for c in a.chunks] == [c.behavior_logp.tobytes() for c in b.chunks]
        assert a.final_reward == b.final_reward

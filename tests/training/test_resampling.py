"""Starts from a prefix: which, how they move, what a checkpoint keeps, and that they give signal in a real sandbox."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from training_toys import trajectory

from rome.data import TaskSampler, TaskSpec, collect_episodes, tokenize_episodes
from rome.envs import TerminalEnv
from rome.ipa import ObjectiveConfig
from rome.models import ChatRenderer, ModelConfig, init_params, train_tokenizer
from rome.rollout import DecodeEngine, EngineConfig, RolloutRunner
from rome.training.config import ConfigError
from rome.training.policy import PolicyTrainer
from rome.training.resampling import Expert, Resampler, ResamplingSettings, Start, experts_to_imitate
from rome.training.rl import GroupSource, rollout_metrics
from rome.training.settings import load_settings
from rome.training.state import init_state, make_optimizer

RNG = np.random.default_rng(0)


def played(name, reward, chunks=4, family="toy", **changes):
    t = trajectory(RNG, name, reward, chunks, **changes)
    return dataclasses.replace(t, task=dataclasses.replace(t.task, family=family))


DEMONSTRATIONS = [
    *(played(f"demo-{i}", 1.0, family="easy") for i in range(3)),
    *(played(f"demo-{i}", 1.0, family="hard") for i in range(3, 6)),
    played("demo-6", 0.0, family="hard"),  # flawed
    played("demo-7", 1.0, chunks=1, family="hard"),  # nothing to replay
]


def resampler(**settings):
    return Resampler(ResamplingSettings(**{"fraction": 0.5, **settings}), DEMONSTRATIONS, seed=1)


def group(*rewards):
    return [played(f"s{i}", reward) for i, reward in enumerate(rewards)]


def test_the_fraction_of_groups_starts_from_a_prefix():
    for fraction, expected in ((0.0, 0), (0.25, 10), (0.5, 20), (0.9, 36)):
        starts = [resampler(fraction=fraction).next(n, {}) for n in range(40)]
        assert sum(start is not None for start in starts) == expected


def test_a_cell_moves_back_chunk_by_chunk_as_its_groups_succeed():
    drawn = resampler(fraction=0.99, threshold=0.5)
    easy, hard = DEMONSTRATIONS[0], DEMONSTRATIONS[3]
    for prefix in (3, 2, 1):
        starts = [start for n in range(1, 30) if (start := drawn.next(n, {})) and start.expert.task.family == "easy"]
        assert {start.prefix for start in starts} == {prefix}
        drawn.record(Start(easy, prefix), group(1, 0, 0))  # a third is not enough
        assert drawn.metrics()["resampling/chunks_left_mean"] == (4 - prefix + 1) / 2
        drawn.record(Start(easy, prefix), group(1, 0))
        drawn.record(Start(easy, prefix), group(1, 1))  # drawn before the step back: counts no more
    starts = [start for n in range(1, 30) if (start := drawn.next(n, {})) is not None]
    assert {(start.expert.task.family, start.prefix) for start in starts} == {("hard", 3)}  # easy is at its start
    assert {start.expert.id for start in starts} == {t.id for t in DEMONSTRATIONS[3:6]}
    strict = resampler(threshold=1.0)
    strict.record(Start(hard, 3), group(1, 0))
    assert strict.metrics()["resampling/chunks_left_mean"] == 1


def test_cells_that_fail_are_drawn_more_often():
    starts = [resampler().next(n, {"hard/4": 0.0, "easy/4": 1.0}) for n in range(1, 60, 2)]
    assert sum(start.expert.task.family == "hard" for start in starts) > 24


def test_anchors_of_one_expert_locate_its_crucial_chunk():
    drawn = resampler(start="uniform", anchors=3, fork_level=0.05)
    starts = [drawn.next(n, {}) for n in (1, 3, 5)]
    assert [start.prefix for start in starts] == [0, 2, 3]
    assert len({start.expert.id for start in starts}) == 1
    assert drawn.record(starts[2], group(1, 1, 1, 1)) == []
    assert drawn.record(starts[0], group(0, 0, 0, 0)) == []
    (fork,) = drawn.record(starts[1], group(0, 0, 0, 0))
    assert (fork.prefix, fork.after) == (2, 3)
    assert drawn.metrics() == {"resampling/crucial_chunks": 1.0}
    lenient = resampler(start="uniform", anchors=3, fork_level=0.01)
    starts = [lenient.next(n, {}) for n in (1, 3, 5)]
    rewards = ((0,) * 4, (0,) * 4, (1,) * 4)
    assert [lenient.record(s, group(*r)) for s, r in zip(starts, rewards, strict=True)] == [[], [], []]
    drawn = {tuple(r.next(n, {}).prefix for n in (1, 3)) for seed in range(9) for r in [_random(seed)]}
    assert len(drawn) > 2


def _random(seed):
    return Resampler(ResamplingSettings(fraction=0.5, start="random", anchors=2), DEMONSTRATIONS, seed)


def test_failures_are_resampled_once_and_never_imitated():
    drawn = resampler(source="failure", start="uniform", anchors=2)
    assert drawn.next(1, {}) is None  # nothing has failed yet
    drawn.observe([played("a", 0.0, 2), played("b", 0.0, 5)])
    drawn.observe([played("c", 0.0, 3), played("d", 1.0, 6)])
    starts = [drawn.next(n, {}) for n in (3, 5, 7)]
    assert [(s.expert.id, s.prefix) if s else None for s in starts] == [("b", 0), ("b", 4), None]
    assert experts_to_imitate("always", [(starts[1], group(0, 0))]) == []


@pytest.mark.parametrize("imitation", ["off", "fallback", "always"])
def test_what_is_imitated(imitation):
    one, two = DEMONSTRATIONS[:2]
    batch = [(Start(one, 1), group(0, 0)), (Start(one, 2), group(0, 0)), (Start(two, 3), group(1, 0))]
    expected = {"off": [], "fallback": [Expert(one, 3)], "always": [Expert(one, 3), Expert(two, 4)]}[imitation]
    found = experts_to_imitate(imitation, batch)
    assert [(e.trajectory.id, e.chunks) for e in found] == [(e.trajectory.id, e.chunks) for e in expected]


@pytest.mark.parametrize(
    "settings",
    [{}, {"start": "random", "anchors": 3}, {"source": "failure", "start": "uniform"}],
    ids=["rollback", "anchors", "failures"],
)
def test_a_checkpoint_continues_the_same_stream(settings):
    def drive(drawn, numbers):
        starts = []
        for number in numbers:
            start = drawn.next(number, {"hard/4": 0.1})
            starts.append((start.expert.id, start.prefix) if start else None)
            outcome = group(*(float((number + i) % 3 == 0) for i in range(2)))
            if start:
                drawn.record(start, outcome)
            else:
                drawn.observe([played(f"own-{number}-{i}", 0.0) for i in range(2)])
        return starts

    whole, halves = resampler(**settings), resampler(**settings)
    expected = drive(whole, range(40))
    assert drive(halves, range(19)) == expected[:19]
    pending = Start(played("pending", 0.0), 2)
    saved = msgpack.packb(halves.state_dict([pending]))
    resumed = resampler(**settings)
    known = resumed.load_state_dict(msgpack.unpackb(saved))
    assert known["pending"].chunks[1].tokens.tolist() == pending.expert.chunks[1].tokens.tolist()
    assert drive(resumed, range(19, 40)) == expected[19:]
    assert len(set(expected)) > 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fraction", 1.0),
        ("fraction", -0.1),
        ("source", "teacher"),
        ("start", "end"),
        ("threshold", 0.0),
        ("anchors", 0),
        ("fork_level", 1.5),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        ResamplingSettings(**{field: value})
    with pytest.raises(ValueError, match="start: expected uniform or random"):
        ResamplingSettings(source="failure")


# --- in a real sandbox -----------------------------------------------------------------------------------------------

TINY = Path(__file__).parents[1] / "experiments" / "tiny_run.py"


def tiny_settings(**resampling):
    config = runpy.run_path(str(TINY))["get_config"]()
    config.ipa.failure_reward = 0.0
    config.tasks.families = ("move_files",)
    config.resampling.update(resampling)
    return load_settings(config)


def test_imitation_without_experts_is_refused():
    config = runpy.run_path(str(TINY))["get_config"]()
    config.ipa.imitation = "always"
    with pytest.raises(ConfigError, match=r"ipa.imitation: expected off, or resampling.fraction > 0"):
        load_settings(config)
    config.resampling.fraction = 0.25
    assert load_settings(config).resampling.fraction == 0.25
    config.resampling.update(source="failure", start="uniform")
    with pytest.raises(ConfigError, match=r"ipa.imitation: expected off"):
        load_settings(config)


@pytest.fixture(scope="module")
def world():
    """Two demonstrations of a family that the untrained policy can't solve, a tokenizer, that policy's engine."""
    specs = [TaskSpec("move_files", 3, seed) for seed in (1, 2)]
    episodes = collect_episodes(specs, 0.0, 0, TerminalEnv, workers=2)
    renderer = ChatRenderer(train_tokenizer((text for e in episodes for text in e.texts()), 320))
    model = ModelConfig(
        vocab_size=renderer.tokenizer.vocab_size,
        hidden_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=32,
        scan_layers=False,
    )
    params = init_params(model, jax.random.key(0))
    config = EngineConfig(slots=4, cohorts=1, max_length=192, extend_buckets=(32,), max_chunk_tokens=8)
    engine = DecodeEngine(params, model, config, renderer.stop_ids, renderer.tokenizer.pad_id)
    return tokenize_episodes(episodes, renderer), renderer, model, params, engine


def batch_of(world, state=None, **resampling):
    demonstrations, renderer, *_, engine = world
    settings = tiny_settings(**resampling)
    sampler = TaskSampler(settings.tasks.families, (3,), seed=0)
    with RolloutRunner(engine, renderer, TerminalEnv) as runner:
        source = GroupSource(settings, runner, sampler, demonstrations)
        if state is not None:
            source.load_state_dict(*state)
        groups = source.batch(0)
        return source, groups, source.state_dict()


def test_a_family_without_success_gets_signal_from_a_prefix_in_a_real_sandbox(world):
    """The expert's commands run for real; the policy only has to stop there. From the start it never succeeds."""
    demonstrations, _, model, params, _ = world
    _, plain, _ = batch_of(world, fraction=0.0)
    source, mixed, state = batch_of(world, fraction=0.5)
    assert not any(t.succeeded for group in plain for t in group)
    led = [group for group in mixed if group[0].prefix_chunks]
    assert len(led) == 1
    for t in led[0]:
        (expert,) = [d for d in demonstrations if d.task.id == t.task.id]
        assert t.prefix_chunks == len(expert.chunks) - 1
        for k in range(t.prefix_chunks):
            assert t.chunks[k].tokens.tolist() == expert.chunks[k].tokens.tolist()
            assert t.observations[k].text == expert.observations[k].text  # executed again, in another sandbox
        assert t.succeeded
    metrics = rollout_metrics(mixed, 0) | source.metrics()
    assert metrics["train/success"] == 0  # the curve is about the initial state
    assert metrics["resampling/success"] == 1
    assert metrics["resampling/chunks_left_mean"] == 2  # the next start is one chunk earlier
    assert "move_files/3" in source.sampler.success and source.sampler.success["move_files/3"] < 0.5
    # and the update: nothing to learn from the first batch, something from the second
    chosen = dataclasses.replace(tiny_settings().rl, row_length=192, micro_rows=1)
    trainer = PolicyTrainer(model, ObjectiveConfig(), make_optimizer(chosen.optimizer, 10), chosen)
    fresh = init_state(jax.tree.map(jax.numpy.array, params), make_optimizer(chosen.optimizer, 10))
    fresh, update = trainer.update(fresh, [t for group in plain for t in group], 0)
    assert update.metrics["train/nothing_to_train"] == 1
    _, update = trainer.update(fresh, [t for group in mixed for t in group], 0)
    assert update.metrics["train/grad_norm"] > 0
    assert update.metrics["train/tokens"] == sum(len(t.chunks[-1].tokens) for t in led[0])
    # a checkpoint made now leads to the same next batch as going on does
    json.dumps(state[0])
    again = [batch_of(world, state, fraction=0.5)[1] for _ in range(2)]
    first, second = ([[(t.id, t.prefix_chunks, t.chunks[-1].tokens.tolist()) for t in g] for g in b] for b in again)
    assert first == second
    assert {t.prefix_chunks for g in again[0] for t in g} == {0, len(demonstrations[0].chunks) - 2}

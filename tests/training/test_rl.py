"""Where batches come from: what is filtered on the way, and that a checkpoint knows of it."""

import runpy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
from rollout_toys import Journal, ToyEnv, ToyRenderer, same_trajectory, toy_engine, toy_params

from rome.data import TaskSampler
from rome.rollout import RolloutRunner
from rome.training.config import ConfigError
from rome.training.rl import GroupSource
from rome.training.settings import load_settings

TINY = Path(__file__).parents[1] / "experiments" / "tiny_run.py"
STEPS, LIMIT = 4, 2


def settings(**rollout):
    config = runpy.run_path(str(TINY))["get_config"]()
    config.rollout.update(rollout)
    return load_settings(config)


def batches(steps, state=None, **rollout):
    """The source after the steps, and its batches: of toy environments that everybody solves."""
    s = settings(**rollout)
    sampler = TaskSampler(s.tasks.families, s.tasks.horizons, s.seed)
    engine = toy_engine(steps[0] % 2)
    if steps[0]:
        engine.update_params(toy_params(steps[0] % 2), steps[0])
    with RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal(reward=1.0))) as runner:
        source = GroupSource(s, runner, sampler)
        if state is not None:
            source.load_state_dict(*state)
        taken = []
        for step in steps:
            taken.append(source.batch(step))
            source.publish(toy_params((step + 1) % 2), step + 1)
        source.stop()
    return source, [t for batch in taken for group in batch for t in group]


def test_filtered_groups_are_replaced_and_their_outcome_is_not_lost():
    source, samples = batches(range(STEPS), filter_groups=LIMIT)
    plain, unfiltered = batches(range(STEPS))
    assert len(samples) == len(unfiltered) == STEPS * 4
    counts, filtered = source.buffer.stats, STEPS * LIMIT
    assert (counts.filtered_solved, counts.filtered_failed) == (filtered, 0)
    assert source.metrics()["buffer/filtered_solved"] == filtered
    assert source.metrics()["rollout/success"] == 1.0
    assert source.sampler.cursor == plain.sampler.cursor + filtered  # each was replaced by the next
    assert source.sampler.success != plain.sampler.success
    assert not source.state_dict()[0]["pending"]


def test_a_resumed_run_filters_as_one_that_was_not_interrupted():
    _, whole = batches(range(STEPS), filter_groups=LIMIT)
    half, first = batches(range(STEPS // 2), filter_groups=LIMIT)
    _, second = batches(range(STEPS // 2, STEPS), half.state_dict(), filter_groups=LIMIT)
    assert len(first) + len(second) == len(whole)
    assert all(same_trajectory(a, b) for a, b in zip(whole, first + second, strict=True))


def test_asynchronous_rollouts_filter_too_and_keep_their_books():
    source, samples = batches(range(STEPS), filter_groups=LIMIT, async_ratio=1.0)
    counts = source.buffer.stats
    assert STEPS * LIMIT <= counts.filtered_solved <= (STEPS + 1) * LIMIT
    assert source.buffer.take_filtered() == []
    cursor, _ = source.state_dict()
    done = {t.group_id for t in samples}
    assert done.isdisjoint(entry[0] for entry in cursor["pending"])
    assert len(cursor["pending"]) == source.sampler.cursor - len(done) - counts.filtered_solved


def test_single_samples_can_not_be_filtered():
    config = runpy.run_path(str(TINY))["get_config"]()
    config.rollout.filter_groups, config.rl.group_size = 1, 1
    with pytest.raises(ConfigError, match=r"rollout.filter_groups: expected 0 with rl.group_size = 1"):
        load_settings(config)

"""Staleness semantics of the sample buffer, against a model of it; its state survives a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import threading
import time

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rome.rollout import BufferClosed, BufferTimeout, SampleBuffer
from rome.rollout.buffer import has_one_reward
from rome.trajectory import Chunk, Observation, Status, Task, Trajectory


def sample(
    group: str, index: int, version: int, status: Status = Status.COMPLETED, reward: float = 1.0, prefix: int = 0
) -> Trajectory:
    tokens = np.array([1, 2, 3], np.int32)
    chunk = Chunk(f"{group}/{index}#0", tokens, np.full(3, -0.5, np.float32), np.full(3, version, np.int32))
    prompt = Observation(np.array([4, 5], np.int32))
    return Trajectory(
        id=f"{group}/{index}",
        group_id=group,
        task=Task("t", "do"),
        seed=0,
        prompt=prompt,
        chunks=(chunk,),
        observations=(),
        final_reward=reward if status.is_reliable else None,
        status=status,
        start_version=version,
        prefix_chunks=prefix,
    )


def group(name: str, *versions: int, reward: float | None = 1.0) -> list[Trajectory]:
    """One reward for all samples, or (None) another for each."""
    rewards = [float(index) if reward is None else reward for index in range(len(versions))]
    return [sample(name, index, version, reward=rewards[index]) for index, version in enumerate(versions)]


class BufferMachine(RuleBasedStateMachine):
    """The buffer against a list of (id, versions) and two rules: discard when version − start > ratio; filter a group
    of one reward while no more than `filter` were since the last batch."""

    @initialize(ratio=st.sampled_from([0, 0.5, 1, 1.5, 2, 3.25]), batch=st.integers(1, 3), limit=st.integers(0, 3))
    def start(self, ratio, batch, limit):
        self.ratio, self.batch, self.filter = ratio, batch, limit
        self.buffer = SampleBuffer(ratio, batch, limit)
        self.filtered, self.filtered_since = [], 0
        self.model, self.discarded, self.version, self.made = [], [], 0, 0
        self.counts = {"stale": 0, "companions": 0, "in": 0, "out": 0, "solved": 0, "failed": 0}

    def expire(self):
        kept = []
        for name, versions in self.model:
            stale = sum(self.version - v > self.ratio for v in versions)
            if stale:
                self.discarded.append(name)
                self.counts["stale"] += stale
                self.counts["companions"] += len(versions) - stale
            else:
                kept.append((name, versions))
        self.model = kept

    @rule(ages=st.lists(st.integers(0, 4), min_size=1, max_size=3), reward=st.sampled_from([None, 0.0, 1.0]))
    def put(self, ages, reward):
        versions = [max(0, self.version - age) for age in ages]
        name = f"g{self.made}"
        if self.filtered_since < self.filter and (reward is not None or len(ages) == 1):
            self.made += 1
            self.buffer.put_group(group(name, *versions, reward=reward))  # whether there is room or not
            self.filtered.append(name)
            self.filtered_since += 1
            self.counts["solved" if reward else "failed"] += 1
            return
        if len(self.model) >= math.ceil((1 + self.ratio) * self.batch):
            with pytest.raises(BufferTimeout):
                self.buffer.put_group(group(name, *versions, reward=reward))
            return
        self.made += 1
        self.buffer.put_group(group(name, *versions, reward=reward))
        self.counts["in"] += 1
        self.model.append((name, versions))
        self.expire()

    @rule(steps=st.integers(0, 2))
    def publish(self, steps):
        self.version += steps
        self.buffer.set_version(self.version)
        self.expire()

    @rule(steps=st.integers(0, 1), size=st.integers(1, 3))
    def get(self, steps, size):
        size = min(size, self.buffer.capacity)
        self.version += steps
        self.expire()
        if len(self.model) < size:
            with pytest.raises(BufferTimeout):
                self.buffer.get_batch(size, self.version)
            return
        batch = self.buffer.get_batch(size, self.version)
        expected, self.model = self.model[:size], self.model[size:]
        self.counts["out"] += size
        self.filtered_since = 0
        assert [(g[0].group_id, [t.start_version for t in g]) for g in batch] == [(n, v) for n, v in expected]
        assert all(self.version - t.start_version <= self.ratio for g in batch for t in g)

    @rule()
    def collect_discarded(self):
        assert self.buffer.take_discarded() == self.discarded
        self.discarded = []

    @rule()
    def collect_filtered(self):
        assert [g[0].group_id for g in self.buffer.take_filtered()] == self.filtered
        self.filtered = []

    @rule()
    def checkpoint_and_resume(self):
        state = msgpack.unpackb(msgpack.packb(self.buffer.state_dict()))
        self.buffer = SampleBuffer(self.ratio, self.batch, self.filter)
        self.buffer.load_state_dict(state)

    @invariant()
    def agrees(self):
        stats = self.buffer.stats
        assert self.buffer.group_ids() == [name for name, _ in self.model]
        assert len(self.buffer) <= self.buffer.capacity
        assert self.buffer.staleness() == [self.version - v for _, versions in self.model for v in versions]
        assert (stats.dropped_stale, stats.dropped_with_group) == (self.counts["stale"], self.counts["companions"])
        assert (stats.filtered_solved, stats.filtered_failed) == (self.counts["solved"], self.counts["failed"])
        assert (stats.groups_in, stats.groups_out) == (self.counts["in"], self.counts["out"])
        assert stats.groups_in == stats.groups_out + stats.dropped_groups + len(self.model)


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_one_stale_sample_takes_its_group_along_and_both_are_counted():
    buffer = SampleBuffer(1, 2)
    buffer.set_version(2)
    buffer.put_group(group("mixed", 2, 1, 2))
    buffer.set_version(3)
    assert len(buffer) == 0
    assert buffer.take_discarded() == ["mixed"]
    assert buffer.take_discarded() == []
    assert (buffer.stats.dropped_stale, buffer.stats.dropped_with_group) == (1, 2)


def test_a_group_of_one_reward_is_filtered_up_to_the_limit_of_a_step():
    buffer = SampleBuffer(0, 1, filter_groups=2)
    for name, reward in (("solved", 1.0), ("failed", 0.0)):
        buffer.put_group(group(name, 0, 0, reward=reward))
    assert buffer.group_ids() == []
    buffer.put_group(group("third", 0, 0))  # a solved set of tasks starves nobody
    assert buffer.group_ids() == ["third"]
    buffer.get_batch(1, 0)
    buffer.put_group(group("next step", 0, 0))
    buffer.put_group(group("mixed", 0, 0, reward=None))
    assert buffer.group_ids() == ["mixed"]
    assert (buffer.stats.filtered_solved, buffer.stats.filtered_failed) == (2, 1)
    assert [[t.group_id for t in g] for g in buffer.take_filtered()] == [
        ["solved"] * 2,
        ["failed"] * 2,
        ["next step"] * 2,
    ]


def test_what_tells_samples_of_a_group_apart():
    assert has_one_reward(group("g", 0, 0))
    assert not has_one_reward(group("g", 0, 0, reward=None))
    a, b = group("g", 0, 0)
    assert not has_one_reward([a, dataclasses.replace(b, intrinsic_rewards=np.array([-0.1], np.float32))])
    # where the next prefix ends depends on them
    assert not has_one_reward([sample("g", index, 0, prefix=1) for index in range(2)])


def test_a_fractional_ratio_bounds_the_gap_and_sizes_the_buffer():
    for ratio, capacity, kept in [(0, 4, False), (0.5, 6, False), (1, 8, True), (1.25, 9, True)]:
        buffer = SampleBuffer(ratio, 4)
        assert buffer.capacity == capacity
        buffer.put_group(group("g", 0))
        buffer.set_version(1)
        assert (len(buffer) == 1) == kept


def test_state_comes_back_bit_for_bit():
    buffer = SampleBuffer(2, 2)
    buffer.put_group(group("a", 0, 0))
    buffer.set_version(1)
    buffer.put_group(group("b", 1))
    other = SampleBuffer(2, 2)
    other.load_state_dict(msgpack.unpackb(msgpack.packb(buffer.state_dict())))
    assert other.state_dict() == buffer.state_dict()
    (a,), (b,) = other.get_batch(1, 1), buffer.get_batch(1, 1)
    assert a[0].chunks[0].behavior_logp.tobytes() == b[0].chunks[0].behavior_logp.tobytes()
    assert (a[0].id, a[0].status, a[0].start_version) == (b[0].id, b[0].status, b[0].start_version)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("groups"), "expected the keys"),
        (lambda s: s.update(state_version=9), "state_version"),
        (lambda s: s["counts"].pop("groups_in"), "counts"),
        (lambda s: s["groups"][0][0].pop("task"), r"groups\[0\]\[0\]"),
    ],
)
def test_a_damaged_state_is_named_and_changes_nothing(damage, message):
    buffer = SampleBuffer(1, 2)
    buffer.put_group(group("a", 0))
    state = buffer.state_dict()
    damage(state)
    before = buffer.state_dict()
    with pytest.raises(ValueError, match=message):
        buffer.load_state_dict(state)
    assert buffer.state_dict() == before


def test_what_can_not_be_trained_on_is_not_admitted():
    buffer = SampleBuffer(1, 2)
    with pytest.raises(ValueError, match="at least one"):
        buffer.put_group([])
    with pytest.raises(ValueError, match="one group_id"):
        buffer.put_group([sample("a", 0, 0), sample("b", 0, 0)])
    with pytest.raises(ValueError, match="status"):
        buffer.put_group([sample("a", 0, 0, Status.INFRA_FAILURE)])
    with pytest.raises(ValueError, match="num_groups"):
        buffer.get_batch(5, 0)
    buffer.set_version(3)
    with pytest.raises(ValueError, match="current_version"):
        buffer.get_batch(1, 2)
    wrong = [(-1, 1, 0, "async_ratio"), (float("nan"), 1, 0, "async_ratio"), (1, 0, 0, "batch_groups")]
    for *arguments, name in [*wrong, (1, 1, -1, "filter_groups")]:
        with pytest.raises(ValueError, match=name):
            SampleBuffer(*arguments)


def test_waiters_are_served_time_out_or_learn_of_the_failure():
    buffer = SampleBuffer(1, 1)
    started = time.monotonic()
    with pytest.raises(BufferTimeout, match="1 fresh groups"):
        buffer.get_batch(1, 0, timeout=0.05)
    assert 0.04 < time.monotonic() - started < 5
    threading.Timer(0.05, buffer.put_group, [group("a", 0)]).start()
    assert buffer.get_batch(1, 0, timeout=60)[0][0].group_id == "a"
    cause = RuntimeError("the producer died")
    threading.Timer(0.05, buffer.close, [cause]).start()
    with pytest.raises(BufferClosed) as caught:
        buffer.get_batch(1, 0, timeout=60)
    assert caught.value.__cause__ is cause


def test_a_full_buffer_makes_the_producer_wait():
    buffer = SampleBuffer(0, 1)
    buffer.put_group(group("a", 0))
    with pytest.raises(BufferTimeout, match="room for a group"):
        buffer.put_group(group("b", 0), timeout=0.02)
    threading.Timer(0.05, buffer.get_batch, [1, 0]).start()
    buffer.put_group(group("b", 0), timeout=60)
    assert buffer.group_ids() == ["b"]

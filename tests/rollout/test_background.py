"""Free-running rollouts: the trainer consumes while the thread produces, and neither can hang the other."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rollout_toys import Journal, ToyEnv, ToyRenderer, endless_requests, toy_engine, toy_params, toy_requests
from waiting import wait_until

from rome.envs import EnvFailure
from rome.rollout import (
    BackgroundRollouts,
    BufferClosed,
    Deadlines,
    RolloutConfig,
    RolloutRunner,
    SampleBuffer,
)
from rome.trajectory import Status

WAIT = 60.0


def make(journal=None, ratio=1.0, batch=2, requests=None, filter_groups=0, **config):
    journal = journal or Journal()
    engine = toy_engine()
    engine.warmup()
    deadlines = Deadlines(reset=20, step=20, verify=20, close=20)
    rollout = RolloutConfig(**{"env_threads": 4, "deadlines": deadlines, **config})
    runner = RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(journal), rollout)
    buffer = SampleBuffer(ratio, batch, filter_groups)
    return BackgroundRollouts(runner, buffer, requests or endless_requests()), buffer, runner, journal


def test_a_trainer_is_fed_fresh_groups_while_weights_change():
    rollouts, buffer, runner, journal = make(Journal(jitter=0.003), ratio=1.0, batch=2)
    seen, versions = [], set()
    with runner, rollouts:
        for step in range(8):
            batch = buffer.get_batch(2, step, timeout=WAIT)
            seen += [group[0].group_id for group in batch]
            for sample in itertools.chain(*batch):
                assert 0 <= step - sample.start_version <= 1
                stamps = [int(v) for chunk in sample.chunks for v in chunk.versions]
                assert stamps == sorted(stamps)
                assert stamps[0] == sample.start_version
                versions.update(stamps)
            runner.engine.update_params(toy_params(step % 2), step + 1)
    assert len(set(seen)) == 16
    assert len(versions) > 3
    assert journal.opened == journal.closed


def test_back_pressure_stops_at_the_capacity_and_goes_on():
    rollouts, buffer, runner, journal = make(ratio=0.5, batch=4)
    with runner, rollouts:
        wait_until(lambda: len(buffer) == buffer.capacity == 6)
        opened = journal.opened
        time.sleep(0.1)
        assert journal.opened == opened == 6 * 2
        assert runner.in_flight == 0
        buffer.get_batch(4, 0)
        wait_until(lambda: len(buffer) == 6)
        assert journal.opened == 10 * 2


def test_a_stale_group_is_sampled_again_from_the_same_state_under_new_keys():
    rollouts, buffer, runner, _ = make(ratio=1.0, batch=1, requests=toy_requests(groups=2, size=2))
    with runner, rollouts:
        wait_until(lambda: len(buffer) == 2)
        stale = {t.id: t for g in buffer.state_dict()["groups"] for t in map(_restored, g)}
        runner.engine.update_params(toy_params(1), 5)
        batch = [g for _ in range(2) for g in buffer.get_batch(1, 5, timeout=WAIT)]
    assert buffer.stats.dropped_stale == 4
    assert sorted(g[0].group_id for g in batch) == ["g0", "g1"]
    for sample in itertools.chain(*batch):
        first = stale[sample.id.removesuffix("+1")]
        assert sample.id.endswith("+1")
        assert sample.start_version == 5
        assert sample.prompt.tokens.tolist() == first.prompt.tokens.tolist()


def _restored(record):
    from rome.trajectory import trajectory_from_record

    return trajectory_from_record(record)


def test_a_restored_buffer_can_have_its_groups_sampled_again():
    requests = toy_requests(groups=1, size=2)
    rollouts, buffer, runner, _ = make(ratio=1.0, batch=1, requests=list(requests))
    with runner, rollouts:
        wait_until(lambda: len(buffer) == 1)
    state = buffer.state_dict()
    _, resumed, runner, _ = make(ratio=1.0, batch=1)
    resumed.load_state_dict(state)
    rollouts = BackgroundRollouts(runner, resumed, [], known=requests)
    runner.engine.update_params(toy_params(1), 9)
    with runner, rollouts:
        ((a, _),) = resumed.get_batch(1, 9, timeout=WAIT)
    assert (a.id, a.start_version) == ("g0/0+1", 9)


def test_when_the_requests_run_out_the_rest_is_served_and_then_the_buffer_closes():
    rollouts, buffer, runner, _ = make(ratio=2.0, batch=2, requests=toy_requests(groups=5, size=2))
    with runner, rollouts:
        got = [g[0].group_id for _ in range(2) for g in buffer.get_batch(2, 0, timeout=WAIT)]
        with pytest.raises(BufferClosed):
            buffer.get_batch(2, 0, timeout=WAIT)
        got += [g[0].group_id for g in buffer.get_batch(1, 0)]
    assert sorted(got) == [f"g{i}" for i in range(5)]


def test_pause_stops_decoding_and_resume_goes_on():
    rollouts, buffer, runner, _ = make(Journal(jitter=0.002))
    with runner, rollouts:
        buffer.get_batch(1, 0, timeout=WAIT)
        rollouts.pause(WAIT)
        turns = runner.engine.stats.turns
        time.sleep(0.1)
        assert runner.engine.stats.turns == turns
        rollouts.resume()
        for _ in range(4):
            buffer.get_batch(1, 0, timeout=WAIT)
        assert runner.engine.stats.turns > turns


def test_a_group_that_is_finished_as_rollouts_stop_is_delivered_once(monkeypatch):
    """What stops them is a checkpoint: what is neither unfinished nor in the buffer would be sampled again."""
    requests = toy_requests(groups=6, size=2)
    rollouts, buffer, runner, _ = make(ratio=2.0, requests=requests)
    record = runner._record

    def stop_when_complete(group, *arguments):
        record(group, *arguments)
        if group.complete:
            rollouts._stop.set()

    monkeypatch.setattr(runner, "_record", stop_when_complete)
    with runner:
        rollouts.start()
        wait_until(lambda: not rollouts._thread.is_alive())
        missing = rollouts.stop()
        held = buffer.group_ids()
        assert held
        assert not {request.group_id for request in missing} & set(held)
        rest = [request for request in requests if request.group_id not in held]
        with BackgroundRollouts(runner, buffer, rest):
            groups = [group for _ in range(3) for group in buffer.get_batch(2, 0, timeout=WAIT)]
    assert sorted(group[0].group_id for group in groups) == [f"g{i}" for i in range(6)]
    assert len(buffer) == 0


def test_stop_returns_what_was_not_finished_and_closes_everything():
    release = threading.Event()
    rollouts, buffer, runner, journal = make(Journal(step_fault=lambda env: release.wait(60)))
    with runner:
        rollouts.start()
        wait_until(lambda: journal.calls["step"] >= 2)
        started = time.monotonic()
        unfinished = rollouts.stop(WAIT)
        assert time.monotonic() - started < 50  # without waiting for the environments
        assert [request.group_id for request in unfinished] == [f"g{i}" for i in range(buffer.capacity)]
        assert rollouts.stop() == unfinished
        release.set()
    wait_until(lambda: journal.opened == journal.closed)


def test_a_failure_reaches_the_trainer_and_stop():
    def fault(env):
        raise ZeroDivisionError("a bug in the environment")

    rollouts, buffer, runner, journal = make(Journal(step_fault=fault))
    with runner:
        rollouts.start()
        with pytest.raises(BufferClosed) as caught:
            buffer.get_batch(1, 0, timeout=WAIT)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError, match="a bug in the environment"):
            rollouts.stop()
    wait_until(lambda: journal.opened == journal.closed)


def test_a_slow_environment_does_not_hold_the_others_up():
    release = threading.Event()

    def fault(env):
        if env.history.startswith("t0/"):
            release.wait(60)

    rollouts, buffer, runner, _ = make(Journal(step_fault=fault), ratio=3.0, batch=2)
    with runner, rollouts:
        got = buffer.get_batch(2, 0, timeout=15)
        assert "g0" not in {g[0].group_id for g in got}
        release.set()


def test_gather_seconds_waits_for_company():
    def turns(seconds):
        requests = toy_requests(groups=6, size=2)
        rollouts, buffer, runner, _ = make(
            Journal(jitter=0.01), ratio=2.0, batch=2, requests=requests, gather_seconds=seconds
        )
        with runner, rollouts:
            wait_until(lambda: len(buffer) == 6)
        return runner.engine.stats.turns

    assert turns(1.0) < turns(0.0)


def test_filtered_groups_are_replaced_at_once_and_within_bounds():
    """Every group is worth the same here: as many as the limit says are dropped at each step, and no more."""
    rollouts, buffer, runner, _ = make(Journal(reward=1.0), ratio=1.0, batch=2, filter_groups=3)
    with runner, rollouts:
        for step in range(3):
            assert len(buffer.get_batch(2, step, timeout=WAIT)) == 2
            runner.engine.update_params(toy_params(step % 2), step + 1)
            wait_until(lambda step=step: buffer.stats.filtered_solved == 3 * (step + 2))
    assert len(buffer.take_filtered()) == 12


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**16),
    ratio=st.sampled_from([0.5, 1.0, 2.0]),
    filter_groups=st.integers(0, 3),
    redundancy=st.integers(0, 1),
)
def test_whatever_fails_the_trainer_is_fed(seed, ratio, filter_groups, redundancy):
    """Environments fail, hang and answer late, at random; weights change; groups are filtered: no deadlock, no stale
    sample, no group twice, no sample without its typed reason."""
    rng, lock = np.random.default_rng(seed), threading.Lock()

    def misbehave(env):
        with lock:
            draw = rng.random()
        if draw < 0.05:
            raise EnvFailure(Status.INFRA_FAILURE, "gone")
        if draw < 0.08:
            raise EnvFailure(Status.VERIFIER_FAILURE, "no verdict")
        if draw < 0.1:
            time.sleep(0.6)  # twice the deadline

    journal = Journal(jitter=0.002, reset_fault=misbehave, step_fault=misbehave)
    deadlines = Deadlines(reset=0.3, step=0.3, verify=0.3, close=20)
    rollouts, buffer, runner, _ = make(
        journal, ratio, 2, None, filter_groups, redundancy=redundancy, deadlines=deadlines, max_retries=50
    )
    names = []
    with runner, rollouts:
        for step in range(4):
            for group in buffer.get_batch(2, step, timeout=WAIT):
                names.append(group[0].group_id)
                assert [t.status.is_reliable for t in group] == [True] * 2
                assert all(0 <= step - t.start_version <= ratio for t in group)
            runner.engine.update_params(toy_params(step % 2), step + 1)
    filtered = [g[0].group_id for g in buffer.take_filtered()]
    assert len(filtered) == buffer.stats.filtered_solved + buffer.stats.filtered_failed <= 5 * filter_groups
    assert len({*names, *filtered}) == len(names) + len(filtered)
    assert sum(runner.stats.failures.values()) >= runner.stats.resampled
    assert {name.split("/")[0] for name in runner.stats.failures} <= {"infra_failure", "verifier_failure", "timeout"}
    assert not runner.stats.dropped_groups
    wait_until(lambda: journal.opened == journal.closed)


def test_a_ratio_of_zero_is_refused():
    with pytest.raises(ValueError, match="async_ratio"):
        make(ratio=0.0)


def test_a_straggler_is_cancelled_once_its_group_has_enough():
    """One environment of each group hangs: without a spare sample no group would ever be complete."""
    release, hung = threading.Event(), set()

    def hang_one_a_group(env):
        group = env.history.split("/")[0]
        with env.journal.lock:
            first = group not in hung
            hung.add(group)
        if first:
            release.wait(WAIT)

    journal = Journal(step_fault=hang_one_a_group)
    rollouts, buffer, runner, _ = make(journal, ratio=1.0, batch=2, redundancy=1, env_threads=12)
    with runner, rollouts:
        groups = [g for _ in range(2) for g in buffer.get_batch(2, 0, timeout=WAIT)]
        release.set()
    assert [len(group) for group in groups] == [2] * 4
    for group in groups:
        numbers = [int(t.id.split("/")[1].split("+")[0]) for t in group]
        assert numbers == sorted(set(numbers))
        assert set(numbers) < {0, 1, 2}
    assert runner.stats.cancelled >= 4
    assert not runner.stats.dropped_groups
    wait_until(lambda: journal.opened == journal.closed)


def test_a_spare_sample_stands_in_for_one_that_is_lost_for_good():
    def fail(env):
        if env.history.endswith("0"):  # see below: the seed of g0
            with env.journal.lock:
                env.journal.calls["lost"] += 1
                if env.journal.calls["lost"] > 1:
                    return
            raise OSError("no such sandbox")

    journal = Journal(step_fault=fail)
    requests = toy_requests(groups=2, size=2)
    rollouts, buffer, runner, _ = make(journal, ratio=1.0, batch=2, requests=requests, redundancy=1, max_retries=0)
    with runner, rollouts:
        groups = buffer.get_batch(2, 0, timeout=WAIT)
    assert sorted(group[0].group_id for group in groups) == ["g0", "g1"]
    assert runner.stats.failures["infra_failure/step"] == 1
    assert not runner.stats.dropped_groups


def test_the_spare_samples_of_a_second_round_have_keys_of_their_own():
    requests = toy_requests(groups=2, size=2)
    rollouts, buffer, runner, _ = make(ratio=1.0, batch=1, requests=requests, redundancy=2)
    with runner, rollouts:
        wait_until(lambda: len(buffer) == 2)
        runner.engine.update_params(toy_params(1), 5)
        groups = [g for _ in range(2) for g in buffer.get_batch(1, 5, timeout=WAIT)]
    assert all(t.id.endswith("+1") for group in groups for t in group)

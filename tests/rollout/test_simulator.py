"""The simulator against what can be worked out by hand, and against what no schedule may break."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rome.rollout.simulator import Latencies, Plan, SimulatorError, Turn, TurnTime, best_split, simulate

CHUNKS, TOKENS = 3, 5
TURN, STEP, TRAIN, MOVE = 0.2, 1.0, 4.0, 0.3


def exact(**changes):
    """Latencies that are always the same."""
    found = {
        "environment": [STEP],
        "reset": [0.0],
        "episodes": [[TOKENS] * CHUNKS],
        "turn": TurnTime(fixed=TURN),
        "train": [TRAIN],
        "move": [MOVE],
    }
    return Latencies(**{**found, **changes})


def long_tailed(seed=0):
    rng = np.random.default_rng(seed)
    return Latencies(
        environment=0.3 * np.exp(0.8 * rng.standard_normal(500)),
        reset=rng.uniform(0, 0.05, 50),
        episodes=[rng.integers(1, 20, rng.integers(1, 6)).tolist() for _ in range(100)],
        turn=TurnTime(fixed=0.01, prompt=0.002, row=1e-4, step=0.002, step_row=1e-4),
        train=rng.uniform(1, 3, 20),
        move=rng.uniform(0.05, 0.1, 20),
    )


def plan(mode="split", **changes):
    found = {"hosts": 2, "slots": 8, "groups": 2, "group_size": 4, "cohorts": 1, "async_ratio": 1.0}
    return Plan(mode, **{**found, **changes})


def test_synchronous_steps_are_rollout_then_training():
    found = simulate(plan("synchronous", hosts=4), exact(), steps=5, seed=0)
    step = CHUNKS * (TURN + STEP) + TRAIN / 4
    assert found.samples_per_second == pytest.approx(8 / step)
    assert found.utilisation["train"] == pytest.approx(TRAIN / 4 / step)
    assert found.utilisation["decode"] == pytest.approx(CHUNKS * TURN / step)
    assert found.staleness == {0: 8 * 6}
    assert found.environments == pytest.approx(8 * CHUNKS * STEP / step)


def test_two_cohorts_decode_in_turns_while_the_other_waits_for_its_environments():
    found = simulate(plan("synchronous", hosts=1, slots=8, cohorts=2, gather_seconds=0.0), exact(), steps=4, seed=0)
    # the second cohort is one turn behind the first, and both wait for environments at once
    assert found.samples_per_second == pytest.approx(8 / (CHUNKS * (TURN + STEP) + TURN + TRAIN))


def test_where_training_is_the_bottleneck_asynchronous_rollouts_cost_nothing():
    found = simulate(plan(slots=64), exact(train=[20.0]), steps=6, seed=0)
    assert found.samples_per_second == pytest.approx(8 / 20)
    assert found.utilisation["train"] == pytest.approx(1 / 2)  # of two hosts


def test_where_rollouts_are_the_bottleneck_all_slots_are_always_in_use():
    found = simulate(plan(slots=8, async_ratio=8.0), exact(train=[0.01]), steps=8, seed=0)
    assert found.samples_per_second == pytest.approx(8 / (CHUNKS * (TURN + STEP)))


def test_more_training_hosts_are_faster_but_for_the_serial_share():
    times = [
        1
        / simulate(
            plan(hosts=8, train_hosts=k, slots=64, train_serial=0.25), exact(train=[80.0]), 5, 0
        ).samples_per_second
        for k in (1, 2, 4)
    ]
    assert times == pytest.approx([80 / 8 * (0.25 + 0.75 / k) for k in (1, 2, 4)])


def test_a_multiplexed_update_is_two_moves_longer():
    settings = {"hosts": 4, "train_hosts": 2, "slots": 64}
    found = simulate(plan("multiplexed", **settings), exact(train=[100.0]), steps=5, seed=0)
    assert found.samples_per_second == pytest.approx(8 / (100 / 2 + 2 * MOVE), rel=0.01)  # and waits for one turn
    assert found.utilisation["move"] == pytest.approx(2 * MOVE / (50 + 2 * MOVE), rel=0.01)


def test_where_all_pause_to_train_a_step_is_decoding_and_then_training():
    latencies = exact(environment=[0.0], episodes=[[1]], turn=TurnTime(row=0.1), train=[1.0])
    everyone = plan("multiplexed", slots=4, train_hosts=2, park=True)  # a turn of eight rows on two hosts: a batch
    found = simulate(everyone, latencies, steps=10, seed=0)
    assert found.samples_per_second == pytest.approx(8 / (0.4 + 1.0 / 2 + 2 * MOVE))
    assert found.utilisation["idle"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("train_hosts", [2, 4])
def test_with_parking_no_host_is_ever_idle(train_hosts):
    # 80 samples take 80 · 3 turns of 0.1 host-seconds, and 12 host-seconds of training, on four hosts
    latencies = exact(environment=[0.0], turn=TurnTime(row=0.1), train=[12.0], move=[0.0])
    settings = plan(
        "multiplexed", hosts=4, slots=4, groups=20, train_hosts=train_hosts, park=True, cohorts=2, async_ratio=3.0
    )
    found = simulate(settings, latencies, steps=10, seed=0)
    assert found.samples_per_second == pytest.approx(80 / ((80 * CHUNKS * 0.1 + 12) / 4), rel=0.03)
    assert found.utilisation["idle"] == pytest.approx(0, abs=0.03)


def test_lent_hosts_make_turns_slower_and_shared_cores_make_everything_slower():
    latencies = exact(turn=TurnTime(row=0.1), environment=[0.0], train=[1e-6], move=[0.0])
    # eight rows on one, two or four hosts
    rates = [
        simulate(
            plan(hosts=1 + n, slots=8 // n, async_ratio=9.0, groups=1, group_size=8), latencies, 6, 0
        ).samples_per_second
        for n in (1, 2, 4)
    ]
    assert rates == pytest.approx([8 / (CHUNKS * 0.8 / n) for n in (1, 2, 4)])
    busy = exact(environment=[0.0], episodes=[[1]], turn=TurnTime(fixed=1.0), train=[1.0])
    alone = simulate(plan(async_ratio=4.0, slots=8), busy, 20, 0)
    shared = simulate(plan(async_ratio=4.0, slots=8, cores=1), busy, 20, 0)
    assert alone.samples_per_second == pytest.approx(8, rel=0.01)
    assert shared.samples_per_second == pytest.approx(4, rel=0.01)  # a turn and an update, one core


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["synchronous", "split", "multiplexed", "parking"])
def test_invariants_of_any_schedule(mode, seed):
    rng = np.random.default_rng(seed)
    hosts, park = int(rng.integers(4, 9)), mode == "parking"
    settings = plan(
        "multiplexed" if park else mode,
        hosts=hosts,
        train_hosts=int(rng.integers(1, hosts + 1 if park else 3)),
        park=park,
        engines=int(rng.integers(1, 3)),
        slots=int(rng.integers(4, 12)),
        groups=int(rng.integers(1, 6)),
        cohorts=int(rng.integers(1, 4)),
        async_ratio=float(rng.choice([0.5, 1.0, 2.5])),
        cores=rng.choice([None, 2.0]),
    )
    latencies, steps = dataclasses.replace(long_tailed(seed), episodes=[[TOKENS] * CHUNKS]), 12
    found = simulate(settings, latencies, steps, seed)
    assert found == simulate(settings, latencies, steps, seed)
    assert found != simulate(settings, latencies, steps, seed + 1)
    # staleness is bounded; every sample is trained on, dropped, waiting or in flight
    trained = (steps + 1) * settings.groups * settings.group_size
    assert sum(found.staleness.values()) == trained
    assert max(found.staleness) <= (settings.async_ratio if mode != "synchronous" else 0)
    waiting = found.finished_samples - trained - found.dropped_stale
    assert 0 <= waiting <= settings.capacity * settings.group_size
    # no token is decoded twice, and none is missing
    in_flight = found.decoded_tokens - found.finished_samples * CHUNKS * TOKENS
    assert 0 <= in_flight <= settings.capacity * settings.group_size * CHUNKS * TOKENS
    # nobody works more than all the time
    assert all(-1e-9 <= share <= 1 for share in found.utilisation.values())
    assert sum(found.utilisation.values()) == pytest.approx(1)
    used = found.utilisation["train"] * settings.hosts * found.seconds
    assert used > 0


def test_the_staleness_bound_drops_what_is_too_old():
    slow = exact(environment=[0.1] * 9 + [60.0], train=[0.5], turn=TurnTime(fixed=0.01))
    found = simulate(plan(slots=64, groups=4, async_ratio=1.0), slow, 30, seed=1)
    assert found.dropped_stale > 0
    assert max(found.staleness) == 1
    assert simulate(plan(slots=64, groups=4, async_ratio=30.0), slow, 30, seed=1).dropped_stale == 0


def test_the_best_split_is_the_balanced_one():
    # training takes 48 host-seconds a batch; rollouts are bound by decoding, 16 host-seconds: 12 of 16 hosts train
    latencies = exact(environment=[0.0], episodes=[[1]], turn=TurnTime(row=1.0), train=[48.0])
    settings = plan(hosts=16, slots=1, groups=4, async_ratio=4.0)
    hosts, found = best_split(settings, latencies, 10, seed=0)
    assert hosts in (11, 12)
    tried = [
        simulate(dataclasses.replace(settings, train_hosts=k), latencies, 10, 0).samples_per_second
        for k in range(1, 16)
    ]
    assert found.samples_per_second == pytest.approx(max(tried))


def test_turn_times_are_found_again():
    rng = np.random.default_rng(0)
    truth = TurnTime(0.003, 0.004, 1e-5, 6e-4, 2e-5)
    turns = [
        Turn(int(rng.integers(1, 11)), float(rng.integers(8, 96)), int(rng.integers(0, 4)), 0.0) for _ in range(200)
    ]
    turns = [turn._replace(seconds=truth(*turn[:3]) * rng.uniform(0.95, 1.05)) for turn in turns]
    fitted = TurnTime.fit(turns)
    for steps, rows, passes in ((1, 8, 0), (10, 96, 3), (5, 32, 1)):
        assert fitted(steps, rows, passes) == pytest.approx(truth(steps, rows, passes), rel=0.05)
        assert truth.times(3)(steps, rows, passes) == pytest.approx(3 * truth(steps, rows, passes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "magic"}, "mode: expected one of"),
        ({"train_hosts": 2}, r"train_hosts: expected 1\.\.1, found 2"),
        ({"engines": 2}, r"engines: expected 1\.\.1 .*, found 2"),
        ({"train_hosts": 3, "mode": "multiplexed", "park": True}, r"train_hosts: expected 1\.\.2, found 3"),
        ({"park": True}, "park: expected False unless multiplexed"),
        ({"async_ratio": 0.0}, "async_ratio: expected more than 0"),
        ({"slots": 1, "cohorts": 2}, "slots: expected at least one a cohort"),
        ({"train_serial": 1.5}, "train_serial: expected a share"),
        ({"cores": 0.0}, "cores: expected more than 0"),
        ({"hosts": 0}, "hosts: expected at least 1"),
    ],
)
def test_impossible_plans_are_named(changes, message):
    with pytest.raises(SimulatorError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": []}, "environment: expected one or more"),
        ({"train": [float("nan")]}, "train: expected one or more finite"),
        ({"episodes": [[]]}, "episodes: expected"),
        ({"episodes": [[0]]}, "episodes: expected"),
    ],
)
def test_impossible_latencies_are_named(changes, message):
    with pytest.raises(SimulatorError, match=message):
        exact(**changes)

import json
from collections import Counter

import numpy as np
import pytest

from rome.data import TaskSampler, TaskSpec, fixed_tasks
from rome.data.sampler import DEMONSTRATION_SEEDS, EVALUATION_SEEDS, SEEDS_PER_RUN, TRAIN_SEEDS

FAMILIES, HORIZONS = ("a", "b", "c"), (2, 3)


def _sampler(seed=0, **changes):
    return TaskSampler(FAMILIES, HORIZONS, seed, **changes)


def test_the_stream_is_a_function_of_seed_and_history():
    one, two = _sampler(), _sampler()
    for turn in range(5):
        assert one.next(7) == two.next(7)
        for sampler in (one, two):
            sampler.record("a", 2, turn / 4)
    assert _sampler(1).next(30) != _sampler(2).next(30)
    assert [(s.family, s.horizon) for s in _sampler(1).next(30)] != [
        (s.family, s.horizon) for s in _sampler(2).next(30)
    ]


def test_state_round_trips_through_json():
    one, two = _sampler(3), _sampler(3)
    one.next(11)
    one.record("b", 3, 0.75)
    one.record("b", 3, 0.25)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    assert two.next(20) == one.next(20)
    state = one.state_dict()
    one.record("c", 2, 1.0)
    assert "c/2" not in state["success"]  # a snapshot, not a view


def test_what_is_being_learned_comes_more_often():
    """Weight floor + 4 p (1 − p): 1.35 in the middle, 0.35 at both ends."""
    sampler = _sampler(decay=0.0)
    for horizon in HORIZONS:
        sampler.record("a", horizon, 0.0)
        sampler.record("b", horizon, 1.0)
        sampler.record("c", horizon, 0.5)
    counts = Counter(spec.family for _ in range(200) for spec in sampler.next(50))
    total = 2 * 0.35 + 1.35
    for family, weight in (("a", 0.35), ("b", 0.35), ("c", 1.35)):
        assert counts[family] / 10_000 == pytest.approx(weight / total, abs=0.02)


def test_without_focus_all_cells_are_equal():
    sampler = _sampler(focus=0.0, decay=0.0)
    sampler.record("a", 2, 0.5)
    sampler.record("b", 3, 1.0)
    counts = Counter((spec.family, spec.horizon) for _ in range(200) for spec in sampler.next(60))
    assert len(counts) == 6
    assert all(count == pytest.approx(2000, rel=0.1) for count in counts.values())


def test_success_rates_run_on():
    sampler = _sampler(decay=0.9)
    sampler.record("a", 2, 1.0)
    assert sampler.success["a/2"] == pytest.approx(0.55)  # from 0.5, as nothing was known
    sampler.record("a", 2, 1.0)
    assert sampler.success["a/2"] == pytest.approx(0.595)


def test_fixed_tasks_go_round_families_then_horizons():
    specs = fixed_tasks(FAMILIES, HORIZONS, 8, first_seed=100)
    assert specs[:4] == [TaskSpec("a", 2, 100), TaskSpec("b", 2, 101), TaskSpec("c", 2, 102), TaskSpec("a", 3, 103)]
    assert specs[6] == TaskSpec("a", 2, 106)
    assert fixed_tasks(FAMILIES, HORIZONS, 0, 1) == []


def test_seeds_of_training_demonstrations_and_evaluation_never_meet():
    """Of any run seed, over as many tasks as a run may take."""
    ranges = [(EVALUATION_SEEDS, EVALUATION_SEEDS + SEEDS_PER_RUN)]
    for seed in (0, 1, 63, 64, 1000):
        sampler = _sampler(seed)
        first = sampler.next(2)
        assert [spec.seed for spec in first] == [first[0].seed, first[0].seed + 1]
        sampler.cursor = SEEDS_PER_RUN - 1
        last = sampler.next(1)[0].seed
        assert last - first[0].seed == SEEDS_PER_RUN - 1
        assert TRAIN_SEEDS <= first[0].seed <= last < DEMONSTRATION_SEEDS
        shift = (seed % 64) * SEEDS_PER_RUN
        assert DEMONSTRATION_SEEDS + shift + SEEDS_PER_RUN <= EVALUATION_SEEDS
        ranges.append((first[0].seed, last))
    for i, (low, high) in enumerate(ranges[:4]):  # evaluation, and runs 0, 1 and 63
        assert all(high < other_low or other_high < low for other_low, other_high in ranges[i + 1 : 4])


def test_seeds_in_a_stream_are_distinct_however_it_is_taken():
    one, two = _sampler(), _sampler()
    singles = [one.next(1)[0] for _ in range(40)]
    many = two.next(40)
    assert [spec.seed for spec in singles] == [spec.seed for spec in many]
    assert len({spec.seed for spec in singles}) == 40
    assert np.unique([spec.family for spec in singles]).size == 3

"""Where to start rollouts from, and what the crucial chunks are."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.ipa import (
    Fork,
    anchor_prefixes,
    crucial_forks,
    imitated_forks,
    rollback,
    two_proportion_p_value,
)


def test_rollback_moves_one_chunk_back_at_the_threshold():
    assert rollback(3, 2, 4) == 2
    assert rollback(3, 1, 4) == 3
    assert rollback(3, 3, 4, threshold=0.9) == 3
    assert rollback(0, 4, 4) == 0  # the whole task is the last stage
    assert rollback(3, 0, 0) == 3  # nothing was measured


def test_rollback_reaches_the_whole_task_by_single_steps():
    prefix, visited = 5, []
    for successes in (4, 1, 4, 4, 0, 4, 4, 4):
        visited.append(prefix)
        prefix = rollback(prefix, successes, 4)
    assert visited == [5, 4, 4, 3, 2, 2, 1, 0]


@given(st.integers(1, 60), st.integers(1, 80), st.none() | st.integers(0, 10))
def test_anchors_are_distinct_ascending_prefixes(num_chunks, num_anchors, seed):
    anchors = anchor_prefixes(num_chunks, num_anchors, seed)
    assert len(anchors) == min(num_chunks, num_anchors)
    assert anchors == sorted(set(anchors))
    assert anchors[0] >= 0 and anchors[-1] < num_chunks
    assert anchors == anchor_prefixes(num_chunks, num_anchors, seed)


def test_uniform_anchors_span_the_trajectory_and_random_ones_cover_it():
    assert anchor_prefixes(9, 3) == [0, 4, 8]
    assert anchor_prefixes(4, 9) == [0, 1, 2, 3]
    assert anchor_prefixes(9, 1) == [0]
    drawn = [anchor_prefixes(9, 3, seed) for seed in range(100)]
    assert {prefix for anchors in drawn for prefix in anchors} == set(range(9))
    for args in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="num_chunks, num_anchors"):
            anchor_prefixes(*args)


def test_p_value_of_known_tables():
    # Fisher's tea: 1 of 4 against 3 of 4, P = 17/70.
    assert two_proportion_p_value(1, 4, 3, 4) == pytest.approx(17 / 70)
    assert two_proportion_p_value(0, 4, 4, 4) == pytest.approx(1 / 70)
    assert two_proportion_p_value(4, 4, 0, 4) == 1.0
    assert two_proportion_p_value(0, 4, 0, 4) == 1.0
    assert two_proportion_p_value(0, 0, 2, 3) == 1.0  # nothing measured is no evidence


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_the_test_holds_its_level(rate):
    """Summed over all outcomes of two anchors with one true rate, it rejects at most at its level."""
    n = 8
    chance = [math.comb(n, x) * rate**x * (1 - rate) ** (n - x) for x in range(n + 1)]
    rejected = sum(
        chance[x] * chance[y] for x in range(n + 1) for y in range(n + 1) if two_proportion_p_value(x, n, y, n) <= 0.05
    )
    assert 0 < rejected <= 0.05


def test_crucial_forks_are_located():
    forks = crucial_forks([0, 2, 3, 5], [0, 0, 7, 8], [8, 8, 8, 8])
    assert len(forks) == 1
    assert forks[0] == Fork(2, 3, 0.0, 0.875, two_proportion_p_value(0, 8, 7, 8))
    assert forks[0].p_value < 0.001
    assert crucial_forks([0, 1], [0, 2], [4, 4]) == []
    assert len(crucial_forks([0, 1], [0, 2], [4, 4], level=0.3)) == 1


@pytest.mark.parametrize(
    ("prefixes", "successes", "attempts"),
    [([1, 0], [0, 1], [1, 1]), ([0, 0], [0, 1], [1, 1]), ([0, 1], [0], [1, 1]), ([0, 1], [0, 2], [1, 1])],
)
def test_measurements_that_make_no_sense_are_refused(prefixes, successes, attempts):
    with pytest.raises(ValueError, match="expected"):
        crucial_forks(prefixes, successes, attempts)


def test_imitation_only_where_it_is_asked_for():
    positive, forks = np.array([True, False, False, False]), np.array([5, 5, 9, 9])
    np.testing.assert_array_equal(imitated_forks("off", positive, forks), [False] * 4)
    np.testing.assert_array_equal(imitated_forks("always", positive, forks), [True] * 4)
    np.testing.assert_array_equal(imitated_forks("fallback", positive, forks), [False, False, True, True])
    with pytest.raises(ValueError, match="imitation"):
        imitated_forks("sometimes", positive, forks)

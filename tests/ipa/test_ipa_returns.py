"""Returns (Eq 7), and how rewards are shaped before them."""

import numpy as np
import pytest

from rome.ipa import ObjectiveConfig, chunk_returns, group_baseline, is_positive, trajectory_returns


def loop_returns(reward, num_chunks, max_chunks, gamma, intrinsic):
    out = np.zeros((len(reward), max_chunks))
    for n in range(len(reward)):
        last = num_chunks[n]
        for k in range(1, last + 1):
            out[n, k - 1] = gamma ** (last - k) * reward[n]
            for j in range(k, last + 1):
                out[n, k - 1] += gamma ** (j - k) * intrinsic[n, j - 1]
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
def test_equation_7(gamma):
    rng = np.random.default_rng(0)
    reward, intrinsic = rng.normal(size=20), rng.normal(size=(20, 6))
    num_chunks = np.append(rng.integers(1, 7, 19), 0)
    expected = loop_returns(reward, num_chunks, 6, gamma, intrinsic)
    intrinsic[np.arange(6) >= num_chunks[:, None]] = np.nan  # what is past the end is not read
    actual = chunk_returns(reward, num_chunks, 6, gamma, intrinsic)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    plain = loop_returns(reward, num_chunks, 6, gamma, np.zeros((20, 6)))
    np.testing.assert_allclose(chunk_returns(reward, num_chunks, 6, gamma), plain, rtol=1e-5, atol=1e-6)


def test_worked_example():
    returns = chunk_returns(np.array([1.0, -1.0]), np.array([3, 1]), 4, 0.95)
    np.testing.assert_allclose(returns, [[0.9025, 0.95, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]], rtol=1e-6)


REWARD, GROUPS = np.array([1.0, 0.0, 0.0, 1.0, 0.5, -2.0, 1.0]), np.array([7, 7, 7, 9, 9, 9, 4])


@pytest.mark.parametrize("kind", ["group_mean", "leave_one_out"])
def test_baselines(kind):
    for n in range(len(REWARD)):
        others = [REWARD[m] for m in range(len(REWARD)) if GROUPS[m] == GROUPS[n] and (kind == "group_mean" or m != n)]
        expected = sum(others) / len(others) if others else 0.0
        np.testing.assert_allclose(group_baseline(REWARD, GROUPS, kind)[n], expected, rtol=1e-6, atol=1e-7)


def test_the_class_is_decided_on_the_raw_reward():
    np.testing.assert_array_equal(is_positive(REWARD), [True, False, False, True, True, False, True])


def test_failure_reward_replaces_zero_and_never_raises_a_worse_one():
    config = ObjectiveConfig(failure_reward=-1.0)
    np.testing.assert_allclose(
        trajectory_returns(REWARD, np.ones(7, int), 1, config)[:, 0], [1.0, -1.0, -1.0, 1.0, 0.5, -2.0, 1.0]
    )
    np.testing.assert_allclose(trajectory_returns(REWARD, np.ones(7, int), 1, ObjectiveConfig())[:, 0], REWARD)


def test_the_baseline_is_taken_after_the_failure_reward_and_then_discounted():
    config = ObjectiveConfig(failure_reward=-1.0, baseline="leave_one_out", gamma=0.5)
    returns = trajectory_returns(np.array([1.0, 0.0]), np.array([2, 1]), 2, config, group_ids=np.zeros(2, int))
    np.testing.assert_allclose(returns, [[1.0, 2.0], [-2.0, 0.0]])


def test_levels():
    reward, num_chunks = np.array([1.0, 2.0]), np.array([3, 2])
    intrinsic = np.array([[0.1, 0.2, 0.3], [0.5, 0.0, 9.0]])

    def returns(level, gamma=0.5):
        config = ObjectiveConfig(return_level=level, gamma=gamma)
        return np.asarray(trajectory_returns(reward, num_chunks, 3, config, intrinsic=intrinsic))

    np.testing.assert_allclose(returns("chunk"), loop_returns(reward, num_chunks, 3, 0.5, intrinsic), rtol=1e-6)
    np.testing.assert_array_equal(returns("token"), returns("chunk"))
    np.testing.assert_allclose(returns("trajectory"), [[1.6, 1.6, 1.6], [2.5, 2.5, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(returns("none"), [[1, 1, 1], [1, 1, 0]])


def test_without_discount_and_intrinsic_rewards_chunk_and_trajectory_agree():
    rng = np.random.default_rng(1)
    reward, num_chunks = rng.normal(size=9), rng.integers(1, 6, 9)
    tables = [
        trajectory_returns(reward, num_chunks, 5, ObjectiveConfig(return_level=level, gamma=1.0))
        for level in ("chunk", "trajectory")
    ]
    np.testing.assert_array_equal(*tables)


def test_a_baseline_needs_groups():
    with pytest.raises(ValueError, match="group_ids"):
        trajectory_returns(REWARD, np.ones(7, int), 1, ObjectiveConfig(baseline="group_mean"))

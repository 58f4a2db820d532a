"""Units, ratios and masks one by one, and the metrics against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ipa_oracle import geometric_ratio, loop_loss, random_batch, trained, units

from rome.ipa import (
    OBJECTIVES,
    importance_ratio,
    merge_metrics,
    mismatch_mask,
    num_units,
    policy_loss,
    unit_ids,
    unit_log_ratio_mean,
)

IDS = np.array([[0, 0, -1, 2, 2, -1]])


def test_unit_ids_of_each_level():
    _, batch = random_batch(0)
    batch = jax.tree.map(lambda x: x[:1], batch).replace(
        chunk_ids=np.array([[-1, 0, 0, 1, -1, 2, 2, 3]]), segment_ids=np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    )
    np.testing.assert_array_equal(unit_ids(batch, "token"), [[-1, 1, 2, 3, -1, 5, 6, -1]])
    np.testing.assert_array_equal(unit_ids(batch, "chunk"), [[-1, 0, 0, 1, -1, 2, 2, -1]])  # padding is never trained
    np.testing.assert_array_equal(unit_ids(batch, "trajectory"), [[-1, 0, 0, 0, -1, 1, 1, -1]])
    assert [num_units(batch, level) for level in ("token", "chunk", "trajectory")] == [8, 8, 8]


def test_means_over_units_read_only_the_units():
    logp = np.array([[1.0, 3.0, np.nan, -1.0, np.inf, np.inf]], np.float32)
    zeros = np.zeros_like(logp)
    np.testing.assert_array_equal(unit_log_ratio_mean(logp, zeros, IDS, 4), [[2.0, 0.0, np.inf, 0.0]])


def test_empty_units_have_ratio_one():
    ratio = importance_ratio(np.full((1, 6), -0.5), np.zeros((1, 6)), IDS, 4)
    np.testing.assert_allclose(ratio, [[np.exp(-0.5), 1.0, np.exp(-0.5), 1.0]], rtol=1e-6)
    assert ratio.dtype == jnp.float32


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [19.0, 21.0, 1e4, np.inf])
def test_log_ratios_are_clamped_at_20(sign, size):
    ratio = importance_ratio(np.full((1, 6), sign * size), np.zeros((1, 6)), IDS, 4)
    np.testing.assert_allclose(ratio[0, 0], np.exp(sign * min(size, 20.0)), rtol=1e-5)
    np.testing.assert_array_equal(ratio[0, 1], 1.0)


def test_the_clamp_is_on_the_mean_and_not_on_each_token():
    ratio = importance_ratio(np.array([[41.0, -39.0, 0.0, 0.0, 0.0, 0.0]]), np.zeros((1, 6)), IDS, 4)
    np.testing.assert_allclose(ratio[0, 0], np.e, rtol=1e-6)


def test_the_ratio_is_differentiable_within_the_clamp():
    gradient = jax.grad(lambda x: importance_ratio(x, jnp.zeros((1, 6)), IDS, 4).sum())(jnp.full((1, 6), 0.5))
    np.testing.assert_allclose(gradient, [[np.exp(0.5) / 2] * 2 + [0.0] + [np.exp(0.5) / 2] * 2 + [0.0]], rtol=1e-6)


def test_the_mask_is_one_sided_by_default_and_includes_its_bounds():
    log_ratio = np.log(np.array([[8.0, 2.0, 1.0, 0.5, 0.25, 1e-9]], np.float32))
    ids, zeros = np.arange(6)[None], np.zeros((1, 6), np.float32)
    keep = mismatch_mask(log_ratio, zeros, ids, 7, upper=2.0001)
    np.testing.assert_array_equal(keep, [[False, True, True, True, True, True, True]])
    keep = mismatch_mask(log_ratio, zeros, ids, 7, upper=2.0001, lower=0.4999)
    np.testing.assert_array_equal(keep, [[False, True, True, True, False, False, True]])
    np.testing.assert_array_equal(mismatch_mask(zeros, zeros, ids, 6, upper=1.0, lower=1.0), np.ones((1, 6), bool))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_unit_that_was_not_measured_is_dropped(bad):
    zeros = np.zeros((1, 6), np.float32)
    for at, expected in ((0, [[False, True, True, True]]), (2, [[True] * 4])):  # in chunk 0; not trained
        broken = zeros.copy()
        broken[0, at] = bad
        np.testing.assert_array_equal(mismatch_mask(broken, zeros, IDS, 4, upper=5.0), expected)
        np.testing.assert_array_equal(mismatch_mask(zeros, broken, IDS, 4, upper=5.0), expected)


def loop_metrics(logp, batch, config):
    cells, kept = trained(batch, False), loop_loss(logp, batch, config)[2]
    out = {"train/kept_tokens": len(kept), "train/tokens": len(cells), "train/imitation_tokens": 0.0}
    counts = {"token": "train/tokens", "chunk": "train/chunks", "trajectory": "train/trajectories"}
    for level, count in counts.items():
        groups = list(units(batch, cells, level).values())
        out[count] = len(groups)
        out[f"mask/{level}_dropped"] = np.mean([not kept & set(group) for group in groups])
        reference = batch.old_logp if config.ratio_reference == "proximal" else batch.behavior_logp
        for name, a, b in (("ratio", logp, reference), ("mismatch", batch.old_logp, batch.behavior_logp)):
            ratios = [geometric_ratio(a, b, group) for group in groups]
            out |= {f"{name}/{level}_{f.__name__}": f(ratios) for f in (np.mean, np.min, np.max)}
        out[f"mismatch/{level}_gap"] = np.mean(np.abs(np.log(ratios)))
        if level == "token":
            out["mismatch/token_kl"] = np.mean([r - 1 - np.log(r) for r in ratios])
    chunk_of = {c: (c[0], int(batch.chunk_ids[c])) for c in cells}
    out["train/return_mean"] = np.mean([batch.returns[c] for c in set(chunk_of.values())])
    trajectories = units(batch, cells, "trajectory").values()
    out["train/positive_fraction"] = np.mean([batch.positive[chunk_of[t[0]]] for t in trajectories])
    weighed = []
    if config.ratio_level != "none":
        for group in units(batch, cells, config.ratio_level).values():
            if config.ratio_on == "all" or not batch.positive[chunk_of[group[0]]]:
                weighed.append(geometric_ratio(logp, reference, group))
    out["train/ratio_units"] = len(weighed)
    out["ratio/clipped_fraction"] = np.mean([r > 1 for r in weighed]) if weighed else 0.0
    out |= {"train/nonfinite_tokens": 0, "train/nothing_to_train": float(not kept)}
    return {name.replace("amin", "min").replace("amax", "max"): value for name, value in out.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_match_loops(name):
    config = OBJECTIVES[name]
    for seed in range(2):
        logp, batch = random_batch(seed, spread=1.5)
        loss, metrics = policy_loss(logp, batch, config)
        expected = loop_metrics(logp, batch, config)
        assert set(metrics) == set(expected) | {"train/loss", "train/loss_rl", "train/loss_il"}
        assert metrics["train/loss"] == loss
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_merging_sums_what_it_does_not_know():
    merged = merge_metrics({"entropy_sum": jnp.array([1.0, 2.5]), "train/tokens": jnp.array([3.0, 4.0])})
    assert merged == {"entropy_sum": 3.5, "train/tokens": 7.0}

"""The loss and its gradient against a float64 loop oracle, and the traps of the design."""

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ipa_oracle import CHUNKS, eager, loop_loss, pack, random_batch, random_rows, trained, value_and_grad

from rome.ipa import OBJECTIVES, ObjectiveConfig, batch_totals, policy_loss, trajectory_returns

IPA = ObjectiveConfig()
CONFIGS = OBJECTIVES | {
    "behavior reference, two-sided": replace(IPA, ratio_reference="behavior", mismatch_upper=1.3, mismatch_lower=0.8),
    "ratio on all, per chunk": replace(IPA, ratio_on="all", normalizer="chunks", mismatch_upper=1.2),
    "trajectory mask": replace(IPA, mask_level="trajectory", normalizer="trajectories", mismatch_upper=1.1),
    "token mask": replace(IPA, ratio_level="token", mask_level="token", mismatch_upper=1.2),
    "imitation": replace(IPA, imitation="always", lambda_il=0.3, lambda_rl=0.7),
    "imitation per trajectory": replace(
        OBJECTIVES["topr_token_mask"], imitation="fallback", normalizer="trajectories", mismatch_upper=1.2
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_match_the_loop_oracle(name):
    for seed in range(6):
        logp, batch = random_batch(seed, imitation=seed % 2 == 1)
        (loss, metrics), gradient = value_and_grad(logp, batch, CONFIGS[name])
        expected_loss, expected_gradient, kept = loop_loss(logp, batch, CONFIGS[name])
        np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(loss, expected_loss, rtol=2e-5, atol=1e-6)
        assert metrics["train/kept_tokens"] == len(kept)


def result(config, rewards=(1.0, 0.0, 0.0, 1.0)):
    """The gradient of `config` on one batch whose returns it also makes; moved off-policy both ways."""
    rows = random_rows(3, imitation=True, spread=1.5)
    flat = [t for row in rows for t in row]
    final = np.resize(rewards, len(flat))
    returns = trajectory_returns(
        final, np.array([len(t["returns"]) for t in flat]), CHUNKS, config, group_ids=np.arange(len(flat)) // 3
    )
    for t, reward, g in zip(flat, final, np.asarray(returns), strict=True):
        t["returns"], t["positive"][:] = g[: len(t["returns"])], reward > 0
    logp, batch = pack(rows)
    return np.asarray(eager(logp, batch, config)[1])


NEGATIVES = replace(IPA, failure_reward=-1.0)
KNOBS = {
    "return_level": [(NEGATIVES, level) for level in ("trajectory", "none")],
    "ratio_level": [(NEGATIVES, level) for level in ("token", "trajectory", "none")],
    "mask_level": [(replace(NEGATIVES, mismatch_upper=1.2), level) for level in ("token", "trajectory", "none")],
    "ratio_on": [(IPA, "all")],
    "ratio_reference": [(NEGATIVES, "behavior")],
    "gamma": [(IPA, 0.5)],
    "mismatch_upper": [(IPA, 1.2)],
    "mismatch_lower": [(IPA, 0.9)],
    "normalizer": [(IPA, kind) for kind in ("chunks", "trajectories")],
    "failure_reward": [(IPA, -1.0)],
    "baseline": [(IPA, kind) for kind in ("group_mean", "leave_one_out")],
    "imitation": [(IPA, kind) for kind in ("fallback", "always")],
    "lambda_il": [(replace(IPA, imitation="always"), 0.2)],
    "lambda_rl": [(IPA, 0.2)],
}


def test_every_knob_is_tested():
    assert set(KNOBS) == {f.name for f in fields(ObjectiveConfig)}


@pytest.mark.parametrize("knob", KNOBS)
def test_changing_a_knob_changes_the_gradient(knob):
    for base, value in KNOBS[knob]:
        assert value != getattr(base, knob)
        before, after = result(base), result(replace(base, **{knob: value}))
        assert np.abs(before - after).max() > 1e-3, (knob, value)


def test_negatives_are_inert_with_reward_zero():
    assert not result(IPA, rewards=(0.0,)).any()


@pytest.mark.parametrize("knobs", [{"failure_reward": -1.0}, {"baseline": "group_mean"}, {"baseline": "leave_one_out"}])
def test_negatives_have_effect_when_they_should(knobs):
    config = replace(IPA, mask_level="none", **knobs)
    rewards, rows = np.array([1.0, 0.0, 0.0]), [row[:1] for row in random_rows(5, chunk_tokens=(2, 4))]
    counts = np.array([len(row[0]["returns"]) for row in rows])
    returns = trajectory_returns(rewards, counts, CHUNKS, config, group_ids=np.zeros(3, int))
    for row, reward, g in zip(rows, rewards, np.asarray(returns), strict=True):
        row[0]["returns"], row[0]["positive"][:] = g[: len(row[0]["returns"])], reward > 0
    logp, batch = pack(rows)
    gradient = np.asarray(eager(logp, batch, config)[1])
    assert (gradient[0][batch.chunk_ids[0] >= 0] < 0).all()  # minimising raises the log-probs of the success,
    assert (gradient[1:][batch.chunk_ids[1:] >= 0] > 0).all()  # and lowers those of the failures


def test_the_weight_of_a_negative_has_no_gradient_and_is_capped_at_one():
    _, batch = random_batch(1)
    batch = batch.replace(positive=np.zeros_like(batch.positive), returns=np.full_like(batch.returns, -1.0))
    config = replace(IPA, mask_level="none")
    (_, metrics), gradient = eager(batch.old_logp + 1.0, batch, config)  # rho = e everywhere
    n = float(metrics["train/tokens"])
    cells = batch.chunk_ids >= 0
    np.testing.assert_allclose(np.asarray(gradient)[cells], 1.0 / n, rtol=1e-6)
    assert metrics["ratio/clipped_fraction"] == 1.0
    (_, metrics), gradient = eager(batch.old_logp - 1.0, batch, config)
    np.testing.assert_allclose(np.asarray(gradient)[cells], np.exp(-1.0) / n, rtol=1e-5)
    assert metrics["ratio/clipped_fraction"] == 0.0


def test_masking_lowers_the_loss_and_does_not_reweight_the_others():
    logp, batch = random_batch(2)
    everything = np.asarray(eager(logp, batch, replace(IPA, mask_level="none"))[1])
    masked = np.asarray(eager(logp, batch, replace(IPA, mismatch_upper=1.1))[1])
    dropped = (masked == 0) & (everything != 0)
    assert dropped.any() and not dropped.all()
    np.testing.assert_array_equal(masked[~dropped], everything[~dropped])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_trained_never_reaches_loss_or_gradient(name, bad):
    rows = random_rows(4, imitation=True)
    (loss, clean_metrics), gradient = value_and_grad(*pack(rows), CONFIGS[name])
    logp, batch = pack(rows, garbage=bad)
    empty = np.ones_like(batch.returns, bool)
    for b, t in zip(*np.nonzero(batch.chunk_ids >= 0), strict=True):
        empty[b, batch.chunk_ids[b, t]] = False
    batch = batch.replace(returns=np.where(empty, bad, batch.returns).astype(np.float32))
    (bad_loss, metrics), bad_gradient = value_and_grad(logp, batch, CONFIGS[name])
    assert bad_loss == loss
    np.testing.assert_array_equal(bad_gradient, gradient)
    for key, value in metrics.items():
        np.testing.assert_array_equal(value, clean_metrics[key], err_msg=key)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.mask_level != "none" and c.imitation == "off"])
def test_what_the_mask_drops_never_reaches_loss_or_gradient(name, bad):
    """A dropped token may hold anything: the kept ones of its trajectory are trained as if it held a number."""
    config = CONFIGS[name]
    logp, batch = random_batch(6)
    cells = trained(batch, False)
    for at in (cells[0], cells[len(cells) // 2]):
        behavior = batch.behavior_logp.copy()
        behavior[at] = bad
        old = batch.old_logp.copy()
        dropped = batch.replace(behavior_logp=behavior)
        (loss, metrics), gradient = value_and_grad(logp, dropped, config)
        assert np.isfinite(loss) and np.isfinite(gradient).all() and np.asarray(gradient)[at] == 0
        assert all(np.isfinite(v) for v in metrics.values())
        assert metrics["train/nonfinite_tokens"] == 1
        for other in (logp, old):  # and then pi_theta or pi_old of the same token is broken, too
            saved, other[at] = other[at], bad
            broken = value_and_grad(logp, dropped.replace(old_logp=old), config)
            assert np.isfinite(broken[0][0]) and np.isfinite(broken[1]).all()
            assert all(np.isfinite(v) for v in broken[0][1].values())
            if config.ratio_level in ("none", config.mask_level):  # the token shares no ratio with kept ones
                assert broken[0][0] == loss
            other[at] = saved


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_dropped_token_without_a_number_is_left_out_of_its_trajectorys_ratio(bad):
    config = OBJECTIVES["topr_token_mask"]
    logp, batch = random_batch(6)
    batch = batch.replace(positive=np.zeros_like(batch.positive))
    at = trained(batch, False)[0]
    logp[at] = batch.behavior_logp[at] = bad
    without = batch.chunk_ids.copy()
    without[at] = -1
    totals = batch_totals(batch, config)
    loss, _ = policy_loss(logp, batch, config, totals=totals)
    expected, _ = policy_loss(logp, batch.replace(chunk_ids=without), config, totals=totals)
    assert np.isfinite(loss) and loss == expected


def test_a_broken_log_prob_that_is_trained_is_not_hidden():
    logp, batch = random_batch(6)
    logp[trained(batch, False)[0]] = np.nan
    loss, metrics = policy_loss(logp, batch, replace(IPA, mask_level="none"))
    assert np.isnan(loss)
    assert metrics["train/nonfinite_tokens"] == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_with_nothing_to_train(name):
    logp, batch = random_batch(0)
    nothing = batch.replace(chunk_ids=np.full_like(batch.chunk_ids, -1))
    (loss, metrics), gradient = value_and_grad(logp, nothing, OBJECTIVES[name])
    assert loss == 0.0
    assert not np.asarray(gradient).any()
    assert metrics["train/nothing_to_train"] == 1.0
    assert all(np.isfinite(v) for v in metrics.values())
    (_, metrics), _ = value_and_grad(logp, batch, OBJECTIVES[name])
    assert metrics["train/nothing_to_train"] == 0.0


def test_everything_masked_is_nothing_to_train():
    logp, batch = random_batch(0)
    far = batch.replace(behavior_logp=batch.old_logp - 3.0)
    (loss, metrics), gradient = value_and_grad(logp, far, IPA)
    assert loss == 0.0 and not np.asarray(gradient).any()
    assert metrics["train/nothing_to_train"] == 1.0
    assert metrics["mask/token_dropped"] == metrics["mask/chunk_dropped"] == metrics["mask/trajectory_dropped"] == 1.0
    assert metrics["train/tokens"] == len(trained(batch, False))  # the normaliser still counts them


def test_expert_chunks_are_not_trained_with_imitation_off():
    logp, batch = random_batch(7, imitation=True)
    cells = np.zeros(logp.shape, bool)
    cells[tuple(zip(*trained(batch, True), strict=True))] = True
    assert cells.any()
    off = np.asarray(value_and_grad(logp, batch, IPA)[1])
    always = np.asarray(eager(logp, batch, replace(IPA, imitation="always"))[1])
    assert not off[cells].any() and always[cells].all()
    np.testing.assert_array_equal(always[~cells], off[~cells])
    assert batch_totals(batch, IPA).rl == len(trained(batch, False))


def test_imitation_alone_is_something_to_train():
    logp, batch = random_batch(7)
    batch = batch.replace(imitation=np.ones_like(batch.imitation))
    loss, metrics = policy_loss(logp, batch, replace(IPA, imitation="always"))
    assert loss != 0 and metrics["train/nothing_to_train"] == 0
    assert metrics["train/imitation_tokens"] == len(trained(batch, True))


def test_bfloat16_accumulates_in_float32():
    _, batch = random_batch(0)
    rows = 512  # thousands of terms of one sign: a bfloat16 sum would stop growing at 256
    batch = jax.tree.map(lambda x: np.tile(x, (rows // len(x) + 1, 1))[:rows], batch)
    logp = jnp.full(batch.chunk_ids.shape, -1.0, jnp.bfloat16)
    batch = batch.replace(old_logp=logp, behavior_logp=logp, returns=np.ones(batch.returns.shape, jnp.bfloat16))
    (loss, metrics), gradient = value_and_grad(logp, batch, replace(IPA, normalizer="trajectories"))
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert metrics["train/tokens"] == np.sum(batch.chunk_ids >= 0) > 2048
    np.testing.assert_allclose(loss, metrics["train/tokens"] / metrics["train/trajectories"], rtol=1e-5)


def test_one_compilation_serves_every_batch_of_a_shape():
    traces = []

    @partial(jax.jit, static_argnums=2)
    def step(logp, batch, config):
        traces.append(config)
        return policy_loss(logp, batch, config)[0]

    for seed in range(4):
        logp, batch = random_batch(seed)
        step(logp, batch, ObjectiveConfig())  # equal configs are one static argument
    assert len(traces) == 1

"""Properties: limiting cases, and that packing, order and micro-batches do not matter."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ipa_oracle import CHUNKS, LENGTH, ROWS, eager, pack, random_rows, value_and_grad

from rome.ipa import OBJECTIVES, ObjectiveConfig, Totals, batch_totals, merge_metrics, policy_loss

IMITATING = replace(ObjectiveConfig(), imitation="always", lambda_il=0.3, lambda_rl=0.7)
CONFIGS = {"ipa": OBJECTIVES["ipa"], "topr_token_mask": OBJECTIVES["topr_token_mask"], "imitating": IMITATING}
modest = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def same_metrics(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def gradients(rows, gradient):
    """The gradient of each trajectory's tokens, in the order of rows."""
    out = []
    for row, cells in zip(rows, np.asarray(gradient), strict=False):
        at = 0
        for t in row:
            out.append(cells[at : at + len(t["ids"])])
            at += len(t["ids"])
    return out


@modest
@given(seeds)
def test_chunks_of_one_token_are_the_token_level(seed):
    logp, batch = pack(random_rows(seed, chunk_tokens=(1, 1)))
    chunk = eager(logp, batch, ObjectiveConfig(mismatch_upper=1.2))
    token = eager(logp, batch, ObjectiveConfig("token", ratio_level="token", mask_level="token", mismatch_upper=1.2))
    close(chunk[0][0], token[0][0])
    close(chunk[1], token[1])


@modest
@given(seeds)
def test_one_chunk_a_trajectory_is_the_trajectory_level(seed):
    logp, batch = pack(random_rows(seed, max_chunks=1))
    chunk = eager(logp, batch, ObjectiveConfig(mismatch_upper=1.2))
    trajectory = eager(
        logp, batch, ObjectiveConfig("trajectory", "trajectory", "trajectory", gamma=1.0, mismatch_upper=1.2)
    )
    close(chunk[0][0], trajectory[0][0])
    close(chunk[1], trajectory[1])


@pytest.mark.parametrize("name", CONFIGS)
@modest
@given(seed=seeds)
def test_packing_and_order_do_not_matter(name, seed):
    rows = random_rows(seed, imitation=True)
    order = np.random.default_rng(seed).permutation(sum(len(row) for row in rows))
    flat = [t for row in rows for t in row]
    repacked = [[] for _ in range(ROWS)]
    for i in order:  # first fit in a random order, from a random row
        start = int(np.random.default_rng(seed + i).integers(ROWS))
        fits = [
            row
            for row in repacked[start:] + repacked[:start]
            if sum(len(t["ids"]) for t in [*row, flat[i]]) <= LENGTH
            and sum(len(t["returns"]) for t in [*row, flat[i]]) <= CHUNKS
        ]
        fits[0].append({**flat[i], "index": i})
    one = value_and_grad(*pack(rows), CONFIGS[name])
    other = value_and_grad(*pack(repacked), CONFIGS[name])
    close(other[0][0], one[0][0])
    same_metrics(other[0][1], one[0][1])
    before = gradients(rows, one[1])
    after = gradients(repacked, other[1])
    for t, gradient in zip([t for row in repacked for t in row], after, strict=True):
        close(gradient, before[t["index"]])


@partial(jax.jit, static_argnums=2, compiler_options={"xla_backend_optimization_level": 0})
def in_micro_batches(logp, batch, config):
    """(sum of losses, gradient, merged metrics) over micro-batches of one row, normalised by the whole."""
    totals = batch_totals(batch, config)

    def one(logp, row):
        expanded = jax.tree.map(lambda x: x[None], row)
        return policy_loss(logp[None], expanded, config, totals=totals)

    (losses, metrics), gradient = jax.lax.map(lambda x: jax.value_and_grad(one, has_aux=True)(*x), (logp, batch))
    return jnp.sum(losses), gradient, merge_metrics(metrics)


@pytest.mark.parametrize("name", CONFIGS)
@modest
@given(seed=seeds)
def test_micro_batches_sum_to_the_whole(name, seed):
    rows = random_rows(seed, imitation=True)
    logp, batch = pack([*rows[:2], [], rows[2]])  # with micro-batches of nothing
    (loss, metrics), gradient = value_and_grad(logp, batch, CONFIGS[name])
    summed, micro_gradient, merged = in_micro_batches(logp, batch, CONFIGS[name])
    close(summed, loss)
    close(micro_gradient, gradient)
    same_metrics(merged, metrics)


@pytest.mark.parametrize("normalizer", ["tokens", "chunks", "trajectories"])
def test_totals_of_parts_add_up(normalizer):
    config = replace(IMITATING, normalizer=normalizer)
    _, batch = pack(random_rows(11, imitation=True))
    rows = np.arange(ROWS)[:, None]
    parts = [batch_totals(batch.replace(chunk_ids=np.where(rows == i, batch.chunk_ids, -1)), config) for i in range(3)]
    whole = batch_totals(batch, config)
    assert whole.rl > 0 and whole.imitation > 0
    assert Totals(*map(sum, zip(*parts, strict=True))) == whole

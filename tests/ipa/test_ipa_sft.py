"""The SFT objective (Eq 1-2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ipa_oracle import pack, random_rows

from rome.ipa import sft_chunk_mask, sft_loss, sft_tokens

value_and_grad = jax.jit(jax.value_and_grad(sft_loss))


def random_case(seed):
    logp, batch = pack(random_rows(seed))
    mask = np.random.default_rng(seed).random(batch.returns.shape) < 0.6
    return logp, batch.chunk_ids, mask


def loop(logp, chunk_ids, mask, epsilon=1e-6):
    tokens, total = 0, 0.0
    for b, t in zip(*np.nonzero(chunk_ids >= 0), strict=True):
        if mask[b, chunk_ids[b, t]]:
            tokens, total = tokens + 1, total + float(logp[b, t])
    return -total / (tokens + epsilon), tokens


def test_mask_is_no_error_and_relevant():
    error, relevant = np.array([False, False, True, True]), np.array([True, False, True, False])
    np.testing.assert_array_equal(sft_chunk_mask(error, relevant), [True, False, False, False])


@pytest.mark.parametrize("seed", range(6))
def test_equation_2(seed):
    logp, ids, mask = random_case(seed)
    loss, gradient = value_and_grad(logp, ids, mask)
    expected, tokens = loop(logp, ids, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    selected = np.asarray(sft_tokens(ids, mask))
    assert selected.sum() == tokens
    np.testing.assert_allclose(gradient, np.where(selected, -1.0 / tokens, 0.0), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_unselected_token_may_hold_anything(bad):
    logp, ids, mask = random_case(0)
    loss, gradient = value_and_grad(logp, ids, mask)
    broken = np.where(sft_tokens(ids, mask), logp, bad)
    np.testing.assert_array_equal(value_and_grad(broken, ids, mask)[0], loss)
    np.testing.assert_array_equal(value_and_grad(broken, ids, mask)[1], gradient)


def test_nothing_selected_is_loss_zero():
    logp, ids, mask = random_case(0)
    loss, gradient = value_and_grad(logp, ids, np.zeros_like(mask))
    assert loss == 0 and not np.asarray(gradient).any()


def test_epsilon_is_added_to_the_number_of_tokens():
    logp, ids, mask = random_case(0)
    np.testing.assert_allclose(sft_loss(logp, ids, mask, epsilon=3.0), loop(logp, ids, mask, 3.0)[0], rtol=1e-5)


def test_micro_batches_sum_to_the_whole():
    logp, ids, mask = random_case(1)
    total = jnp.sum(sft_tokens(ids, mask))
    parts = [sft_loss(logp[i : i + 1], ids[i : i + 1], mask[i : i + 1], total_tokens=total) for i in range(len(logp))]
    np.testing.assert_allclose(sum(parts), sft_loss(logp, ids, mask), rtol=1e-5)


def test_bfloat16_accumulates_in_float32():
    logp, ids, mask = jnp.full((64, 64), -1.0, jnp.bfloat16), np.zeros((64, 64), int), np.ones((64, 1), bool)
    loss = sft_loss(logp, ids, mask)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)

"""The log-prob head against the plain formula in float64, and the memory that it needs at a real vocabulary."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import score_tokens

BATCH, TIME, WIDTH, VOCAB = 3, 14, 8, 37


def plain_scores(hidden, weights, targets, temperature, tied):
    """(log-prob, entropy, log-sum-exp) [B, T], all logits at once."""
    logits = jnp.einsum("btd,vd->btv" if tied else "btd,dv->btv", hidden, weights) / temperature
    log_probs = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return logp, -(jnp.exp(log_probs) * log_probs).sum(-1), jax.nn.logsumexp(logits, axis=-1)


def problem(tied: bool, dtype: str = "float32", spread: float = 1.0):
    rng = np.random.default_rng(0)
    hidden = spread * rng.normal(size=(BATCH, TIME, WIDTH))
    weights = rng.normal(size=(VOCAB, WIDTH) if tied else (WIDTH, VOCAB))
    targets = rng.integers(0, VOCAB, (BATCH, TIME)).astype(np.int32)
    cotangents = rng.normal(size=(3, BATCH, TIME))
    return jnp.asarray(hidden, dtype), jnp.asarray(weights, dtype), targets, cotangents


def value_and_grads(scorer, hidden, weights, temperature, cotangents):
    def loss(hidden, weights, temperature):
        scores = scorer(hidden, weights, temperature)
        return sum((c * s).sum() for c, s in zip(cotangents, scores, strict=True)), scores

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, scores = run(hidden, weights, temperature)
    return list(scores), list(grads)


def oracle(hidden, weights, targets, temperature, cotangents, tied):
    """The plain formula and its autodiff in float64."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in (hidden, weights)]
        scorer = partial(plain_scores, tied=tied)
        return value_and_grads(
            lambda h, w, t: scorer(h, w, targets, t), *arrays, jnp.float64(temperature), jnp.asarray(cotangents)
        )


# 14 tokens a row in chunks of: all, 4 (padded), 1 (the least)
@pytest.mark.parametrize("chunk", [1000, 12, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_matches_the_plain_formula_in_float64(tied, chunk):
    hidden, weights, targets, cotangents = problem(tied)
    scorer = partial(score_tokens, tied=tied, chunk=chunk)
    found = value_and_grads(
        lambda h, w, t: scorer(h, w, targets, t), hidden, weights, jnp.float32(0.7), cotangents.astype(np.float32)
    )
    expected = oracle(hidden, weights, targets, 0.7, cotangents, tied)
    for found_part, expected_part in zip(found, expected, strict=True):
        for a, b in zip(found_part, expected_part, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_sharp_distributions_stay_exact():
    """Logits up to ±300: a token's probability underflows, its log-prob must not."""
    hidden, weights, targets, cotangents = problem(True, spread=30.0)
    scores, grads = value_and_grads(
        lambda h, w, t: score_tokens(h, w, targets, t, tied=True, chunk=9),
        hidden, weights, jnp.float32(1.0), cotangents.astype(np.float32),
    )  # fmt: skip
    expected, expected_grads = oracle(hidden, weights, targets, 1.0, cotangents, True)
    assert jnp.min(scores[0]) < -100
    for a, b in zip(scores + grads[:2], expected + expected_grads[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_bfloat16_accumulates_in_float32():
    """Each product rounds its inputs only: 512 equal contributions to the weights' gradient must not get lost."""
    hidden = jnp.ones((1, 512, 1), jnp.bfloat16)
    weights = jnp.zeros((2, 1), jnp.bfloat16)
    targets = np.zeros((1, 512), np.int32)

    def loss(weights):
        return score_tokens(hidden, weights, targets, tied=True, chunk=1).logp.sum()

    assert jax.grad(loss)(weights).tolist() == [[256.0], [-256.0]]  # bfloat16 sums would stop growing at 128
    assert score_tokens(hidden, weights, targets, tied=True, chunk=64).logp.dtype == jnp.float32


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the head of Qwen3-30B-A3B sees of half a row of 32k."""

    tokens: int = 16384
    width: int = 2048
    vocab: int = 151936


def temporary_bytes(scorer, dtype: str, shape: Shape = Shape()) -> int:
    """Of forward and backward, from the compiler; nothing runs."""

    def loss(hidden, weights, targets):
        logp, entropy, total = scorer(hidden, weights, targets, 0.7)
        return (logp + 0.01 * entropy + 0.01 * total**2).mean()

    arguments = (
        jax.ShapeDtypeStruct((1, shape.tokens, shape.width), dtype),
        jax.ShapeDtypeStruct((shape.width, shape.vocab), dtype),
        jax.ShapeDtypeStruct((1, shape.tokens), "int32"),
    )
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needs_an_eighth_of_the_memory_at_a_real_vocabulary(dtype):
    plain = temporary_bytes(partial(plain_scores, tied=False), dtype)
    ours = temporary_bytes(partial(score_tokens, tied=False, chunk=512), dtype)
    assert plain >= 16384 * 151936 * 4  # at least once all logits, or the yardstick is wrong
    assert ours <= plain / 8, (plain, ours)

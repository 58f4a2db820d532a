"""Routing and the three expert dispatches, against plain loops in float64 and against each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import ModelConfig
from rome.models.moe import DISPATCHES, Experts, Routing, dense_dispatch, pick_dispatch, route, sparse_dispatch

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=4,
    num_experts=5,
    num_experts_per_token=2,
    moe_intermediate_size=7,
)


def problem(tokens: int, num_experts: int, top: int, width: int = 12, inner: int = 10):
    """Activations, routing and experts. The last expert is everyone's choice, and the first one nobody's."""
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    shapes = (num_experts, width, inner), (num_experts, width, inner), (num_experts, inner, width)
    experts = Experts(*(0.3 * rng.normal(size=shape).astype(np.float32) for shape in shapes))
    scores = rng.normal(size=(tokens, num_experts))
    scores[:, -1] += 20
    scores[:, 0] -= 40
    chosen = np.argsort(-scores, axis=1)[:, :top].astype(np.int32)
    weights = rng.uniform(0.1, 1, size=(tokens, top)).astype(np.float32)
    return jax.tree.map(jnp.asarray, (x, Routing(chosen, weights), experts))


def reference(x, routing, experts):
    """float64[N, D], token by token."""
    gate, up, down = (np.asarray(w, np.float64) for w in experts)
    out = np.zeros(x.shape)
    for n, row in enumerate(np.asarray(x, np.float64)):
        for e, weight in zip(*(np.asarray(part[n]) for part in routing), strict=True):
            a = row @ gate[e]
            out[n] += weight * ((a / (1 + np.exp(-a)) * (row @ up[e])) @ down[e])
    return out


def output_and_gradients(dispatch, x, routing, experts, cotangent):
    def loss(x, weights, experts):
        y = dispatch(x, Routing(routing.experts, weights), experts)
        return (y * cotangent).sum(), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, routing.weights, experts)
    return y, grads


@pytest.mark.parametrize("name", DISPATCHES)
@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 3, 1), (37, 5, 2), (96, 64, 8)])
def test_dispatches_agree_with_loops_in_output_and_with_dense_in_gradients(name, tokens, experts, top):
    x, routing, weights = problem(tokens, experts, top)
    counts = np.bincount(np.ravel(routing.experts), minlength=experts)
    assert counts[0] == 0 and counts[-1] == tokens  # an idle expert, and a crowded one
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32) / tokens
    y, grads = output_and_gradients(DISPATCHES[name], x, routing, weights, cotangent)
    np.testing.assert_allclose(y, reference(x, routing, weights), rtol=0, atol=1e-5)
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, (x, routing, weights, cotangent)
        )
        _, expected = output_and_gradients(dense_dispatch, *exact)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), grads, expected)


def test_dispatch_is_picked_by_name_or_size():
    auto = dataclasses.replace(CONFIG, num_experts=8)
    assert {name: pick_dispatch(dataclasses.replace(CONFIG, moe_dispatch=name), 100) for name in DISPATCHES} == (
        DISPATCHES
    )
    assert pick_dispatch(auto, 4096) is sparse_dispatch
    assert pick_dispatch(auto, 1) is dense_dispatch  # a block of one visit is mostly padding
    # as many rows either way: measured, sparse is twice as fast
    assert pick_dispatch(dataclasses.replace(CONFIG, num_experts=64, num_experts_per_token=8), 8) is sparse_dispatch


def test_replayed_experts_are_visited_with_this_routers_weights():
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    logits = x.astype(np.float64) @ router
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    recorded = rng.permuted(np.tile(np.arange(5), (9, 1)), axis=1)[:, :2].astype(np.int16)
    recorded[4] = -1  # nothing recorded
    for norm in (True, False):
        config = dataclasses.replace(CONFIG, norm_topk_prob=norm)
        free, replayed = route(x, router, config), route(x, router, config, recorded)
        picked = np.where(recorded >= 0, recorded, np.argsort(-probs, axis=1)[:, :2])
        expected = np.take_along_axis(probs, picked, axis=1)
        expected /= expected.sum(1, keepdims=True) if norm else 1.0
        np.testing.assert_array_equal(replayed.experts, picked)
        np.testing.assert_allclose(replayed.weights, expected, rtol=1e-5)
        assert replayed.weights.dtype == free.weights.dtype and replayed.experts.dtype == free.experts.dtype
        # replaying the router's own choice changes nothing, gradients included
        own = free.experts

        def loss(router, experts, config=config):
            return (route(x, router, config, experts).weights[:, 0] ** 2).sum()

        slope = [jax.grad(loss)(router, choice) for choice in (None, own)]
        np.testing.assert_allclose(*slope, rtol=1e-4, atol=1e-6)
        assert jnp.abs(slope[0]).max() > 1e-3

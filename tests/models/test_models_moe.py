"""Routing and the three expert dispatches, against plain loops in float64 and against each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import ConfigError, ModelConfig, init_params, score_sequences
from rome.models.moe import (
    DISPATCHES,
    Experts,
    Routing,
    dense_dispatch,
    pick_dispatch,
    route,
    router_loss,
    sparse_dispatch,
)

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


def test_router_losses_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(2, 6, 6)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    counted = np.arange(12).reshape(2, 6) % 4 != 1
    routing = route(x, router, CONFIG)
    logits = x.astype(np.float64) @ router
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probs, axis=-1)[..., :2][counted]
    shares = np.bincount(chosen.ravel(), minlength=5) / chosen.size
    balance = 5 * (shares * probs[counted].mean(0)).sum()
    z = (np.log(np.exp(logits).sum(-1))[counted] ** 2).mean()
    for aux, z_coef in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.2)):
        config = dataclasses.replace(CONFIG, router_aux_loss_coef=aux, router_z_loss_coef=z_coef)
        found = router_loss(x, router, routing, counted, config)
        np.testing.assert_allclose(found, aux * balance + z_coef * z, rtol=1e-5)
        assert router_loss(x, router, routing, np.zeros_like(counted), config) == 0
    # equal logits, visits spread evenly: balanced
    even = Routing(jnp.arange(10).reshape(5, 2) % 5, None)
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=1.0)
    np.testing.assert_allclose(
        router_loss(x[0, :5], np.zeros_like(router), even, np.ones(5, bool), config), 1.0, rtol=1e-6
    )


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_reports_its_router_losses_only_if_they_count(scan):
    config = dataclasses.replace(CONFIG, num_layers=3, dense_layers=(1,), scan_layers=scan)
    params = init_params(config, jax.random.key(0))
    tokens = jnp.arange(8).reshape(2, 4)
    segments = jnp.array([[1, 1, 1, 0], [1, 1, 2, 2]])
    inputs = (tokens, jnp.zeros_like(tokens), segments)

    def loss(aux, z):
        changed = dataclasses.replace(config, router_aux_loss_coef=aux, router_z_loss_coef=z)
        return jax.jit(jax.value_and_grad(lambda p: score_sequences(p, changed, *inputs).router_loss))(params)

    off, no_slope = loss(0.0, 0.0)
    balance, slope = loss(1.0, 0.0)
    both, _ = loss(0.5, 2.0)
    assert off == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(no_slope))
    assert 0.5 < balance < 2.5 and np.abs(slope["layers"]["router"]).max() > 1e-4
    assert both > 0.5 * balance + 2.0  # z is at least log²(E) of even logits, 2.6 here, or about it


def test_replay_of_another_shape_or_of_a_dense_model_is_refused():
    tokens = jnp.ones((2, 4), jnp.int32)
    given = (tokens, tokens, tokens, 1.0)
    with pytest.raises(ConfigError, match=r"replayed experts: expected shape \(2, 4, 1, 2\), got \(2, 4, 2, 2\)"):
        score_sequences({}, CONFIG, *given, jnp.zeros((2, 4, 2, 2), jnp.int16))
    dense = dataclasses.replace(CONFIG, num_experts=0, num_experts_per_token=0)
    with pytest.raises(ConfigError, match="replayed experts: expected None for a dense model"):
        score_sequences({}, dense, *given, jnp.zeros((2, 4, 1, 2), jnp.int16))
    with pytest.raises(ConfigError, match="router_z_loss_coef: expected 0, or a positive number with experts"):
        dataclasses.replace(dense, router_z_loss_coef=0.1)

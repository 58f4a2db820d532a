"""Adapters on every kind of weight: nothing at first, then what the formula says, merged or not."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_transformer import DENSE, MOE, make_params, packed_rows

from rome.models import ConfigError, forward
from rome.models.lora import Adapted, LoraConfig, adapt, add_adapters, attach, merge, trained, with_trained

EVERY = ("wq", "wk", "wv", "wo", "router", "gate", "up", "down", "embedding", "lm_head")
LORA = LoraConfig(rank=3, alpha=6.0, targets=EVERY)


@cache
def adapted() -> Adapted:
    """Adapters with B away from 0, so that they change something."""
    fresh = adapt(make_params(MOE), MOE, LORA, jax.random.key(1))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), fresh.adapters)
    return fresh.replace(adapters=moved)


@cache
def logits_of():
    rows = packed_rows(MOE, [[5, 3], [7]], 9)
    return jax.jit(lambda params: forward(attach(params), MOE, *rows))


def test_fresh_adapters_change_nothing():
    fresh = adapt(make_params(MOE), MOE, LORA, jax.random.key(1))
    assert set(fresh.adapters["layers"]) == set(EVERY) - {"embedding", "lm_head"}
    assert set(fresh.adapters["top"]) == {"embedding", "lm_head"}
    jax.tree.map(np.testing.assert_array_equal, merge(fresh), fresh.base)


def test_merged_and_unmerged_give_the_same_logits():
    unmerged, merged = logits_of()(adapted()), logits_of()(merge(adapted()))
    plain = logits_of()(adapted().base)
    np.testing.assert_allclose(unmerged, merged, atol=1e-5)
    assert float(jnp.abs(merged - plain).max()) > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_each_weight_gets_the_scaled_product_of_its_adapters(name):
    """W + (alpha / rank) A B, matrix by matrix, in float64."""
    state = adapted()
    stack = "top" if name in ("embedding", "lm_head") else "layers"
    pair = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.adapters[stack][name])
    base, merged = ((tree if stack == "top" else tree["layers"])[name] for tree in (state.base, merge(state)))
    equation = {"wq": "ldr,lrhk->ldhk", "wk": "ldr,lrhk->ldhk", "wv": "ldr,lrhk->ldhk", "wo": "lhkr,lrd->lhkd"}
    equation |= dict.fromkeys(("gate", "up", "down"), "ledr,lerf->ledf") | {"router": "ldr,lre->lde"}
    delta = np.einsum(equation.get(name, "ir,ro->io"), pair["a"], pair["b"])
    np.testing.assert_allclose(np.asarray(merged, np.float64), np.asarray(base, np.float64) + 2.0 * delta, atol=1e-5)


def test_only_adapters_get_gradients():
    state = adapted()

    def loss(part):
        layer = jax.tree.map(lambda leaf: leaf[0], attach(with_trained(state, part))["layers"])
        return sum(jnp.sum(jnp.sin(weight)) for weight in add_adapters(layer).values())

    gradients = jax.grad(loss)(trained(state))
    assert jax.tree.structure(gradients) == jax.tree.structure(state.adapters)
    assert float(jnp.abs(gradients["layers"]["gate"]["b"][0]).max()) > 0
    assert float(jnp.abs(gradients["layers"]["gate"]["b"][1]).max()) == 0  # the loss reads layer 0 alone


def test_a_bad_field_is_named():
    with pytest.raises(ConfigError, match=r"LoraConfig\.targets: expected some of .* got \['wz'\]"):
        LoraConfig(rank=2, targets=("wq", "wz"))
    with pytest.raises(ConfigError, match=r"LoraConfig\.rank"):
        LoraConfig(rank=-1)
    with pytest.raises(ConfigError, match=r"LoraConfig\.alpha"):
        LoraConfig(rank=1, alpha=0.0)
    tied = dataclasses.replace(DENSE, tie_embeddings=True)
    with pytest.raises(ConfigError, match=r"got \['router', 'lm_head'\]"):
        adapt(make_params(DENSE), tied, LORA, jax.random.key(0))

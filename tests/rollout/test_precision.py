"""Engines with bfloat16 or 8-bit weights: what they compute is what they say, and how far it is from the trainer's."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_toys import MODEL, VOCAB, ToyRenderer

from rome.models import forward, init_params, param_specs, token_log_probs
from rome.models.lora import MATRICES
from rome.models.params import is_spec
from rome.models.quantized import QUANTIZED, Int8, quantized_specs
from rome.models.quantized import quantize as eager_quantize
from rome.rollout import DecodeEngine, EngineConfig, EngineError
from rome.rollout.stream import Sampling, StreamConfig, StreamEngine

MOE = dataclasses.replace(
    MODEL, num_layers=2, num_experts=4, num_experts_per_token=2, moe_intermediate_size=16, dense_layers=(0,)
)
LLAMA = dataclasses.replace(MODEL, qk_norm=False, num_layers=2)
ROW = 48
quantize = jax.jit(eager_quantize)
logits_of = jax.jit(forward, static_argnums=1)
log_probs = jax.jit(token_log_probs, static_argnums=1)


@cache
def sharp_params(config, seed=0):
    params = init_params(config, jax.random.key(seed))
    return {**params, "lm_head": params["lm_head"] * 3}


def dequantized(params):
    """The weights that the codes stand for, as float32."""

    def whole(name, leaf):
        if not isinstance(leaf, Int8):
            return leaf
        inputs, outputs = MATRICES[name]
        axes = range(leaf.codes.ndim - inputs - outputs, leaf.codes.ndim - outputs)
        return leaf.codes * jnp.expand_dims(leaf.steps, tuple(axes))

    return {
        name: {n: whole(n, leaf) for n, leaf in stack.items()} if isinstance(stack, dict) else stack
        for name, stack in params.items()
    }


@pytest.mark.parametrize("config", [LLAMA, MOE], ids=["dense", "experts"])
def test_codes_are_within_half_a_step_and_only_projections_have_them(config):
    params = sharp_params(config)
    params = {**params, "layers": params["layers"] | {"wv": params["layers"]["wv"].at[..., 0].set(0.0)}}
    small = quantize(params)
    for stack in {"layers", "dense_layers"} & set(params):
        assert {n for n, leaf in small[stack].items() if isinstance(leaf, Int8)} == set(QUANTIZED)
    assert not any(isinstance(small[name], Int8) for name in ("embedding", "lm_head", "final_norm"))
    for exact, whole in zip(jax.tree.leaves(params), jax.tree.leaves(dequantized(small)), strict=True):
        assert np.abs(exact - whole).max() <= 0.51 * np.abs(exact).max() / 127
    declared = jax.tree.leaves(quantized_specs(param_specs(config)), is_leaf=is_spec)
    assert [(s.shape, s.dtype) for s in declared] == [(x.shape, str(x.dtype)) for x in jax.tree.leaves(small)]


@pytest.mark.parametrize(
    ("rows", "dtype", "error"), [(1, "float32", 1e-4), (5, "float32", 1e-4), (3, "bfloat16", 1e-2)]
)
def test_a_product_is_that_with_the_weights_that_the_codes_stand_for(rows, dtype, error):
    rng = np.random.default_rng(rows)
    weights = Int8(jnp.array(rng.integers(-127, 128, (96, 40)), jnp.int8), jnp.array(rng.random(40), jnp.float32))
    x = jnp.array(rng.normal(size=(rows, 2, 96)) * 10.0 ** rng.integers(-6, 6, (rows, 2, 1)), dtype)
    x = x.at[0, 0].set(0.0)
    expected = np.asarray(x, np.float64) @ (np.asarray(weights.codes, np.float64) * np.asarray(weights.steps))
    found = x @ weights
    assert found.dtype == x.dtype
    scale = np.abs(expected).max(axis=-1, keepdims=True) + 1e-30
    np.testing.assert_allclose(np.asarray(found, np.float64) / scale, expected / scale, atol=error)
    assert (found[0, 0] == 0).all()


@pytest.mark.parametrize("dispatch", ["sparse", "dense", "ragged"])
def test_every_dispatch_reads_quantised_experts(dispatch):
    config, reference = (dataclasses.replace(MOE, moe_dispatch=name) for name in (dispatch, "sparse"))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)
    inputs = tokens, np.tile(np.arange(12, dtype=np.int32), (2, 1)), np.ones_like(tokens)
    small = quantize(sharp_params(MOE))
    found, expected = logits_of(small, config, *inputs), logits_of(dequantized(small), reference, *inputs)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - logits_of(sharp_params(MOE), reference, *inputs)).max() > 2e-2


def sampled(config, precision, params=None, slots=4):
    """What an engine of `config`, whose cache is in pages, sampled for the same prompts: [(all tokens, the chunk)]."""
    settings = EngineConfig(
        slots,
        1,
        ROW,
        (8,),
        max_chunk_tokens=24,
        record_experts=config.is_moe,
        precision=precision,
        page_size=5,
    )
    engine = DecodeEngine(params or sharp_params(config), config, settings, frozenset({1}), 0)
    prompts = {slot: np.arange(15 + slot, 20 + slot, dtype=np.int32) for slot in range(slots)}
    for slot in range(slots):
        engine.insert(slot, 7 + slot)
    chunks = engine.generate(0, prompts)
    for slot, chunk in chunks.items() if config.is_moe else ():
        assert engine.routed_experts(slot).shape == (5 + len(chunk.tokens) - 1, 1, 2)
    return engine, [(np.concatenate([prompts[slot], chunk.tokens]), chunk) for slot, chunk in chunks.items()]


def gaps(params, config, samples):
    """log π − log μ of every sampled token, π being the training path."""
    found = []
    for tokens, chunk in samples:
        row = np.zeros((1, ROW), np.int32)
        row[0, : len(tokens)] = tokens
        segments = (np.arange(ROW) < len(tokens)).astype(np.int32)[None]
        logp = np.asarray(log_probs(params, config, row, np.arange(ROW, dtype=np.int32)[None], segments)[0])[0]
        found.append(logp[5 : len(tokens)] - chunk.behavior_logp)
    return np.concatenate(found)


def test_int8_log_probs_are_those_of_the_weights_that_the_codes_stand_for():
    params = sharp_params(MOE)
    engine, samples = sampled(MOE, "int8")
    assert np.abs(gaps(dequantized(quantize(params)), MOE, samples)).max() < 2e-3
    assert np.abs(gaps(params, MOE, samples)).max() > 5e-3  # what the mismatch mask is for
    # new weights are quantised when they are published
    engine.update_params(sharp_params(MOE, 1), 1)
    for slot in range(4):
        engine.free(slot)
        engine.insert(slot, 50 + slot)
    chunks = engine.generate(0, {slot: np.arange(15, 20, dtype=np.int32) for slot in range(4)})
    second = [(np.concatenate([np.arange(15, 20), chunk.tokens]), chunk) for chunk in chunks.values()]
    assert np.abs(gaps(dequantized(quantize(sharp_params(MOE, 1))), MOE, second)).max() < 2e-3
    assert {int(v) for chunk in chunks.values() for v in chunk.versions} == {1}
    with pytest.raises(EngineError, match="params"):
        engine.update_params(quantize(params), 2)


def test_bfloat16_is_near_and_not_the_same():
    worst = np.abs(gaps(sharp_params(MODEL), MODEL, sampled(MODEL, "bfloat16")[1])).max()
    assert 1e-3 < worst < 1


def test_the_services_engine_has_the_same_option():
    prompt, params = np.arange(15, 27, dtype=np.int32), sharp_params(MOE)
    engine = StreamEngine(params, MOE, StreamConfig(2, ROW, (12,), precision="int8"), ToyRenderer.stop_ids, 0)
    slot = engine.start(prompt, Sampling(1, 1, 0.0))
    burst = engine.advance()[slot]
    inputs = np.tile(prompt, (2, 1)), np.tile(np.arange(12, dtype=np.int32), (2, 1)), np.ones((2, 12), np.int32)
    for weights, near in ((dequantized(quantize(params)), True), (params, False)):
        logits = logits_of(weights, MOE, *inputs)[0, -1]
        gap = abs(jax.nn.log_softmax(logits)[burst.tokens[0]] - burst.raw_logp[0])
        assert (gap < 1e-3) == near
    for config in (EngineConfig, StreamConfig):
        with pytest.raises(EngineError, match="precision"):
            config(precision="int4")

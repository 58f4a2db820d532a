"""The structured start: the circuit is there, and nothing else has changed."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import ModelConfig, init_induction, init_params, token_log_probs
from rome.models.transformer import apply_rope, project_heads, rms_norm, rope_tables

CONFIG = ModelConfig(
    vocab_size=400,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=64,
    rope_theta=1e4,
    qk_norm_init=1.5,
)
MOE = dataclasses.replace(CONFIG, num_experts=4, num_experts_per_token=2, moe_intermediate_size=32)


induction = jax.jit(init_induction, static_argnums=1)


@cache
def _start(config):
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return params, induction(params, config, jax.random.key(1))


@partial(jax.jit, static_argnums=1)
def _first_layer_attention(params, config, tokens):
    """float32[B, H, T, T] of layer 0, from the definition."""
    layer = {name: leaf[0] for name, leaf in params["layers"].items()}
    y = rms_norm(params["embedding"][tokens], layer["attention_norm"], config.rms_norm_eps)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rope = rope_tables(positions, config)
    q, k = (
        apply_rope(rms_norm(project_heads(y, layer[w]), layer[f"{n}_norm"], config.rms_norm_eps), rope)
        for w, n in (("wq", "q"), ("wk", "k"))
    )
    k = jnp.repeat(k, config.num_heads // config.num_kv_heads, axis=1)
    scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2))
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores * config.head_dim**-0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def test_the_first_heads_look_one_token_back():
    plain, params = _start(CONFIG)
    tokens = jax.random.randint(jax.random.key(7), (4, 48), 0, CONFIG.vocab_size)
    group = CONFIG.num_heads // CONFIG.num_kv_heads
    back = np.arange(1, 48)
    looks = np.asarray(_first_layer_attention(params, CONFIG, tokens))[:, :, back, back - 1]
    assert looks[:, :group].mean() > 0.5
    assert np.median(looks[:, :group]) > 0.5
    assert looks[:, group:].mean() < 0.15  # the other heads start as ever
    assert np.asarray(_first_layer_attention(plain, CONFIG, tokens))[:, :, back, back - 1].mean() < 0.15


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_the_start_is_as_undecided_as_a_random_one(config):
    """The circuit is there to be trained: log-probs are finite and near those of a uniform guess."""
    tokens = jax.random.randint(jax.random.key(3), (4, 48), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(48), tokens.shape)
    _, params = _start(config)
    logp, entropy = jax.jit(token_log_probs, static_argnums=1)(params, config, tokens, positions, jnp.ones_like(tokens))
    assert np.isfinite(logp).all()
    assert float(logp[:, 1:].mean()) == pytest.approx(-np.log(config.vocab_size), abs=1.0)
    assert float(entropy[:, 1:].mean()) > 0.8 * np.log(config.vocab_size)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        MOE,
        dataclasses.replace(CONFIG, param_dtype="bfloat16"),
        dataclasses.replace(CONFIG, num_layers=1, tie_embeddings=False, qk_norm=False),
        dataclasses.replace(CONFIG, num_kv_heads=4, num_layers=3),
    ],
    ids=["dense", "moe", "bfloat16", "one-layer", "no-groups"],
)
def test_shapes_and_dtypes_stay_and_the_start_is_deterministic(config):
    plain, params = _start(config)
    again = induction(plain, config, jax.random.key(1))
    other = induction(plain, config, jax.random.key(2))
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    for before, after, same in zip(*map(jax.tree.leaves, (plain, params, again)), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert np.isfinite(np.asarray(after, np.float32)).all()
        assert np.asarray(after).tobytes() == np.asarray(same).tobytes()
    assert not np.array_equal(params["embedding"], other["embedding"])
    touched = {"wq", "wk", "wo"} if config.num_layers > 1 else {"wq", "wk"}  # only later layers copy
    for name in params["layers"].keys() - touched:
        np.testing.assert_array_equal(params["layers"][name], plain["layers"][name])
    for name in touched:
        assert not np.array_equal(params["layers"][name], plain["layers"][name])
    group = config.num_heads // config.num_kv_heads
    np.testing.assert_array_equal(params["layers"]["wk"][:, :, 1:], plain["layers"]["wk"][:, :, 1:])
    np.testing.assert_array_equal(params["layers"]["wq"][:, :, group:], plain["layers"]["wq"][:, :, group:])

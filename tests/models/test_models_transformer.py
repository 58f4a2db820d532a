"""The transformer against an independent float64 reference, and the properties that training relies on."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import ConfigError, ModelConfig, count_params, forward, init_params, param_specs, token_log_probs
from rome.models.params import is_spec

DENSE = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=20,
    rope_theta=100.0,
    qk_norm_init=1.5,
    head_chunk=16,
)
MOE = dataclasses.replace(
    DENSE, num_experts=5, num_experts_per_token=2, moe_intermediate_size=9, tie_embeddings=False, moe_dispatch="sparse"
)
VARIANTS = {
    "dense": DENSE,
    "dense_untied_no_qk_norm": dataclasses.replace(DENSE, tie_embeddings=False, qk_norm=False, num_kv_heads=4),
    "one_kv_head_unrolled": dataclasses.replace(DENSE, num_kv_heads=1, scan_layers=False),
    "moe_sparse": MOE,
    "moe_dense": dataclasses.replace(MOE, moe_dispatch="dense", norm_topk_prob=False),
}


@cache
def make_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters whose norms aren't all one value, so that a norm left out shows."""
    rng = np.random.default_rng(seed)
    params = jax.jit(partial(init_params, config))(jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), params)


def packed_rows(config: ModelConfig, layout: list[list[int]], length: int, seed: int = 0):
    """Rows of segments of the given lengths, padded: (tokens, positions, segment_ids) int32[B, length]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(layout), length)).astype(np.int32)
    positions = np.zeros_like(tokens)
    segments = np.zeros_like(tokens)
    for row, lengths in enumerate(layout):
        start = 0
        for number, size in enumerate(lengths, start=1):
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = number
            start += size
    return tokens, positions, segments


@partial(jax.jit, static_argnums=1)
def evaluate(params, config, tokens, positions, segments):
    """(logits, log-probs, entropy) at temperature 0.7."""
    logits = forward(params, config, tokens, positions, segments)
    return logits, *token_log_probs(params, config, tokens, positions, segments, temperature=0.7)


# ---- an independent reference: one segment, float64, plain loops


def reference_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def reference_rope(x, position, theta):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def reference_swiglu(x, gate, up, down):
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def reference_mlp(x, layer, config):
    if not config.num_experts:
        return reference_swiglu(x, layer["gate"], layer["up"], layer["down"])
    scores = x @ layer["router"]
    probs = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    chosen = np.argsort(-probs)[: config.num_experts_per_token]
    norm = probs[chosen].sum() if config.norm_topk_prob else 1.0
    return sum(
        probs[e] / norm * reference_swiglu(x, layer["gate"][e], layer["up"][e], layer["down"][e]) for e in chosen
    )


def reference_logits(params, config, tokens) -> np.ndarray:
    """float64[T, V] of one segment."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["embedding"][tokens]
    eps, group = config.rms_norm_eps, config.num_heads // config.num_kv_heads
    for index in range(config.num_layers):
        layer = {name: value[index] for name, value in params["layers"].items()}
        y = reference_norm(x, layer["attention_norm"], eps)
        for t in range(len(tokens) - 1, -1, -1):  # backwards, for x is changed in place and y is not
            mixed = np.zeros(config.hidden_size)
            for head in range(config.num_heads):
                kv = head // group
                q = y[t] @ layer["wq"][:, head]
                if config.qk_norm:
                    q = reference_norm(q, layer["q_norm"], eps)
                q = reference_rope(q, t, config.rope_theta)
                scores = []
                for s in range(t + 1):
                    k = y[s] @ layer["wk"][:, kv]
                    if config.qk_norm:
                        k = reference_norm(k, layer["k_norm"], eps)
                    scores.append(q @ reference_rope(k, s, config.rope_theta) / np.sqrt(config.head_dim))
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                value = sum(weights[s] * (y[s] @ layer["wv"][:, kv]) for s in range(t + 1))
                mixed += value @ layer["wo"][head]
            x[t] = x[t] + mixed
        y = reference_norm(x, layer["mlp_norm"], eps)
        x = x + np.stack([reference_mlp(row, layer, config) for row in y])
    x = reference_norm(x, params["final_norm"], eps)
    return x @ (params["embedding"].T if config.tie_embeddings else params["lm_head"])


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_float64_reference_on_packed_rows(name):
    config = VARIANTS[name]
    params = make_params(config)
    layout = [[9, 1, 6], [13], [2, 3, 4, 5]]
    tokens, positions, segments = packed_rows(config, layout, 18)
    logits, logp, entropy = evaluate(params, config, tokens, positions, segments)
    for row, lengths in enumerate(layout):
        start = 0
        for size in lengths:
            ids = tokens[row, start : start + size]
            expected = reference_logits(params, config, ids)
            np.testing.assert_allclose(logits[row, start : start + size], expected, rtol=0, atol=1e-4)
            scaled = log_softmax(expected[:-1] / 0.7)
            want = scaled[np.arange(size - 1), ids[1:]]
            np.testing.assert_allclose(logp[row, start + 1 : start + size], want, rtol=0, atol=1e-4)
            want = -(np.exp(scaled) * scaled).sum(-1)
            np.testing.assert_allclose(entropy[row, start + 1 : start + size], want, rtol=0, atol=1e-4)
            assert logp[row, start] == 0.0
            assert entropy[row, start] == 0.0
            start += size
        assert not np.any(logp[row, start:])
        assert not np.any(entropy[row, start:])


def test_rows_longer_than_an_attention_block_match_the_reference():
    config = dataclasses.replace(DENSE, num_layers=1, head_chunk=64)
    params = make_params(config)
    tokens, positions, segments = packed_rows(config, [[100, 45]], 150)
    logits, _, _ = evaluate(params, config, tokens, positions, segments)
    np.testing.assert_allclose(logits[0, :100], reference_logits(params, config, tokens[0, :100]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[0, 100:145], reference_logits(params, config, tokens[0, 100:145]), atol=1e-4)


@partial(jax.jit, static_argnums=1)
def loss_and_grad(params, config, tokens, positions, segments, weights):
    def loss(params):
        logp, entropy = token_log_probs(params, config, tokens, positions, segments, temperature=0.9)
        return (weights * (logp + 0.1 * entropy)).sum(), logp

    (value, logp), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, logp, grads


def assert_trees_close(actual, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


@pytest.mark.parametrize("name", ["dense", "moe_sparse"])
def test_packed_equals_unpacked_in_log_probs_and_gradients(name):
    config = VARIANTS[name]
    params = make_params(config)
    layout = [[70, 40, 30], [11, 120]]
    packed = packed_rows(config, [*layout, [], [], []], 145)
    weights = np.random.default_rng(1).normal(size=packed[0].shape).astype(np.float32)
    _, logp, grads = loss_and_grad(params, config, *packed, weights)
    rows = []
    for row, lengths in enumerate(layout):
        start = 0
        for size in lengths:
            rows.append((row, start, size))
            start += size
    alone = packed_rows(config, [[size] for _, _, size in rows], 145)
    alone_weights = np.zeros(alone[0].shape, np.float32)
    for index, (row, start, size) in enumerate(rows):
        alone[0][index, :size] = packed[0][row, start : start + size]
        alone_weights[index, :size] = weights[row, start : start + size]
    _, alone_logp, alone_grads = loss_and_grad(params, config, *alone, alone_weights)
    for index, (row, start, size) in enumerate(rows):
        np.testing.assert_allclose(logp[row, start : start + size], alone_logp[index, :size], rtol=0, atol=1e-5)
    assert_trees_close(grads, alone_grads, atol=2e-4)


# every expert is chosen: which ones are is a step function, that differences would trip over
@pytest.mark.parametrize("config", [DENSE, dataclasses.replace(MOE, num_experts_per_token=5)], ids=["dense", "moe"])
def test_hand_written_gradients_match_central_differences(config):
    params = make_params(config)
    batch = packed_rows(config, [[9, 8], [17], [3]], 20)
    weights = np.random.default_rng(2).normal(size=batch[0].shape).astype(np.float32)
    _, _, grads = loss_and_grad(params, config, *batch, weights)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    for index, grad in enumerate(jax.tree.leaves(grads)):
        direction = rng.normal(size=grad.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)

        def value(step, index=index, direction=direction):
            moved = [leaf + step * direction if i == index else leaf for i, leaf in enumerate(leaves)]
            return float(loss_and_grad(jax.tree.unflatten(tree, moved), config, *batch, weights)[0])

        slope = (value(5e-3) - value(-5e-3)) / 1e-2
        assert abs(slope - float((grad * direction).sum())) < 0.01 * max(1.0, abs(slope))


@pytest.mark.parametrize("name", ["dense", "moe_sparse"])
def test_padding_has_no_effect_and_nothing_is_nan(name):
    config = VARIANTS[name]
    params = make_params(config)
    tokens, positions, segments = packed_rows(config, [[7, 4], [5], []], 20)
    other = np.where(segments == 0, (tokens + 17) % config.vocab_size, tokens)
    weights = np.ones(tokens.shape, np.float32)
    value, logp, grads = loss_and_grad(params, config, tokens, positions, segments, weights)
    _, logp2, grads2 = loss_and_grad(params, config, other, positions, segments, weights)
    np.testing.assert_allclose(logp, logp2, rtol=0, atol=1e-6)
    assert_trees_close(grads, grads2, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, logp, grads)))
    logits, _, _ = evaluate(params, config, tokens, positions, segments)
    assert np.isfinite(logits).all()


def test_rows_do_not_influence_each_other():
    params = make_params(MOE)
    tokens, positions, segments = packed_rows(MOE, [[12, 3], [15], [8]], 20)
    _, logp, _ = evaluate(params, MOE, tokens, positions, segments)
    tokens = tokens.copy()
    tokens[1:] = (tokens[1:] + 5) % MOE.vocab_size
    _, again, _ = evaluate(params, MOE, tokens, positions, segments)
    np.testing.assert_allclose(logp[0], again[0], rtol=0, atol=1e-6)
    assert np.abs(logp[1] - again[1]).max() > 1e-2


@pytest.mark.parametrize("change", [{"remat": True}, {"scan_layers": False}, {"head_chunk": 1000}])
def test_remat_unrolling_and_head_chunks_change_nothing(change):
    params = make_params(DENSE)
    batch = packed_rows(DENSE, [[9, 8], [17], [3]], 20)
    weights = np.random.default_rng(4).normal(size=batch[0].shape).astype(np.float32)
    value, logp, grads = loss_and_grad(params, DENSE, *batch, weights)
    value2, logp2, grads2 = loss_and_grad(params, dataclasses.replace(DENSE, **change), *batch, weights)
    np.testing.assert_allclose(logp, logp2, rtol=0, atol=1e-5)
    assert_trees_close((value, grads), (value2, grads2), atol=1e-4)


def largest_array(function, *args) -> int:
    """Elements of the largest intermediate of a function, loops and inner functions included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape"))
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return max(walk(jax.make_jaxpr(function)(*args).jaxpr))


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    config = dataclasses.replace(DENSE, vocab_size=4096, head_chunk=8)
    params = init_params(config, jax.random.key(0))
    batch = packed_rows(config, [[32]] * 4, 32)
    one_chunk, all_logits = 8 * 4096, 4 * 32 * 4096

    def grad(config):
        return lambda params: jax.grad(lambda p: token_log_probs(p, config, *batch)[0].sum())(params)

    assert largest_array(grad(config), params) <= 4 * one_chunk
    assert largest_array(grad(dataclasses.replace(config, head_chunk=1000)), params) >= all_logits


def test_bfloat16_stays_close_and_keeps_float32_log_probs():
    params = make_params(DENSE)
    batch = packed_rows(DENSE, [[20], [9, 9], [4]], 20)
    _, exact, _ = evaluate(params, DENSE, *batch)
    _, rough, _ = evaluate(params, dataclasses.replace(DENSE, dtype="bfloat16"), *batch)
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.abs(exact - rough).max() < 0.3
    stored = init_params(dataclasses.replace(DENSE, param_dtype="bfloat16"), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


# ---- parameters and config


def test_parameter_counts_of_qwen3_30b_a3b():
    config = ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=6144,
        tie_embeddings=False,
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=768,
    )
    assert count_params(config) == 30_532_122_624
    assert count_params(config, active=True) == 3_353_032_704
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    assert sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(shapes)) == 30_532_122_624


@pytest.mark.parametrize("name", VARIANTS)
def test_params_are_what_their_declarations_say(name):
    config = VARIANTS[name]
    params = init_params(config, jax.random.key(0))
    specs = param_specs(config)
    assert jax.tree.structure(params) == jax.tree.structure(specs, is_leaf=is_spec)
    for spec, leaf in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params), strict=True):
        assert leaf.shape == spec.shape
        assert leaf.dtype == spec.dtype
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    c, per_layer = config, 2 * config.hidden_size + 2 * config.qk_norm * config.head_dim
    per_layer += 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    if c.num_experts:
        per_layer += c.num_experts * c.hidden_size * (1 + 3 * c.moe_intermediate_size)
    else:
        per_layer += 3 * c.hidden_size * c.intermediate_size
    outer = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2) + c.hidden_size
    assert count_params(config) == outer + c.num_layers * per_layer


def test_init_is_deterministic_scaled_and_distinct():
    config = dataclasses.replace(DENSE, hidden_size=64, intermediate_size=128, num_layers=8)
    params = init_params(config, jax.random.key(0))
    again = init_params(config, jax.random.key(0))
    other = init_params(config, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["embedding"], other["embedding"])
    layers = params["layers"]
    assert not np.array_equal(layers["gate"], layers["up"])
    assert not np.array_equal(layers["wk"], layers["wv"])
    assert np.all(layers["q_norm"] == 1.5)
    assert np.std(layers["gate"]) == pytest.approx(64**-0.5, rel=0.05)
    assert np.std(layers["down"]) == pytest.approx(128**-0.5 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"dtype": "float63"}, "dtype"),
        ({"moe_dispatch": "magic"}, "moe_dispatch"),
        ({"num_experts": 4}, "num_experts_per_token"),
        ({"num_experts": 4, "num_experts_per_token": 2}, "moe_intermediate_size"),
        ({"intermediate_size": 0}, "intermediate_size"),
    ],
)
def test_config_errors_name_the_field(change, field):
    with pytest.raises(ConfigError, match=rf"ModelConfig\.{field}: expected"):
        dataclasses.replace(DENSE, **change)
    assert hash(DENSE) == hash(dataclasses.replace(DENSE))

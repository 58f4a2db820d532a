"""`extend` against the training path: any split of a sequence into deltas gives the same distribution."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import KVCache, ModelConfig, extend, forward, init_cache, init_params, token_log_probs, unstack_layers
from rome.models.paged import Paging, init_paged_cache

DENSE = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    qk_norm_init=1.5,
)
MOE = dataclasses.replace(DENSE, num_experts=4, num_experts_per_token=2, moe_intermediate_size=12, tie_embeddings=False)
CONFIGS = {"dense": DENSE, "moe": MOE}

step = jax.jit(extend, static_argnums=1)


@partial(jax.jit, static_argnums=1)
def training_path(params, config, tokens, positions, segments):
    logits = forward(params, config, tokens, positions, segments)
    return logits, token_log_probs(params, config, tokens, positions, segments)[0]


@cache
def make_params(config, seed=0):
    return jax.jit(partial(init_params, config))(jax.random.key(seed))


def rows(config, lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(lengths), max(lengths))).astype(np.int32)
    positions = np.tile(np.arange(max(lengths), dtype=np.int32), (len(lengths), 1))
    segments = (positions < np.array(lengths)[:, None]).astype(np.int32)
    return tokens, positions, segments


def feed(params, config, cache, tokens, counts, width):
    """Appends counts[b] tokens of the head of each row, in one call of the given width."""
    block = np.full((len(counts), width), 49, np.int32)
    for row, count in enumerate(counts):
        block[row, :count] = tokens[row][:count]
    return step(params, config, cache, block, np.array(counts, np.int32))


@pytest.mark.parametrize("name", CONFIGS)
def test_extend_in_arbitrary_splits_equals_the_training_path(name):
    config = CONFIGS[name]
    params = make_params(config, 1)
    lengths = [33, 40, 17, 26]
    tokens, positions, segments = rows(config, lengths)
    logits, expected = map(np.asarray, training_path(params, config, tokens, positions, segments))
    rng = np.random.default_rng(7)
    state = init_cache(config, 4, 41)
    done = np.zeros(4, int)
    widths = iter([16, 1, 1, 16, 1] + [16] * 30)
    while np.any(done < lengths):
        width = next(widths)
        counts = [int(rng.integers(0, min(width, lengths[b] - done[b]) + 1)) for b in range(4)]
        out, state = feed(params, config, state, [tokens[b, done[b] :] for b in range(4)], counts, width)
        done += counts
        assert np.isfinite(out).all()
        np.testing.assert_array_equal(state.length, done)
        for b in range(4):
            if counts[b]:
                np.testing.assert_allclose(out[b], logits[b, done[b] - 1], rtol=0, atol=1e-4)
                if done[b] < lengths[b]:
                    got = jax.nn.log_softmax(out[b])[tokens[b, done[b]]]
                    assert abs(got - expected[b, done[b]]) <= 1e-4


def columns(slot):
    """[K, L, h] of one slot's keys or values; keys are stored with the columns last."""
    slot = np.asarray(slot)
    return slot if slot.shape[-1] == DENSE.head_dim else np.swapaxes(slot, 1, 2)


def test_slots_with_count_zero_and_bounds_stay_untouched():
    params = make_params(DENSE)
    tokens, *_ = rows(DENSE, [16] * 4)
    _, before = feed(params, DENSE, init_cache(DENSE, 4, 16), tokens, [16, 5, 8, 0], 16)
    out, after = feed(params, DENSE, before, tokens, [0, 3, 0, 0], 16)
    for old, new in zip(before.keys + before.values, after.keys + after.values, strict=True):
        # slot 0 is full: a write past its end must not wrap or clamp onto earlier columns
        np.testing.assert_array_equal(old[0], new[0])
        np.testing.assert_array_equal(old[2:], new[2:])
        np.testing.assert_array_equal(columns(old[1])[:, :5], columns(new[1])[:, :5])
        assert np.all(np.any(columns(new[1])[:, 5:8] != columns(old[1])[:, 5:8], axis=-1))
        np.testing.assert_array_equal(columns(new[1])[:, 8:], 0.0)
    np.testing.assert_array_equal(after.length, [16, 8, 8, 0])
    assert np.isfinite(out).all()


def test_reset_slots_start_over_and_do_not_see_their_past():
    params = make_params(DENSE)
    tokens, *_ = rows(DENSE, [16] * 4)
    empty = init_cache(DENSE, 4, 16)
    _, state = feed(params, DENSE, empty, tokens, [10, 10, 0, 16], 16)
    state = state.reset(jnp.array([True, False, False, False]))
    np.testing.assert_array_equal(state.length, [0, 10, 0, 16])
    fresh, _ = feed(params, DENSE, empty, tokens[:, 3:], [4, 0, 0, 0], 16)
    again, state = feed(params, DENSE, state, tokens[:, 3:], [4, 0, 0, 0], 16)
    np.testing.assert_array_equal(fresh[0], again[0])
    np.testing.assert_array_equal(state.length, [4, 10, 0, 16])


@pytest.mark.parametrize("name", CONFIGS)
def test_slots_do_not_influence_each_other_and_extend_is_bitwise_deterministic(name):
    config = CONFIGS[name]
    params = make_params(config)
    tokens, *_ = rows(config, [20] * 4)
    others = (tokens + np.array([[0], [7], [11], [5]], np.int32)) % config.vocab_size
    outs = []
    for batch, counts in [(tokens, [9, 9, 9, 9]), (tokens, [9, 9, 9, 9]), (others, [9, 2, 0, 16])]:
        out, state = feed(params, config, init_cache(config, 4, 41), batch, counts, 16)
        out2, _ = feed(params, config, state, batch[:, 9:], [1, 1, 1, 1], 1)
        outs.append((np.asarray(out[0]), np.asarray(out2[0])))
    for again, other in ((1, 0), (2, 0)):
        for first, second in zip(outs[again], outs[other], strict=True):
            np.testing.assert_array_equal(first, second)


def test_decoding_in_a_jitted_loop_updates_the_cache_in_place():
    """Greedy decoding in one while loop equals one call a token, and the compiled loop copies no cache."""
    params = make_params(DENSE, 3)
    slots, room, steps = 4, 256, 6
    tokens, *_ = rows(DENSE, [5] * slots)

    @partial(jax.jit, donate_argnums=0)
    def decode(cache: KVCache, token):
        layers = unstack_layers(params, DENSE)

        def body(state):
            index, cache, token, out = state
            logits, cache = extend(layers, DENSE, cache, token[:, None], jnp.ones_like(token))
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return index + 1, cache, token, out.at[index].set(token)

        out = jnp.zeros((steps, slots), jnp.int32)
        return jax.lax.while_loop(lambda state: state[0] < steps, body, (0, cache, token, out))

    _, cache = feed(params, DENSE, init_cache(DENSE, slots, room), tokens, [5] * slots, 5)
    start = jnp.array(tokens[:, 0])
    compiled = decode.lower(cache, start).compile()
    one_layer = slots * DENSE.num_kv_heads * room * DENSE.head_dim * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer * DENSE.num_layers
    expected, token, single = [], start, jax.tree.map(jnp.copy, cache)
    for _ in range(steps):
        logits, single = step(params, DENSE, single, token[:, None], jnp.ones_like(token))
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        expected.append(np.asarray(token))
    _, looped, _, out = decode(cache, start)
    np.testing.assert_array_equal(out, np.stack(expected))
    np.testing.assert_array_equal(looped.length, single.length)


def test_decoding_in_a_jitted_loop_updates_the_pages_in_place():
    """The compiled loop copies no pool, although a loop inside it reads what it writes."""
    params = make_params(DENSE, 3)
    slots, room, paging = 4, 512, Paging(16, 128)

    @partial(jax.jit, donate_argnums=0)
    def decode(cache, token):
        layers = unstack_layers(params, DENSE)

        def body(state):
            index, cache, token = state
            logits, cache = extend(layers, DENSE, cache, token[:, None], jnp.ones_like(token))
            return index + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.while_loop(lambda state: state[0] < 6, body, (0, cache, token))

    cache = jax.eval_shape(lambda: init_paged_cache(DENSE, slots, room, paging))
    compiled = decode.lower(cache, jax.ShapeDtypeStruct((slots,), jnp.int32)).compile()
    one_layer = slots * DENSE.num_kv_heads * room * DENSE.head_dim * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer * DENSE.num_layers


def test_extend_compiles_once_per_shape():
    params = make_params(DENSE)
    counted = jax.jit(lambda *arguments: extend(*arguments), static_argnums=1)
    cache = init_cache(DENSE, 2, 16)
    for counts in ([1, 1], [0, 1], [1, 0]):
        _, cache = counted(params, DENSE, cache, np.zeros((2, 1), np.int32), np.array(counts, np.int32))
        cache = cache.reset(jnp.array([True, False]))
    assert counted._cache_size() == 1

"""The paged cache against the contiguous one: any table of pages, any block of them, gives the same logits."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_cache import DENSE, MOE, make_params

from rome.models import extend, init_cache
from rome.models.cache import sees
from rome.models.paged import Paging, attend_pages, init_paged_cache

MIXED = dataclasses.replace(
    MOE, intermediate_size=24, dense_layers=(0,), sliding_layers=(1,), sliding_window=9, tie_embeddings=True
)
ROOM = 200  # several blocks of pages

step = jax.jit(extend, static_argnums=1)
attend = jax.jit(attend_pages, static_argnums=(6, 7))


def reference(q, k, v, positions, window):
    """q [B, K, G, S, h] over k, v [B, K, L, h] of which column t is position t."""
    scores = np.einsum("bkgsh,bklh->bkgsl", q, k) / np.sqrt(q.shape[-1])
    visible = np.asarray(sees(positions[..., None] - np.arange(k.shape[2]), window))[:, None, None]
    weights = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    return np.einsum("bkgsl,bklh->bkgsh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("size", "width", "window"), [(4, 1, 0), (4, 3, 0), (5, 2, 0), (4, 2, 7), (24, 1, 3)])
def test_attention_over_blocks_of_scattered_pages(size, width, window):
    rng = np.random.default_rng(size * width)
    rows, heads, room = 3, 2, 24
    columns = -(-room // size)
    table = rng.permutation(rows * columns).reshape(rows, columns)
    k, v = rng.normal(size=(2, rows, heads, columns * size, 8))
    q = rng.normal(size=(rows, heads, 3, 2, 8))
    positions = np.array([[3, 4], [22, 23], [10, 11]])
    paged = k.reshape(rows, heads, columns, size, 8), v.reshape(rows, heads, columns, size, 8)
    keys, values = (np.zeros((rows * columns, heads, size, 8)) for _ in range(2))
    for held, given in zip((keys, values), paged, strict=True):
        held[table] = np.swapaxes(given, 1, 2)
    padded = np.pad(table, ((0, 0), (0, -columns % width)))
    first = max(0, 3 - window + 1) // (size * width) if window else 0
    end = -(-24 // (size * width))
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, np.swapaxes(keys, 2, 3), values)]
    arguments = jnp.asarray(padded, jnp.int32), jnp.asarray(positions, jnp.int32)
    found = attend(*arrays, *arguments, (jnp.int32(first), jnp.int32(end)), width, window)
    np.testing.assert_allclose(found, reference(q, k, v, positions, window), atol=2e-6)
    # what a row gets does not depend on how far its neighbours' histories reach
    shorter = attend(*arrays, *arguments, (jnp.int32(first), jnp.int32(-(-5 // (size * width)))), width, window)
    np.testing.assert_array_equal(found[0], shorter[0])


@cache
def histories():
    """Logits of both caches after each append of a random sequence of them, and the caches at the end."""
    config, size = MIXED, 7
    params, rng = make_params(config, 1), np.random.default_rng(3)
    paging = Paging(size, 4 * Paging(size, 0).of(ROOM))
    contiguous = init_cache(config, 4, ROOM, config.is_moe)
    paged = init_paged_cache(config, 4, ROOM, paging, config.is_moe)
    table = rng.permutation(paging.pages).reshape(4, -1).astype(np.int32)
    table[3, 1:] = paging.pages  # the last slot has one page, and stays within it
    paged = paged.replace(table=jnp.asarray(table))
    most, logits = np.array([190, 110, 40, min(size, 3)]), []
    for _ in range(18):
        left = most - np.asarray(contiguous.length)
        counts = np.minimum(rng.integers(0, 33, 4), left).astype(np.int32)
        tokens = rng.integers(0, config.vocab_size, (4, 32)).astype(np.int32)
        expected, contiguous = step(params, config, contiguous, tokens, counts)
        found, paged = step(params, config, paged, tokens, counts)
        logits.append((counts, np.asarray(expected), np.asarray(found)))
    return logits, contiguous, paged


def test_extend_gives_the_logits_of_the_contiguous_cache():
    """Of a dense layer that sees all, and one with experts and a sliding window."""
    logits, contiguous, paged = histories()
    np.testing.assert_array_equal(contiguous.length, paged.length)
    assert contiguous.length[0] == 190
    for counts, expected, found in logits:
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[counts > 0], expected[counts > 0], atol=2e-5)


def test_experts_are_recorded_where_their_tokens_are():
    _, contiguous, paged = histories()
    table = np.asarray(paged.table)
    assert len(paged.pool.experts) == len(contiguous.experts) == 1
    for of_rows, of_pages in zip(contiguous.experts, paged.pool.experts, strict=True):
        for row, length in enumerate(np.asarray(paged.length)[:3]):
            np.testing.assert_array_equal(of_pages[table[row]].reshape(-1, 2)[:length], of_rows[row, :length])


def test_a_slot_writes_its_own_pages_only_and_what_has_no_page_is_lost():
    config, paging = DENSE, Paging(4, 6)
    params, cache = make_params(config), init_paged_cache(config, 2, 16, paging)
    cache = cache.replace(table=jnp.array([[0, 3, 6, 6], [5, 6, 6, 6]], jnp.int32))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) % 50
    _, before = step(params, config, cache, tokens, np.array([7, 2], np.int32))
    _, after = step(params, config, before, tokens, np.array([5, 0], np.int32))  # 12 tokens, two pages
    for pool, written in ((before.pool, {0, 3, 5}), (after.pool, {0, 3, 5})):
        for held in pool.values:
            assert {int(page) for page in np.unique(np.nonzero(np.asarray(held))[0])} == written
    for old, new in zip(before.pool.values, after.pool.values, strict=True):
        np.testing.assert_array_equal(old[5], new[5])
        np.testing.assert_array_equal(old[0], new[0])
        assert (old[3] != new[3]).any()

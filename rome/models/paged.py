"""A key/value cache in pages: slots that start alike share them, and memory follows what is held.

The host says which pages a slot has, in a table (`rome.rollout.pages`); here they are written and attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rome.models.attention import MASKED
from rome.models.cache import Extension, check_cache, pick_rows, sees
from rome.models.config import ModelConfig
from rome.models.sharding import is_sharded, island, partition

_BLOCK = 64  # tokens of a slot's history that one iteration of the attention reads, at least


class Paging(NamedTuple):
    """Tokens of a page, and how many pages a cache has."""

    size: int
    pages: int

    def of(self, tokens: int) -> int:
        """The pages that so many tokens take."""
        return -(-tokens // self.size)


class Pool(NamedTuple):
    """What P pages of n tokens hold: keys [P, K, h, n] and values [P, K, n, h], a tuple over layers each, and
    ``experts`` int16[P, n, k], a tuple over the layers with a router, or ()."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    experts: tuple[jax.Array, ...]


@flax.struct.dataclass
class PagedCache:
    """Token t of slot b lies in page ``table[b, t // n]``, at t % n; the first ``length`` int32[B] tokens are valid.

    ``table`` int32[B, C] holds P where a slot has no page: what is written there is lost. No slot writes into a page
    that another one has. ``pool`` is None while another cache has it (`lend`).
    """

    pool: Pool | None
    table: jax.Array
    length: jax.Array

    def reset(self, slots: jax.Array) -> PagedCache:
        """Empties the slots where bool[B] is true."""
        return replace(self, length=jnp.where(slots, 0, self.length))

    def start_from(self, prompts: PagedCache, source: jax.Array, copied: jax.Array, to: jax.Array) -> PagedCache:
        """Slot b stands where row source[b] of `prompts` does, where source int32[B] is not −1: it has the same full
        pages by now. Pages `copied` int32[B] are copied `to` others; P: none."""

        def copy(held: jax.Array) -> jax.Array:
            return held.at[to].set(held.at[copied].get(mode="clip"), mode="drop")

        return replace(self, pool=jax.tree.map(copy, self.pool), length=pick_rows(source, self.length, prompts.length))

    def lend(self, borrower: PagedCache) -> tuple[PagedCache, PagedCache]:
        """Gives its pool to another cache: (this one without, the borrower with it)."""
        return replace(self, pool=None), replace(borrower, pool=self.pool)

    def shardings(self, place: Callable[..., Any]) -> PagedCache:
        """``place(*logical axes)`` of every leaf."""
        pool = self.pool
        if pool is not None:
            heads = (place(None, "kv_heads"),) * len(pool.keys)
            pool = Pool(heads, heads, (place(),) * len(pool.experts))
        return PagedCache(pool, place(), place())

    def extension(self, config: ModelConfig, positions: jax.Array, counts: jax.Array) -> Extension:
        """See `rome.models.cache.Cache`."""
        return _Pages(self, config, positions, counts)


def init_paged_cache(
    config: ModelConfig, rows: int, max_length: int, paging: Paging, record_experts: bool = False
) -> PagedCache:
    """An empty cache of ``rows`` slots, whose table has room for ``max_length`` tokens each, in ``config.dtype``.

    Raises ConfigError as `init_cache` does.
    """
    check_cache(config, max_length, record_experts)
    size, pages = paging
    layers, heads, recorded = config.num_layers, config.num_kv_heads, config.routed_layers * record_experts
    keys = tuple(jnp.zeros((pages, heads, config.head_dim, size), config.dtype) for _ in range(layers))
    values = tuple(jnp.zeros((pages, heads, size, config.head_dim), config.dtype) for _ in range(layers))
    visited = (pages, size, config.num_experts_per_token)
    experts = tuple(jnp.zeros(visited, jnp.int16) for _ in range(recorded))
    table = jnp.full((rows, paging.of(max_length)), pages, jnp.int32)
    return PagedCache(Pool(keys, values, experts), table, jnp.zeros((rows,), jnp.int32))


class _Pages:
    """New tokens for a `PagedCache`."""

    def __init__(self, cache: PagedCache, config: ModelConfig, positions: jax.Array, counts: jax.Array) -> None:
        self._cache, self._windows = cache, config.windows
        pages, _, size, _ = cache.pool.values[0].shape
        is_new = jnp.arange(positions.shape[1]) < counts[:, None]
        index = jnp.where(is_new, positions // size, cache.table.shape[1])
        # an index out of bounds is dropped by the scatters below
        self._pages = jnp.take_along_axis(cache.table, index, axis=1, mode="fill", fill_value=pages)
        self._offsets = positions % size
        self._positions, self._length = positions, cache.length + counts
        self._width = -(-_BLOCK // size)
        self._table = jnp.pad(cache.table, ((0, 0), (0, -cache.table.shape[1] % self._width)))
        block, live = self._width * size, counts > 0
        # the blocks that hold what some slot sees; one at least, so that idle slots stay free of NaN
        end = jnp.maximum(-(-jnp.max(jnp.where(live, self._length, 0)) // block), 1)
        first = jnp.min(jnp.where(live, cache.length, end * block))
        self._blocks = {
            window: (jnp.clip((first - window + 1) // block, 0, end - 1) if window else jnp.int32(0), end)
            for window in set(self._windows)
        }

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        pool, window, width = self._cache.pool, self._windows[layer], self._width

        def share(q, k, v, keys, values, pages, offsets, table, positions, blocks):
            keys = keys.at[pages, :, :, offsets].set(jnp.swapaxes(k, 1, 2), mode="drop")
            values = values.at[pages, :, offsets].set(jnp.swapaxes(v, 1, 2), mode="drop")
            return attend_pages(q, keys, values, table, positions, blocks, width, window), (keys, values)

        if is_sharded():
            heads, whole = partition((None, "kv_heads")), partition(())
            share = island(share, (*(heads,) * 5, *(whole,) * 5), (heads, (heads, heads)))
        places = self._pages, self._offsets, self._table, self._positions
        return share(q, k, v, pool.keys[layer], pool.values[layer], *places, self._blocks[window])

    def finished(self, layers: Sequence[Any], visited: Sequence[jax.Array]) -> PagedCache:
        cache = self._cache
        keys, values = zip(*layers, strict=True)
        experts = tuple(
            held.at[self._pages, self._offsets].set(new, mode="drop")
            for held, new in zip(cache.pool.experts, visited[: len(cache.pool.experts)], strict=True)
        )
        return PagedCache(Pool(keys, values, experts), cache.table, self._length)


def attend_pages(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    blocks: tuple[jax.Array, jax.Array],
    width: int,
    window: int,
) -> jax.Array:
    """q [B, K, G, S, h] at `positions` int32[B, S] over the slots' pages, with a running softmax (Milakov & Gimelshein
    2018) over blocks of `width` of them.

    Only `blocks` (first, end) are read, so that a step costs what the longest live history does. A block that a slot
    does not see changes nothing of it, bit for bit: what it gets does not depend on its neighbours' lengths.
    """
    batch, kv_heads, groups, new, head_dim = q.shape
    flat = q.reshape(batch, kv_heads, groups * new, head_dim) * head_dim**-0.5
    size = values.shape[2]
    block = width * size

    def read(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, mixed = carry
        pages = jax.lax.dynamic_slice_in_dim(table, at * width, width, axis=1)
        k = jnp.moveaxis(keys.at[pages].get(mode="clip"), 1, 3).reshape(batch, kv_heads, head_dim, block)
        v = jnp.swapaxes(values.at[pages].get(mode="clip"), 1, 2).reshape(batch, kv_heads, block, head_dim)
        scores = jnp.einsum("bkmh,bkhl->bkml", flat, k, preferred_element_type=jnp.float32)
        visible = sees(positions[..., None] - (at * block + jnp.arange(block)), window)
        scores = scores.reshape(batch, kv_heads, groups, new, block)
        scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(batch, kv_heads, groups * new, block)
        above = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights, shrunk = jnp.exp(scores - above), jnp.exp(highest - above)
        added = jnp.einsum("bkml,bklh->bkmh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return above, total * shrunk + weights.sum(axis=-1, keepdims=True), mixed * shrunk + added

    column = jnp.full((*flat.shape[:3], 1), MASKED, jnp.float32)
    start = column, jnp.zeros_like(column), jnp.zeros(flat.shape, jnp.float32)
    _, total, mixed = jax.lax.fori_loop(*blocks, read, start)
    return (mixed / total).astype(q.dtype).reshape(q.shape)

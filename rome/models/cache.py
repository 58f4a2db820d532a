"""The key/value cache and `extend`, the one function that prefills, appends deltas and decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from rome.models.attention import MASKED
from rome.models.config import ConfigError, ModelConfig
from rome.models.params import Params
from rome.models.rope import rope_tables
from rome.models.sharding import is_sharded, island, partition
from rome.models.transformer import (
    decoder_layer,
    embed,
    layer_params,
    rms_norm,
    unembed,
)


class Extension(Protocol):
    """A cache that is about to take new tokens: what `extend` knows of it."""

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        """Takes a layer's new keys and values [B, K, S, h]; gives the mixed values of q [B, K, G, S, h] over the slots'
        whole histories, and what the layer then holds."""
        ...

    def finished(self, layers: Sequence[Any], visited: Sequence[jax.Array]) -> Cache:
        """The cache after all layers, of what each holds and of the experts [B, S, k] that routers chose."""
        ...


class Cache(Protocol):
    """Keys and values of B slots. `KVCache` has a row for each slot, `rome.models.paged.PagedCache` pages."""

    @property
    def length(self) -> jax.Array:
        """int32[B], tokens that each slot holds."""
        ...

    def extension(self, config: ModelConfig, positions: jax.Array, counts: jax.Array) -> Extension:
        """For tokens at `positions` int32[B, S], the first `counts[b]` of each row being new."""
        ...


@flax.struct.dataclass
class KVCache:
    """Keys [B, K, h, max_length] and values [B, K, max_length, h] of B slots, a tuple over layers each; the first
    ``length`` int32[B] columns are valid. Both are laid out so that a decode step's products read them in order.

    ``experts`` int16[B, max_length, K], a tuple over the layers with a router, are those that each token visited; () if
    not recorded."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    experts: tuple[jax.Array, ...] = ()

    @property
    def max_length(self) -> int:
        return self.values[0].shape[2]

    def reset(self, slots: jax.Array) -> KVCache:
        """Empties the slots where bool[B] is true. What they held stays in memory, unreachable."""
        return replace(self, length=jnp.where(slots, 0, self.length))

    def start_from(self, prompts: KVCache, source: jax.Array) -> KVCache:
        """Slot b becomes a copy of row source[b] of `prompts`, where source int32[B] is not −1."""
        return jax.tree.map(functools.partial(pick_rows, source), self, prompts)

    def shardings(self, place: Callable[..., Any]) -> KVCache:
        """``place(*logical axes)`` of every leaf."""
        heads = (place("batch", "kv_heads"),) * len(self.keys)
        return KVCache(heads, heads, place("batch"), (place("batch"),) * len(self.experts))

    def extension(self, config: ModelConfig, positions: jax.Array, counts: jax.Array) -> Extension:
        """See `Cache`."""
        return _Rows(self, config, positions, counts)


def pick_rows(source: jax.Array, held: jax.Array, given: jax.Array) -> jax.Array:
    """Row source[b] of `given` where it is not −1, else row b of `held`."""
    chosen = (source >= 0).reshape(-1, *[1] * (held.ndim - 1))
    return jnp.where(chosen, given[jnp.maximum(source, 0)], held)


def init_cache(config: ModelConfig, batch: int, max_length: int, record_experts: bool = False) -> KVCache:
    """An empty cache of ``batch`` slots with room for ``max_length`` tokens each, in ``config.dtype``.

    Raises:
        ConfigError: ``max_length`` is more than the model's ``max_position_embeddings``, or there are no experts to
            record.
    """
    check_cache(config, max_length, record_experts)
    shape = (batch, config.num_kv_heads, config.head_dim, max_length)
    keys = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    values = tuple(jnp.zeros((*shape[:2], max_length, config.head_dim), config.dtype) for _ in range(config.num_layers))
    recorded = config.routed_layers * record_experts
    visited = (batch, max_length, config.num_experts_per_token)
    experts = tuple(jnp.zeros(visited, jnp.int16) for _ in range(recorded))
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32), experts)


def check_cache(config: ModelConfig, max_length: int, record_experts: bool) -> None:
    """Raises ConfigError as `init_cache` does."""
    if record_experts and not config.is_moe:
        raise ConfigError("record_experts: expected a mixture of experts, got a dense model")
    longest = config.max_position_embeddings
    if longest and max_length > longest:
        raise ConfigError(f"max_length: expected at most max_position_embeddings = {longest}, got {max_length}")


def extend(
    params: Params, config: ModelConfig, cache: Cache, tokens: jax.Array, counts: jax.Array
) -> tuple[jax.Array, Cache]:
    """Appends tokens to slots at their current lengths: a prefill, a delta, or (S = 1) a decode step.

    Args:
        params: from `init_params`.
        config: the model's config.
        cache: where the slots stand. Donate it to jit (or carry it in a loop) and it is updated in place.
        tokens: int32[B, S]; the first ``counts[b]`` of row b are new, the rest is ignored.
        counts: int32[B], 0..S. A slot with 0 keeps its cache and length bit for bit.

    Returns:
        Logits float32[B, V] after each slot's last new token (of slots with count 0: finite, meaningless), and the
        cache with ``length + counts``. The caller keeps ``length + counts <= max_length`` (and has pages for them);
        what exceeds it is lost.
    """
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    extension = cache.extension(config, positions, counts)
    rope = rope_tables(positions, config)
    x = embed(params, config, tokens)
    layers, visited = [], []
    for index in range(config.num_layers):
        attend = functools.partial(extension.attend, index)
        x, held, routed = decoder_layer(x, layer_params(params, config, index), config, rope, attend)
        layers.append(held)
        if routed.experts is not None:
            visited.append(routed.experts.astype(jnp.int16))
    last = jnp.maximum(counts - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    logits = unembed(params, config, rms_norm(x, params["final_norm"], config.rms_norm_eps))
    return logits, extension.finished(layers, visited)


class _Rows:
    """New tokens for a `KVCache`."""

    def __init__(self, cache: KVCache, config: ModelConfig, positions: jax.Array, counts: jax.Array) -> None:
        self._cache, self._windows, self._counts = cache, config.windows, counts
        is_new = jnp.arange(positions.shape[1]) < counts[:, None]
        # an index out of bounds is dropped by the scatters below
        self._columns = jnp.where(is_new, positions, cache.max_length)
        behind_BxSxL = positions[..., None] - jnp.arange(cache.max_length)
        self._bias = {window: jnp.where(sees(behind_BxSxL, window), 0.0, MASKED) for window in set(self._windows)}

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        held, bias = (self._cache.keys[layer], self._cache.values[layer]), self._bias[self._windows[layer]]
        return _append_and_attend(q, k, v, *held, self._columns, bias)

    def finished(self, layers: Sequence[Any], visited: Sequence[jax.Array]) -> KVCache:
        cache = self._cache
        keys, values = zip(*layers, strict=True)
        recorded = zip(cache.experts, visited[: len(cache.experts)], strict=True)
        experts = tuple(_record(held, new, self._columns) for held, new in recorded)
        return KVCache(keys, values, cache.length + self._counts, experts)


def sees(behind: jax.Array, window: int) -> jax.Array:
    """Whether a token sees the one that stands so many positions before it; window 0: all."""
    return (behind >= 0) & (behind < window) if window else behind >= 0


def _append_and_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, columns: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes k and v [B, K, S, h] to the columns [B, S] of one layer's cache; q's mixed values and the new cache."""

    def share(q, k, v, keys, values, columns, bias):
        rows = jnp.arange(q.shape[0])[:, None]
        keys = keys.at[rows, :, :, columns].set(_by_token(k), mode="drop")
        values = values.at[rows, :, columns].set(_by_token(v), mode="drop")
        return _attend_cache(q, keys, values, bias), (keys, values)

    if is_sharded():
        heads, slots = partition(("batch", "kv_heads")), partition(("batch",))
        share = island(share, (*(heads,) * 5, slots, slots), (heads, (heads, heads)))
    return share(q, k, v, keys, values, columns, bias)


def _record(held: jax.Array, new: jax.Array, columns: jax.Array) -> jax.Array:
    """Writes new[B, S, K] to the columns [B, S] of held[B, L, K]."""

    def share(held, new, columns):
        return held.at[jnp.arange(held.shape[0])[:, None], columns].set(new, mode="drop")

    if is_sharded():
        slots = partition(("batch",))
        share = island(share, (slots, slots, slots), slots)
    return share(held, new, columns)


def _by_token(new_BxKxSxh: jax.Array) -> jax.Array:
    return jnp.swapaxes(new_BxKxSxh, 1, 2)


def _attend_cache(q: jax.Array, keys_BxKxhxL: jax.Array, values_BxKxLxh: jax.Array, bias_BxSxL: jax.Array) -> jax.Array:
    """q [B, K, G, S, h] over the cached columns."""
    batch, kv_heads, groups, new, head_dim = q.shape
    flat = q.reshape(batch, kv_heads, groups * new, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bkmh,bkhl->bkml", flat, keys_BxKxhxL, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, new, -1) + bias_BxSxL[:, None, None]
    probs = jax.nn.softmax(scores, axis=-1).astype(values_BxKxLxh.dtype).reshape(batch, kv_heads, groups * new, -1)
    return jnp.einsum("bkml,bklh->bkmh", probs, values_BxKxLxh).reshape(q.shape)

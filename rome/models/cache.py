"""The key/value cache and `extend`, the one function that prefills, appends deltas and decodes."""

from __future__ import annotations

from dataclasses import replace

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


def init_cache(config: ModelConfig, batch: int, max_length: int, record_experts: bool = False) -> KVCache:
    """An empty cache of ``batch`` slots with room for ``max_length`` tokens each, in ``config.dtype``.

    Raises:
        ConfigError: ``max_length`` is more than the model's ``max_position_embeddings``, or there are no experts to
            record.
    """
    if record_experts and not config.is_moe:
        raise ConfigError("record_experts: expected a mixture of experts, got a dense model")
    longest = config.max_position_embeddings
    if longest and max_length > longest:
        raise ConfigError(f"max_length: expected at most max_position_embeddings = {longest}, got {max_length}")
    shape = (batch, config.num_kv_heads, config.head_dim, max_length)
    keys = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    values = tuple(jnp.zeros((*shape[:2], max_length, config.head_dim), config.dtype) for _ in range(config.num_layers))
    recorded = config.routed_layers * record_experts
    visited = (batch, max_length, config.num_experts_per_token)
    experts = tuple(jnp.zeros(visited, jnp.int16) for _ in range(recorded))
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32), experts)


def extend(
    params: Params, config: ModelConfig, cache: KVCache, tokens: jax.Array, counts: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Appends tokens to slots at their current lengths: a prefill, a delta, or (S = 1) a decode step.

    Args:
        params: from `init_params`.
        config: the model's config.
        cache: where the slots stand. Donate it to jit (or carry it in a loop) and it is updated in place.
        tokens: int32[B, S]; the first ``counts[b]`` of row b are new, the rest is ignored.
        counts: int32[B], 0..S. A slot with 0 keeps its cache and length bit for bit.

    Returns:
        Logits float32[B, V] after each slot's last new token (of slots with count 0: finite, meaningless), and the
        cache with ``length + counts``. The caller keeps ``length + counts <= max_length``; what exceeds it is lost.
    """
    offsets = jnp.arange(tokens.shape[1])[None, :]
    positions = cache.length[:, None] + offsets
    # an index out of bounds is dropped by the scatter below
    columns = jnp.where(offsets < counts[:, None], positions, cache.max_length)
    rope = rope_tables(positions, config)
    behind_BxSxL = positions[..., None] - jnp.arange(cache.max_length)
    bias = {0: jnp.where(behind_BxSxL >= 0, 0.0, MASKED)}  # by window; 0: all
    if config.sliding_layers:
        window = config.sliding_window
        bias[window] = jnp.where((behind_BxSxL >= 0) & (behind_BxSxL < window), 0.0, MASKED)

    x = embed(params, config, tokens)
    keys, values, visited = [], [], []
    for index in range(config.num_layers):
        window = config.sliding_window if index in config.sliding_layers else 0

        def attend(q, k, v, index=index, window=window):
            return _append_and_attend(q, k, v, cache.keys[index], cache.values[index], columns, bias[window])

        x, (k, v), routed = decoder_layer(x, layer_params(params, config, index), config, rope, attend)
        keys.append(k)
        values.append(v)
        if routed.experts is not None:
            visited.append(routed.experts.astype(jnp.int16))
    experts = tuple(
        _record(held, new, columns) for held, new in zip(cache.experts, visited[: len(cache.experts)], strict=True)
    )
    last = jnp.maximum(counts - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    logits = unembed(params, config, rms_norm(x, params["final_norm"], config.rms_norm_eps))
    return logits, KVCache(tuple(keys), tuple(values), cache.length + counts, experts)


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

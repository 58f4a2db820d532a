"""Attention over packed rows: causal, inside segments and windows, grouped queries, in memory linear in the row.

Scores are never kept for the backward pass: it recomputes them from the log-sum-exp of each query, as FlashAttention
does (Dao et al. 2022, algorithm 4). Queries go in blocks that only meet the keys before their end, which skips most of
the upper triangle. The layouts (heads before tokens, gradients of keys and values as transposed products) are those
that XLA's CPU backend multiplies fastest: 2.2 times the plain einsum formulation under autodiff at 16 rows of 256.

Shape letters: B rows, K key/value heads, G query heads a key/value head, T queries, S keys, M = G * T, h head_dim.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from rome.models.kernels import KERNELS, KernelError, pick_kernel, visible

MASKED = -1e30  # finite: a query without any key stays free of NaN
_BLOCK = 128
_MAX_BLOCKS = 16

_Residuals = tuple[jax.Array, ...]


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None = None,
    key_segment_ids: jax.Array | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Mixes values by softmax(q k / sqrt(h)) over the earlier tokens of the same segment, the token itself included.

    Args:
        q: [B, K, G, T, h].
        k: [B, K, S, h], S >= T: the queries are those of the last T tokens.
        v: [B, K, S, h].
        segment_ids: int32[B, T], of the queries. The causal order is that of the row.
        window: how many tokens one sees at most, itself included (sliding-window attention); None: all.
        key_segment_ids: int32[B, S]; may be left out if S = T.
        kernel: `rome.models.kernels` lists them; ``auto`` is the fastest one of the platform that can serve.

    Returns:
        [B, K, G, T, h] in q's dtype; softmax and its gradient are float32.

    Raises:
        KernelError: the named kernel can't serve these shapes or dtypes, or the mask makes no sense.
    """
    length, before = q.shape[3], k.shape[2] - q.shape[3]
    if before < 0 or (window is not None and window < 1) or (before and key_segment_ids is None):
        raise KernelError(
            f"attention mask: expected at least as many keys as queries, segment ids of all keys and a window of 1 or "
            f"more, found {k.shape[2]} keys, {length} queries and window {window}"
        )
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    written_for = KERNELS[pick_kernel(kernel, q, k)]
    if written_for is not None:
        return written_for(q, k, v, segment_ids, key_segment_ids, window)
    block = max(_BLOCK, -(-length // _MAX_BLOCKS))
    q = q * q.shape[-1] ** -0.5
    mixed = []
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = slice(0 if window is None else max(0, before + start - window + 1), before + end)
        queries, keys = segment_ids[:, start:end], key_segment_ids[:, seen]
        mixed.append(_attend_block(window, q[:, :, :, start:end], k[:, :, seen], v[:, :, seen], queries, keys))
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=3)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_block(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array
) -> jax.Array:
    """Attention of the last T of S tokens. q [B, K, G, T, h] (already scaled), k and v [B, K, S, h]."""
    return _forward(window, q, k, v, q_segments, k_segments)[0]


def _scores(window: int | None, q: jax.Array, k: jax.Array, q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
    """Masked scores float32[B, K, G, T, S]."""
    batch, kv_heads, groups, time, _ = q.shape
    scores = jnp.einsum("bkmh,bksh->bkms", _flat(q), k, preferred_element_type=jnp.float32)
    mask_BxTxS = visible(q_segments, k_segments, window)
    scores = scores.reshape(batch, kv_heads, groups, time, -1)
    return jnp.where(mask_BxTxS[:, None, None], scores, MASKED)


def _flat(x_BxKxGxTxn: jax.Array) -> jax.Array:
    """[B, K, G, T, n] -> [B, K, M, n]: the queries of a group share one matrix product with their keys."""
    batch, kv_heads, groups, time, last = x_BxKxGxTxn.shape
    return x_BxKxGxTxn.reshape(batch, kv_heads, groups * time, last)


def _forward(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array
) -> tuple[jax.Array, _Residuals]:
    scores = _scores(window, q, k, q_segments, k_segments)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("bkms,bksh->bkmh", _flat(weights).astype(v.dtype), v, preferred_element_type=jnp.float32)
    mixed = (mixed.reshape(q.shape) / total).astype(q.dtype)
    return mixed, (q, k, v, q_segments, k_segments, highest + jnp.log(total), mixed)


def _backward(window: int | None, residuals: _Residuals, d_mixed: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, q_segments, k_segments, log_total, mixed = residuals
    dtype = q.dtype
    probs = _flat(jnp.exp(_scores(window, q, k, q_segments, k_segments) - log_total))
    correction = (d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_out = _flat(d_mixed)
    d_probs = jnp.einsum("bkmh,bksh->bkms", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (probs * (d_probs - _flat(correction))).astype(dtype)
    d_v = jnp.einsum("bkhm,bkms->bkhs", jnp.swapaxes(d_out, 2, 3), probs.astype(dtype))
    d_k = jnp.einsum("bkhm,bkms->bkhs", jnp.swapaxes(_flat(q), 2, 3), d_scores)
    d_q = jnp.einsum("bkms,bksh->bkmh", d_scores, k)
    return d_q.reshape(q.shape), jnp.swapaxes(d_k, 2, 3), jnp.swapaxes(d_v, 2, 3), None, None


_attend_block.defvjp(_forward, _backward)

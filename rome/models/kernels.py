"""Attention kernels written for one kind of device, behind `rome.models.attention.packed_attention`.

| kernel | runs on | masks | needs |
|---|---|---|---|
| xla | anything (`rome.models.attention`) | segments, windows | |
| cudnn | NVIDIA GPUs | segments and windows, as a mask [B, 1, T, S] in memory: quadratic in the row | half precision, head_dim a multiple of 8 up to 128, even T and S |
| splash | TPUs | segments and windows, skipping blocks that the causal order or the window hides | T and S multiples of 128 |

What a kernel can't do raises; nothing falls back silently once a kernel is named. Shape letters as in
`rome.models.attention`, H = K * G.

Neither a GPU nor a TPU was at hand when this was written: no kernel but xla has ever run. Tests run splash in Pallas'
interpreter, and the cuDNN call's arguments through JAX's plain implementation, against xla; they lower both for their
platforms. libtpu 0.0.52 compiled splash for a v5e (forward and backward, head_dim 64 and 128, windows, S > T).
"""  # noqa: E501

from __future__ import annotations

import jax
import jax.numpy as jnp

from rome.models.sharding import platform

_LANES = 128


class KernelError(ValueError):
    """An attention that the named kernel can't compute. Names what was expected and found."""


def _objections(kernel: str, q: jax.Array, k: jax.Array) -> list[str]:
    """Why `kernel` can't serve q [B, K, G, T, h] and k [B, K, S, h]; nothing if it can."""
    queries, keys, width = q.shape[3], k.shape[2], q.shape[4]
    checks = {
        "cudnn": {
            f"dtype: expected bfloat16 or float16, found {q.dtype}": q.dtype in (jnp.bfloat16, jnp.float16),
            f"head_dim: expected a multiple of 8 up to 128, found {width}": width % 8 == 0 and width <= 128,
            f"tokens: expected even numbers, found {queries} queries and {keys} keys": not (queries | keys) & 1,
        },
        "splash": {
            f"tokens: expected multiples of {_LANES}, found {queries} queries and {keys} keys": not (
                queries % _LANES or keys % _LANES
            ),
        },
    }
    return [message for message, valid in checks.get(kernel, {}).items() if not valid]


def pick_kernel(kernel: str, q: jax.Array, k: jax.Array) -> str:
    """The kernel to use: the named one, or of `auto` the platform's own where it can serve, else `xla`.

    Raises KernelError if the named kernel can't serve these shapes and dtypes.
    """
    if kernel == "auto":
        own = {"gpu": "cudnn", "tpu": "splash"}.get(platform(), "xla")
        return "xla" if _objections(own, q, k) else own
    objections = _objections(kernel, q, k)
    if objections:
        raise KernelError(f"attention kernel {kernel!r}: {'; '.join(objections)}")
    return kernel


def visible(q_segments: jax.Array, k_segments: jax.Array, window: int | None) -> jax.Array:
    """bool[B, T, S]: which keys each query sees, the queries being the last T of S tokens: earlier ones of the same
    segment, the token itself included, at most ``window`` of them."""
    queries, keys = q_segments.shape[1], k_segments.shape[1]
    behind_TxS = jnp.arange(keys - queries, keys)[:, None] - jnp.arange(keys)
    seen_TxS = behind_TxS >= 0
    if window is not None:
        seen_TxS &= behind_TxS < window
    return (q_segments[:, :, None] == k_segments[:, None, :]) & seen_TxS


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    window: int | None,
    implementation: str = "cudnn",
) -> jax.Array:
    """Through `jax.nn.dot_product_attention`. ``implementation="xla"`` is the same call without cuDNN, for tests."""
    batch, kv_heads, groups, queries, width = q.shape
    q_BxTxHxh = jnp.swapaxes(q.reshape(batch, kv_heads * groups, queries, width), 1, 2)
    k_BxSxKxh, v_BxSxKxh = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    mask = visible(q_segments, k_segments, window)[:, None]
    mixed = jax.nn.dot_product_attention(q_BxTxHxh, k_BxSxKxh, v_BxSxKxh, mask=mask, implementation=implementation)
    return jnp.swapaxes(mixed, 1, 2).reshape(q.shape)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs. ``interpret`` runs it on any device, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import

    batch, kv_heads, groups, queries, width = q.shape
    keys, heads = k.shape[2], kv_heads * groups
    if window is None:
        mask = splash.CausalMask((queries, keys), offset=keys - queries)
    else:
        mask = splash.LocalMask((queries, keys), (window - 1, 0), offset=keys - queries)
    of_q, of_k = (next(b for b in (512, 256, _LANES) if n % b == 0) for n in (queries, keys))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=of_q,
            block_kv=of_k,
            block_kv_compute=of_k,
            block_q_dkv=of_q,
            block_kv_dkv=of_k,
            block_kv_dkv_compute=of_k,
            block_q_dq=of_q,
            block_kv_dq=of_k,
        ),
    )
    q_BxHxTxh = (q * width**-0.5).reshape(batch, heads, queries, width)
    mixed = jax.vmap(kernel)(q_BxHxTxh, k, v, splash.SegmentIds(q_segments, k_segments))
    return mixed.reshape(q.shape).astype(q.dtype)


# by name; None: the function that asks
KERNELS = {"xla": None, "cudnn": cudnn_attention, "splash": splash_attention}

"""Attention kernels of other platforms against the one that runs here, as far as a CPU can go (see the module)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rome.models import KernelError
from rome.models.attention import packed_attention
from rome.models.kernels import cudnn_attention, pick_kernel, splash_attention

KV_HEADS, GROUPS, WIDTH = 2, 2, 16


def problem(queries: int, keys: int, dtype: str = "float32"):
    """The last `queries` of `keys` packed tokens, two rows: (q, k, v, segments of q, segments of k)."""
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(2, KV_HEADS, GROUPS, queries, WIDTH))
    k, v = rng.normal(size=(2, 2, KV_HEADS, keys, WIDTH))
    cuts = np.array([[0.2, 0.55, 0.9], [0.4, 0.41, 2]]) * keys
    segments = 1 + (np.arange(keys) >= cuts[:, :, None]).sum(axis=1)
    segments[0] %= 4  # the last segment of row 0 becomes 0, padding
    segments = jnp.asarray(segments, jnp.int32)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return q, k, v, segments[:, keys - queries :], segments


def output_and_gradients(attend, q, k, v, q_segments, k_segments):
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def loss(q, k, v):
        mixed = attend(q, k, v, q_segments, k_segments)
        return (mixed * cotangent).sum(), mixed

    grads, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return mixed, *grads


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("queries", [256, 128])
@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_kernels_honour_segments_windows_and_queries_at_the_end(kernel, queries, window):
    given = problem(queries, 256)
    attend = {
        "cudnn": partial(cudnn_attention, window=window, implementation="xla"),
        "splash": partial(splash_attention, window=window, interpret=True),
    }[kernel]
    found = output_and_gradients(attend, *given)
    expected = output_and_gradients(
        lambda q, k, v, of_q, of_k: packed_attention(q, k, v, of_q, window, of_k, kernel="xla"), *given
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_named_kernel_serves_or_says_why_not():
    def shapes(queries: int, keys: int, width: int = 64, dtype: str = "bfloat16"):
        return (
            jax.ShapeDtypeStruct((1, 2, 2, queries, width), dtype),
            jax.ShapeDtypeStruct((1, 2, keys, width), dtype),
        )

    assert pick_kernel("auto", *shapes(256, 256)) == "xla"  # on CPU
    assert pick_kernel("splash", *shapes(256, 512)) == "splash"
    assert pick_kernel("cudnn", *shapes(254, 512)) == "cudnn"
    refused = [
        ("splash", shapes(200, 256), "multiples of 128, found 200 queries and 256 keys"),
        ("cudnn", shapes(256, 256, dtype="float32"), "expected bfloat16 or float16, found float32"),
        ("cudnn", shapes(256, 256, width=136), "head_dim: expected a multiple of 8 up to 128, found 136"),
        ("cudnn", shapes(255, 256), "expected even numbers, found 255 queries"),
    ]
    for kernel, arguments, message in refused:
        with pytest.raises(KernelError, match=message):
            pick_kernel(kernel, *arguments)


def test_a_mask_that_no_kernel_has_raises():
    q, k, v, of_q, of_k = problem(8, 16)
    with pytest.raises(KernelError, match="window of 1 or more, found 16 keys, 8 queries and window 0"):
        packed_attention(q, k, v, of_q, 0, of_k)
    with pytest.raises(KernelError, match="segment ids of all keys"):
        packed_attention(q, k, v, of_q)
    with pytest.raises(KernelError, match="as many keys as queries"):
        packed_attention(q, k[:, :, :4], v[:, :, :4], of_q, None, of_k[:, :4])


def lowered(platform: str, kernel: str) -> str:
    """The program of a gradient of attention for a platform that isn't here."""
    q, k, v, of_q, of_k = problem(128, 256, "bfloat16")

    def loss(q, k, v):
        return packed_attention(q, k, v, of_q, None, of_k, kernel=kernel).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


def test_splash_lowers_for_tpu():
    assert lowered("tpu", "splash").count("tpu_custom_call") >= 3  # forward, dq, dkv


def test_cudnn_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # asks a library for its own
    program = lowered("cuda", "cudnn")
    assert "__cudnn$fmhaScaleBiasSoftmax" in program and "__cudnn$fmhaScaleBiasSoftmaxBackward" in program

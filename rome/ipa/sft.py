"""The objective of supervised fine-tuning on agent trajectories (Eq 1-2)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.ipa.units import to_tokens


def sft_chunk_mask(error: Array, relevant: Array) -> Array:
    """m_k = 1[not Err(k)] 1[Rel(k)] (Eq 1), bool as its arguments.

    Err(k): the turn's tool call or its execution failed, from the runtime log and not from the text.
    Rel(k): its context was not altered by compression, tool emulation or loop handling, and it is no near-duplicate.
    """
    return ~error & relevant


def sft_tokens(chunk_ids: Array, chunk_mask: Array) -> Array:
    """bool[B, T]: the tokens whose chunk has m_k = 1. chunk_ids int[B, T] (-1 = no loss), chunk_mask bool[B, C]."""
    return to_tokens(chunk_mask, chunk_ids, False)


def sft_loss(
    logp: Array, chunk_ids: Array, chunk_mask: Array, *, total_tokens: Array | None = None, epsilon: float = 1e-6
) -> Array:
    """Eq 2: L = -(sum_k m_k |c_k| + epsilon)^-1 sum_k m_k log pi(c_k | s_k).

    A turn with m_k = 0 stays in the context of the later ones; only its loss is zeroed.

    Args:
      logp: float[B, T], differentiated; accumulated in float32. Unselected tokens may hold anything, NaN included.
      chunk_ids: int32[B, T], row-local; -1 = not a chunk (prompt, observation, padding).
      chunk_mask: bool[B, C], m_k by row-local chunk id; see `sft_chunk_mask`.
      total_tokens: sum_k m_k |c_k| over the global batch (of `sft_tokens`), when this is a micro-batch of it.
      epsilon: keeps a batch with nothing selected at loss 0.

    Returns:
      float32 scalar; the losses, and the gradients, of micro-batches sum to those of the whole.
    """
    selected = sft_tokens(chunk_ids, chunk_mask)
    nll = -jnp.sum(jnp.where(selected, logp, 0.0), dtype=jnp.float32)
    total = jnp.sum(selected, dtype=jnp.float32) if total_tokens is None else total_tokens
    return nll / (total + epsilon)

"""From rewards to returns (Eq 7)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.ipa.config import ObjectiveConfig


def chunk_returns(
    final_reward: Array, num_chunks: Array, max_chunks: int, gamma: float, intrinsic: Array | None = None
) -> Array:
    """Chunk-level returns (Eq 7): G_k = gamma^(K-k) R + sum_{j >= k} gamma^(j-k) r_j, for k = 1..K; gamma is per chunk.

    Args:
      final_reward: float[N], R.
      num_chunks: int[N], K <= max_chunks.
      max_chunks: static C.
      gamma: the discount a chunk.
      intrinsic: float[N, C], r_j; None = no intrinsic rewards.

    Returns:
      float32[N, C]; 0 past num_chunks.
    """
    final_reward, num_chunks = jnp.asarray(final_reward, jnp.float32), jnp.asarray(num_chunks)
    chunk = jnp.arange(max_chunks)
    inside = chunk < num_chunks[:, None]
    chunks_left = jnp.maximum(num_chunks[:, None] - 1 - chunk, 0)
    returns = jnp.power(jnp.float32(gamma), chunks_left) * final_reward[:, None]
    if intrinsic is not None:
        ahead = chunk[None, :] - chunk[:, None]  # [k, j]: j - k
        discount = jnp.where(ahead >= 0, jnp.power(jnp.float32(gamma), jnp.maximum(ahead, 0)), 0.0)
        rewards = jnp.where(inside, jnp.asarray(intrinsic, jnp.float32), 0.0)
        returns += jnp.sum(discount * rewards[:, None, :], axis=-1)
    return jnp.where(inside, returns, 0.0)


def is_positive(final_reward: Array) -> Array:
    """bool[N]: T+ iff the raw final reward R > 0, whatever `failure_reward` and the baseline make of it."""
    return jnp.asarray(final_reward) > 0


def group_baseline(reward: Array, group_ids: Array, kind: str) -> Array:
    """float32[N]: the baseline of each trajectory [ours], from the rewards of its group (the samples of one task).

    none: 0 · group_mean: the mean of the group, itself included · leave_one_out: the mean of the others; 0 when alone.
    """
    reward = jnp.asarray(reward, jnp.float32)
    if kind == "none":
        return jnp.zeros_like(reward)
    group_ids = jnp.asarray(group_ids)
    same = group_ids[:, None] == group_ids[None, :]
    if kind == "leave_one_out":
        same &= ~jnp.eye(len(reward), dtype=bool)
    total = jnp.sum(jnp.where(same, reward[None, :], 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(same, axis=1), 1)


def trajectory_returns(
    final_reward: Array,
    num_chunks: Array,
    max_chunks: int,
    config: ObjectiveConfig,
    *,
    group_ids: Array | None = None,
    intrinsic: Array | None = None,
) -> Array:
    """The `returns` of N trajectories under a config, one row a trajectory: what a PolicyBatch is filled with.

    The final reward is first shaped [ours]: a failure (R <= 0) is worth at most `failure_reward`, and the baseline of
    the group is subtracted. Then by `return_level`:
      chunk       Eq 7.
      token       as chunk: rewards arrive at the ends of chunks, so a token's return is its chunk's.
      trajectory  the trajectory is one step: G = R + sum_j r_j for each chunk, and gamma has nothing to discount.
      none        G = 1: plain likelihood, failures included.

    Args:
      final_reward: float[N], raw.
      num_chunks: int[N].
      max_chunks: static C.
      config: reads return_level, gamma, failure_reward, baseline.
      group_ids: int[N], needed by a baseline.
      intrinsic: float[N, C].

    Returns:
      float32[N, C]; 0 past num_chunks.
    """
    if config.baseline != "none" and group_ids is None:
        raise ValueError(f"group_ids: expected int[N] for baseline {config.baseline!r}, found None")
    raw = jnp.asarray(final_reward, jnp.float32)
    reward = jnp.where(is_positive(raw), raw, jnp.minimum(raw, config.failure_reward))
    reward = reward - group_baseline(reward, group_ids, config.baseline)
    inside = jnp.arange(max_chunks) < jnp.asarray(num_chunks)[:, None]
    if config.return_level == "none":
        return inside.astype(jnp.float32)
    if config.return_level == "trajectory":
        whole = chunk_returns(reward, num_chunks, max_chunks, 1.0, intrinsic)[:, :1]
        return jnp.where(inside, whole, 0.0)
    return chunk_returns(reward, num_chunks, max_chunks, config.gamma, intrinsic)

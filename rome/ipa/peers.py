"""Peers' objectives, for comparison: each a few lines with its reference, all over the same PolicyBatch.

`batch.returns` holds the advantages, and every token with a chunk id is trained (`batch.imitation` is not read). Each
returns a float32 scalar loss to minimise. `total` is the normaliser of the global batch when `batch` is a micro-batch:
the trained tokens, or for GRPO and GSPO the trajectories.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from rome.ipa.batch import PolicyBatch
from rome.ipa.ratios import bounded_exp, importance_ratio
from rome.ipa.returns import chunk_returns
from rome.ipa.units import num_units, to_tokens, unit_count, unit_ids, unit_size, unit_sum


def ppo_clip(
    logp: Array, batch: PolicyBatch, *, clip_low: float = 0.2, clip_high: float = 0.2, total: Array | None = None
) -> Array:
    """PPO's clipped surrogate, mean over tokens. Schulman et al. 2017, arXiv 1707.06347, Eq 7."""
    ratio = _ratio(logp, batch.old_logp, batch, "token")
    return _token_mean(_surrogate(ratio, _advantages(batch), clip_low, clip_high), batch, total)


def grpo(
    logp: Array,
    batch: PolicyBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logp: Array | None = None,
    kl_weight: float = 0.04,
    total: Array | None = None,
) -> Array:
    """PPO's surrogate, mean over each trajectory and then over trajectories, with advantages from `group_advantages`.

    Given reference_logp [B, T], also the KL penalty to it. Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, Eq 3-4.
    """
    ratio = _ratio(logp, batch.old_logp, batch, "token")
    gain = _surrogate(ratio, _advantages(batch), clip_low, clip_high)
    if reference_logp is not None:
        inverse = _ratio(reference_logp, logp, batch, "token")
        gain -= kl_weight * (inverse - jnp.log(inverse) - 1.0)
    return _trajectory_mean(gain, batch, total)


def gspo(
    logp: Array, batch: PolicyBatch, *, clip_low: float = 3e-4, clip_high: float = 4e-4, total: Array | None = None
) -> Array:
    """The surrogate of the trajectory's geometric-mean ratio. Zheng et al. 2025, arXiv 2507.18071, Eq 5-7."""
    ratio = _ratio(logp, batch.old_logp, batch, "trajectory")
    return _trajectory_mean(_surrogate(ratio, _advantages(batch), clip_low, clip_high), batch, total)


def cispo(
    logp: Array, batch: PolicyBatch, *, clip_low: float = 1.0, clip_high: float = 0.28, total: Array | None = None
) -> Array:
    """REINFORCE weighted by a clipped ratio without gradient. MiniMax-M1 2025, arXiv 2506.13585, Eq 4-5.

    The paper leaves the lower bound open (clip_low = 1) and tunes the upper one.
    """
    ratio = lax.stop_gradient(_ratio(logp, batch.old_logp, batch, "token"))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    logp = jnp.where(_trained(batch), logp.astype(jnp.float32), 0.0)
    return _token_mean(weight * _advantages(batch) * logp, batch, total)


def tis_token(
    logp: Array,
    batch: PolicyBatch,
    *,
    cap: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    total: Array | None = None,
) -> Array:
    """PPO with each token weighted by min(pi_old/mu, cap). Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"."""
    weight = jnp.minimum(_ratio(batch.old_logp, batch.behavior_logp, batch, "token"), cap)
    gain = _surrogate(_ratio(logp, batch.old_logp, batch, "token"), _advantages(batch), clip_low, clip_high)
    return _token_mean(lax.stop_gradient(weight) * gain, batch, total)


def tis_sequence(
    logp: Array,
    batch: PolicyBatch,
    *,
    cap: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    total: Array | None = None,
) -> Array:
    """As `tis_token`, with the truncated product of pi_old/mu over the trajectory. Liu et al. 2025, "When Speed Kills
    Stability: Demystifying RL Collapse from the Training-Inference Mismatch"."""
    ids, units = unit_ids(batch, "trajectory"), num_units(batch, "trajectory")
    log_product = unit_sum(batch.old_logp - batch.behavior_logp, ids, units)
    weight = jnp.minimum(bounded_exp(log_product), cap)
    gain = _surrogate(_ratio(logp, batch.old_logp, batch, "token"), _advantages(batch), clip_low, clip_high)
    return _token_mean(lax.stop_gradient(to_tokens(weight, ids, 0.0)) * gain, batch, total)


def icepop(
    logp: Array,
    batch: PolicyBatch,
    *,
    alpha: float = 0.5,
    beta: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    total: Array | None = None,
) -> Array:
    """PPO with each token weighted by pi_old/mu inside [alpha, beta] and dropped outside; the mean counts all tokens.

    Ling team 2025 (Ring-1T), arXiv 2510.18855.
    """
    mismatch = _ratio(batch.old_logp, batch.behavior_logp, batch, "token")
    inside = (mismatch >= alpha) & (mismatch <= beta)
    gain = _surrogate(_ratio(logp, batch.old_logp, batch, "token"), _advantages(batch), clip_low, clip_high)
    weighted = lax.stop_gradient(jnp.where(inside, mismatch, 0.0)) * jnp.where(inside, gain, 0.0)
    return _token_mean(weighted, batch, total)


def group_advantages(reward: Array, group_ids: Array, *, normalize: bool = True) -> Array:
    """float32[N]: (R - mean) / std over each group, GRPO's advantage. arXiv 2402.03300, section 4.1.2.

    reward float[N], group_ids int[N]. Population std, 1e-6 added; normalize=False leaves the division out (Dr. GRPO,
    Liu et al. 2025, arXiv 2503.20783).
    """
    group_ids = jnp.asarray(group_ids)
    return _standardise(jnp.asarray(reward, jnp.float32), group_ids[:, None] == group_ids[None, :], normalize)


def gigpo_advantages(
    reward: Array,
    num_chunks: Array,
    group_ids: Array,
    state_ids: Array,
    *,
    gamma: float = 0.95,
    omega: float = 1.0,
    normalize: bool = True,
) -> Array:
    """float32[N, C]: GiGPO's advantages, A = A_episode + omega A_step. Feng et al. 2025, arXiv 2505.10978, Eq 3-9.

    A_episode compares the final rewards of a group; A_step compares the discounted returns of those steps of a group
    that started from the same (anchor) state. 0 past num_chunks.
    reward float[N], num_chunks int[N], group_ids int[N], state_ids int[N, C].
    """
    state_ids, group_ids = jnp.asarray(state_ids), jnp.asarray(group_ids)
    inside = jnp.arange(state_ids.shape[1]) < jnp.asarray(num_chunks)[:, None]
    returns = chunk_returns(reward, num_chunks, state_ids.shape[1], gamma)
    group, state = jnp.broadcast_to(group_ids[:, None], state_ids.shape).ravel(), state_ids.ravel()
    same = (group[:, None] == group[None, :]) & (state[:, None] == state[None, :]) & inside.ravel()
    step = _standardise(returns.ravel(), same, normalize).reshape(returns.shape)
    episode = group_advantages(reward, group_ids, normalize=normalize)[:, None]
    return jnp.where(inside, episode + omega * step, 0.0)


PEERS: dict[str, Callable[..., Array]] = {
    "ppo_clip": ppo_clip,
    "grpo": grpo,
    "gspo": gspo,
    "cispo": cispo,
    "tis_token": tis_token,
    "tis_sequence": tis_sequence,
    "icepop": icepop,
}


def _standardise(values: Array, same: Array, normalize: bool) -> Array:
    """values[n] against the mean (and std) of its group, the values[m] with same[n, m]."""
    size = jnp.maximum(jnp.sum(same, axis=1), 1)
    # From differences, so that equal values give exactly 0: rounding would be blown up by the division.
    centred = jnp.sum(jnp.where(same, values[:, None] - values[None, :], 0.0), axis=1) / size
    if not normalize:
        return centred
    variance = jnp.sum(jnp.where(same, jnp.square(centred)[None, :], 0.0), axis=1) / size
    return centred / (jnp.sqrt(variance) + 1e-6)


def _trained(batch: PolicyBatch) -> Array:
    return unit_ids(batch, "token") >= 0


def _advantages(batch: PolicyBatch) -> Array:
    return lax.stop_gradient(to_tokens(batch.returns, unit_ids(batch, "chunk"), 0.0))


def _ratio(logp: Array, old_logp: Array, batch: PolicyBatch, level: str) -> Array:
    """[B, T]: each token's ratio at `level`; 1 where the token is not trained."""
    ids, units = unit_ids(batch, level), num_units(batch, level)
    return to_tokens(importance_ratio(logp, old_logp, ids, units), ids, 1.0)


def _surrogate(ratio: Array, advantage: Array, clip_low: float, clip_high: float) -> Array:
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage)


def _token_mean(gain: Array, batch: PolicyBatch, total: Array | None) -> Array:
    trained = _trained(batch)
    total = jnp.sum(trained, dtype=jnp.float32) if total is None else total
    return -jnp.sum(jnp.where(trained, gain, 0.0)) / jnp.maximum(total, 1.0)


def _trajectory_mean(gain: Array, batch: PolicyBatch, total: Array | None) -> Array:
    ids, units = unit_ids(batch, "trajectory"), num_units(batch, "trajectory")
    means = unit_sum(gain, ids, units) / jnp.maximum(unit_size(ids, units), 1.0)
    total = unit_count(ids, units) if total is None else total
    return -jnp.sum(means) / jnp.maximum(total, 1.0)

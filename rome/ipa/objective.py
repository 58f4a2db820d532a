"""The objective (Eq 3, 4, 6, 9 and 10): one loss, whose three granularity knobs make the paper's comparisons.

    w_c = 1 on T+,  clip(rho_c, 0, 1) on T-        L_RL = -(1/N)    sum_c  m_c w_c G_c  sum_{t in c} log pi(t)
                                                   L_IL = -(1/N_IL) sum_c* G_c*         sum_{t in c*} log pi(t)
                                                   L    = lambda_RL L_RL + lambda_IL L_IL

w, m and G carry no gradient. The printed mu(c) is the sampling density: realised by sampling, never multiplied in. The
printed pi(c*) factor of Eq 10 would vanish for long chunks and is not used [ours].
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rome.ipa.batch import PolicyBatch
from rome.ipa.config import ObjectiveConfig
from rome.ipa.metrics import policy_metrics
from rome.ipa.ratios import importance_ratio, mismatch_mask
from rome.ipa.units import num_units, to_tokens, unit_count, unit_ids


class Totals(NamedTuple):
    """The normalisers of a global batch, float32 scalars: N of the RL term and N_IL of the imitation term."""

    rl: Array
    imitation: Array


def split_imitation(batch: PolicyBatch, config: ObjectiveConfig) -> tuple[PolicyBatch, PolicyBatch]:
    """(what L_RL trains, what L_IL trains): the batch twice, each with chunk id -1 on the other's tokens (Eq 10)."""
    imitated = to_tokens(batch.imitation, unit_ids(batch, "chunk"), False)
    expert_ids = jnp.where(imitated & (config.imitation != "off"), batch.chunk_ids, -1)
    sampled_ids = jnp.where(imitated, -1, batch.chunk_ids)
    return batch.replace(chunk_ids=sampled_ids), batch.replace(chunk_ids=expert_ids)


def batch_totals(batch: PolicyBatch, config: ObjectiveConfig) -> Totals:
    """N and N_IL [ours]: the trained tokens, chunks or trajectories of `batch`, those that the mask drops included.

    Totals of parts add up: `Totals(*map(sum, zip(*parts)))`; a trajectory lies in one row.
    """
    level = {"tokens": "token", "chunks": "chunk", "trajectories": "trajectory"}[config.normalizer]
    sampled, expert = split_imitation(batch, config)
    return Totals(*(unit_count(unit_ids(part, level), num_units(part, level)) for part in (sampled, expert)))


def kept_tokens(sampled: PolicyBatch, config: ObjectiveConfig) -> Array:
    """m: bool[B, T], the tokens that are trained and that the mismatch mask keeps."""
    if config.mask_level == "none":
        return unit_ids(sampled, "token") >= 0
    ids, units = unit_ids(sampled, config.mask_level), num_units(sampled, config.mask_level)
    keep = mismatch_mask(
        sampled.old_logp, sampled.behavior_logp, ids, units, config.mismatch_upper, config.mismatch_lower
    )
    return to_tokens(keep, ids, False)


def reference_logp(batch: PolicyBatch, config: ObjectiveConfig) -> Array:
    """float32[B, T]: the log-probs in the denominator of rho."""
    return batch.old_logp if config.ratio_reference == "proximal" else batch.behavior_logp


def ratio_weight(logp: Array, sampled: PolicyBatch, kept: Array, config: ObjectiveConfig) -> Array:
    """w: float32[B, T], clip(rho, 0, 1) where `ratio_on` applies it and 1 elsewhere (Eq 4, 6, 9)."""
    if config.ratio_level == "none":
        return jnp.ones_like(logp, jnp.float32)
    reference = reference_logp(sampled, config)
    ids, units = unit_ids(sampled, config.ratio_level), num_units(sampled, config.ratio_level)
    # A dropped token's NaN or inf must not spoil the kept ones of a ratio unit that is coarser than the mask's [ours].
    ids = jnp.where(kept | jnp.isfinite(logp - reference), ids, -1)
    weight = to_tokens(jnp.clip(importance_ratio(logp, reference, ids, units), 0.0, 1.0), ids, 1.0)
    if config.ratio_on == "all":
        return weight
    positive = to_tokens(sampled.positive, unit_ids(sampled, "chunk"), True)
    return jnp.where(positive, 1.0, weight)


def weighted_nll(logp: Array, coefficient: Array, selected: Array) -> Array:
    """-sum of coefficient * logp over the selected tokens. Selects before it multiplies: nothing else is ever read."""
    coefficient = lax.stop_gradient(jnp.where(selected, coefficient, 0.0))
    return -jnp.sum(coefficient * jnp.where(selected, logp, 0.0), dtype=jnp.float32)


def policy_loss(
    logp: Array, batch: PolicyBatch, config: ObjectiveConfig, *, totals: Totals | None = None
) -> tuple[Array, dict[str, Array]]:
    """The loss to minimise (Eq 9 with the default config, Eq 10 with imitation) and its metrics.

    Args:
      logp: float[B, T], log pi_theta of `batch.tokens`, differentiated; any dtype, accumulated in float32.
      batch: see PolicyBatch.
      config: static; see ObjectiveConfig.
      totals: `batch_totals` of the global batch, when `batch` is a micro-batch of it: then the losses, and the
        gradients, of the micro-batches sum to those of the whole. None: `batch` is the global batch.

    Returns:
      (loss, metrics): a float32 scalar, 0 with a zero gradient when nothing is left to train; and float32 scalars by
      name, which `merge_metrics` merges over micro-batches (see `policy_metrics`).
    """
    logp = logp.astype(jnp.float32)
    totals = batch_totals(batch, config) if totals is None else totals
    sampled, expert = split_imitation(batch, config)
    chunk = unit_ids(batch, "chunk")
    returns = to_tokens(batch.returns, chunk, 0.0)
    kept = kept_tokens(sampled, config)
    weight = ratio_weight(logp, sampled, kept, config)
    rl = weighted_nll(logp, weight * returns, kept) / jnp.maximum(totals.rl, 1.0)
    il = weighted_nll(logp, returns, unit_ids(expert, "token") >= 0) / jnp.maximum(totals.imitation, 1.0)
    loss = config.lambda_rl * rl + config.lambda_il * il
    metrics = {"train/loss": loss, "train/loss_rl": rl, "train/loss_il": il}
    metrics |= policy_metrics(logp, reference_logp(sampled, config), sampled, expert, kept, config)
    return loss, metrics

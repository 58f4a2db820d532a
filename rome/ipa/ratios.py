"""The two comparisons of policies, which are never merged.

rho = pi_theta / pi_old is off-policy drift and weighs a unit (Eq 8); pi_old / mu is the mismatch between the training
and the inference engine and keeps or drops it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.ipa.units import unit_mean

MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio: Array) -> Array:
    """exp of a log-ratio clamped to +-20, so that no ratio overflows [ours]."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def unit_log_ratio_mean(logp: Array, old_logp: Array, unit_ids: Array, num_units: int) -> Array:
    """float32[B, U]: the mean over each unit's tokens of (logp - old_logp) [B, T]; 0 for empty units."""
    return unit_mean(logp.astype(jnp.float32) - old_logp.astype(jnp.float32), unit_ids, num_units)


def importance_ratio(logp: Array, old_logp: Array, unit_ids: Array, num_units: int) -> Array:
    """The importance ratio (Eq 8): rho_c = exp(mean_{t in c} (logp_t - old_logp_t)), the geometric mean.

    Returns float32[B, U]; 1 for empty units.
    """
    return bounded_exp(unit_log_ratio_mean(logp, old_logp, unit_ids, num_units))


def mismatch_mask(
    old_logp: Array, behavior_logp: Array, unit_ids: Array, num_units: int, upper: float, lower: float | None = None
) -> Array:
    """The mismatch mask (Eq 6, 9): m_c = 1[exp(mean_{t in c} (old_logp_t - behavior_logp_t)) <= H].

    One-sided with H = `upper`, as in the paper; `lower` also drops ratios below it [ours]. A unit whose mean is NaN or
    infinite was not measured, and is dropped [ours]. Returns bool[B, U]; empty units have ratio 1.
    """
    log_ratio = unit_log_ratio_mean(old_logp, behavior_logp, unit_ids, num_units)
    ratio = bounded_exp(log_ratio)
    keep = jnp.isfinite(log_ratio) & (ratio <= upper)
    return keep if lower is None else keep & (ratio >= lower)

"""What a run logs about its ratios, masks and returns, always at token, chunk and trajectory granularity."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from rome.ipa.batch import PolicyBatch
from rome.ipa.config import ObjectiveConfig
from rome.ipa.ratios import importance_ratio
from rome.ipa.units import num_units, to_tokens, unit_ids, unit_mean, unit_size, unit_sum

COUNT_OF = {"token": "train/tokens", "chunk": "train/chunks", "trajectory": "train/trajectories"}
"""The metric that counts the units of each level."""

SPREAD = ("mean", "min", "max")

WEIGHTS = {
    "train/positive_fraction": "train/trajectories",
    "train/return_mean": "train/chunks",
    "ratio/clipped_fraction": "train/ratio_units",
} | {
    name.replace("LEVEL", level): count
    for level, count in COUNT_OF.items()
    for name in ("mask/LEVEL_dropped", *(f"{kind}/LEVEL_{s}" for kind in ("ratio", "mismatch") for s in SPREAD))
}
"""Which count weighs each metric that is not itself a sum, when metrics are merged."""


def policy_metrics(
    logp: Array, reference: Array, sampled: PolicyBatch, expert: PolicyBatch, kept: Array, config: ObjectiveConfig
) -> dict[str, Array]:
    """Metrics of one (micro-)batch; LEVEL is token, chunk or trajectory, over what L_RL trains. float32 scalars.

      ratio/LEVEL_{mean,min,max}     pi_theta / reference
      mismatch/LEVEL_{mean,min,max}  pi_old / mu
      ratio/clipped_fraction         of the ratio units that `ratio_on` applies to (train/ratio_units), those above 1
      mask/LEVEL_dropped             fraction of the units with no token left
      train/positive_fraction        of the trajectories
      train/return_mean              over chunks
      train/{tokens,chunks,trajectories,kept_tokens,imitation_tokens}   counts
      train/nonfinite_tokens         trained tokens with a NaN or inf log-prob; left out of the ratios above
      train/nothing_to_train         1 when neither term has a token left

    Means of a batch without units are 0, its min and max are 1.
    """
    logp = lax.stop_gradient(logp)
    trained = unit_ids(sampled, "token") >= 0
    finite = jnp.isfinite(logp) & jnp.isfinite(reference) & jnp.isfinite(sampled.old_logp + sampled.behavior_logp)
    metrics: dict[str, Array] = {}
    for level, count in COUNT_OF.items():
        ids, units = unit_ids(sampled, level), num_units(sampled, level)
        readable, present = jnp.where(finite, ids, -1), unit_size(ids, units) > 0
        metrics[count] = _count(present)
        metrics |= _spread(f"ratio/{level}", importance_ratio(logp, reference, readable, units), present)
        mismatch = importance_ratio(sampled.old_logp, sampled.behavior_logp, readable, units)
        metrics |= _spread(f"mismatch/{level}", mismatch, present)
        metrics[f"mask/{level}_dropped"] = _mean(unit_sum(kept, ids, units) == 0, present)

    chunk_present = unit_size(unit_ids(sampled, "chunk"), num_units(sampled, "chunk")) > 0
    positive = to_tokens(sampled.positive, unit_ids(sampled, "chunk"), False)
    metrics |= _clipping(logp, reference, sampled, finite, positive, config)
    metrics["train/return_mean"] = _mean(sampled.returns, chunk_present)
    ids, units = unit_ids(sampled, "trajectory"), num_units(sampled, "trajectory")
    metrics["train/positive_fraction"] = _mean(unit_mean(positive, ids, units), unit_size(ids, units) > 0)
    metrics["train/kept_tokens"] = _count(kept)
    metrics["train/imitation_tokens"] = _count(unit_ids(expert, "token") >= 0)
    metrics["train/nonfinite_tokens"] = _count(trained & ~finite)
    left = metrics["train/kept_tokens"] + metrics["train/imitation_tokens"]
    metrics["train/nothing_to_train"] = (left == 0).astype(jnp.float32)
    return metrics


def merge_metrics(stacked: dict[str, Array]) -> dict[str, Array]:
    """The metrics of a batch from those of its micro-batches, stacked on a leading axis: float32[M] -> scalars.

    Exactly what `policy_loss` would report on the whole batch. Names say how: *_min and *_max by extremum over the
    micro-batches that have such units, other names in WEIGHTS as weighted means, and the rest (counts, losses) by sum.
    """
    return {name: _merge(name, values, stacked) for name, values in stacked.items()}


def _merge(name: str, values: Array, stacked: dict[str, Array]) -> Array:
    if name == "train/nothing_to_train":
        return jnp.min(values)
    if name not in WEIGHTS:
        return jnp.sum(values)
    weight = stacked[WEIGHTS[name]]
    if name.endswith("_min"):
        return _lowest(values, weight > 0)
    if name.endswith("_max"):
        return _highest(values, weight > 0)
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def _clipping(
    logp: Array, reference: Array, sampled: PolicyBatch, finite: Array, positive: Array, config: ObjectiveConfig
) -> dict[str, Array]:
    """The fraction of the ratio units that `ratio_on` applies to whose ratio is clipped (rho > 1), and their number."""
    if config.ratio_level == "none":
        return {"train/ratio_units": jnp.float32(0), "ratio/clipped_fraction": jnp.float32(0)}
    ids, units = unit_ids(sampled, config.ratio_level), num_units(sampled, config.ratio_level)
    applies = unit_size(ids if config.ratio_on == "all" else jnp.where(positive, -1, ids), units) > 0
    ratio = importance_ratio(logp, reference, jnp.where(finite, ids, -1), units)
    return {"train/ratio_units": _count(applies), "ratio/clipped_fraction": _mean(ratio > 1.0, applies)}


def _count(present: Array) -> Array:
    return jnp.sum(present, dtype=jnp.float32)


def _mean(values: Array, present: Array) -> Array:
    return jnp.sum(jnp.where(present, values, 0.0), dtype=jnp.float32) / jnp.maximum(_count(present), 1.0)


def _lowest(values: Array, present: Array) -> Array:
    return jnp.where(jnp.any(present), jnp.min(values, where=present, initial=jnp.inf), 1.0)


def _highest(values: Array, present: Array) -> Array:
    return jnp.where(jnp.any(present), jnp.max(values, where=present, initial=0.0), 1.0)


def _spread(name: str, ratios: Array, present: Array) -> dict[str, Array]:
    return {
        f"{name}_mean": _mean(ratios, present),
        f"{name}_min": _lowest(ratios, present),
        f"{name}_max": _highest(ratios, present),
    }

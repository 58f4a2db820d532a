"""What a run logs about its ratios, masks and returns, always at token, chunk and trajectory granularity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rome.ipa.batch import PolicyBatch
from rome.ipa.config import ObjectiveConfig
from rome.ipa.ratios import bounded_exp
from rome.ipa.units import to_tokens, unit_ids, unit_sum

COUNT_OF = {"token": "train/tokens", "chunk": "train/chunks", "trajectory": "train/trajectories"}
"""The metric that counts the units of each level."""

LEVELS = tuple(COUNT_OF)


def _count(present: Array) -> Array:
    """How many units are present; as below, over the last two axes."""
    return jnp.sum(present, axis=(-2, -1), dtype=jnp.float32)


def _mean(values: Array, present: Array) -> Array:
    return jnp.sum(jnp.where(present, values, 0.0), axis=(-2, -1)) / jnp.maximum(_count(present), 1.0)


def _lowest(values: Array, present: Array) -> Array:
    lowest = jnp.min(jnp.where(present, values, jnp.inf), axis=(-2, -1))
    return jnp.where(_count(present) > 0, lowest, 1.0)


def _highest(values: Array, present: Array) -> Array:
    highest = jnp.max(jnp.where(present, values, -jnp.inf), axis=(-2, -1))
    return jnp.where(_count(present) > 0, highest, 1.0)


SPREAD = {"mean": _mean, "min": _lowest, "max": _highest}

WEIGHTS = {
    "train/positive_fraction": "train/trajectories",
    "train/return_mean": "train/chunks",
    "ratio/clipped_fraction": "train/ratio_units",
    "mismatch/token_kl": "train/tokens",
} | {
    name.replace("LEVEL", level): count
    for level, count in COUNT_OF.items()
    for name in (
        "mask/LEVEL_dropped",
        "mismatch/LEVEL_gap",
        *(f"{kind}/LEVEL_{s}" for kind in ("ratio", "mismatch") for s in SPREAD),
    )
}
"""Which count weighs each metric that is not itself a sum, when metrics are merged."""


def policy_metrics(
    logp: Array, reference: Array, sampled: PolicyBatch, expert: PolicyBatch, kept: Array, config: ObjectiveConfig
) -> dict[str, Array]:
    """Metrics of one (micro-)batch; LEVEL is token, chunk or trajectory, over what L_RL trains. float32 scalars.

      ratio/LEVEL_{mean,min,max}     pi_theta / reference
      mismatch/LEVEL_{mean,min,max}  pi_old / mu. Its mean is near 1 however far the two are apart: mu drew the tokens
      mismatch/LEVEL_gap             mean |log pi_old / mu|
      mismatch/token_kl              of mu from pi_old in nats, estimated as the mean of r - 1 - log r, r = pi_old / mu
      ratio/clipped_fraction         of the ratio units that `ratio_on` applies to (train/ratio_units), those above 1
      mask/LEVEL_dropped             fraction of the units with no token left
      train/positive_fraction        of the trajectories
      train/return_mean              over chunks
      train/{tokens,chunks,trajectories,kept_tokens,imitation_tokens}   counts
      train/nonfinite_tokens         trained tokens with a NaN or inf log-prob; left out of the ratios above
      train/nothing_to_train         1 when neither term has a token left

    Means of a batch without units are 0, its min and max are 1.
    """
    trained, chunk = unit_ids(sampled, "token") >= 0, unit_ids(sampled, "chunk")
    drift, mismatch = lax.stop_gradient(logp) - reference, sampled.old_logp - sampled.behavior_logp
    finite = trained & jnp.isfinite(drift) & jnp.isfinite(mismatch)
    of_token = (
        trained,
        finite,
        jnp.where(finite, drift, 0.0),
        jnp.where(finite, mismatch, 0.0),
        kept,
        to_tokens(sampled.positive, chunk, False),
        to_tokens(sampled.returns, chunk, 0.0),
    )
    of_token = jnp.stack([values.astype(jnp.float32) for values in of_token])  # [S, B, T]
    ids = jnp.stack([unit_ids(sampled, level) for level in LEVELS])  # [L, B, T]
    units = max(trained.shape[1], sampled.returns.shape[1])
    sums = jax.vmap(jax.vmap(unit_sum, (None, 0, None)), (0, None, None))(of_token, ids, units)  # [S, L, B, U]
    size, readable, drift, mismatch, left, positive, returns = sums

    present, readable = size > 0, jnp.maximum(readable, 1.0)
    gap = mismatch / readable
    ratio, mismatch = bounded_exp(drift / readable), bounded_exp(gap)
    count, dropped, gaps = _count(present), _mean(left == 0, present), _mean(jnp.abs(gap), present)  # [L]
    spreads = {
        f"{kind}/{{}}_{stat}": f(values, present)
        for kind, values in (("ratio", ratio), ("mismatch", mismatch))
        for stat, f in SPREAD.items()
    }
    metrics = {}
    for i, level in enumerate(LEVELS):
        metrics |= {COUNT_OF[level]: count[i], f"mask/{level}_dropped": dropped[i], f"mismatch/{level}_gap": gaps[i]}
        metrics |= {name.format(level): values[i] for name, values in spreads.items()}

    weighed = present & ((positive == 0) | (config.ratio_on == "all")) & (config.ratio_level != "none")
    at = LEVELS.index(config.ratio_level) if config.ratio_level in LEVELS else 0
    nothing_left = ~jnp.any(kept) & ~jnp.any(unit_ids(expert, "token") >= 0)
    return metrics | {
        "mismatch/token_kl": _mean(mismatch - 1.0 - gap, present)[LEVELS.index("token")],
        "train/ratio_units": _count(weighed)[at],
        "ratio/clipped_fraction": _mean(ratio > 1.0, weighed)[at],
        "train/positive_fraction": _mean(positive > 0, present)[LEVELS.index("trajectory")],
        "train/return_mean": _mean(returns / jnp.maximum(size, 1.0), present)[LEVELS.index("chunk")],
        "train/kept_tokens": jnp.sum(kept, dtype=jnp.float32),
        "train/imitation_tokens": jnp.sum(unit_ids(expert, "token") >= 0, dtype=jnp.float32),
        "train/nonfinite_tokens": jnp.sum(trained & ~finite, dtype=jnp.float32),
        "train/nothing_to_train": nothing_left.astype(jnp.float32),
    }


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
        return _lowest(values[None], weight[None] > 0)
    if name.endswith("_max"):
        return _highest(values[None], weight[None] > 0)
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1.0)

"""Units: one code path for every granularity.

A unit is the set of tokens of a row that share one scalar: a token, a chunk, or a whole trajectory (the paper's
"sentence"). Everything takes integer unit_ids[B, T] (-1 = not trained) and a static num_units U.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rome.ipa.batch import PolicyBatch


def unit_ids(batch: PolicyBatch, level: str) -> Array:
    """int32[B, T]: the row-local unit of each token at `level` (token, chunk or trajectory); -1 = not trained."""
    trained = (batch.chunk_ids >= 0) & (batch.segment_ids > 0)
    ids = {
        "token": jnp.arange(batch.chunk_ids.shape[1]),
        "chunk": batch.chunk_ids,
        "trajectory": batch.segment_ids - 1,
    }[level]
    return jnp.where(trained, ids, -1)


def num_units(batch: PolicyBatch, level: str) -> int:
    """U, the static number of units a row can hold at `level`: C chunks, and never more than T of the others."""
    return batch.returns.shape[1] if level == "chunk" else batch.chunk_ids.shape[1]


def unit_sum(values: Array, unit_ids: Array, num_units: int) -> Array:
    """float32[B, U]: the sum of values[B, T] over each unit. Selects, so what is not trained never reaches the sum."""
    values = jnp.where(unit_ids >= 0, values.astype(jnp.float32), 0.0)
    bins = jnp.where(unit_ids >= 0, unit_ids, num_units)  # one more bin for what is not trained
    sums = jax.vmap(lambda v, b: jax.ops.segment_sum(v, b, num_units + 1))(values, bins)
    return sums[:, :num_units]


def unit_size(unit_ids: Array, num_units: int) -> Array:
    """float32[B, U]: how many tokens each unit has; 0 for empty units."""
    return unit_sum(jnp.ones_like(unit_ids), unit_ids, num_units)


def unit_mean(values: Array, unit_ids: Array, num_units: int) -> Array:
    """float32[B, U]: the mean of values[B, T] over each unit's tokens; 0 for empty units."""
    return unit_sum(values, unit_ids, num_units) / jnp.maximum(unit_size(unit_ids, num_units), 1.0)


def unit_count(unit_ids: Array, num_units: int) -> Array:
    """float32 scalar: how many units of the batch are not empty."""
    return jnp.sum(unit_size(unit_ids, num_units) > 0, dtype=jnp.float32)


def to_tokens(table: Array, unit_ids: Array, fill: float | bool) -> Array:
    """[B, T]: each token's entry of table[B, U]; `fill` where the token is in no unit."""
    return jnp.where(unit_ids >= 0, jnp.take_along_axis(table, jnp.maximum(unit_ids, 0), axis=1), fill)

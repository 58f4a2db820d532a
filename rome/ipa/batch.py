"""The arrays that an objective reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Trajectories packed into B rows of T tokens and at most C chunks; a pytree.

    Row-local chunk ids index the [B, C] tables, and a chunk never spans two segments. A token is trained iff its chunk
    id is >= 0 and its segment is > 0. Tokens that are not trained may hold anything, NaN included.

    tokens         int32[B, T]
    positions      int32[B, T]     position within the trajectory
    segment_ids    int32[B, T]     1, 2, ... = the trajectories of the row; 0 = padding
    chunk_ids      int32[B, T]     0 ... C-1; -1 = no loss (prompt, observation, padding, an excluded prefix)
    old_logp       float32[B, T]   log pi_old, the training engine at the start of the step
    behavior_logp  float32[B, T]   log mu, the inference engine when the token was sampled
    returns        float32[B, C]   G (Eq 7), from `trajectory_returns`
    positive       bool[B, C]      the chunk's trajectory is in T+, by its raw final reward
    imitation      bool[B, C]      an expert's chunk: trained by L_IL (Eq 10), never by L_RL
    experts        int16[B, T, L, K], or None: the experts that each token visited at rollout, -1 = not known; for the
                                   model of the training engine (router replay), no objective reads it
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    chunk_ids: Array
    old_logp: Array
    behavior_logp: Array
    returns: Array
    positive: Array
    imitation: Array
    experts: Array | None = None

    def replace(self, **changes: Array) -> PolicyBatch:
        """A copy with some arrays changed."""
        return dataclasses.replace(self, **changes)

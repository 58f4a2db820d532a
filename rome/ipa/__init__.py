"""IPA, Interaction-Perceptive Agentic Policy Optimization (arXiv 2512.24873 v3, section 3.2.4): the mathematics.

jax and arrays only; pure functions. Read it in this order: `units` (what shares a scalar), `returns` (Eq 7), `ratios`
(Eq 8 and the mismatch mask), `objective` (Eq 9-10), `config` (the paper's comparisons as a table of knobs), `metrics`;
then `sft` (Eq 1-2), `resampling` (where to start rollouts), and `peers` (other people's objectives).

    batch = PolicyBatch(..., returns=..., positive=..., imitation=...)     # returns from trajectory_returns(...)
    loss, metrics = policy_loss(logp, batch, OBJECTIVES["ipa"])
"""

from rome.ipa.batch import PolicyBatch
from rome.ipa.config import OBJECTIVES, ObjectiveConfig, ObjectiveError, validate_asynchrony
from rome.ipa.metrics import merge_metrics
from rome.ipa.objective import Totals, batch_totals, policy_loss
from rome.ipa.ratios import importance_ratio, mismatch_mask, unit_log_ratio_mean
from rome.ipa.resampling import (
    Fork,
    anchor_prefixes,
    crucial_forks,
    imitated_forks,
    rollback,
    two_proportion_p_value,
)
from rome.ipa.returns import chunk_returns, group_baseline, is_positive, trajectory_returns
from rome.ipa.sft import sft_chunk_mask, sft_loss, sft_tokens
from rome.ipa.units import num_units, unit_ids

__all__ = [
    "OBJECTIVES",
    "Fork",
    "ObjectiveConfig",
    "ObjectiveError",
    "PolicyBatch",
    "Totals",
    "anchor_prefixes",
    "batch_totals",
    "chunk_returns",
    "crucial_forks",
    "group_baseline",
    "imitated_forks",
    "importance_ratio",
    "is_positive",
    "merge_metrics",
    "mismatch_mask",
    "num_units",
    "policy_loss",
    "rollback",
    "sft_chunk_mask",
    "sft_loss",
    "sft_tokens",
    "trajectory_returns",
    "two_proportion_p_value",
    "unit_ids",
    "unit_log_ratio_mean",
    "validate_asynchrony",
]

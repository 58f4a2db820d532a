"""Chunk-level initialised resampling, the part that is mathematics (host-side, plain numbers).

An expert-like trajectory of K chunks offers K starting points: replay its first `prefix` chunks in a real sandbox
(prefix = 0 ... K-1; the paper's k is prefix + 1) and let the policy continue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROLLBACK_THRESHOLD = 0.5
"""The success rate at which the start moves one chunk back [ours]."""


class Fork(NamedTuple):
    """A crucial interaction c*_f: chunks (prefix, after] of the expert, one chunk when the anchors are adjacent."""

    prefix: int  # expert chunks replayed to reach the state just before the crucial chunk
    after: int  # expert chunks replayed to reach the state just after it
    rate_before: float
    rate_after: float
    p_value: float


def rollback(prefix: int, successes: int, attempts: int, threshold: float = ROLLBACK_THRESHOLD) -> int:
    """Sequential rollback: the next prefix, one chunk shorter once the success rate from here reaches the threshold.

    Starts at K-1 (only the last chunk is sampled) and ends at 0 (the whole task). No attempts: stays.
    """
    _check_counts(successes, attempts)
    return max(prefix - 1, 0) if attempts > 0 and successes / attempts >= threshold else prefix


def anchor_prefixes(num_chunks: int, num_anchors: int, seed: int | None = None) -> list[int]:
    """Parallelised initialisation: distinct prefixes in 0 ... K-1, ascending, to start several rollouts from each.

    seed None: evenly spaced, both ends included (one anchor: 0). Else drawn uniformly without replacement. At most K.
    """
    if num_chunks < 1 or num_anchors < 1:
        raise ValueError(f"num_chunks, num_anchors: expected >= 1, found {num_chunks} and {num_anchors}")
    anchors = min(num_anchors, num_chunks)
    if seed is not None:
        return sorted(np.random.default_rng(seed).choice(num_chunks, anchors, replace=False).tolist())
    return [round(i * (num_chunks - 1) / max(anchors - 1, 1)) for i in range(anchors)]


def two_proportion_p_value(successes_low: int, attempts_low: int, successes_high: int, attempts_high: int) -> float:
    """The p-value of "the first success rate is lower than the second", one-sided.

    Fisher's exact two-proportion test [ours]: it holds its level at the few samples an anchor gets, where the normal
    approximation does not. P[X <= successes_low], X hypergeometric given the pooled successes.
    """
    _check_counts(successes_low, attempts_low)
    _check_counts(successes_high, attempts_high)
    pooled = successes_low + successes_high
    ways = sum(math.comb(attempts_low, x) * math.comb(attempts_high, pooled - x) for x in range(successes_low + 1))
    return ways / math.comb(attempts_low + attempts_high, pooled)


def crucial_forks(
    prefixes: Sequence[int], successes: Sequence[int], attempts: Sequence[int], level: float = 0.05
) -> list[Fork]:
    """The crucial chunks: where the success rate from before is significantly lower than from after, at `level`.

    Each anchor is compared with the next one; `prefixes` are ascending, and may end with K (the expert's own end, whose
    success is known). `level` is that of each comparison. Returns the forks in order of position, to be logged.
    """
    if not len(prefixes) == len(successes) == len(attempts) or list(prefixes) != sorted(set(prefixes)):
        raise ValueError("prefixes: expected ascending anchors, with successes and attempts of the same length")
    forks = []
    for i in range(len(prefixes) - 1):
        p_value = two_proportion_p_value(successes[i], attempts[i], successes[i + 1], attempts[i + 1])
        if p_value <= level:
            rates = [successes[j] / attempts[j] for j in (i, i + 1)]
            forks.append(Fork(prefixes[i], prefixes[i + 1], rates[0], rates[1], p_value))
    return forks


def imitated_forks(imitation: str, positive: np.ndarray, fork_ids: np.ndarray) -> np.ndarray:
    """bool[N]: which trajectories get the imitation term (Eq 10), under ObjectiveConfig.imitation.

    off: none · always: all · fallback: those whose fork (N trajectories with one fork id) sampled no positive.
    Where it is False, the packer excludes the expert's chunks: chunk id -1.

    Args:
      imitation: off, fallback or always.
      positive: bool[N], T+ by the raw final reward.
      fork_ids: int[N], the fork each trajectory was started from.
    """
    positive, fork_ids = np.asarray(positive, bool), np.asarray(fork_ids)
    if imitation == "fallback":
        return ~np.isin(fork_ids, fork_ids[positive])
    if imitation not in ("off", "always"):
        raise ValueError(f"imitation: expected off, fallback or always, found {imitation!r}")
    return np.full(positive.shape, imitation == "always")


def _check_counts(successes: int, attempts: int) -> None:
    if not 0 <= successes <= attempts:
        raise ValueError(f"successes: expected 0 <= successes <= attempts, found {successes} of {attempts}")

"""The knobs of the objective, and the paper's comparisons as rows of one table.

Source of the whole package: "Let It Flow" (ROME), arXiv 2512.24873 v3, section 3.2.4, equations 1-10. A decision taken
here because the paper is silent is marked [ours].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

CHOICES: dict[str, tuple[str, ...]] = {
    "return_level": ("token", "chunk", "trajectory", "none"),
    "ratio_level": ("token", "chunk", "trajectory", "none"),
    "mask_level": ("token", "chunk", "trajectory", "none"),
    "ratio_on": ("negatives", "all"),
    "ratio_reference": ("proximal", "behavior"),
    "normalizer": ("tokens", "chunks", "trajectories"),
    "baseline": ("none", "group_mean", "leave_one_out"),
    "imitation": ("off", "fallback", "always"),
}


class ObjectiveError(ValueError):
    """An objective that makes no sense. The message names the field, what it was and what was expected."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which objective `policy_loss` computes. Hashable, so a static argument of jit. The defaults are IPA (Eq 9).

    return_level     the unit that shares a return G; read when returns are built (`trajectory_returns`)
    ratio_level      the unit that shares an importance ratio rho; none: w = 1
    mask_level       the unit that the mismatch mask keeps or drops; none: m = 1
    ratio_on         negatives: w = 1 on T+ (Eq 6, 9); all: w = clip(rho, 0, 1) everywhere (Eq 4)
    ratio_reference  the denominator of rho: proximal = pi_old (the paper's), behavior = mu [ours]
    gamma            discount a chunk, in [0, 1]; 0.95 [ours]
    mismatch_upper   H: keep a unit iff pi_old/mu <= H; 5.0 [ours]
    mismatch_lower   also drop a unit with pi_old/mu below this; None = one-sided, as in the paper [ours]
    normalizer       what N counts over the global batch [ours]
    failure_reward   a failure is worth at most this; with 0 and no baseline the negative branch is inert [ours]
    baseline         subtracted from the final reward, per group of trajectories of one task [ours]
    imitation        Eq 10's imitation term: off; at forks without a sampled positive (fallback); always [ours]
    lambda_il        weight of L_IL (Eq 10)
    lambda_rl        weight of L_RL (Eq 10)
    """

    return_level: str = "chunk"
    ratio_level: str = "chunk"
    mask_level: str = "chunk"
    ratio_on: str = "negatives"
    ratio_reference: str = "proximal"
    gamma: float = 0.95
    mismatch_upper: float = 5.0
    mismatch_lower: float | None = None
    normalizer: str = "tokens"
    failure_reward: float = 0.0
    baseline: str = "none"
    imitation: str = "off"
    lambda_il: float = 1.0
    lambda_rl: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ObjectiveError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            numeric = field.name not in CHOICES and not (field.name == "mismatch_lower" and value is None)
            if numeric and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
                raise ObjectiveError(f"{field.name}: expected a number, found {value!r}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ObjectiveError(f"gamma: expected a discount in [0, 1], found {self.gamma}")
        if self.mismatch_upper <= 0.0:
            raise ObjectiveError(f"mismatch_upper: expected a ratio > 0, found {self.mismatch_upper}")
        if self.mismatch_lower is not None and not 0.0 <= self.mismatch_lower <= self.mismatch_upper:
            raise ObjectiveError(
                f"mismatch_lower: expected None or a ratio in [0, mismatch_upper = {self.mismatch_upper}], "
                f"found {self.mismatch_lower}"
            )
        if self.failure_reward > 0.0:
            raise ObjectiveError(f"failure_reward: expected a reward <= 0, found {self.failure_reward}")
        for name in ("lambda_il", "lambda_rl"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ObjectiveError(f"{name}: expected a finite weight >= 0, found {getattr(self, name)}")


OBJECTIVES: dict[str, ObjectiveConfig] = {
    # Eq 9
    "ipa": ObjectiveConfig(),
    # Eq 6, the paper's baseline
    "topr_token_mask": ObjectiveConfig(
        return_level="trajectory", ratio_level="trajectory", mask_level="token", gamma=1.0
    ),
    # Eq 4
    "tis": ObjectiveConfig(
        return_level="trajectory", ratio_level="trajectory", mask_level="none", ratio_on="all", gamma=1.0
    ),
    # Eq 3
    "reinforce": ObjectiveConfig(return_level="trajectory", ratio_level="none", mask_level="none", gamma=1.0),
    # the finest limit
    "token": ObjectiveConfig(return_level="trajectory", ratio_level="token", mask_level="token", gamma=1.0),
}


def validate_asynchrony(config: ObjectiveConfig, async_ratio: float, allow_unmasked: bool = False) -> None:
    """Refuses a run that trains on samples of older policies with no mismatch mask, unless it says so.

    async_ratio is how many policy versions old a sample may be (0 = on-policy). The mask is disabled by
    mask_level="none" or mismatch_upper=inf. Raises ObjectiveError.
    """
    if not (math.isfinite(async_ratio) and async_ratio >= 0):
        raise ObjectiveError(f"async_ratio: expected a finite number >= 0, found {async_ratio}")
    unmasked = config.mask_level == "none" or math.isinf(config.mismatch_upper)
    if async_ratio > 0 and unmasked and not allow_unmasked:
        raise ObjectiveError(
            f"mask_level: expected a mismatch mask with async_ratio {async_ratio} > 0, found "
            f"mask_level={config.mask_level!r} and mismatch_upper={config.mismatch_upper}. "
            "Stale samples would be trained on unchecked: set mask_level, async_ratio=0, or allow_unmasked=True."
        )

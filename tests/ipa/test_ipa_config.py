"""The config refuses what makes no sense, and the table of objectives is the paper's."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from rome.ipa import OBJECTIVES, ObjectiveConfig, ObjectiveError, validate_asynchrony
from rome.ipa.config import CHOICES

TABLE = {  # objective: return, ratio, mask, ratio applies to (None: no ratio), gamma is 1
    "ipa": ("chunk", "chunk", "chunk", "negatives", False),
    "topr_token_mask": ("trajectory", "trajectory", "token", "negatives", True),
    "tis": ("trajectory", "trajectory", "none", "all", True),
    "reinforce": ("trajectory", "none", "none", None, True),
    "token": ("trajectory", "token", "token", "negatives", True),
}


def test_the_table_of_objectives():
    assert set(OBJECTIVES) == set(TABLE)
    for name, (returns, ratio, mask, applies, undiscounted) in TABLE.items():
        config = OBJECTIVES[name]
        assert (config.return_level, config.ratio_level, config.mask_level) == (returns, ratio, mask)
        assert applies is None or config.ratio_on == applies
        assert (config.gamma == 1.0) == undiscounted
    assert OBJECTIVES["ipa"] == ObjectiveConfig()


def test_defaults_and_the_set_of_knobs():
    assert {f.name: f.default for f in fields(ObjectiveConfig)} == {
        "return_level": "chunk",
        "ratio_level": "chunk",
        "mask_level": "chunk",
        "ratio_on": "negatives",
        "ratio_reference": "proximal",
        "gamma": 0.95,
        "mismatch_upper": 5.0,
        "mismatch_lower": None,
        "normalizer": "tokens",
        "failure_reward": 0.0,
        "baseline": "none",
        "imitation": "off",
        "lambda_il": 1.0,
        "lambda_rl": 1.0,
    }
    with pytest.raises(FrozenInstanceError):
        ObjectiveConfig().gamma = 0.5
    assert hash(ObjectiveConfig()) == hash(OBJECTIVES["ipa"])


@pytest.mark.parametrize("field", CHOICES)
def test_every_choice_is_accepted_and_nothing_else(field):
    for choice in CHOICES[field]:
        assert getattr(ObjectiveConfig(**{field: choice}), field) == choice
    for wrong in ("sentence", "", None, 1):
        with pytest.raises(ObjectiveError, match=f"^{field}: expected one of {CHOICES[field][0]}"):
            ObjectiveConfig(**{field: wrong})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("gamma", -0.1),
        ("gamma", 1.1),
        ("gamma", float("nan")),
        ("gamma", "0.9"),
        ("gamma", True),
        ("gamma", None),
        ("mismatch_upper", 0.0),
        ("mismatch_upper", float("nan")),
        ("mismatch_lower", -1.0),
        ("mismatch_lower", 6.0),
        ("failure_reward", 1.0),
        ("lambda_il", -1.0),
        ("lambda_rl", float("inf")),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_by_name(field, wrong):
    with pytest.raises(ObjectiveError, match=f"^{field}: expected"):
        ObjectiveConfig(**{field: wrong})


@pytest.mark.parametrize(
    "unmasked", [replace(ObjectiveConfig(), mask_level="none"), replace(ObjectiveConfig(), mismatch_upper=float("inf"))]
)
def test_asynchrony_without_a_mask_must_be_explicit(unmasked):
    with pytest.raises(ObjectiveError, match="mask_level"):
        validate_asynchrony(unmasked, async_ratio=0.5)
    validate_asynchrony(unmasked, async_ratio=0.5, allow_unmasked=True)
    validate_asynchrony(unmasked, async_ratio=0)
    validate_asynchrony(ObjectiveConfig(), async_ratio=2)
    with pytest.raises(ObjectiveError, match="async_ratio"):
        validate_asynchrony(ObjectiveConfig(), async_ratio=-1)

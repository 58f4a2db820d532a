"""Procedural families of tasks. To add one: write a class with `name` and `build`, and list it here."""

from rome.envs.families.base import MAX_HORIZON, MIN_HORIZON, Draft, Draw, Family, Step
from rome.envs.families.trails import (
    BuildArchive,
    CountMatches,
    EditConfig,
    ExtractLogs,
    FollowHints,
    MakeLinks,
    RepairPermissions,
)
from rome.envs.families.visits import (
    AggregateNumbers,
    FindChecksum,
    FixFunction,
    MergeRecords,
    MoveFiles,
    SortRecords,
)

_TRAINED: tuple[Family, ...] = (
    FollowHints(),
    CountMatches(),
    AggregateNumbers(),
    MoveFiles(),
    EditConfig(),
    FixFunction(),
    RepairPermissions(),
    ExtractLogs(),
    BuildArchive(),
    FindChecksum(),
    MakeLinks(),
    SortRecords(),
)
_HELD_OUT: tuple[Family, ...] = (MergeRecords(),)

FAMILIES: tuple[str, ...] = tuple(family.name for family in _TRAINED)
"""Names of the families to train on."""
HELD_OUT_FAMILIES: tuple[str, ...] = tuple(family.name for family in _HELD_OUT)
"""Names of the families that are never trained on."""
REGISTRY: dict[str, Family] = {family.name: family for family in _TRAINED + _HELD_OUT}

__all__ = ["FAMILIES", "HELD_OUT_FAMILIES", "MAX_HORIZON", "MIN_HORIZON", "REGISTRY", "Draft", "Draw", "Family", "Step"]

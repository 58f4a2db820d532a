"""What a turn appends to slots, in batches of static size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Append(NamedTuple):
    """Tokens for the rows of a DecodeState: the first `counts[b]` of `tokens[b]`; `fresh` rows are emptied before."""

    tokens: np.ndarray  # int32[B, bucket]
    counts: np.ndarray  # int32[B]
    fresh: np.ndarray  # bool[B]


class PromptPass(NamedTuple):
    """Prompts that are prefilled together: appends to the prompt rows, and which of these each row starts with (source
    int32[B]; −1: none). With pages: those of the prompts int32[R, C], and which are copied, to which, int32[B] each."""

    prefills: list[Append]
    source: np.ndarray
    table: np.ndarray | None = None
    copies: tuple[np.ndarray, ...] = ()


def batches(
    rows: int, deltas: Mapping[int, np.ndarray], buckets: Sequence[int], pad_id: int, fresh: bool = False
) -> list[Append]:
    """The deltas, by row, as one or more appends of static size; `fresh`: to empty caches."""
    longest = max((len(delta) for delta in deltas.values()), default=0)
    made, start = [], 0
    while start < longest:
        bucket = next((size for size in buckets if size >= longest - start), buckets[-1])
        tokens = np.full((rows, bucket), pad_id, np.int32)
        counts = np.zeros(rows, np.int32)
        for row, delta in deltas.items():
            part = delta[start : start + bucket]
            tokens[row, : len(part)] = part
            counts[row] = len(part)
        made.append(Append(tokens, counts, np.full(rows, fresh and start == 0)))
        start += bucket
    return made


def idle_append(rows: int, bucket: int) -> Append:
    """One that appends nothing."""
    return Append(np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool))

"""Copy exercises: the continued pre-training of a policy that starts from nothing.

An agent's commands are mostly copies (a name it was told, a number it just read), and a small transformer learns to
copy from random text far faster than from demonstrations, where copies are few and guessable. One exercise is a random
context followed by segments of it, repeated; the first token of a segment is the cue, the others are trained.
"""

from __future__ import annotations

import numpy as np


def copy_exercises(
    rng: np.random.Generator,
    rows: int,
    row_length: int,
    vocabulary: np.ndarray,
    context: tuple[int, int] = (12, 64),
    segment: tuple[int, int] = (2, 8),
) -> dict[str, np.ndarray]:
    """A batch of exercises, one a row.

    Args:
      vocabulary: int32[n], the token ids to draw from (no special tokens).
      context, segment: lengths in tokens, drawn uniformly (inclusive).
    Returns:
      tokens, positions, segment_ids, chunk_ids int32[rows, row_length]; every trained token has chunk id 0.
    """
    tokens = rng.choice(vocabulary, (rows, row_length)).astype(np.int32)
    chunk_ids = np.full((rows, row_length), -1, np.int32)
    for row in range(rows):
        size = int(rng.integers(context[0], context[1] + 1))
        at = size
        while at < row_length:
            length = int(rng.integers(segment[0], segment[1] + 1))
            start = int(rng.integers(0, size - length + 1)) if size > length else 0
            length = min(length, row_length - at, size)
            tokens[row, at : at + length] = tokens[row, start : start + length]
            chunk_ids[row, at + 1 : at + length] = 0
            at += length
    positions = np.broadcast_to(np.arange(row_length, dtype=np.int32), tokens.shape).copy()
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.ones_like(tokens),
        "chunk_ids": chunk_ids,
    }

"""Relabelling: one demonstration stands for all that differ from it in names and numbers only.

The names of a procedural task are drawn from a pool and its numbers at random, so exchanging them everywhere at once
(instruction, commands, outputs) gives an equally good demonstration without running it again. A policy trained on such
data cannot remember answers; it has to copy them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

_ATTEMPTS = 64  # to draw a number that no other number has become
_PIECE = re.compile(r"[a-z]+|(?<![a-z0-9])[0-9]{3,}(?![a-z])")  # the number in `sha256sum` is part of a command


def relabelling(rng: np.random.Generator, names: Sequence[str]) -> Callable[[str], str]:
    """A text → text function that permutes `names` and redraws numbers of three digits or more, consistently.

    Different numbers stay different (as long as there are enough of their length).
    Three-digit numbers stay valid file modes with read permission for the owner; longer ones keep their length and no
    leading zero. Everything else stays as it is, numbers inside a word (`sha256sum`) too.
    """
    permuted = dict(zip(names, (names[i] for i in rng.permutation(len(names))), strict=True))
    numbers: dict[str, str] = {}

    def number(text: str) -> str:
        if text not in numbers:
            high, first = (8, 4) if len(text) == 3 else (10, 1)
            for _ in range(_ATTEMPTS):
                digits = [rng.integers(first, high), *rng.integers(0, high, len(text) - 1)]
                numbers[text] = "".join(str(digit) for digit in digits)
                if list(numbers.values()).count(numbers[text]) == 1:
                    break
        return numbers[text]

    def piece(match: re.Match[str]) -> str:
        text = match.group()
        return number(text) if text[0].isdigit() else permuted.get(text, text)

    return lambda text: _PIECE.sub(piece, text)

"""Which pages of a cohort's cache belong to which of its rows, and who may go on when pages are scarce.

All of it is on the host. The device sees a table: the pages of each row in order (`rome.models.paged`).

A trajectory may grow to `max_length`, so rows that only share out what is free could end up waiting for each other.
`affordable` is Dijkstra's banker's algorithm for one resource: a turn is granted only if there remains an order in
which every trajectory could grow to its end, each from what is free and what those before it will return. So nobody's
pages are ever taken away, nothing is computed twice, and whoever is refused waits for a while and not for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rome.models.paged import Paging


class Claim(NamedTuple):
    """What a row wants of a turn: pages for `tokens` in all; a fresh row also says what it starts with."""

    row: int
    tokens: int
    prompt: np.ndarray | None = None  # int32[m]; None: it goes on


class PagePool:
    """The pages of one cohort.

    Args:
      rows: slots of the cohort.
      paging: tokens of a page, and how many pages there are.
      max_length: tokens that a row may have.

    Attributes:
      table: int32[rows, pages of a row]; what a row does not have is `paging.pages`, which is no page.
      held: int64[rows], pages that each row has.
      references: int32[pages], rows that have each page.
    """

    def __init__(self, rows: int, paging: Paging, max_length: int) -> None:
        self.paging, self.per_row = paging, paging.of(max_length)
        self.table = np.full((rows, self.per_row), paging.pages, np.int32)
        self.held = np.zeros(rows, np.int64)
        self.references = np.zeros(paging.pages, np.int32)
        self._free = list(range(paging.pages))[::-1]  # taken from its end

    @property
    def in_use(self) -> int:
        return self.paging.pages - len(self._free)

    @property
    def shared(self) -> int:
        """Pages that more than one row has."""
        return int((self.references > 1).sum())

    def grow(self, row: int, tokens: int) -> None:
        """Gives a row pages of its own until it has room for so many tokens."""
        for index in range(int(self.held[row]), self.paging.of(tokens)):
            page = self._free.pop()
            self.table[row, index] = page
            self.references[page] = 1
            self.held[row] = index + 1

    def shrink(self, row: int, tokens: int) -> None:
        """Takes back what a row with so many tokens does not need."""
        kept, held = self.paging.of(tokens), int(self.held[row])
        for page in self.table[row, kept:held][::-1]:
            self.references[page] -= 1
            if not self.references[page]:
                self._free.append(int(page))
        self.table[row, kept:held] = self.paging.pages
        self.held[row] = min(kept, held)

    def start(self, rows: Sequence[int], length: int) -> list[tuple[int, int]]:
        """Pages for rows that start with one prompt of `length` tokens, which is prefilled into those of the first.

        All have its full pages in common; of the last one, if it is partly filled, the others get copies. What the rows
        had before is taken back.

        Returns (page, copy) of each page that is to be copied once the prompt is there.
        """
        first, *others = rows
        for row in rows:
            self.shrink(row, 0)
        self.grow(first, length)
        full, copies = length // self.paging.size, []
        for row in others:
            common = self.table[first, :full]
            self.table[row, :full] = common
            self.references[common] += 1
            self.held[row] = full
            if length % self.paging.size:
                self.grow(row, length)
                copies.append((int(self.table[first, full]), int(self.table[row, full])))
        return copies

    def place(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], prompt_rows: int
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """`start` for several prompts, each given by the rows that start with it, and its length.

        Returns a table int32[prompt_rows, pages of a row] to prefill them with, and the pages that are to be copied and
        where to, int32[rows] each, filled up with what is no page.
        """
        table = np.full((prompt_rows, self.per_row), self.paging.pages, np.int32)
        copied, to = np.full((2, len(self.held)), self.paging.pages, np.int32)
        copies = []
        for index, (rows, length) in enumerate(zip(prompts, lengths, strict=True)):
            copies += self.start(rows, length)
            table[index] = self.table[rows[0]]
        for index, (page, copy) in enumerate(copies):
            copied[index], to[index] = page, copy
        return table, (copied, to)

    def affordable(self, claims: Sequence[Claim]) -> list[int]:
        """The rows whose claims can be granted together, given those of a turn in order of precedence.

        If all that have pages claim a turn, one of them at least gets it. No row starts while one that came before it
        is refused.
        """
        if self.paging.pages >= self.per_row * len(self.held):
            return [claim.row for claim in claims]
        free, held, gains = len(self._free), self.held.copy(), self._own()
        granted: list[int] = []
        prompts: set[bytes] = set()
        refused = False
        for row, tokens, prompt in claims:
            total, common = self.paging.of(tokens), 0
            if prompt is not None:
                common, name = len(prompt) // self.paging.size, prompt.tobytes()
            cost = total - held[row] - common * (prompt is not None and name in prompts)
            after, gained = held.copy(), gains.copy()
            after[row] = total
            gained[row] += total - held[row] - common  # what is shared may stay with the others
            if cost > free or (refused and prompt is not None) or not self._is_safe(free - cost, after, gained):
                refused = True
                continue
            free, held, gains = free - cost, after, gained
            granted.append(row)
            if prompt is not None:
                prompts.add(name)
        return granted

    def _own(self) -> np.ndarray:
        """int64[rows]: pages that nobody else has."""
        alone = np.append(self.references == 1, False)  # what is no page is nobody's
        return alone[self.table].sum(axis=1)

    def _is_safe(self, free: int, held: np.ndarray, gains: np.ndarray) -> bool:
        """Whether all rows that have pages can grow to their end one after the other, who needs least first."""
        (rows,) = held.nonzero()
        needs = self.per_row - held[rows]
        order = np.argsort(needs, kind="stable")
        returned = np.cumsum(gains[rows][order])
        return bool((needs[order] <= free + np.append(0, returned[:-1])).all())

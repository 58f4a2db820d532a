"""Trajectories packed into static-shape rows: many short episodes share a row, and never see each other.

A row holds whole trajectories only. Segment ids (1, 2, …; 0 is padding) keep attention apart; chunk ids count the
chunks of the row from 0 and index the `[rows, max_chunks]` tables of a PolicyBatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rome.trajectory import Trajectory


class PackingError(ValueError):
    """A trajectory that does not fit in a row; names it, its size and the row's."""


@dataclass(frozen=True)
class Place:
    """Where one trajectory lies: tokens [start, start + length) and chunks [first_chunk, + num_chunks) of `row`."""

    row: int
    start: int
    length: int
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True)
class PackedRows:
    """`tokens, positions, segment_ids, chunk_ids` int32[R, T], `behavior_logp` float32[R, T], a Place a trajectory.

    `experts` int16[R, T, L, k], if asked for: the experts that each token visited at rollout, −1 where not known.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    chunk_ids: np.ndarray
    behavior_logp: np.ndarray
    places: tuple[Place, ...]
    max_chunks: int
    experts: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def fill(self) -> float:
        """The fraction of the rows' positions that hold a token."""
        return float(np.mean(self.segment_ids > 0)) if self.segment_ids.size else 0.0

    def table(self, values: Sequence[np.ndarray | float | bool], dtype: type, fill: float | bool = 0) -> np.ndarray:
        """`[R, C]` table of per-chunk values; `values[i]` are trajectory i's: [K_i] or longer, or one scalar."""
        out = np.full((self.num_rows, self.max_chunks), fill, dtype)
        for place, value in zip(self.places, values, strict=True):
            array = np.broadcast_to(value, (place.num_chunks,)) if np.ndim(value) == 0 else value[: place.num_chunks]
            out[place.row, place.first_chunk : place.first_chunk + place.num_chunks] = array
        return out

    def per_chunk_mean(self, per_token: np.ndarray) -> list[np.ndarray]:
        """For each trajectory, the mean over each chunk's tokens of `per_token` [R, T]: float64[K]."""
        means = []
        for p in self.places:
            ids = self.chunk_ids[p.row, p.start : p.start + p.length] - p.first_chunk
            values = per_token[p.row, p.start : p.start + p.length].astype(np.float64)
            trained = ids >= 0
            sums = np.bincount(ids[trained], weights=values[trained], minlength=p.num_chunks)
            counts = np.bincount(ids[trained], minlength=p.num_chunks)
            means.append(sums / np.maximum(counts, 1))
        return means


def _assign(lengths: list[int], chunks: list[int], row_length: int, max_chunks: int) -> list[tuple[int, int, int]]:
    """First-fit decreasing. For each item (row, start, first_chunk); deterministic in the input order."""
    rows: list[list[int]] = []  # [tokens used, chunks used]
    placed: list[tuple[int, int, int]] = [(0, 0, 0)] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need, count = lengths[item], chunks[item]
        fits = (r for r, (t, c) in enumerate(rows) if t + need <= row_length and c + count <= max_chunks)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([0, 0])
        used = rows[row]
        placed[item] = (row, used[0], used[1])
        used[0] += lengths[item]
        used[1] += chunks[item]
    return placed


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    row_length: int,
    max_chunks: int,
    rows_multiple: int = 1,
    routed: tuple[int, int] | None = None,
) -> PackedRows:
    """Packs whole trajectories into rows of `row_length` tokens and at most `max_chunks` chunks.

    Observations after the last chunk condition nothing that is trained and are left out. A replayed prefix is context
    (chunk id −1), unless the trajectory is nothing but prefix: an expert's, to be imitated. The number of rows is
    padded with empty ones to a multiple of `rows_multiple`. With `routed` = (layers with a router, experts a token) the
    rows carry the recorded experts. Raises PackingError if a trajectory can't fit in one row, or recorded others.
    """
    segments = [t.segments()[: 2 * len(t.chunks)] for t in trajectories]
    lengths = [sum(len(tokens) for _, tokens in parts) for parts in segments]
    chunks = [len(t.chunks) for t in trajectories]
    for trajectory, length in zip(trajectories, lengths, strict=True):
        if length > row_length or len(trajectory.chunks) > max_chunks:
            raise PackingError(
                f"trajectory {trajectory.id}: expected at most {row_length} tokens and {max_chunks} chunks a row, "
                f"found {length} and {len(trajectory.chunks)}"
            )
    placed = _assign(lengths, chunks, row_length, max_chunks)
    used = 1 + max((row for row, _, _ in placed), default=-1)
    num_rows = max(-(-used // rows_multiple), 1) * rows_multiple
    tokens, positions, segment_ids = (np.zeros((num_rows, row_length), np.int32) for _ in range(3))
    chunk_ids = np.full((num_rows, row_length), -1, np.int32)
    behavior_logp = np.zeros((num_rows, row_length), np.float32)
    segments_in_row = [0] * num_rows
    places = []
    for trajectory, parts, length, (row, start, first) in zip(trajectories, segments, lengths, placed, strict=True):
        segments_in_row[row] += 1
        cells = slice(start, start + length)
        positions[row, cells] = np.arange(length)
        segment_ids[row, cells] = segments_in_row[row]
        at = start
        for index, part in parts:
            tokens[row, at : at + len(part)] = part
            if index >= 0 and (index >= trajectory.prefix_chunks or trajectory.prefix_chunks == len(trajectory.chunks)):
                chunk_ids[row, at : at + len(part)] = first + index
                behavior_logp[row, at : at + len(part)] = trajectory.chunks[index].behavior_logp
            at += len(part)
        places.append(Place(row, start, length, first, len(trajectory.chunks)))
    experts = None if routed is None else _packed_experts(trajectories, places, tokens.shape, routed)
    return PackedRows(tokens, positions, segment_ids, chunk_ids, behavior_logp, tuple(places), max_chunks, experts)


def _packed_experts(
    trajectories: Sequence[Trajectory], places: Sequence[Place], shape: tuple[int, ...], routed: tuple[int, int]
) -> np.ndarray:
    packed = np.full((*shape, *routed), -1, np.int16)
    for trajectory, place in zip(trajectories, places, strict=True):
        experts = trajectory.experts()
        if experts is None:
            continue
        if experts.shape[1:] != routed:
            raise PackingError(
                f"trajectory {trajectory.id}: expected {routed[1]} experts a token in {routed[0]} layers, "
                f"found {experts.shape[2]} in {experts.shape[1]}"
            )
        packed[place.row, place.start : place.start + place.length] = experts[: place.length]
    return packed

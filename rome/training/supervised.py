"""The supervised stages, CPT (copy exercises) and SFT (demonstrations), as one resumable loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rome.data import copy_exercises
from rome.ipa import sft_chunk_mask
from rome.models import SPECIAL_TOKENS
from rome.training.packing import pack_trajectories
from rome.training.settings import CopySettings, SupervisedSettings
from rome.training.state import TrainState
from rome.training.steps import SupervisedBatch
from rome.trajectory import Trajectory

BatchAt = Callable[[int], SupervisedBatch]


def copy_batches(
    settings: SupervisedSettings, copying: CopySettings, demonstrations: Sequence[Trajectory], seed: int
) -> BatchAt:
    """Step → batch of copy exercises over the tokens that the demonstrations use. A pure function of (seed, step)."""
    parts = [tokens for t in demonstrations for _, tokens in t.segments()]
    used = np.unique(np.concatenate(parts))
    vocabulary = used[used >= len(SPECIAL_TOKENS)].astype(np.int32)
    mask = np.ones((settings.rows, 1), bool)

    def batch(step: int) -> SupervisedBatch:
        rng = np.random.default_rng([seed, 1, step])
        arrays = copy_exercises(
            rng, settings.rows, settings.row_length, vocabulary, tuple(copying.context), tuple(copying.segment)
        )
        return SupervisedBatch(**arrays, chunk_mask=mask)

    return batch


def demonstration_batches(settings: SupervisedSettings, demonstrations: Sequence[Trajectory], seed: int) -> BatchAt:
    """Step → batch of packed demonstrations, each row once an epoch. A pure function of (seed, step)."""
    order = np.random.default_rng([seed, 2]).permutation(len(demonstrations))
    shuffled = [demonstrations[i] for i in order]
    max_chunks = max(8, settings.row_length // 4)
    rows = pack_trajectories(shuffled, settings.row_length, max_chunks, settings.rows)
    relevant = np.ones(1, bool)  # scripted experts' contexts are never compressed or emulated
    keep = [sft_chunk_mask(np.array([c.error for c in t.chunks]), relevant) for t in shuffled]
    mask = rows.table(keep, bool, False)
    epochs: dict[int, np.ndarray] = {}

    def row(index: int) -> int:
        epoch, position = divmod(index, rows.num_rows)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = np.random.default_rng([seed, 3, epoch]).permutation(rows.num_rows)
        return int(epochs[epoch][position])

    def batch(step: int) -> SupervisedBatch:
        chosen = np.array([row(step * settings.rows + i) for i in range(settings.rows)])
        return SupervisedBatch(
            rows.tokens[chosen],
            rows.positions[chosen],
            rows.segment_ids[chosen],
            rows.chunk_ids[chosen],
            mask[chosen],
        )

    return batch


def run_supervised(
    state: TrainState,
    start: int,
    settings: SupervisedSettings,
    batch_at: BatchAt,
    step_function: Callable[[TrainState, SupervisedBatch], tuple[TrainState, dict[str, jax.Array]]],
    on_metrics: Callable[[int, dict[str, float]], None],
    on_checkpoint: Callable[[int, TrainState], None],
    checkpoint_every: int,
) -> TrainState:
    """Updates `start` … `settings.steps`; step n is dispatched while n−1's metrics are still in flight."""
    for step in range(start, settings.steps):
        state, metrics = step_function(state, batch_at(step))
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            on_metrics(done, {name: float(value) for name, value in jax.device_get(metrics).items()})
        if done % checkpoint_every == 0 and done < settings.steps:
            on_checkpoint(done, state)
    return state

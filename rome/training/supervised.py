"""The supervised stages, CPT (copy exercises) and SFT (demonstrations), as one resumable loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rome.data import copy_exercises, relabel, relabelling
from rome.envs.families.words import WORDS
from rome.ipa import sft_chunk_mask
from rome.models import Renderer
from rome.training.packing import pack_trajectories
from rome.training.settings import CopySettings, SupervisedSettings
from rome.training.state import TrainState
from rome.training.steps import SupervisedBatch
from rome.trajectory import Trajectory

BatchAt = Callable[[int], SupervisedBatch]


def copy_batches(
    settings: SupervisedSettings,
    copying: CopySettings,
    demonstrations: Sequence[Trajectory],
    renderer: Renderer,
    seed: int,
) -> BatchAt:
    """Step → batch of copy exercises over the tokens that the demonstrations use. A pure function of (seed, step)."""
    parts = [tokens for t in demonstrations for _, tokens in t.segments()]
    used = np.unique(np.concatenate(parts))
    vocabulary = used[~np.isin(used, list(renderer.tokenizer.special.values()))].astype(np.int32)
    mask = np.ones((settings.rows, 1), bool)

    def batch(step: int) -> SupervisedBatch:
        rng = np.random.default_rng([seed, 1, step])
        arrays = copy_exercises(
            rng, settings.rows, settings.row_length, vocabulary, tuple(copying.context), tuple(copying.segment)
        )
        return SupervisedBatch(**arrays, chunk_mask=mask)

    return batch


def demonstration_batches(
    settings: SupervisedSettings, demonstrations: Sequence[Trajectory], renderer: Renderer, seed: int
) -> BatchAt:
    """Step → batch of packed demonstrations, their names and numbers drawn anew. A pure function of (seed, step).

    Each epoch takes the demonstrations in a new order; a batch takes `rows × row_length` tokens' worth of them, and
    leaves out what does not fit in its rows.
    """
    mean_tokens = sum(t.num_tokens for t in demonstrations) / len(demonstrations)
    count = max(1, int(settings.rows * settings.row_length / mean_tokens))
    max_chunks = max(8, settings.row_length // 4)
    relevant = np.ones(1, bool)  # scripted experts' contexts are never compressed or emulated
    orders: dict[int, np.ndarray] = {}

    def demonstration(index: int) -> Trajectory:
        epoch, position = divmod(index, len(demonstrations))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, 2, epoch]).permutation(len(demonstrations))
            orders.pop(epoch - 2, None)
        return demonstrations[int(orders[epoch][position])]

    def batch(step: int) -> SupervisedBatch:
        rng = np.random.default_rng([seed, 3, step])
        chosen = [relabel(demonstration(step * count + i), relabelling(rng, WORDS), renderer) for i in range(count)]
        rows = pack_trajectories(chosen, settings.row_length, max_chunks, settings.rows)
        keep = [sft_chunk_mask(np.array([c.error for c in t.chunks]), relevant) for t in chosen]
        arrays = (rows.tokens, rows.positions, rows.segment_ids, rows.chunk_ids, rows.table(keep, bool, False))
        return SupervisedBatch(*(array[: settings.rows] for array in arrays))

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

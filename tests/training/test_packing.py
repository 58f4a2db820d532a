from dataclasses import replace

import jax
import numpy as np
import pytest
from training_toys import SHALLOW, SHALLOW_MOE, params_of, tokens, trajectories, trajectory

from rome.ipa import ObjectiveConfig, PolicyBatch, policy_loss
from rome.models import token_log_probs
from rome.training.packing import PackedRows, PackingError, pack_trajectories
from rome.trajectory import Observation


def test_rows_hold_whole_trajectories_and_nothing_else():
    given = trajectories(0, 13)
    rows = pack_trajectories(given, 48, 8, rows_multiple=4)
    assert rows.num_rows % 4 == 0
    seen = np.zeros_like(rows.tokens, bool)
    for t, place in zip(given, rows.places, strict=True):
        cells = slice(place.start, place.start + place.length)
        parts = t.segments()
        assert place.length == sum(len(part) for _, part in parts)
        np.testing.assert_array_equal(rows.tokens[place.row, cells], np.concatenate([part for _, part in parts]))
        np.testing.assert_array_equal(rows.positions[place.row, cells], np.arange(place.length))
        expected = np.concatenate([np.full(len(p), place.first_chunk + k if k >= 0 else -1) for k, p in parts])
        np.testing.assert_array_equal(rows.chunk_ids[place.row, cells], expected)
        behavior = [t.chunks[k].behavior_logp if k >= 0 else np.zeros(len(p), np.float32) for k, p in parts]
        np.testing.assert_array_equal(rows.behavior_logp[place.row, cells], np.concatenate(behavior))
        assert len(set(rows.segment_ids[place.row, cells])) == 1
        assert not seen[place.row, cells].any()
        seen[place.row, cells] = True
    np.testing.assert_array_equal(seen, rows.segment_ids > 0)
    assert (rows.chunk_ids[~seen] == -1).all()
    assert not rows.tokens[~seen].any()
    assert rows.fill == seen.mean()
    for row in range(rows.num_rows):  # segments of a row are 1, 2, …; its chunks 0, 1, …
        inside = [place for place in rows.places if place.row == row]
        assert set(rows.segment_ids[row]) - {0} == set(range(1, len(inside) + 1))
        assert set(rows.chunk_ids[row]) - {-1} == set(range(sum(place.num_chunks for place in inside)))
    again = pack_trajectories(given, 48, 8, rows_multiple=4)
    assert again.places == rows.places


def test_packing_shares_rows_and_respects_both_limits():
    given = trajectories(1, 12)
    loose, tight = pack_trajectories(given, 64, 99), pack_trajectories(given, 64, 4)
    assert loose.num_rows < len(given)
    assert tight.num_rows > loose.num_rows
    for rows, limit in ((loose, 99), (tight, 4)):
        for row in range(rows.num_rows):
            inside = [place for place in rows.places if place.row == row]
            assert sum(place.num_chunks for place in inside) <= limit
            assert sum(place.length for place in inside) <= 64


def test_nothing_packs_into_empty_rows():
    rows = pack_trajectories([], 16, 4, rows_multiple=3)
    assert rows.tokens.shape == (3, 16)
    assert rows.fill == 0
    assert not rows.segment_ids.any()


def test_adjacent_chunks_stay_apart():
    rng = np.random.default_rng(0)
    t = trajectory(rng, "t", 1.0, 3)
    bare = trajectory(rng, "bare", 1.0, 3, observations=(Observation(tokens(rng, 0)), Observation(tokens(rng, 0))))
    rows = pack_trajectories([t, bare], 64, 8)
    place = rows.places[1]
    ids = rows.chunk_ids[place.row, place.start : place.start + place.length]
    sizes = [len(chunk.tokens) for chunk in bare.chunks]
    expected = np.repeat(np.arange(3) + place.first_chunk, sizes)
    np.testing.assert_array_equal(ids[len(bare.prompt.tokens) :], expected)


def test_what_follows_the_last_chunk_is_left_out():
    rng = np.random.default_rng(0)
    t = trajectory(rng, "t", 1.0, 2)
    longer = trajectory(rng, "u", 1.0, 1, observations=(Observation(tokens(rng, 9)),))
    rows = pack_trajectories([t, longer], 64, 8)
    assert rows.places[1].length == len(longer.prompt.tokens) + len(longer.chunks[0].tokens)


@pytest.mark.parametrize(("row_length", "max_chunks"), [(9, 8), (64, 2)])
def test_a_trajectory_that_fits_no_row_is_named(row_length, max_chunks):
    rng = np.random.default_rng(0)
    long = trajectory(rng, "the-long-one", 1.0, 3, prompt=Observation(tokens(rng, 7)))
    small = trajectory(rng, "small", 1.0, 1, prompt=Observation(tokens(rng, 1)))
    with pytest.raises(
        PackingError, match=rf"the-long-one: expected at most {row_length} tokens and {max_chunks} chunks"
    ):
        pack_trajectories([small, long], row_length, max_chunks)


def test_tables_take_scalars_and_longer_rows():
    given = trajectories(2, 5)
    rows = pack_trajectories(given, 64, 16)
    numbers = rows.table([np.arange(16) + 100 * i for i in range(5)], np.float32, fill=-1)
    flags = rows.table([i % 2 == 0 for i in range(5)], bool, False)
    for i, place in enumerate(rows.places):
        own = slice(place.first_chunk, place.first_chunk + place.num_chunks)
        np.testing.assert_array_equal(numbers[place.row, own], 100 * i + np.arange(place.num_chunks))
        assert (flags[place.row, own] == (i % 2 == 0)).all()
    assert (numbers >= 0).sum() == sum(len(t.chunks) for t in given)
    assert numbers.dtype == np.float32
    assert flags.dtype == bool


def test_per_chunk_mean_is_the_mean_over_each_chunks_tokens():
    given = trajectories(3, 7)
    rows = pack_trajectories(given, 48, 16)
    for t, means in zip(given, rows.per_chunk_mean(rows.behavior_logp), strict=True):
        np.testing.assert_allclose(means, [np.mean(c.behavior_logp.astype(float)) for c in t.chunks], rtol=1e-12)


def _batch(given, rows):
    returns = [np.linspace(-1, 1, len(t.chunks)) + i for i, t in enumerate(given)]
    return PolicyBatch(
        tokens=rows.tokens,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        chunk_ids=rows.chunk_ids,
        old_logp=rows.behavior_logp - 0.1,
        behavior_logp=rows.behavior_logp,
        returns=rows.table(returns, np.float32),
        positive=rows.table([t.succeeded for t in given], bool, False),
        imitation=rows.table([False] * len(given), bool, False),
    )


@pytest.mark.parametrize("model", [SHALLOW, SHALLOW_MOE], ids=["dense", "moe"])
def test_packed_and_unpacked_give_the_same_loss_and_gradient(model):
    """ipa.md, trap 2: on the real model, all in few rows against a row for each."""
    given = trajectories(4, 9)
    config = ObjectiveConfig(ratio_on="all")

    def loss(params, batch):
        logp, _ = token_log_probs(params, model, batch.tokens, batch.positions, batch.segment_ids)
        return policy_loss(logp, batch, config)[0]

    packed = pack_trajectories(given, 48, 16)
    half_packed = pack_trajectories(given, 48, 4)
    assert packed.num_rows < half_packed.num_rows < len(given)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params_of(model), _batch(given, _apart(given, 48, 16)))
    assert abs(value) > 0.1
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for rows in (packed, half_packed):
        again, other = jax.jit(jax.value_and_grad(loss))(params_of(model), _batch(given, rows))
        assert again == pytest.approx(float(value), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), other, gradient)


def _apart(given, row_length, max_chunks):
    """A row for each trajectory."""
    single = [pack_trajectories([t], row_length, max_chunks) for t in given]
    names = ("tokens", "positions", "segment_ids", "chunk_ids", "behavior_logp")
    arrays = {name: np.concatenate([getattr(rows, name) for rows in single]) for name in names}
    places = tuple(replace(rows.places[0], row=i) for i, rows in enumerate(single))
    return PackedRows(**arrays, places=places, max_chunks=max_chunks)

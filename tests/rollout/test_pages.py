"""A cache in pages: the same samples as with rows, prompts shared, nothing leaked, nobody starved."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from rollout_toys import (
    MODEL,
    VOCAB,
    Journal,
    ToyEnv,
    ToyRenderer,
    same_trajectory,
    toy_engine,
    toy_params,
    toy_requests,
)

from rome.models import init_params
from rome.models.paged import Paging
from rome.rollout import (
    BackgroundRollouts,
    Deadlines,
    DecodeEngine,
    EngineConfig,
    EngineError,
    RolloutConfig,
    RolloutRunner,
    SampleBuffer,
)
from rome.rollout.pages import Claim, PagePool
from rome.training.compilations import count_compilations

MIXED = dataclasses.replace(
    MODEL,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    num_experts_per_token=2,
    moe_intermediate_size=16,
    dense_layers=(0,),
    sliding_layers=(1,),
    sliding_window=11,
)
SHAPES = {"slots": 8, "cohorts": 2, "max_length": 96, "extend_buckets": (32,), "max_chunk_tokens": 10}


@cache
def mixed_params(seed=0):
    params = init_params(MIXED, jax.random.key(seed))
    return {**params, "lm_head": params["lm_head"] * 3}


def mixed_engine(**changes):
    settings = EngineConfig(**{**SHAPES, "record_experts": True, **changes})
    return DecodeEngine(mixed_params(), MIXED, settings, ToyRenderer.stop_ids, 0)


def play(engine, turns, temperature=None, group=3):
    """Slots in groups that start alike, `turns` chunks each; slot → (tokens, chunks), and the experts if recorded."""
    rng = np.random.default_rng(0)
    history, said = {}, {}
    for slot in range(engine.config.slots):
        if slot % group == 0:
            prompt = rng.integers(15, VOCAB, int(rng.integers(3, 40))).astype(np.int32)
        engine.insert(slot, slot * 7919 + 13)
        history[slot], said[slot] = prompt, []
    for _ in range(turns):
        for cohort in range(engine.config.cohorts):
            fed = {slot: history[slot][len(engine.processed(slot)) :] for slot in engine.cohort_slots(cohort)}
            for slot, chunk in engine.generate(cohort, fed, temperature).items():
                said[slot].append(chunk)
                history[slot] = np.concatenate([history[slot], chunk.tokens, [20, 21]]).astype(np.int32)
    return history, said, {s: engine.routed_experts(s) for s in history} if engine.config.record_experts else {}


def assert_same(one, other, atol=1e-5):
    for slot, (a, b) in enumerate(zip(one[0].values(), other[0].values(), strict=True)):
        np.testing.assert_array_equal(a, b)
        for x, y in zip(one[1][slot], other[1][slot], strict=True):
            np.testing.assert_allclose(x.behavior_logp, y.behavior_logp, atol=atol)
            np.testing.assert_allclose(x.raw_logp, y.raw_logp, atol=atol)
            assert (x.finish, x.versions.tolist()) == (y.finish, y.versions.tolist())
    for slot, experts in one[2].items():
        np.testing.assert_array_equal(experts, other[2][slot])


COUNTS = ("prefilled_tokens", "copied_tokens", "decoded_tokens", "processed_tokens", "padded_tokens")


@cache
def rows_play(temperature):
    engine = mixed_engine()
    return play(engine, 4, temperature), {name: getattr(engine.stats, name) for name in COUNTS}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pages_give_what_rows_give_and_nothing_compiles_after_warmup(temperature):
    """Experts, a sliding window, groups that share and slots that don't, chunks over the borders of pages that don't
    divide the length."""
    expected, counts = rows_play(temperature)
    engine = mixed_engine(page_size=7)
    engine.warmup()
    known = engine.compilations
    with count_compilations() as compiled:
        found = play(engine, 4, temperature)
    assert compiled.count == 0
    assert engine.compilations == known
    assert_same(found, expected)
    assert {name: getattr(engine.stats, name) for name in COUNTS} == counts


def test_a_group_shares_its_prompt_and_copies_its_last_page():
    engine = toy_engine(**SHAPES, page_size=8)
    prompt = np.arange(15, 15 + 20, dtype=np.int32)  # two full pages and half a one
    for slot in range(4):
        engine.insert(slot, slot)
    sampled = engine.generate(0, dict.fromkeys(range(4), prompt))
    stats, pool = engine.stats, engine._pools[0]
    assert (stats.prefilled_tokens, stats.copied_tokens) == (20, 60)
    assert (stats.pages_shared, stats.pages_copied) == (2, 3)
    own = sum(-(-(20 + len(chunk.tokens) - 1) // 8) - 2 for chunk in sampled.values())
    assert stats.pages_in_use == 2 + own == pool.in_use
    assert stats.pages_peak == 2 + 4 * 2  # room for ten tokens of each, before they were drawn
    assert (pool.table[:4, :2] == pool.table[0, :2]).all()
    assert len(set(pool.table[:4, 2])) == 4
    engine.free(0)
    engine.free(0)
    assert (engine.stats.pages_shared, pool.references[pool.table[1, 0]]) == (2, 3)
    for slot in range(1, 4):
        engine.free(slot)
    assert (stats.pages_in_use, stats.pages_shared) == (0, 0)
    assert (pool.references == 0).all()


def assert_sound(pool, lengths):
    """Every page has the rows that its count says, rows have the pages they need, and only whole pages are shared."""
    paging = pool.paging
    listed = pool.table[pool.table < paging.pages]
    np.testing.assert_array_equal(np.bincount(listed, minlength=paging.pages), pool.references)
    assert pool.in_use == len(set(listed.tolist()))
    for row, length in enumerate(lengths):
        held = pool.held[row]
        assert held == paging.of(length)
        assert (pool.table[row, :held] < paging.pages).all() and (pool.table[row, held:] == paging.pages).all()
        writable = pool.table[row, length // paging.size : held]
        assert (pool.references[writable] == 1).all()


def test_random_use_of_a_tight_pool_leaks_nothing_and_changes_no_token():
    """Slots come, speak and go in any order, in a pool of half the pages; beside it an engine with rows."""
    tight, rows = mixed_engine(page_size=7, pages=2 * 28), mixed_engine()
    rng = np.random.default_rng(5)
    prompts = [rng.integers(15, VOCAB, length).astype(np.int32) for length in (5, 14, 33)]
    history: dict[int, np.ndarray] = {}
    refused = 0
    for turn in range(60):
        for slot in range(8):
            if slot not in history and rng.random() < 0.7:
                history[slot] = prompts[rng.integers(3)]
                for engine in (tight, rows):
                    engine.insert(slot, 1000 * turn + slot)
        cohort = turn % 2
        fed = {
            slot: history[slot][len(tight.processed(slot)) :]
            for slot in tight.cohort_slots(cohort)
            if slot in history and rng.random() < 0.9
        }
        granted = tight.affordable(cohort, fed)
        refused += len(fed) - len(granted)
        if len(granted) < len(fed):
            with pytest.raises(EngineError, match="pages are scarce"):
                tight.generate(cohort, fed)
        found, expected = tight.generate(cohort, granted, 0.0), rows.generate(cohort, granted, 0.0)
        assert found.keys() == granted.keys()
        for slot, chunk in found.items():
            np.testing.assert_array_equal(chunk.tokens, expected[slot].tokens)
            np.testing.assert_allclose(chunk.raw_logp, expected[slot].raw_logp, atol=1e-5)
            more = rng.integers(15, VOCAB, rng.integers(1, 12))
            history[slot] = np.concatenate([history[slot], chunk.tokens, more]).astype(np.int32)
        for slot in [s for s in history if len(history[s]) >= 96 or rng.random() < 0.05]:
            del history[slot]
            for engine in (tight, rows):
                engine.free(slot)
        for each in range(2):
            slots = tight.cohort_slots(each)
            assert_sound(tight._pools[each], [len(tight.processed(slot)) for slot in slots])
    assert refused > 10
    assert tight.stats.pages_peak <= 2 * 28
    for slot in range(8):
        tight.free(slot)
    assert tight.stats.pages_in_use == 0


@pytest.mark.parametrize("seed", range(20))
def test_whoever_waits_for_pages_gets_them(seed):
    """Trajectories of any length, and pools from the least that there may be: somebody always goes on, and all end."""
    rng = np.random.default_rng(seed)
    rows, most, size = int(rng.integers(1, 9)), 64, int(rng.integers(1, 20))
    per_row = Paging(size, 0).of(most)
    pool = PagePool(rows, Paging(size, int(rng.integers(per_row, rows * per_row + 1))), most)
    lengths, ends = np.zeros(rows, int), np.zeros(rows, int)
    prompts, order, left = [np.zeros(0, np.int32)] * rows, [], 40
    for _ in range(2000):
        for row in np.flatnonzero(ends == 0)[:left].tolist():
            fresh_prompt = rng.integers(0, 9, rng.integers(1, 30)).astype(np.int32)
            # half of them are in the group of a neighbour, which may have begun already
            prompts[row] = prompts[row - 1] if rng.random() < 0.5 and len(prompts[row - 1]) else fresh_prompt
            ends[row], left = rng.integers(len(prompts[row]) + 1, most + 1), left - 1
            order = [*(other for other in order if other != row), row]
        ready = [row for row in order if ends[row]]
        if not ready:
            break
        added = {row: int(rng.integers(1, 8)) if lengths[row] else len(prompts[row]) for row in ready}
        upper = {row: min(most, int(lengths[row]) + added[row] + 9) for row in ready}
        claims = [Claim(row, upper[row], None if lengths[row] else prompts[row]) for row in ready]
        granted = pool.affordable(claims)
        assert granted
        assert pool.affordable([claim for claim in claims if claim.row in granted]) == granted
        groups: dict[bytes, list[int]] = {}
        for row in granted:
            if not lengths[row]:
                groups.setdefault(prompts[row].tobytes(), []).append(row)
        pool.place([*groups.values()], [len(prompts[group[0]]) for group in groups.values()], rows)
        for row in granted:
            pool.grow(row, upper[row])
            lengths[row] = rng.integers(min(lengths[row] + added[row], upper[row]), upper[row] + 1)
            if lengths[row] >= ends[row]:
                lengths[row] = ends[row] = 0
            pool.shrink(row, int(lengths[row]))
        assert_sound(pool, lengths)
    assert not ends.any() and left == 0 and pool.in_use == 0


def roll(engine, requests):
    deadlines = Deadlines(reset=60, step=60, verify=60, close=60)
    config = RolloutConfig(env_threads=4, deadlines=deadlines)
    with RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal()), config) as runner:
        return [t for group in runner.run(requests) for t in group]


def test_a_tight_pool_delays_trajectories_and_changes_none_of_them():
    """Bit for bit those of a pool that never refuses."""
    requests = toy_requests(groups=4, size=4, seed=2)
    # in the second, a cohort has room for one trajectory that reaches the end
    ample, tight = toy_engine(**SHAPES, page_size=8), toy_engine(**SHAPES, page_size=8, pages=2 * 12)
    expected, found = roll(ample, requests), roll(tight, requests)
    assert len(found) == 16
    assert all(same_trajectory(a, b) for a, b in zip(expected, found, strict=True))
    assert ample.stats.postponed == 0 < tight.stats.postponed
    assert tight.stats.pages_peak <= 24 < ample.stats.pages_peak
    assert tight.stats.pages_in_use == ample.stats.pages_in_use == 0


def test_free_running_rollouts_wait_for_pages_too():
    engine = toy_engine(**SHAPES, page_size=8, pages=2 * 12)
    deadlines = Deadlines(reset=60, step=60, verify=60, close=60)
    config = RolloutConfig(env_threads=4, deadlines=deadlines, gather_seconds=0.0)
    runner = RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal(jitter=0.005)), config)
    buffer = SampleBuffer(1.0, 4)
    with runner, BackgroundRollouts(runner, buffer, toy_requests(groups=8, size=4)):
        for _ in range(2):
            assert sum(map(len, buffer.get_batch(4, 0, timeout=120))) == 16
    assert engine.stats.postponed > 0
    assert engine.stats.pages_in_use == 0


def test_an_interrupted_turn_returns_all_pages(monkeypatch):
    engine = toy_engine(**SHAPES, page_size=8)
    prompt = np.arange(15, 35, dtype=np.int32)
    for slot in range(3):
        engine.insert(slot, slot)
    engine.insert(4, 4)
    other = engine.generate(1, {4: prompt})[4]
    real = engine._compiled.decode

    def interrupted(params, state, *rest):
        real(params, state, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._compiled, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(0, dict.fromkeys(range(3), prompt))
    monkeypatch.undo()
    assert engine._pools[0].in_use == 0
    assert engine._pools[1].in_use == Paging(8, 0).of(20 + len(other.tokens) - 1)  # the other cohort goes on
    engine.insert(0, 0)
    fresh = engine.generate(0, {0: prompt})[0]
    again = toy_engine(**SHAPES, page_size=8)
    again.insert(0, 0)
    np.testing.assert_array_equal(fresh.tokens, again.generate(0, {0: prompt})[0].tokens)


def test_a_turn_that_was_interrupted_before_it_began_can_be_asked_for_again(monkeypatch):
    engine = toy_engine(**SHAPES, page_size=8)
    prompt = np.arange(15, 35, dtype=np.int32)

    def interrupted():
        raise KeyboardInterrupt

    for slot in range(3):
        engine.insert(slot, slot)
    monkeypatch.setattr(engine, "_one_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(0, dict.fromkeys(range(3), prompt))
    monkeypatch.undo()
    engine.free(0)
    engine.generate(0, dict.fromkeys(range(1, 3), prompt))
    assert_sound(engine._pools[0], [len(engine.processed(slot)) for slot in range(4)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": -1}, "page_size: expected at least 0"),
        ({"pages": 4}, "pages: expected 0 with page_size 0"),
        ({"page_size": 8, "pages": 25}, "pages: expected 0, or a multiple of cohorts of at least 24"),
        ({"page_size": 8, "pages": 22}, "pages: expected 0, or a multiple of cohorts of at least 24"),
    ],
)
def test_pools_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(EngineError, match=message):
        EngineConfig(slots=4, cohorts=2, max_length=96, **changes)


def test_what_pages_cannot_do_is_refused():
    data, tensor = (jax.sharding.AbstractMesh((2,), (axis,)) for axis in ("data", "tensor"))
    settings = EngineConfig(slots=4, cohorts=2, page_size=8)
    for meshes in ((data,), (tensor, tensor)):
        with pytest.raises(NotImplementedError, match="page_size: expected 0 with several placements or a mesh that"):
            DecodeEngine(toy_params(), MODEL, settings, ToyRenderer.stop_ids, 0, meshes=meshes)

"""The engine samples what it says it samples, from the right distribution, once, and without recompiling."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_toys import END, MODEL, VOCAB, ToyRenderer, toy_engine, toy_params

from rome.models import forward, token_log_probs
from rome.rollout import DecodeEngine, EngineConfig, EngineError, Finish
from rome.rollout.sampling import sample_tokens

ROW = 96


def play(engine, slot_keys, turns, temperature=None, prompt_length=5, observation=(20, 21)):
    """Decodes `turns` chunks for each (slot, key); returns slot → (tokens, [(start, Sampled)])."""
    rng = np.random.default_rng(0)
    prompts = {key: rng.integers(15, VOCAB, prompt_length + key % 9).astype(np.int32) for key in range(64)}
    history = {}
    for slot, key in slot_keys.items():
        engine.insert(slot, key * 7919 + 13)
        history[slot] = (prompts[key], [])
    size = engine.config.slots_per_cohort
    for _ in range(turns):
        for cohort in range(engine.config.cohorts):
            deltas = {s: history[s][0][len(engine.processed(s)) :] for s in history if s // size == cohort}
            if not deltas:
                continue
            for slot, chunk in engine.generate(cohort, deltas, temperature).items():
                tokens, chunks = history[slot]
                chunks = [*chunks, (len(tokens), chunk)]
                history[slot] = np.concatenate([tokens, chunk.tokens, np.array(observation, np.int32)]), chunks
    return history


training_path = jax.jit(token_log_probs, static_argnums=1)
training_logits = jax.jit(forward, static_argnums=1)
sample = jax.jit(sample_tokens, static_argnums=(4, 5))


def as_row(tokens):
    """The tokens as one padded row: (tokens, positions, segment_ids), each int32[1, ROW]."""
    row = np.zeros((1, ROW), np.int32)
    row[0, : len(tokens)] = tokens
    return row, np.arange(ROW, dtype=np.int32)[None], (np.arange(ROW) < len(tokens)).astype(np.int32)[None]


def training_log_probs(tokens, temperature=1.0, params=None):
    logp, _ = training_path(params or toy_params(), MODEL, *as_row(tokens), temperature)
    return np.asarray(logp[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_training_path(temperature):
    engine = toy_engine(temperature=temperature)
    for tokens, chunks in play(engine, {0: 1, 1: 2, 2: 3, 3: 4}, turns=4).values():
        behavior, raw = training_log_probs(tokens, temperature), training_log_probs(tokens)
        assert len(chunks) == 4
        for start, chunk in chunks:
            span = slice(start, start + len(chunk.tokens))
            np.testing.assert_array_equal(tokens[span], chunk.tokens)
            np.testing.assert_allclose(chunk.behavior_logp, behavior[span], atol=1e-4)
            np.testing.assert_allclose(chunk.raw_logp, raw[span], atol=1e-4)
            if temperature != 1:
                assert np.abs(chunk.behavior_logp - chunk.raw_logp).max() > 1e-2


def test_greedy_takes_the_argmax_and_is_certain_of_it():
    for tokens, chunks in play(toy_engine(), {0: 1, 3: 2}, turns=3, temperature=0.0).values():
        best = np.asarray(training_logits(toy_params(), MODEL, *as_row(tokens))[0].argmax(-1))
        for start, chunk in chunks:
            np.testing.assert_array_equal(chunk.tokens, best[start - 1 : start - 1 + len(chunk.tokens)])
            assert (chunk.behavior_logp == 0).all()
            assert (chunk.raw_logp < 0).all()


def test_what_is_drawn_does_not_depend_on_slot_cohort_or_company():
    alone = play(toy_engine(), {0: 5}, turns=4)[0]
    crowd = play(toy_engine(slots=8, cohorts=1, extend_buckets=(4, 32)), {7: 5, 0: 6, 3: 8}, turns=4)[7]
    moved = play(toy_engine(slots=6, cohorts=3), {5: 5, 4: 9}, turns=4)[5]
    for other in (crowd, moved):
        np.testing.assert_array_equal(alone[0], other[0])
        for (_, a), (_, b) in zip(alone[1], other[1], strict=True):
            np.testing.assert_allclose(a.behavior_logp, b.behavior_logp, atol=1e-5)
    different = play(toy_engine(), {0: 6}, turns=4)[0]
    assert not np.array_equal(alone[0][-10:], different[0][-10:])


def test_the_same_calls_give_the_same_bits():
    first, second = (play(toy_engine(), {0: 1, 1: 2, 3: 4}, turns=4) for _ in range(2))
    for slot in first:
        for (_, a), (_, b) in zip(first[slot][1], second[slot][1], strict=True):
            assert a.tokens.tobytes() == b.tokens.tobytes()
            assert a.behavior_logp.tobytes() == b.behavior_logp.tobytes()


def test_versions_change_with_the_weights_and_so_do_the_log_probs():
    engine = toy_engine()
    engine.insert(0, 3)
    tokens = np.arange(15, 25, dtype=np.int32)
    before = engine.generate(0, {0: tokens})[0]
    engine.update_params(toy_params(1), version=4)
    tokens = np.concatenate([tokens, before.tokens, [30]]).astype(np.int32)
    after = engine.generate(0, {0: tokens[len(engine.processed(0)) :]})[0]
    assert (before.versions == 0).all()
    assert (after.versions == 4).all()
    # a slot that starts under the new weights has their log-probs exactly
    engine.insert(1, 3)
    fresh = engine.generate(0, {1: np.arange(15, 25, dtype=np.int32)})[1]
    row = np.concatenate([np.arange(15, 25), fresh.tokens]).astype(np.int32)
    np.testing.assert_allclose(fresh.raw_logp, training_log_probs(row, params=toy_params(1))[10 : len(row)], atol=1e-4)


def test_the_engine_keeps_its_own_copy_of_the_weights():
    engine, params = toy_engine(), jax.tree.map(jnp.copy, toy_params(1))
    engine.update_params(params, 1)
    jax.tree.map(lambda leaf: leaf.delete(), params)  # what a trainer that donates its state does
    engine.insert(0, 1)
    assert len(engine.generate(0, {0: np.array([20], np.int32)})[0].tokens) >= 1
    with pytest.raises(EngineError, match="version"):
        engine.update_params(toy_params(), 1)
    with pytest.raises(EngineError, match="params"):
        engine.update_params({**toy_params(), "lm_head": jnp.zeros((2, 2))}, 2)


def test_each_token_passes_through_the_model_once():
    engine = toy_engine()
    history = play(engine, {0: 1, 1: 2, 2: 3}, turns=4, prompt_length=20)
    given = sum(5 * 0 + len(tokens) - sum(len(c.tokens) for _, c in chunks) for tokens, chunks in history.values())
    unseen_observations = 2 * len(history)  # the ones after the last chunks were never fed
    sampled = sum(len(c.tokens) for _, chunks in history.values() for _, c in chunks)
    assert engine.stats.prefilled_tokens == given - unseen_observations
    assert engine.stats.decoded_tokens == sampled
    assert engine.stats.processed_tokens == sum(len(engine.processed(slot)) for slot in history)
    assert engine.stats.processed_tokens == given - unseen_observations + sampled - len(history)
    for slot, (tokens, _) in history.items():
        np.testing.assert_array_equal(engine.processed(slot), tokens[: len(engine.processed(slot))])


@pytest.mark.parametrize("length", [7, 40])
def test_a_groups_prompt_is_prefilled_once_and_copied(length):
    """Also when it is longer than the largest bucket, and when a turn has more prompts than are prefilled together."""
    engine = toy_engine(slots=8, cohorts=1, prompt_rows=2)
    prompts = [np.arange(15 + k, 15 + k + length, dtype=np.int32) for k in range(3)]
    history = {}
    for slot in range(8):
        engine.insert(slot, 100 + slot)
        history[slot] = prompts[slot % 3]
    sampled = engine.generate(0, history)
    assert engine.stats.prefilled_tokens == 3 * length
    assert engine.stats.copied_tokens == 5 * length
    assert engine.stats.processed_tokens == 3 * length + sum(len(c.tokens) - 1 for c in sampled.values())
    again = {s: np.concatenate([history[s], c.tokens, [20, 21]]).astype(np.int32) for s, c in sampled.items()}
    engine.free(7)
    engine.insert(7, 999)  # a newcomer among those that go on: the prompt of a copy, prefilled again
    again[7] = prompts[1]
    more = engine.generate(0, {slot: tokens[len(engine.processed(slot)) :] for slot, tokens in again.items()})
    assert engine.stats.prefilled_tokens == 3 * length + length + 7 * 2
    assert engine.stats.copied_tokens == 5 * length
    assert len({chunk.tokens.tobytes() for chunk in sampled.values()}) > 3  # samples of one prompt differ
    for slot, tokens in again.items():
        row = np.concatenate([tokens, more[slot].tokens]).astype(np.int32)
        expected = training_log_probs(row)
        if slot != 7:
            span = slice(length, length + len(sampled[slot].tokens))
            np.testing.assert_allclose(sampled[slot].behavior_logp, expected[span], atol=1e-4)
        np.testing.assert_allclose(more[slot].behavior_logp, expected[len(tokens) : len(row)], atol=1e-4)
        assert engine.processed(slot).tobytes() == row[:-1].tobytes()


def test_chunks_end_at_a_stop_id_at_their_limit_or_with_the_context():
    engine = toy_engine(max_length=24, max_chunk_tokens=5)
    finishes = set()
    for key in range(40):
        slot = key % 2
        engine.free(slot)
        engine.insert(slot, key)
        prompt = np.full(8 if key % 2 else 21, 15 + key % 40, np.int32)
        chunk = engine.generate(0, {slot: prompt})[slot]
        ends = chunk.tokens[-1] in ToyRenderer.stop_ids
        assert not np.isin(chunk.tokens[:-1], list(ToyRenderer.stop_ids)).any()
        assert ends == (chunk.finish is Finish.STOP)
        if chunk.finish is Finish.LENGTH:
            assert len(chunk.tokens) == 5
        if chunk.finish is Finish.CONTEXT:
            assert len(prompt) + len(chunk.tokens) == 24
        finishes.add(chunk.finish)
    assert finishes == set(Finish)


def test_nothing_compiles_after_warmup():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    engine = toy_engine(max_chunk_tokens=11, prompt_rows=1)  # nobody else's shapes
    engine.warmup()
    assert engine.compilations == 5  # two buckets, the prompts, their copy, the decode loop
    assert compiled
    other = jax.tree.map(jnp.copy, toy_params(1))
    compiled.clear()
    play(engine, {0: 1, 1: 2, 3: 4}, turns=2, prompt_length=30)  # over the largest bucket: several appends
    engine.update_params(other, 1)
    for slot in (0, 1, 3):
        engine.free(slot)
    play(engine, {0: 3}, turns=2, temperature=0.5)
    assert compiled == []
    assert engine.compilations == 5


def test_a_key_for_every_position_and_every_trajectory():
    logits = jnp.zeros((3, VOCAB))
    keys = np.array([[0, 1], [0, 1], [1, 0]], np.uint32)

    def draw(positions):
        return np.asarray(sample(logits, keys, jnp.array(positions), jnp.float32(1), 0, 1.0)[0])

    a = np.array([draw([p, p, p]) for p in range(30)])
    assert (a[:, 0] == a[:, 1]).all()
    assert (a[:, 0] != a[:, 2]).sum() > 20
    assert len(set(a[:, 0])) > 10


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (5, 1.0, 1.0), (0, 0.8, 0.9), (7, 0.7, 1.3)]
)
def test_tokens_follow_the_declared_distribution(top_k, top_p, temperature):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=12) * 1.5
    expected = truncated_softmax(logits, top_k, top_p, temperature)
    draws = 20000
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 12))
    keys = np.stack([np.zeros(draws), np.full(draws, 7)], 1).astype(np.uint32)
    tokens, logp, raw = map(np.asarray, sample(batch, keys, jnp.arange(draws), jnp.float32(temperature), top_k, top_p))
    observed = np.bincount(tokens, minlength=12) / draws
    assert (observed[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = draws * ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < 40  # 11 degrees of freedom or fewer: p < 4e-5
    np.testing.assert_allclose(logp, np.log(expected[tokens]), atol=1e-5)
    plain = truncated_softmax(logits, 0, 1.0, 1.0)
    np.testing.assert_allclose(raw, np.log(plain[tokens]), atol=1e-5)


def truncated_softmax(logits, top_k, top_p, temperature):
    p = np.exp(logits / temperature)
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    mass = p[kept] / p[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(mass), top_p - 1e-9)) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slots", 3),
        ("cohorts", 0),
        ("max_length", 1),
        ("extend_buckets", (8, 4)),
        ("extend_buckets", ()),
        ("prompt_rows", 0),
        ("max_chunk_tokens", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.0),
    ],
)
def test_configs_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(EngineError, match=field):
        EngineConfig(**{"slots": 4, "cohorts": 2, field: value})


def test_requests_that_make_no_sense_are_refused():
    engine = toy_engine()
    with pytest.raises(EngineError, match="slot 0: expected an inserted one"):
        engine.generate(0, {0: np.array([20], np.int32)})
    engine.insert(0, 1)
    with pytest.raises(EngineError, match="slot 0: expected a free one"):
        engine.insert(0, 1)
    with pytest.raises(EngineError, match="cohort 1"):
        engine.generate(1, {0: np.array([20], np.int32)})
    for bad in (np.zeros(0, np.int32), np.full(96, 20, np.int32)):
        with pytest.raises(EngineError, match=r"delta of 1\.\.95 tokens"):
            engine.generate(0, {0: bad})
    with pytest.raises(EngineError, match="warmup"):
        engine.warmup()
    with pytest.raises(EngineError, match="stop_ids"):
        DecodeEngine(toy_params(), MODEL, EngineConfig(), frozenset({VOCAB}), 0)
    with pytest.raises(EngineError, match="top_k"):
        DecodeEngine(toy_params(), MODEL, EngineConfig(top_k=VOCAB + 1), frozenset({END}), 0)


def test_an_interrupted_turn_leaves_a_usable_engine(monkeypatch):
    engine = toy_engine()
    engine.insert(0, 1)
    real = engine._compiled.decode

    def interrupted(params, state, *rest):
        real(params, state, *rest)  # donates the state, like a Ctrl-C during the wait
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._compiled, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(0, {0: np.array([20], np.int32)})
    monkeypatch.undo()
    engine.insert(0, 1)
    assert len(engine.generate(0, {0: np.array([20], np.int32)})[0].tokens) >= 1

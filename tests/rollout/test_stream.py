"""The service's engine: rows with distributions of their own, against numpy and against the training path."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_toys import MODEL, VOCAB, ToyRenderer, finish_stream, joined, toy_engine, toy_params

from rome.models import forward
from rome.rollout import EngineError
from rome.rollout.sampling import RowSampling, sample_rows, sample_tokens
from rome.rollout.stream import Sampling, StreamConfig, StreamEngine

rows_of = jax.jit(sample_rows)
LENGTH = 64
logits_of = jax.jit(forward, static_argnums=1)


def stream(**changes) -> StreamEngine:
    settings = {"slots": 4, "max_length": LENGTH, "extend_buckets": (4, 16), "burst": 3, "alternatives": 5, **changes}
    return StreamEngine(toy_params(), MODEL, StreamConfig(**settings), ToyRenderer.stop_ids, pad_id=0)


def oracle(logits, temperature, top_k, top_p, min_p):
    """float64[V]: temperature, then top-k, then top-p, then min-p, each on what the one before it left."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    if top_k:
        p[np.argsort(-p, kind="stable")[top_k:]] = 0
        p /= p.sum()
    order = np.argsort(-p, kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-7)) + 1
    p[order[count:]] = 0
    p[p < min_p * p.max() * (1 - 1e-7)] = 0
    return p / p.sum()


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (0.9, 0, 1.0, 0.2),
    (1.7, 20, 0.9, 0.05),
    (1.0, 1, 1.0, 0.0),
]


def test_every_row_follows_its_own_distribution():
    draws, vocab = 4000, 37
    logits = np.random.default_rng(3).normal(size=vocab).astype(np.float32) * 2
    columns = [np.repeat(np.array(column), draws) for column in zip(*SETTINGS, strict=True)]
    keys = np.stack([np.zeros(len(columns[0])), np.repeat(np.arange(len(SETTINGS)), draws)], 1).astype(np.uint32)
    rows = RowSampling(
        keys, *(c.astype(t) for c, t in zip(columns, (np.float32, np.int32, np.float32, np.float32), strict=True))
    )
    positions = np.tile(np.arange(draws, dtype=np.int32), len(SETTINGS))
    tokens, logp, raw = map(np.asarray, rows_of(jnp.broadcast_to(logits, (len(keys), vocab)), rows, positions))
    plain = oracle(logits, 1.0, 0, 1.0, 0.0)
    for index, setting in enumerate(SETTINGS):
        expected, span = oracle(logits, *setting), slice(index * draws, (index + 1) * draws)
        observed = np.bincount(tokens[span], minlength=vocab) / draws
        assert (observed[expected == 0] == 0).all(), setting
        kept = expected > 0
        degrees = kept.sum() - 1
        chi2 = draws * ((observed - expected)[kept] ** 2 / expected[kept]).sum()
        assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 15, setting
        np.testing.assert_allclose(logp[span], np.log(expected[tokens[span]]), atol=1e-5)
        np.testing.assert_allclose(raw[span], np.log(plain[tokens[span]]), atol=1e-5)


def test_the_static_path_has_the_same_min_p():
    logits = np.random.default_rng(5).normal(size=(300, 37)).astype(np.float32) * 2
    keys = np.zeros((300, 2), np.uint32)
    static = jax.jit(sample_tokens, static_argnums=(4, 5, 6))
    tokens, logp, _ = map(np.asarray, static(logits, keys, jnp.arange(300), jnp.float32(0.8), 9, 0.9, 0.1))
    expected = np.array([oracle(row, 0.8, 9, 0.9, 0.1)[token] for row, token in zip(logits, tokens, strict=True)])
    np.testing.assert_allclose(logp, np.log(expected), atol=1e-5)


def test_mixed_requests_that_come_and_go_match_the_training_path():
    engine = stream()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(15, VOCAB, n).astype(np.int32) for n in (3, 21, 8, 30, 5, 12)]
    kinds = [(0.0, 0, 1.0, 0.0), *SETTINGS[:5]]
    wanted = [Sampling(100 + i, 20, t, k, p, m, alternatives=i % 2 == 0) for i, (t, k, p, m) in enumerate(kinds)]
    queue, running, done = list(range(6)), {}, {}
    while queue or running:
        while queue and engine.free_slots:
            request = queue.pop(0)
            running[engine.start(prompts[request], wanted[request])] = request
        for slot, burst in engine.advance().items():
            done.setdefault(running[slot], []).append(burst)
            if burst.finish is not None:
                engine.free(slot)
                del running[slot]
    for request, bursts in done.items():
        tokens, prompt, s = joined(bursts, "tokens"), prompts[request], wanted[request]
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(prompt) + len(tokens)] = np.concatenate([prompt, tokens])
        segments = (np.arange(LENGTH) < len(prompt) + len(tokens)).astype(np.int32)[None]
        logits = np.asarray(logits_of(toy_params(), MODEL, row, np.arange(LENGTH, dtype=np.int32)[None], segments))[0]
        logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
        raw = np.log([oracle(row, 1.0, 0, 1.0, 0.0)[t] for row, t in zip(logits, tokens, strict=True)])
        np.testing.assert_allclose(joined(bursts, "raw_logp"), raw, atol=1e-4)
        if s.temperature == 0:
            np.testing.assert_array_equal(tokens, logits.argmax(-1))
            assert (joined(bursts, "behavior_logp") == 0).all()
        else:
            drawn = [
                oracle(row, s.temperature, s.top_k, s.top_p, s.min_p)[t] for row, t in zip(logits, tokens, strict=True)
            ]
            np.testing.assert_allclose(joined(bursts, "behavior_logp"), np.log(drawn), atol=1e-4)
        if s.alternatives:
            np.testing.assert_array_equal(joined(bursts, "top_ids"), np.argsort(-logits, kind="stable")[:, :5])
        stopped = tokens[-1] in ToyRenderer.stop_ids
        assert bursts[-1].finish == ("stop" if stopped else "length")
        assert stopped or len(tokens) == 20


def test_without_truncation_it_draws_what_the_training_engine_draws():
    prompt = np.arange(20, 31, dtype=np.int32)
    trainer = toy_engine(max_length=LENGTH, max_chunk_tokens=10)
    trainer.insert(0, 77)
    expected = trainer.generate(0, {0: prompt})[0]
    engine = stream()
    slot = engine.start(prompt, Sampling(77, 10))
    bursts = finish_stream(engine, [slot])[slot]
    np.testing.assert_array_equal(joined(bursts, "tokens"), expected.tokens)
    np.testing.assert_allclose(joined(bursts, "behavior_logp"), expected.behavior_logp, atol=1e-5)


def test_a_prefix_is_prefilled_once_and_new_weights_forget_it():
    engine = stream()
    prompt = np.arange(15, 55, dtype=np.int32)
    first = engine.start(prompt, Sampling(1, 4))
    answer = joined(finish_stream(engine, [first])[first], "tokens")
    assert engine.stats.prefilled_tokens == 40
    longer = np.concatenate([prompt, answer, [20, 21, 22]]).astype(np.int32)
    second = engine.start(longer, Sampling(2, 4))  # the conversation goes on, in the same slot
    assert second == first
    assert engine.stats.reused_tokens == 40 + len(answer) - 1
    neighbour = engine.start(longer[:40], Sampling(1, 4))  # copied from the busy slot; only the last token is new
    assert engine.stats.reused_tokens == 40 + len(answer) - 1 + 39
    bursts = finish_stream(engine, [second, neighbour])
    np.testing.assert_array_equal(joined(bursts[neighbour], "tokens"), answer)
    before = engine.stats.reused_tokens
    engine.update_params(toy_params(1), 1)
    third = engine.start(prompt, Sampling(1, 4))
    assert engine.stats.reused_tokens == before
    assert {burst.version for burst in finish_stream(engine, [third])[third]} == {1}
    # a request in flight goes on under the new weights, and each of its tokens says under which it was drawn
    fourth = engine.start(prompt, Sampling(3, 12, 0.0))
    early = engine.advance()[fourth]
    assert early.finish is None
    engine.update_params(toy_params(2), 2)
    assert (early.version, {burst.version for burst in finish_stream(engine, [fourth])[fourth]}) == (1, {2})


def test_forgetting_makes_an_engine_as_good_as_new():
    def sampled(engine):
        slot = engine.start(np.arange(20, 50, dtype=np.int32), Sampling(seed=5, max_tokens=6))
        return slot, joined(finish_stream(engine, [slot])[slot], "behavior_logp").tobytes()

    fresh, used = stream(), stream()
    busy = used.start(np.arange(20, 50, dtype=np.int32), Sampling(seed=9, max_tokens=2))
    with pytest.raises(EngineError, match="forget: expected no slot in use"):
        used.forget()
    finish_stream(used, [busy])
    used.forget()
    assert sampled(used) == sampled(fresh)
    assert used.stats.reused_tokens == 0


def test_nothing_compiles_after_warmup():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    engine = stream(slots=3, burst=2)  # nobody else's shapes
    engine.warmup()
    assert engine.compilations == 5  # two buckets, the placing, bursts with and without alternatives
    assert compiled
    compiled.clear()
    slots = [
        engine.start(np.arange(15, 15 + 7 * (i + 1), dtype=np.int32), Sampling(i, 9, t, k, p, m, i == 1))
        for i, (t, k, p, m) in enumerate(SETTINGS[:3])
    ]
    finish_stream(engine, slots)
    assert compiled == []


def test_what_makes_no_sense_is_refused_by_name():
    for field, value in [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("min_p", 1.0), ("max_tokens", 0)]:
        with pytest.raises(EngineError, match=field):
            Sampling(**{"seed": 0, "max_tokens": 1, field: value})
    for field, value in [("slots", 0), ("max_length", 1), ("extend_buckets", ()), ("burst", 0), ("alternatives", 0)]:
        with pytest.raises(EngineError, match=field):
            StreamConfig(**{field: value})
    engine = stream(slots=1)
    with pytest.raises(EngineError, match="prompt"):
        engine.start(np.full(LENGTH, 20), Sampling(0, 1))
    engine.start(np.array([20]), Sampling(0, 1))
    with pytest.raises(EngineError, match="slots"):
        engine.start(np.array([20]), Sampling(0, 1))

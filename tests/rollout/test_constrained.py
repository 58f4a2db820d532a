"""Constrained rows draw from what their mask leaves, beside rows that are free; grammars in our own chat format."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_toys import MODEL, finish_stream, joined

from rome.models import ChatRenderer, forward, init_params, train_tokenizer
from rome.rollout.grammar import GrammarCompiler, GrammarError, GrammarUnavailable, json_grammar
from rome.rollout.sampling import RowSampling, sample_rows
from rome.rollout.service.app import ServiceConfig, _Service
from rome.rollout.service.chats import RomeChat
from rome.rollout.service.errors import ServiceError
from rome.rollout.service.protocol import ChatRequest, ToolSpec
from rome.rollout.stream import Sampling, StreamConfig, StreamEngine

LENGTH = 64
TOKENIZER = train_tokenizer(["list the files"], 280)
CHAT = RomeChat(ChatRenderer(TOKENIZER))
POLICY = dataclasses.replace(MODEL, vocab_size=TOKENIZER.vocab_size)
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
SHELL = {"type": "function", "function": {"name": "sh", "parameters": PARAMETERS}}
logits_of = jax.jit(forward, static_argnums=1)


def bits(allowed: np.ndarray) -> np.ndarray:
    """bool[V] as int32 words."""
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view(np.int32)


def test_masked_rows_draw_from_what_is_left_and_others_as_ever():
    rng = np.random.default_rng(0)
    count, vocab = 600, 75
    logits = np.tile(rng.normal(size=vocab).astype(np.float32) * 2, (count, 1))
    allowed = rng.random(vocab) < 0.3
    keys = np.stack([np.zeros(count), np.arange(count)], 1).astype(np.uint32)
    kinds = np.arange(count) % 3  # greedy, plain, truncated
    temperature = np.array([0.0, 1.0, 0.7], np.float32)[kinds]
    top_k, top_p = np.array([0, 0, 9], np.int32)[kinds], np.array([1, 1, 0.9], np.float32)[kinds]
    constrained = np.arange(count) % 2 == 0
    masks = np.where(constrained[:, None], bits(allowed), 0)
    both = RowSampling(keys, temperature, top_k, top_p, np.zeros(count, np.float32), constrained, masks)
    free = both._replace(constrained=np.zeros(count, bool))
    positions = np.zeros(count, np.int32)
    rows_of = jax.jit(sample_rows)
    tokens, logp, raw = map(np.asarray, rows_of(logits, both, positions))
    plain = [np.asarray(x) for x in rows_of(logits, free, positions)]
    for found, expected in zip((tokens, logp, raw), plain, strict=True):
        np.testing.assert_array_equal(found[~constrained], expected[~constrained])
    assert allowed[tokens[constrained]].all() and not allowed[tokens[~constrained]].all()
    left = np.where(allowed, logits[0], -np.inf)
    assert set(tokens[constrained & (kinds == 0)]) == {int(left.argmax())}
    log_softmax = lambda x: x - np.log(np.exp(x - x.max()).sum()) - x.max()  # noqa: E731
    drawn = constrained & (kinds == 1)
    np.testing.assert_allclose(logp[drawn], log_softmax(left)[tokens[drawn]], atol=1e-5)
    np.testing.assert_allclose(raw, log_softmax(logits[0])[tokens], atol=1e-5)
    assert len(set(tokens[drawn])) > 5


class Alternating:
    """Even tokens, then odd ones, then an end."""

    def __init__(self, end: int, size: int) -> None:
        self.taken, self.end, self.size = [], end, size

    def mask(self) -> np.ndarray:
        if len(self.taken) == self.size:
            return bits(np.arange(POLICY.vocab_size) == self.end)
        return bits((np.arange(POLICY.vocab_size) % 2 == len(self.taken) % 2) & (np.arange(POLICY.vocab_size) > 10))

    def accept(self, token: int) -> None:
        self.taken.append(int(token))


class Broken(Alternating):
    def mask(self) -> np.ndarray:
        if len(self.taken) == 2:
            raise GrammarError("too complex")
        return super().mask()


@pytest.fixture(scope="module")
def engine() -> StreamEngine:
    params = init_params(POLICY, jax.random.key(0))
    params = {**params, "lm_head": params["lm_head"] * 4}
    return StreamEngine(params, POLICY, StreamConfig(3, LENGTH, (16,)), CHAT.stop_ids, 0)


def test_a_constrained_slot_goes_token_by_token_beside_free_ones(engine):
    prompt, (end, *_) = np.arange(20, 32, dtype=np.int32), sorted(CHAT.stop_ids)
    alone = engine.start(prompt, Sampling(5, 30))
    expected = joined(finish_stream(engine, [alone])[alone], "tokens")
    compiled = engine.compilations
    slots = [
        engine.start(prompt, Sampling(5, 30)),
        engine.start(prompt, Sampling(6, 30), Alternating(end, 9)),
        engine.start(prompt, Sampling(7, 30), Broken(end, 9)),
    ]
    bursts = finish_stream(engine, slots)
    free, strict, broken = (bursts[slot] for slot in slots)
    assert engine.compilations == compiled
    np.testing.assert_array_equal(joined(free, "tokens"), expected)
    tokens = joined(strict, "tokens")
    assert [len(b.tokens) for b in strict] == [1] * 10 and strict[-1].finish == "stop"
    assert (tokens[:9] % 2 == np.arange(9) % 2).all() and tokens[9] == end
    assert ([len(b.tokens) for b in broken], broken[-1].finish) == ([1, 1, 0], "grammar")
    row = np.zeros((1, LENGTH), np.int32)
    row[0, :22] = [*prompt, *tokens]
    segments = (np.arange(LENGTH) < 22).astype(np.int32)[None]
    logits = np.asarray(logits_of(engine._weights[0], POLICY, row, np.arange(LENGTH, dtype=np.int32)[None], segments))
    raw = np.asarray(jax.nn.log_softmax(logits[0, 11:21]))
    np.testing.assert_allclose(joined(strict, "raw_logp"), raw[np.arange(10), tokens], atol=1e-4)
    walk, behavior = Alternating(end, 9), joined(strict, "behavior_logp")
    for step, token in enumerate(tokens):
        left = np.unpackbits(walk.mask().view(np.uint8), bitorder="little")[: POLICY.vocab_size] == 1
        masked = np.asarray(jax.nn.log_softmax(jnp.where(left, raw[step], -jnp.inf)))
        np.testing.assert_allclose(behavior[step], masked[token], atol=1e-4)
        walk.accept(token)


def test_a_forced_call_in_our_own_format_is_a_command_between_its_tokens(engine):
    pytest.importorskip("llguidance")
    tools = [ToolSpec.model_validate(SHELL)]
    grammar = GrammarCompiler(CHAT.vocabulary()).compile(CHAT.call_grammar(dict(enumerate(tools))))
    prompt, said = np.array(CHAT.encode("go on"), np.int32), set()
    for seed in range(3):
        slot = engine.start(prompt, Sampling(seed, LENGTH, temperature=2.0), grammar.begin())
        bursts = finish_stream(engine, [slot])[slot]
        tokens = joined(bursts, "tokens")
        assert tokens[0] == TOKENIZER.special["<tool_call>"]
        assert not set(tokens[1:-1].tolist()) & set(TOKENIZER.special.values())
        if bursts[-1].finish == "stop":
            answer = CHAT.answer(tokens, "", tools)
            assert [name for name, _ in answer.calls] == ["sh"]
        said.add(tokens.tobytes())
    assert len(said) == 3
    pattern = {**PARAMETERS, "properties": {"command": {"type": "string", "pattern": "^ls"}}}
    narrow = ToolSpec.model_validate({"type": "function", "function": {"name": "sh", "parameters": pattern}})
    with pytest.raises(ServiceError, match=r"tools\.0\.function\.parameters\.properties\.command"):
        CHAT.call_grammar({0: narrow})


def test_a_grammar_that_is_none_says_what_is_wrong():
    pytest.importorskip("llguidance")
    compiler = GrammarCompiler(CHAT.vocabulary())
    with pytest.raises(GrammarError, match="no token that ends"):
        GrammarCompiler(CHAT.vocabulary()._replace(ends=frozenset()))
    with pytest.raises(GrammarError, match="banana"):
        compiler.compile(json_grammar({"type": "banana"}))
    with pytest.raises(GrammarError):
        compiler.compile("start: nothing_of_that_name")
    constraint = compiler.compile(json_grammar({"const": "a"})).begin()
    for token in TOKENIZER.encode('"a"'):
        assert constraint.mask()[token // 32] >> token % 32 & 1
        constraint.accept(token)
    ends = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
    assert ends.tolist() == [TOKENIZER.special["<|im_end|>"]]


def test_without_the_library_a_constrained_request_says_which_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # what an import of a missing package meets
    with pytest.raises(GrammarUnavailable, match=r"rome-agents\[constrained\]"):
        GrammarCompiler(CHAT.vocabulary())
    messages = [{"role": "user", "content": "hi"}]
    asked = ChatRequest.model_validate({"model": "m", "messages": messages, "response_format": {"type": "json_object"}})
    service = _Service(None, CHAT, ServiceConfig("m"))
    with pytest.raises(ServiceError, match=r"response_format: .*rome-agents\[constrained\]") as refused:
        service._grammar(asked)
    assert (refused.value.status, refused.value.code) == (400, "not_installed")

"""Tokenizer and renderer: nothing is lost, nothing in text is special, pieces concatenate."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.models import (
    SPECIAL_TOKENS,
    ChatRenderer,
    Message,
    ParsedChunk,
    RenderError,
    Tokenizer,
    TokenizerError,
    train_tokenizer,
)

CORPUS = [
    "cat cedar.txt\nnext: birch.txt",
    "grep -c maple notes.log >> answer.txt",
    "Follow the hints from cedar.txt and write the code 4821 to answer.txt.",
    "mv birch.txt cedar/ && ls -la\n[exit 1]",
    "café naïve 数据 Привет",
] * 4

TOKENIZER = train_tokenizer(CORPUS, 420)
ISOLATED = train_tokenizer(CORPUS, 420, split="isolated")
RENDERER = ChatRenderer(TOKENIZER)
SPECIAL_IDS = set(TOKENIZER.special.values())

pieces = st.sampled_from([*SPECIAL_TOKENS, "<tool_call", "</", "cat ", "\n", "\x00", "\r\n", "'", " ", "é", "12345"])
texts = st.one_of(st.text(), st.lists(st.one_of(pieces, st.text(max_size=5))).map("".join))
any_texts = st.one_of(texts, st.text(st.characters(codec=None)))  # lone surrogates too


@settings(deadline=None)
@given(texts)
def test_text_is_lossless_and_never_special(text):
    for tokenizer in (TOKENIZER, ISOLATED):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not SPECIAL_IDS & set(ids)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)


@settings(deadline=None)
@given(st.binary())
def test_bytes_are_lossless(data):
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(data)) == data
    assert TOKENIZER.decode(TOKENIZER.encode(data.decode("latin-1"))) == data.decode("latin-1")
    escaped = data.decode("utf-8", "surrogateescape")
    assert TOKENIZER.decode_bytes(TOKENIZER.encode(escaped)) == data


@settings(deadline=None)
@given(any_texts)
def test_encode_never_raises(text):
    assert not SPECIAL_IDS & set(TOKENIZER.encode(text))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ISOLATED], ids=["words", "isolated"])
def test_digits_are_split_and_merges_were_learned(tokenizer):
    digits = tokenizer.encode("4821")
    assert [tokenizer.decode([index]) for index in digits] == ["4", "8", "2", "1"]
    assert len(tokenizer.encode("answer")) < len("answer")
    assert 267 < tokenizer.vocab_size <= 420


def test_isolated_words_are_the_same_tokens_everywhere():
    word = ISOLATED.encode("cedar")
    assert ISOLATED.encode("mv birch/cedar.txt")[-len(word) - 2 : -2] == word
    assert ISOLATED.encode(" cedar")[1:] == word
    assert TOKENIZER.encode(" cedar")[-len(word) :] != word


def test_special_tokens_are_the_declared_ones():
    assert TOKENIZER.pad_id == 0
    assert list(TOKENIZER.special) == list(SPECIAL_TOKENS)
    assert sorted(SPECIAL_IDS) == list(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.decode([TOKENIZER.special["<tool_call>"], *TOKENIZER.encode("ls")]) == "<tool_call>ls"


def test_save_and_load_keep_every_id(tmp_path):
    TOKENIZER.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    text = "cat cedar.txt <|im_end|> 99 \x00 数据"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert (loaded.vocab_size, loaded.special) == (TOKENIZER.vocab_size, TOKENIZER.special)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic_across_processes(tmp_path):
    TOKENIZER.save(tmp_path / "here")
    script = (
        "import json, sys; from rome.models import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), 420).save(sys.argv[2])"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", script, json.dumps(CORPUS), str(tmp_path / name)], check=True, timeout=60)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (tmp_path / "here/tokenizer.json").read_bytes()


def test_broken_files_raise_typed_errors_that_name_them(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for cut in [0, 1, 17, len(whole) // 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    document = json.loads(whole)
    vocabulary = document["bpe"]["model"]["vocab"]
    gap = {piece: index + (index > 100) for piece, index in vocabulary.items()}
    no_merges = {**document["bpe"]["model"], "vocab": dict(list(vocabulary.items())[:50]), "merges": []}
    for broken in (
        [],
        {"format": "other"},
        {**document, "version": 99},
        {**document, "special_tokens": ["<a>"]},
        {**document, "bpe": None},
        {**document, "bpe": {**document["bpe"], "model": {**document["bpe"]["model"], "vocab": gap}}},
        {**document, "bpe": {**document["bpe"], "model": no_merges}},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(TokenizerError):
            Tokenizer.load(tmp_path)
    path.write_bytes(bytes(byte ^ 0xFF for byte in whole))
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path)


def test_bad_arguments_raise_typed_errors():
    with pytest.raises(TokenizerError, match="vocab_size: expected at least 267"):
        train_tokenizer(CORPUS, 200)
    with pytest.raises(TokenizerError, match="split"):
        train_tokenizer(CORPUS, 400, split="letters")
    for index in (-1, TOKENIZER.vocab_size):
        with pytest.raises(TokenizerError, match="id: expected"):
            TOKENIZER.decode([index])
    with pytest.raises(RenderError, match="role"):
        Message("robot", "hello")
    with pytest.raises(RenderError, match="command"):
        Message("user", "hello", command="ls")


# ---- the renderer


def test_rendering_is_token_cheap_and_exact():
    special, encode = TOKENIZER.special, TOKENIZER.encode
    prompt = RENDERER.prompt([Message("user", "cat cedar.txt")])
    assert prompt == [special["<|user|>"], *encode("cat cedar.txt"), special["<|im_end|>"], special["<|assistant|>"]]
    assert RENDERER.chunk("ls") == [special["<tool_call>"], *encode("ls"), special["</tool_call>"]]
    assert RENDERER.chunk(None) == [special["<|im_end|>"]]
    assert RENDERER.stop_ids == {special["</tool_call>"], special["<|im_end|>"]}


@settings(deadline=None)
@given(texts, st.lists(st.tuples(st.one_of(st.none(), texts), texts, texts), max_size=4))
def test_pieces_concatenate_to_the_whole_conversation(task, turns):
    messages = [Message("system", "be brief"), Message("user", task)]
    pieces = list(RENDERER.prompt(messages))
    header = TOKENIZER.special["<|assistant|>"]
    for command, thought, output in turns:
        assert [*RENDERER.render(messages), header] == pieces
        pieces += RENDERER.chunk(command, thought)
        messages.append(Message("assistant", thought, command))
        assert RENDERER.render(messages) == pieces
        pieces += RENDERER.observation([Message("tool", output)])
        messages.append(Message("tool", output))
    whole = RENDERER.render(messages)
    for cut in range(len(messages)):
        prefix = RENDERER.render(messages[:cut])
        assert whole[: len(prefix)] == prefix


@settings(deadline=None)
@given(texts, texts)
def test_parse_gives_back_what_chunk_rendered(command, text):
    assert RENDERER.parse(RENDERER.chunk(command, text)) == ParsedChunk("tool_call", command, text)
    assert RENDERER.parse(RENDERER.chunk(None, text)) == ParsedChunk("final", "", text)


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_parse_never_raises_and_accepts_only_whole_chunks(ids):
    parsed = RENDERER.parse(ids)
    if parsed.kind != "malformed":
        assert ids[-1] in RENDERER.stop_ids
        assert len(SPECIAL_IDS & set(ids)) <= 2


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["<tool_call>"],
        ["</tool_call>"],
        ["</tool_call>", "<tool_call>"],
        ["<tool_call>", "<tool_call>", "</tool_call>"],
        ["<tool_call>", "<|im_end|>"],
        ["<|im_end|>", "<|im_end|>"],
        ["<tool_call>", "<|endoftext|>", "</tool_call>"],
        ["<|endoftext|>"],
    ],
)
def test_malformed_chunks_are_named_so(names):
    ids = [TOKENIZER.special[name] for name in names]
    assert RENDERER.parse(ids).kind == "malformed"
    text = TOKENIZER.encode("ls")
    assert RENDERER.parse([*ids, *text]).kind == "malformed"

"""Constrained decoding: a grammar or a JSON schema says which tokens may come next. Needs the extra `constrained`.

The library is llguidance, whose grammars are written in its dialect of Lark: `%json {...}` is any value of a schema,
and `<[17]>` is the token with id 17. Schemas that it does not implement are refused, never loosened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_FORMAT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarError(ValueError):
    """A grammar or a schema that can't be followed, or one that became too complex on the way."""


class GrammarUnavailable(RuntimeError):
    """llguidance is not installed."""


class Vocabulary(NamedTuple):
    """What a compiler knows of a tokenizer: the bytes of each id (b"" for ids without text), which ids stand for no
    text, which of them end an answer, how text becomes ids, and how many ids the model has."""

    pieces: Sequence[bytes]
    special: frozenset[int]
    ends: frozenset[int]
    encode: Callable[[str], list[int]]
    size: int


def json_rule(schema: dict[str, Any]) -> str:
    """The right side of a rule: any value of a schema, written on one line as `json.dumps` does.

    One way to write a value, because models that are made to write spaces where they like may never stop.
    """
    return "%json " + json.dumps({**schema, "x-guidance": _FORMAT})


def json_grammar(schema: dict[str, Any]) -> str:
    """A grammar of the values of a schema."""
    return f"start: value\nvalue: {json_rule(schema)}\n"


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self) -> np.ndarray:
        """int32[W]: bit t % 32 of word t // 32 tells whether token t may come next. Some token always may.

        Raises GrammarError if the grammar became too complex to follow.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error() or not words.any():
            raise GrammarError(f"grammar: {self._matcher.get_error() or 'no token may follow'}")
        return words

    def accept(self, token: int) -> None:
        """Moves on by a token that `mask` allowed."""
        self._matcher.consume_token(int(token))


class Grammar:
    """A compiled grammar; every answer begins with a `Constraint` of its own."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def begin(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe.

    Raises GrammarUnavailable without llguidance, GrammarError for a tokenizer without an end.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import llguidance
        except ImportError:
            raise GrammarUnavailable(
                "constrained decoding needs the package llguidance: pip install 'rome-agents[constrained]'"
            ) from None
        if not vocabulary.ends:
            raise GrammarError("this model has no token that ends an answer")
        self._library = llguidance
        wrapper = llguidance.TokenizerWrapper(_Tokenizer(vocabulary))
        ends = sorted(vocabulary.ends)
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=vocabulary.size, eos_token=ends)

    def compile(self, grammar: str) -> Grammar:
        """A grammar whose first rule is `start`. Raises GrammarError, which says what is wrong with it."""
        source = self._library.LLMatcher.grammar_from_lark(grammar)
        wrong = self._library.LLMatcher.validate_grammar(source, self._tokenizer)
        matcher = None if wrong else self._library.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher is None or matcher.is_error():
            raise GrammarError((wrong or matcher.get_error()).strip())
        return Grammar(matcher)


class _Tokenizer:
    """As llguidance wants it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.special_token_ids = list(vocabulary.pieces), sorted(vocabulary.special)
        self.eos_token_id = min(vocabulary.ends)
        self._encode = vocabulary.encode

    def __call__(self, data: bytes | str) -> list[int]:
        return self._encode(data.decode("utf-8", "replace") if isinstance(data, bytes) else data)

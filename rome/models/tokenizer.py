"""Byte-level BPE whose special tokens live outside of text: no string can ever encode to one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rome.files import atomic_write

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
)

# Qwen2's split of text into words; it takes digits one by one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same word is the same token wherever it stands: longer sequences, easier copying for small models.
_ISOLATED_WORDS = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s"
_PATTERNS = {"words": _WORDS, "isolated": _ISOLATED_WORDS}

_FORMAT = "rome-tokenizer"
_FORMAT_VERSION = 1
_FILE = "tokenizer.json"


class TokenizerError(ValueError):
    """A tokenizer file is missing, cut short or not one of ours, or an id is out of range."""


class Tokenizer:
    """Text to ids and back, without loss.

    Ids ``0 .. len(special) - 1`` are the special tokens, in the order of `SPECIAL_TOKENS`; text takes the ids after
    them. So ``encode("<tool_call>")`` is eleven or so ordinary characters, never the token of that name.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
        self._bpe = bpe
        self.special: dict[str, int] = {name: index for index, name in enumerate(special_tokens)}
        self._offset = len(self.special)
        self._names = tuple(special_tokens)
        vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
        if [index for _, index in vocabulary] != list(range(len(vocabulary))):
            raise TokenizerError("vocabulary: expected ids 0..n-1 without gaps")
        try:
            self._bytes = tuple(bytes(BYTE_OF[char] for char in piece) for piece, _ in vocabulary)
        except KeyError as error:
            raise TokenizerError(f"vocabulary: {error} isn't a byte of the byte-level alphabet") from None
        self._byte_ids = {piece[0]: index for index, piece in enumerate(self._bytes) if len(piece) == 1}
        if len(self._byte_ids) != 256:
            raise TokenizerError(f"vocabulary: expected all 256 bytes, got {len(self._byte_ids)}")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included: what ``ModelConfig.vocab_size`` must be."""
        return self._offset + len(self._bytes)

    @property
    def pad_id(self) -> int:
        return self.special["<|endoftext|>"]

    def encode(self, text: str) -> list[int]:
        """Ids of text; never a special one. Lone surrogates that stand for bytes (``surrogateescape``) become those."""
        try:
            ids = self._bpe.encode(text).ids
        except TypeError:
            if not isinstance(text, str):
                raise
            return self.encode_bytes(_escaped_bytes(text))  # lone surrogates, which UTF-8 has no bytes for
        return [index + self._offset for index in ids]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes; what isn't UTF-8 goes byte by byte. ``decode_bytes`` gives the same bytes back."""
        ids: list[int] = []
        text = data.decode("utf-8", "surrogateescape")
        plain: list[str] = []
        for char in text:
            if "\udc80" <= char <= "\udcff":
                ids += self.encode("".join(plain))
                plain.clear()
                ids.append(self._byte_ids[ord(char) - 0xDC00] + self._offset)
            else:
                plain.append(char)
        return ids + self.encode("".join(plain))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids; special tokens give their names.

        Raises:
            TokenizerError: an id is outside of the vocabulary.
        """
        return b"".join(self._piece(int(index)) for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give their names, and bytes that aren't UTF-8 give U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _piece(self, index: int) -> bytes:
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(f"id: expected 0..{self.vocab_size - 1}, got {index}")
        if index < self._offset:
            return self._names[index].encode()
        return self._bytes[index - self._offset]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json`` into the directory, whole or not at all."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "special_tokens": list(self._names),
            "bpe": json.loads(self._bpe.to_str()),
        }
        atomic_write(folder / _FILE, json.dumps(document, ensure_ascii=False))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads what `save` wrote.

        Raises:
            TokenizerError: the file is missing, truncated, corrupt or of another format; the message names it.
        """
        path = Path(directory) / _FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path}: expected a saved tokenizer: {error}") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise TokenizerError(f"{path}: format: expected {_FORMAT!r}")
        if document.get("version") != _FORMAT_VERSION:
            raise TokenizerError(f"{path}: version: expected {_FORMAT_VERSION}, got {document.get('version')!r}")
        names = document.get("special_tokens")
        if not isinstance(names, list) or names != list(SPECIAL_TOKENS):
            raise TokenizerError(f"{path}: special_tokens: expected {list(SPECIAL_TOKENS)}, got {names!r}")
        try:
            bpe = tokenizers.Tokenizer.from_str(json.dumps(document.get("bpe")))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path}: bpe: expected a BPE model: {error}") from error
        return cls(bpe, names)


def train_tokenizer(texts: Iterable[str], vocab_size: int, split: str = "words", digits: int = 1) -> Tokenizer:
    """Trains a byte-level BPE. The same texts give the same tokenizer.

    Args:
        texts: what to learn merges from.
        vocab_size: number of ids wanted, special tokens and the 256 bytes included. A corpus with too few different
            words gives fewer.
        split: how text is cut before merging. ``words`` (as Qwen2: a space or sign joins the word after it) gives the
            shortest sequences; ``isolated`` keeps letters, signs and spaces apart, so that a word is the same tokens
            wherever it stands.
        digits: how many digits of a number, from its left, may share a token. 1 (Qwen) makes numbers uniform; with
            more, copying one takes fewer and less ambiguous steps (Llama 3 takes 3).

    Raises:
        TokenizerError: ``vocab_size`` has no room for the special tokens and the bytes, ``split`` is unknown, or
            ``digits`` is not 1, 2 or 3.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size: expected at least {smallest}, got {vocab_size}")
    if split not in _PATTERNS:
        raise TokenizerError(f"split: expected one of {sorted(_PATTERNS)}, got {split!r}")
    if digits not in (1, 2, 3):
        raise TokenizerError(f"digits: expected 1, 2 or 3, got {digits!r}")
    pattern = _PATTERNS[split].replace(r"|\p{N}", rf"|\p{{N}}{{1,{digits}}}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _escaped_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-8", "replace")


BYTE_OF = _byte_alphabet()

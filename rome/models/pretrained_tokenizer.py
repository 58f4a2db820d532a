"""Tokenizers and chat templates of published models, from a local Hugging Face folder or a GGUF file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rome.files import atomic_write
from rome.models.tokenizer import BYTE_OF, Tokenizer, TokenizerError
from rome.models.weights import open_gguf

_PRIVATE_USE = range(0xE000, 0xF900)


class PretrainedTokenizer:
    """A byte-level BPE with special tokens among its ids, and perhaps a chat template.

    ``encode`` takes text for what it is: no string of a user or a tool becomes a special token. Only `encode_chat`
    makes these, where the template itself wrote them.

    Attributes:
        special: id of each special token, by its text.
        roles: text of ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``, as far as the model has them.
        stop_ids: ids that end what the model says.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        roles: Mapping[str, str],
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        _require_byte_level(bpe)
        self._bpe = bpe
        bpe.encode_special_tokens = True
        added = bpe.get_added_tokens_decoder()
        for token in added.values():
            if token.special and (token.lstrip or token.rstrip or token.single_word):
                raise TokenizerError(f"special token {token.content!r}: expected no lstrip, rstrip or single_word")
        self.special = {token.content: index for index, token in added.items() if token.special}
        for name, text in roles.items():
            if text not in self.special:
                raise TokenizerError(f"{name}: expected one of the special tokens, found {text!r}")
        self._added = {index: token.content.encode() for index, token in added.items()}
        self._padded = 0
        self.roles = dict(roles)
        self.chat_template = chat_template
        own = (self.special[roles["eos_token"]],) if "eos_token" in roles else ()
        self.stop_ids = frozenset((*own, *stop_ids))

    @classmethod
    def from_folder(cls, folder: str | Path) -> PretrainedTokenizer:
        """Reads ``tokenizer.json``, ``tokenizer_config.json`` and, where there, ``chat_template.jinja`` and
        ``generation_config.json`` (more stop tokens).

        Raises:
            TokenizerError: a file is missing or broken, or the tokenizer is no byte-level BPE.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            bpe = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path}: expected a tokenizer: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        roles = {name: _text(config[name]) for name in names if config.get(name) is not None}
        template = _template(config.get("chat_template"))
        if (file := folder / "chat_template.jinja").exists():
            template = file.read_text(encoding="utf-8")
        stop: Any = []
        if (file := folder / "generation_config.json").exists():
            stop = _read_json(file).get("eos_token_id") or []
        return cls(bpe, roles, template, [stop] if isinstance(stop, int) else stop)

    @classmethod
    def from_gguf(cls, path: str | Path) -> PretrainedTokenizer:
        """Builds the tokenizer of a GGUF file from its metadata. Only SmolLM's way of splitting text is known.

        Raises:
            TokenizerError: the file has no tokenizer, or another kind.
        """
        fields = open_gguf(path).fields

        def get(key: str, kind: type, default: Any = None) -> Any:
            value = fields.get(f"tokenizer.{key}", default)
            if type(value) is not kind and not (value is None and kind is not list):
                raise TokenizerError(f"{path}: tokenizer.{key}: expected {kind.__name__}, found {value!r}")
            return value

        for key, expected in (("ggml.model", "gpt2"), ("ggml.pre", "smollm")):
            if (found := get(key, str)) != expected:
                raise TokenizerError(f"{path}: tokenizer.{key}: expected {expected!r}, found {found!r}")
        pieces = get("ggml.tokens", list)
        merges = [tuple(merge.split(" ")) for merge in get("ggml.merges", list)]
        bpe = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        bpe.decoder = decoders.ByteLevel()
        kinds = get("ggml.token_type", list)  # 3: control, 4: user-defined
        if len(kinds) != len(pieces):
            raise TokenizerError(f"{path}: tokenizer.ggml.token_type: expected {len(pieces)} types, found {len(kinds)}")
        for piece, kind in zip(pieces, kinds, strict=True):
            if kind in (3, 4):
                bpe.add_tokens([AddedToken(piece, special=kind == 3, normalized=False)])
        roles = {}
        for name, key in _GGUF_ROLES.items():
            if (index := get(f"ggml.{key}_token_id", int)) is not None:
                if index >= len(pieces):
                    raise TokenizerError(f"{path}: tokenizer.ggml.{key}_token_id: expected an id, found {index}")
                roles[name] = pieces[index]
        return cls(bpe, roles, get("chat_template", str))

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_folder` and Hugging Face transformers read, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.roles}
        files = {
            "tokenizer.json": self._bpe.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
            "generation_config.json": json.dumps({"eos_token_id": sorted(self.stop_ids)}) + "\n",
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        for name, text in files.items():
            atomic_write(folder / name, text)

    def padded_to(self, size: int) -> PretrainedTokenizer:
        """The same tokenizer for a model of ``size`` ids: those that it has no text for decode to U+FFFD.

        Raises:
            TokenizerError: the model has fewer ids than the tokenizer.
        """
        if size < self.vocab_size:
            raise TokenizerError(f"vocab_size: expected a model of at least {self.vocab_size} ids, found {size}")
        padded = copy.copy(self)
        padded._padded = size
        return padded

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's own ``vocab_size`` may be larger (padded)."""
        return max(self._bpe.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        """The padding token, or where there is none the end token: what stands there is never read."""
        name = "pad_token" if "pad_token" in self.roles else "eos_token"
        if name not in self.roles:
            raise TokenizerError("pad_token: expected a padding or an end token, found neither")
        return self.special[self.roles[name]]

    def encode(self, text: str) -> list[int]:
        """Ids of text; never a special one."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids; special tokens give their names.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        return b"".join(self._piece(int(index)) for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give their names, and bytes that aren't UTF-8 give U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _piece(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index]
        piece = self._bpe.id_to_token(index) if index >= 0 else None
        if piece is None:
            if 0 <= index < self._padded:
                return "\ufffd".encode()
            raise TokenizerError(f"id: expected 0..{self.vocab_size - 1}, got {index}")
        return bytes(BYTE_OF[char] for char in piece)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The conversation as the model's template writes it.

        Args:
            messages: ``role`` and ``content`` each, and what else the template reads.
            add_generation_prompt: end with the header of the assistant's turn.
            variables: more for the template (``tools``, ``enable_thinking``...).

        Raises:
            TokenizerError: there is no template, or it refuses the conversation.
        """
        import jinja2

        values = self.roles | {"messages": messages, "add_generation_prompt": add_generation_prompt} | variables
        try:
            return self._template.render(**values)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"chat_template: {error}") from error

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        after: str = "",
        **variables: Any,
    ) -> list[int]:
        """Ids of the rendered conversation. Special tokens' names in a message are text like any other.

        Args:
            messages, add_generation_prompt, variables: as in `render_chat`.
            after: give only what follows this text.

        Raises:
            TokenizerError: as in `render_chat`; or ``after`` is not in the rendered text exactly once.
        """
        values = {"messages": list(messages), **variables}
        marker = unused_character(values)
        values = _break_names(values, self._special_pattern, marker)
        text = self.render_chat(values.pop("messages"), add_generation_prompt=add_generation_prompt, **values)
        if after:
            if (count := text.count(after)) != 1:
                raise TokenizerError(f"chat_template: expected to render {after!r} once, found it {count} times")
            text = text.partition(after)[2]
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            ids += [*self.encode(text[start : match.start()].replace(marker, "")), self.special[match.group()]]
            start = match.end()
        return ids + self.encode(text[start:].replace(marker, ""))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _template(self) -> Any:
        if self.chat_template is None:
            raise TokenizerError("chat_template: expected one, this tokenizer has none")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(
                "chat templates need the package jinja2: pip install 'rome-agents[pretrained]'"
            ) from error

        # the settings and helpers that published templates are written for
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.chat_template)
        except TemplateError as error:
            raise TokenizerError(f"chat_template: {error}") from error


_GGUF_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def load_tokenizer(folder: str | Path) -> Tokenizer | PretrainedTokenizer:
    """A tokenizer of ours or of a published model, whichever `save` wrote it.

    Raises:
        TokenizerError: the files are missing or broken.
    """
    if (Path(folder) / "tokenizer_config.json").exists():
        return PretrainedTokenizer.from_folder(folder)
    return Tokenizer.load(folder)


def unused_character(value: Any) -> str:
    """A character of Unicode's private use area that is in no string of ``value``."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)


def _require_byte_level(bpe: tokenizers.Tokenizer) -> None:
    """Raises TokenizerError unless pieces are spelled in the byte-level alphabet."""
    document = json.loads(bpe.to_str())
    decoder, kind = document.get("decoder") or {}, document["model"].get("type")
    if kind != "BPE" or decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"tokenizer: expected a byte-level BPE, found {kind} decoded by {decoder.get('type')}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: expected a JSON file: {error}") from error
    if not isinstance(document, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _text(token: str | dict[str, Any]) -> str:
    """Old files describe a token, new ones name it."""
    return token["content"] if isinstance(token, dict) else token


def _template(value: Any) -> str | None:
    """One template, or the one named ``default`` of several."""
    if not isinstance(value, list):
        return value
    return next((entry["template"] for entry in value if entry.get("name") == "default"), None)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _break_names(value: Any, names: re.Pattern[str], marker: str) -> Any:
    """``value`` with a marker inside every special token's name that one of its strings spells."""
    if isinstance(value, str):
        return names.sub(lambda match: match.group()[0] + marker + match.group()[1:], value)
    if isinstance(value, Mapping):
        return {key: _break_names(item, names, marker) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_break_names(item, names, marker) for item in value]
    return value

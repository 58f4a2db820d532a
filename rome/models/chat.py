"""Rendering of conversations into tokens. It only ever appends: what was rendered is never rendered again.

A trajectory reads ``<|user|>task<|im_end|><|assistant|>`` (prompt) ``<tool_call>ls</tool_call>`` (chunk)
``<|tool|>a.txt<|im_end|><|assistant|>`` (observation) ``done<|im_end|>`` (chunk): each piece starts where the one
before it ended, so their concatenation is the conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rome.models.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class RenderError(ValueError):
    """A message can't be rendered; the message names the field and what was expected."""


@dataclass(frozen=True)
class Message:
    """One turn. ``command`` is the shell command of an assistant's tool call, if it made one."""

    role: str
    content: str
    command: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RenderError(f"role: expected one of {ROLES}, got {self.role!r}")
        if self.command is not None and self.role != "assistant":
            raise RenderError(f"command: expected None for role {self.role!r}, got {self.command!r}")


@dataclass(frozen=True)
class ParsedChunk:
    """What the policy meant: a tool call with its command, a final answer, or neither (``malformed``)."""

    kind: Literal["tool_call", "final", "malformed"]
    command: str
    text: str


class Renderer(Protocol):
    """What training and rollouts ask of a renderer: `ChatRenderer` or `rome.models.TemplateRenderer`."""

    tokenizer: Any  # decode, pad_id, vocab_size, special

    @property
    def stop_ids(self) -> frozenset[int]: ...
    def prompt(self, messages: Sequence[Message]) -> list[int]: ...
    def observation(self, messages: Sequence[Message]) -> list[int]: ...
    def chunk(self, command: str | None, text: str = "") -> list[int]: ...
    def parse(self, tokens: Iterable[int]) -> ParsedChunk: ...


class ChatRenderer:
    """Renders messages, chunks and observations with one tokenizer; parses chunks back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.special
        self._roles = {role: special[f"<|{role}|>"] for role in ROLES}
        self._end = special["<|im_end|>"]
        self._open = special["<tool_call>"]
        self._close = special["</tool_call>"]
        self._special_ids = frozenset(special.values())

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a chunk. The id is the chunk's last token: sampled, and trained on."""
        return frozenset((self._close, self._end))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The opening messages and the assistant's header: ready to sample."""
        return [*self.render(messages), self._roles["assistant"]]

    def observation(self, messages: Sequence[Message]) -> list[int]:
        """The new messages only, and the assistant's header: what to append after a chunk."""
        return self.prompt(messages)

    def chunk(self, command: str | None, text: str = "") -> list[int]:
        """The tokens that an assistant would have sampled: text and a tool call, or (command None) text and the end."""
        ids = self.tokenizer.encode(text)
        if command is None:
            return [*ids, self._end]
        return [*ids, self._open, *self.tokenizer.encode(command), self._close]

    def render(self, messages: Iterable[Message]) -> list[int]:
        """A whole conversation, without a header at the end. That of a prefix of it is a prefix of this."""
        ids: list[int] = []
        for message in messages:
            ids.append(self._roles[message.role])
            if message.role == "assistant":
                ids += self.chunk(message.command, message.content)
            else:
                ids += [*self.tokenizer.encode(message.content), self._end]
        return ids

    def parse(self, tokens: Iterable[int]) -> ParsedChunk:
        """Reads a chunk back. Never raises on ids of the vocabulary: what has no meaning is ``malformed``."""
        ids = [int(token) for token in tokens]
        decode = self.tokenizer.decode
        special = [(index, token) for index, token in enumerate(ids) if token in self._special_ids]
        last = len(ids) - 1
        if special == [(last, self._end)]:
            return ParsedChunk("final", "", decode(ids[:-1]))
        if len(special) == 2 and special[0][1] == self._open and special[1] == (last, self._close):
            start = special[0][0]
            return ParsedChunk("tool_call", decode(ids[start + 1 : -1]), decode(ids[:start]))
        return ParsedChunk("malformed", "", decode(ids))

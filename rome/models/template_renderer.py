"""Conversations in the chat format of a published model: its own template around this project's tool calls.

A trajectory reads, in ChatML, ``<|im_start|>user\\ntask<|im_end|>\\n<|im_start|>assistant\\n`` (prompt)
``<tool_call>ls</tool_call><|im_end|>`` (chunk) ``\\n<|im_start|>tool\\na.txt<|im_end|>\\n<|im_start|>assistant\\n``
(observation). As with `rome.models.ChatRenderer`, what was rendered is never rendered again: a template that would
write earlier turns otherwise when new ones come (Qwen3 drops their thoughts) never gets to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rome.models.chat import Message, ParsedChunk, RenderError
from rome.models.pretrained_tokenizer import PretrainedTokenizer, unused_character
from rome.models.tokenizer import TokenizerError

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class TemplateRenderer:
    """Renders messages, chunks and observations with a published model's tokenizer and template; parses chunks back.

    ``<tool_call>`` and its end are text to it. Where the tokenizer has tokens of these names (Qwen), text becomes them.

    Raises:
        TokenizerError: there is no template, it refuses tool messages, or no end token follows what the model says.
    """

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        self.tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.special.values())
        self._end = self._after_chunk([Message("tool", "")])[0]
        if self._end not in tokenizer.stop_ids:
            name = tokenizer.decode([self._end])
            stops = [tokenizer.decode([index]) for index in sorted(tokenizer.stop_ids)]
            raise TokenizerError(f"chat_template: expected one of {stops} after what the model says, found {name!r}")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a chunk. The id is the chunk's last token: sampled, and trained on."""
        return self.tokenizer.stop_ids

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The opening messages and the assistant's header: ready to sample."""
        return self.tokenizer.encode_chat(_plain(messages), add_generation_prompt=True)

    def observation(self, messages: Sequence[Message]) -> list[int]:
        """What to append after a chunk: how the template goes on after its end token, the new messages, the header."""
        return self._after_chunk(messages)[1:]

    def _after_chunk(self, messages: Sequence[Message]) -> list[int]:
        said = unused_character([message.content for message in messages])
        dialogue = [Message("user", "?"), Message("assistant", said), *messages]
        return self.tokenizer.encode_chat(_plain(dialogue), add_generation_prompt=True, after=said)

    def chunk(self, command: str | None, text: str = "") -> list[int]:
        """The tokens that an assistant would have sampled: text, a tool call unless ``command`` is None, and the end.

        Raises:
            RenderError: text or command holds a tool call's tag.
        """
        for name, value in (("text", text), ("command", command or "")):
            if _OPEN in value or _CLOSE in value:
                raise RenderError(f"{name}: expected neither {_OPEN} nor {_CLOSE} in it, got {value!r}")
        said = text if command is None else f"{text}{_OPEN}{command}{_CLOSE}"
        return [*self.tokenizer.encode(said), self._end]

    def parse(self, tokens: Iterable[int]) -> ParsedChunk:
        """Reads a chunk back. Never raises on ids of the model: what has no meaning is ``malformed``."""
        ids = [int(token) for token in tokens]
        text = self.tokenizer.decode(ids[:-1])
        if not ids or ids[-1] != self._end or self._special_ids.intersection(ids[:-1]):
            return ParsedChunk("malformed", "", self.tokenizer.decode(ids))
        before, opened, rest = text.partition(_OPEN)
        command, closed, after = rest.partition(_CLOSE)
        if not opened and _CLOSE not in text:
            return ParsedChunk("final", "", text)
        if opened and closed and not after.strip() and not any(_OPEN in s or _CLOSE in s for s in (before, command)):
            return ParsedChunk("tool_call", command, before)
        return ParsedChunk("malformed", "", self.tokenizer.decode(ids))


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """As templates read them.

    Raises:
        RenderError: a message has a command: only what the model itself says has one.
    """
    for message in messages:
        if message.command is not None:
            raise RenderError(f"command: expected None in a message to a template, got {message.command!r}")
    return [{"role": message.role, "content": message.content} for message in messages]

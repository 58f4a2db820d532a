"""OpenAI's messages and tool calls to tokens and back, in our chat format and in those of published models."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rome.models import ChatRenderer, Message, PretrainedTokenizer, TokenizerError
from rome.rollout.grammar import Vocabulary, json_rule
from rome.rollout.service.errors import ServiceError, invalid
from rome.rollout.service.protocol import ChatMessage, ToolSpec
from rome.rollout.service.text import overlap

_ROLES = {"developer": "system"}


class Answer(NamedTuple):
    """What the model said: text, and calls as (function name, arguments as JSON text)."""

    content: str
    calls: tuple[tuple[str, str], ...]


class ChatFormat(Protocol):
    """A model's way to write conversations."""

    stop_ids: frozenset[int]
    vocab_size: int
    pad_id: int
    # where a tool call may begin in the text; None: only the whole answer tells
    call_marker: str | None

    def prompt(self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec]) -> list[int]:
        """Tokens up to and including the header of the assistant's turn. Raises ServiceError, naming the message."""

    def answer(self, tokens: Sequence[int], text: str, tools: Sequence[ToolSpec]) -> Answer:
        """Reads a whole answer, given its tokens and its text."""

    def call_grammar(self, tools: Mapping[int, ToolSpec]) -> str:
        """A grammar (`rome.rollout.grammar`) of the calls of one of the tools, given by their place in the request.
        Raises ServiceError, naming the tool."""

    def vocabulary(self) -> Vocabulary:
        """For grammars."""

    def encode(self, text: str) -> list[int]: ...

    def piece(self, token: int) -> bytes:
        """A token's bytes; b"" for what is no token of the tokenizer (models pad their vocabularies)."""


class RomeChat:
    """Our chat format, whose one tool is a shell: a request offers at most one function, with one required string
    parameter, and that is the command."""

    call_marker = None

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer, self._tokenizer = renderer, renderer.tokenizer
        self.stop_ids = renderer.stop_ids
        self.vocab_size, self.pad_id = self._tokenizer.vocab_size, self._tokenizer.pad_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def piece(self, token: int) -> bytes:
        return _piece(self._tokenizer, token)

    def prompt(self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec]) -> list[int]:
        if tools:
            _command_of(tools)
        return self._renderer.prompt(self.messages(messages))

    def messages(self, messages: Sequence[ChatMessage]) -> list[Message]:
        """As the renderer takes them. Raises ServiceError, naming the message."""
        return [
            Message(_ROLES.get(m.role, m.role), m.text, _called_command(m, f"messages.{i}"))
            for i, m in enumerate(messages)
        ]

    def answer(self, tokens: Sequence[int], text: str, tools: Sequence[ToolSpec]) -> Answer:
        parsed = self._renderer.parse(tokens)
        if parsed.kind != "tool_call":
            return Answer(text, ())
        if not tools:  # the call as text: its end is a stop id, which is no part of `text`
            return Answer(f"{text}</tool_call>", ())
        name, parameter = _command_of(tools)
        arguments = json.dumps({parameter: parsed.command}, ensure_ascii=False)
        return Answer(parsed.text, ((name, arguments),))

    def call_grammar(self, tools: Mapping[int, ToolSpec]) -> str:
        """The command is any text: a shell takes no JSON, whose schema could say more."""
        (index, tool), *_ = tools.items()
        _, parameter = _command_of([*tools.values()])
        more = set(tool.function.parameters["properties"][parameter]) - {"type", "description", "title"}
        if more:
            where = f"tools.{index}.function.parameters.properties.{parameter}"
            raise invalid(where, f"expected a type and a description, which is all that is followed, found {more}")
        opens, closes = (self._tokenizer.special[name] for name in ("<tool_call>", "</tool_call>"))
        return f"start: <[{opens}]> COMMAND <[{closes}]>\nCOMMAND: /(.|\\n)+/\n"

    def vocabulary(self) -> Vocabulary:
        ends = self.stop_ids - {self._tokenizer.special["</tool_call>"]}
        return _vocabulary(self, self._tokenizer, ends)


def _command_of(tools: Sequence[ToolSpec]) -> tuple[str, str]:
    """Name and parameter of the one function that takes a command."""
    if len(tools) != 1:
        raise invalid("tools", f"expected one function, which this model's shell calls become, found {len(tools)}")
    properties = tools[0].function.parameters.get("properties")
    required = tools[0].function.parameters.get("required")
    text = [k for k, v in properties.items() if isinstance(v, dict) and v.get("type") == "string"] if properties else []
    names = [name for name in text if name in required] if isinstance(required, list) else text
    if len(names) != 1:
        raise invalid("tools.0.function.parameters", f"expected one required string (the command), found {names}")
    return tools[0].function.name, names[0]


def _called_command(message: ChatMessage, where: str) -> str | None:
    calls = message.tool_calls
    if not calls:
        return None
    if message.role != "assistant" or len(calls) != 1:
        raise invalid(
            f"{where}.tool_calls", f"expected one call, of an assistant, found {len(calls)} of {message.role}"
        )
    arguments = _arguments(calls[0].function.arguments, f"{where}.tool_calls.0.function.arguments")
    values = list(arguments.values())
    if len(values) != 1 or not isinstance(values[0], str):
        raise invalid(f"{where}.tool_calls.0.function.arguments", "expected one string, the command")
    return values[0]


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise invalid(where, "expected a JSON object in a string")
    return value


class TemplateChat:
    """A published model's own template. Calls are read as these models write them: JSON with `name` and `arguments`,
    one or a list, between <tool_call> and </tool_call>. What is no such call stays text."""

    call_marker = "<tool_call>"
    _CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)

    def __init__(self, tokenizer: PretrainedTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.stop_ids, self.vocab_size = tokenizer.stop_ids, vocab_size
        self.pad_id = tokenizer.pad_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def piece(self, token: int) -> bytes:
        return _piece(self._tokenizer, token)

    def prompt(self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec]) -> list[int]:
        plain = [self._plain(message, f"messages.{index}") for index, message in enumerate(messages)]
        variables = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]} if tools else {}
        try:
            return self._tokenizer.encode_chat(plain, add_generation_prompt=True, **variables)
        except TokenizerError as error:
            raise ServiceError(400, f"messages: {error}", "messages") from error

    def _plain(self, message: ChatMessage, where: str) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": message.text}
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.tool_calls:  # templates want arguments as values, not as text
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(
                            call.function.arguments, f"{where}.tool_calls.{index}.function.arguments"
                        ),
                    },
                }
                for index, call in enumerate(message.tool_calls)
            ]
        return plain

    def answer(self, tokens: Sequence[int], text: str, tools: Sequence[ToolSpec]) -> Answer:
        if not tools or (first := text.find(self.call_marker)) < 0:
            return Answer(text, ())
        calls: list[tuple[str, str]] = []
        for match in self._CALL.finditer(text):
            found = _named_calls(match.group(1))
            if found is None:
                return Answer(text, ())
            calls += found
        return Answer(text[:first].rstrip(), tuple(calls))

    def call_grammar(self, tools: Mapping[int, ToolSpec]) -> str:
        opens, closes = (self._literal(name) for name in ("<tool_call>", "</tool_call>"))
        rules = [f'start: {opens} "\\n" call "\\n" {closes}', "call: " + " | ".join(f"call{i}" for i in tools)]
        for index, tool in tools.items():
            schema = tool.function.parameters
            if schema.get("type", "object") != "object":
                raise invalid(f"tools.{index}.function.parameters", "expected the schema of an object")
            head = f'{{"name": {json.dumps(tool.function.name)}, "arguments": '
            rules.append(f'call{index}: {json.dumps(head)} arguments{index} "}}"')
            rules.append(f"arguments{index}: {json_rule({**schema, 'type': 'object'})}")
        return "\n".join(rules)

    def _literal(self, name: str) -> str:
        """A marker in a grammar: some tokenizers have a token for it that stands for no text, some spell it."""
        special = self._tokenizer.special
        return f"<[{special[name]}]>" if name in special else json.dumps(name)

    def vocabulary(self) -> Vocabulary:
        return _vocabulary(self, self._tokenizer, self.stop_ids)


def _vocabulary(chat: ChatFormat, tokenizer: Any, ends: frozenset[int]) -> Vocabulary:
    pieces = [chat.piece(token) for token in range(tokenizer.vocab_size)]
    return Vocabulary(pieces, frozenset(tokenizer.special.values()), ends, chat.encode, chat.vocab_size)


def _named_calls(text: str) -> list[tuple[str, str]] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    entries = value if isinstance(value, list) else [value]
    calls = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return None
        arguments = entry.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        calls.append((entry["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls


def _piece(tokenizer: Any, token: int) -> bytes:
    try:
        return tokenizer.decode_bytes([token])
    except TokenizerError:
        return b""


class ContentStream:
    """The part of an answer's text that is certainly content while tokens still come: all of it without tools, else
    what stands before a call could begin."""

    def __init__(self, chat: ChatFormat, tools: Sequence[ToolSpec]) -> None:
        self._marker = chat.call_marker if tools else ""
        self._held, self.sent = "", ""

    def push(self, text: str) -> str:
        if self._marker == "":
            certain = text
        else:
            self._held += text
            if self._marker is None:
                return ""
            at = self._held.find(self._marker)
            end = at if at >= 0 else len(self._held) - overlap(self._held, self._marker)
            certain = self._held[:end].rstrip() if at < 0 else ""  # space before a call is no content
            self._held = self._held[len(certain) :]
        self.sent += certain
        return certain


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"

"""Answers in OpenAI's shapes, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rome.rollout.service.chats import ChatFormat, ContentStream, call_id
from rome.rollout.service.errors import ServiceError
from rome.rollout.service.protocol import ChatRequest, CompletionRequest
from rome.rollout.service.scheduler import Part
from rome.rollout.stream import Burst


@dataclass
class Choice:
    """One sequence of an answer, as far as it has come."""

    index: int
    prompt: list[int]
    text: str = ""
    finish: str | None = None
    bursts: list[Burst] = field(default_factory=list)
    content: ContentStream | None = None  # of a streamed chat

    def add(self, part: Part) -> None:
        self.text += part.text
        self.finish = part.finish
        self.bursts.append(part.burst)

    @property
    def tokens(self) -> list[int]:
        return [int(token) for burst in self.bursts for token in burst.tokens]


class Shape(Protocol):
    """How an endpoint writes its answers."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]: ...
    def opening(self, choices: Sequence[Choice]) -> Iterator[str]: ...
    def events(self, choice: Choice, part: Part) -> Iterator[str]: ...
    def closing(self, choices: Sequence[Choice]) -> Iterator[str]: ...
    def error(self, error: ServiceError) -> str: ...


class _Shape:
    prefix, object_whole, object_part = "", "", ""

    def __init__(self, chat: ChatFormat, asked: ChatRequest | CompletionRequest, name: str) -> None:
        self.chat, self.asked = chat, asked
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        given = [self._whole_choice(choice) for choice in choices]
        return {**self._head, "object": self.object_whole, "choices": given, "usage": self._usage(choices)}

    def opening(self, choices: Sequence[Choice]) -> Iterator[str]:
        yield from ()

    def closing(self, choices: Sequence[Choice]) -> Iterator[str]:
        options = self.asked.stream_options
        if options is not None and options.include_usage:
            yield _event({**self._head, "object": self.object_part, "choices": [], "usage": self._usage(choices)})
        yield "data: [DONE]\n\n"

    def error(self, error: ServiceError) -> str:
        return _event(error.body)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError("each endpoint has a shape of its own")

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        prompts = {id(choice.prompt): len(choice.prompt) for choice in choices}  # the samples of a prompt share it
        given, sampled = sum(prompts.values()), sum(len(choice.tokens) for choice in choices)
        return {"prompt_tokens": given, "completion_tokens": sampled, "total_tokens": given + sampled}

    def _part(self, choice: Choice, **values: Any) -> str:
        given = {"index": choice.index, "finish_reason": None, "logprobs": None, **values}
        return _event({**self._head, "object": self.object_part, "choices": [given]})

    def _ids(self, choice: Choice, bursts: Sequence[Burst], opening: bool) -> dict[str, Any]:
        """With `return_token_ids`: what was sampled, stop token included, under which probability and weights."""
        if not self.asked.return_token_ids:
            return {}
        values: dict[str, Any] = {
            "token_ids": [int(token) for burst in bursts for token in burst.tokens],
            "sampling_logprobs": [float(logp) for burst in bursts for logp in burst.behavior_logp],
            "versions": [burst.version for burst in bursts for _ in burst.tokens],
        }
        return values | ({"prompt_token_ids": choice.prompt} if opening else {})

    def _name(self, token: int) -> str:
        """Its text; of a part of a character, its bytes as OpenAI writes them: `bytes:\\xc3`."""
        piece = self.chat.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _width(self, token: int) -> int:
        """Characters of text that a token adds, as far as it alone tells."""
        return len(self.chat.piece(token).decode("utf-8", "ignore"))


class ChatShape(_Shape):
    """Of /v1/chat/completions."""

    prefix, object_whole, object_part = "chatcmpl", "chat.completion", "chat.completion.chunk"
    asked: ChatRequest

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        answer = self.chat.answer(choice.tokens, choice.text, self.asked.offered)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.calls:
            message["tool_calls"] = self._calls(answer.calls)
            message["content"] = answer.content or None
        return {
            "index": choice.index,
            "message": message,
            "finish_reason": "tool_calls" if answer.calls else choice.finish,
            "logprobs": self._logprobs(choice.bursts),
            **self._ids(choice, choice.bursts, opening=True),
        }

    def opening(self, choices: Sequence[Choice]) -> Iterator[str]:
        for choice in choices:
            choice.content = ContentStream(self.chat, self.asked.offered)
            yield self._part(choice, delta={"role": "assistant", "content": ""}, **self._ids(choice, (), opening=True))

    def events(self, choice: Choice, part: Part) -> Iterator[str]:
        choice.add(part)
        content = choice.content.push(part.text)
        if content or self.asked.logprobs or self.asked.return_token_ids:
            extra = {"logprobs": self._logprobs([part.burst]), **self._ids(choice, [part.burst], opening=False)}
            yield self._part(choice, delta={"content": content} if content else {}, **extra)
        if part.finish is None:
            return
        answer = self.chat.answer(choice.tokens, choice.text, self.asked.offered)
        rest = answer.content[len(choice.content.sent) :]
        if rest:
            yield self._part(choice, delta={"content": rest})
        if answer.calls:
            calls = [{"index": i, **call} for i, call in enumerate(self._calls(answer.calls))]
            yield self._part(choice, delta={"tool_calls": calls})
        yield self._part(choice, delta={}, finish_reason="tool_calls" if answer.calls else part.finish)

    def _calls(self, calls: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        return [
            {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]

    def _logprobs(self, bursts: Sequence[Burst]) -> dict[str, Any] | None:
        if self.asked.alternatives is None:
            return None
        content = []
        for burst in bursts:
            for at, (token, logp) in enumerate(zip(burst.tokens, burst.raw_logp, strict=True)):
                tops = []
                if self.asked.alternatives:
                    pairs = zip(burst.top_ids[at], burst.top_logp[at], strict=True)
                    tops = [self._entry(*pair) for pair in pairs][: self.asked.alternatives]
                content.append({**self._entry(token, logp), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logp: float) -> dict[str, Any]:
        piece = self.chat.piece(int(token))
        return {"token": piece.decode("utf-8", "replace"), "logprob": float(logp), "bytes": list(piece)}


class CompletionShape(_Shape):
    """Of /v1/completions."""

    prefix, object_whole, object_part = "cmpl", "text_completion", "text_completion"
    asked: CompletionRequest

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "finish_reason": choice.finish,
            "logprobs": self._logprobs(choice.bursts, 0),
            **self._ids(choice, choice.bursts, opening=True),
        }

    def events(self, choice: Choice, part: Part) -> Iterator[str]:
        opening, offset = not choice.bursts, sum(map(self._width, choice.tokens))
        choice.add(part)
        logprobs = self._logprobs([part.burst], offset)
        extra = self._ids(choice, [part.burst], opening)
        yield self._part(choice, text=part.text, finish_reason=part.finish, logprobs=logprobs, **extra)

    def _logprobs(self, bursts: Sequence[Burst], offset: int) -> dict[str, Any] | None:
        if self.asked.alternatives is None:
            return None
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for burst in bursts:
            for at, (token, logp) in enumerate(zip(burst.tokens, burst.raw_logp, strict=True)):
                shown["tokens"].append(self._name(int(token)))
                shown["token_logprobs"].append(float(logp))
                shown["text_offset"].append(offset)
                offset += self._width(int(token))
                if self.asked.alternatives:
                    pairs = list(zip(burst.top_ids[at], burst.top_logp[at], strict=True))[: self.asked.alternatives]
                    # the likelier of two tokens with one name stays
                    shown["top_logprobs"].append({self._name(int(i)): float(v) for i, v in reversed(pairs)})
        return {**shown, "top_logprobs": shown["top_logprobs"] or None}


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"

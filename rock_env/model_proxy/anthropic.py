"""Anthropic's Messages API to and from chat completions. Pure functions; what is not supported is refused by name.

Supported: text, tools, tool_use, tool_result, system, stop sequences, sampling and streams. A tool result that
`is_error` becomes text that begins with "Error: "; `cache_control` and `metadata` are hints, and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from rock_env.model_proxy.shapes import ApiError, invalid

Event = tuple[str, dict]
_FIELDS = {
    "model", "max_tokens", "messages", "system", "tools", "tool_choice", "stream", "temperature", "top_p", "top_k",
    "stop_sequences", "metadata",
}  # fmt: skip
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _unsupported(param: str) -> ApiError:
    return ApiError(400, "not_supported", f"{param}: not supported by this endpoint", param)


def to_chat(body: object) -> dict:
    """A Messages request as a chat completion request. Raises ApiError."""
    if not isinstance(body, dict):
        raise invalid("body", "a JSON object")
    for name in body:
        if name not in _FIELDS:
            raise _unsupported(str(name)[:100])
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise invalid("model", "a name")
    limit = body.get("max_tokens")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise invalid("max_tokens", "an integer >= 1")
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise invalid("messages", "a list that is not empty")
    if not isinstance(body.get("stream", False), bool):
        raise invalid("stream", "true or false")
    messages = []
    if body.get("system"):
        messages.append({"role": "system", "content": _text("system", body["system"])})
    for number, message in enumerate(body["messages"]):
        messages += _message(f"messages.{number}", message)
    chat = {"model": body["model"], "messages": messages, "max_tokens": limit, "stream": body.get("stream", False)}
    if chat["stream"]:
        chat["stream_options"] = {"include_usage": True}
    chat |= {name: body[name] for name in ("temperature", "top_p", "top_k") if name in body}
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    return chat | _tools(body)


def _tools(body: dict) -> dict:
    tools, chat = body.get("tools") or [], {}
    if not isinstance(tools, list):
        raise invalid("tools", "a list")
    functions = []
    for number, tool in enumerate(tools):
        where = f"tools.{number}"
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise invalid(where, "a tool with a name")
        if tool.get("type", "custom") != "custom":
            raise _unsupported(f"{where}.type")
        function = {"name": tool["name"], "description": tool.get("description", "")}
        functions.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema", {})}})
    if functions:
        chat["tools"] = functions
    choice = body.get("tool_choice")
    if choice is not None:
        if not isinstance(choice, dict):
            raise invalid("tool_choice", "an object")
        if choice.get("type") == "tool" and isinstance(choice.get("name"), str):
            chat["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        elif choice.get("type") in _CHOICES:
            chat["tool_choice"] = _CHOICES[choice["type"]]
        else:
            raise invalid("tool_choice.type", "auto, any, none, or tool with a name")
        if choice.get("disable_parallel_tool_use"):
            chat["parallel_tool_calls"] = False
    return chat


def _text(where: str, content: object) -> str:
    """Text, or blocks of text only."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "text, or a list of text blocks")
    parts = []
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{where}.{number}", "a block")
        if block.get("type") != "text":
            raise _unsupported(f"{where}.{number}.type {str(block.get('type'))[:50]!r}")
        if not isinstance(block.get("text"), str):
            raise invalid(f"{where}.{number}.text", "text")
        parts.append(block["text"])
    return "\n".join(parts)


def _message(where: str, message: object) -> list[dict]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise invalid(f"{where}.role", "user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise invalid(f"{where}.content", "text, or a list of blocks")
    special = "tool_use" if role == "assistant" else "tool_result"
    texts, found = [], []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == special:
            found.append((f"{where}.content.{number}", block))
        else:
            texts.append(_text(f"{where}.content", [block]))
    text = "\n".join(texts)
    if role == "assistant":
        calls = [_call(place, block) for place, block in found]
        return [{"role": role, "content": text or None, **({"tool_calls": calls} if calls else {})}]
    results = [_result(place, block) for place, block in found]
    return results + ([{"role": "user", "content": text}] if texts else [])


def _call(where: str, block: dict) -> dict:
    if not all(isinstance(block.get(name), str) for name in ("id", "name")) or not isinstance(block.get("input"), dict):
        raise invalid(where, "a tool_use with id, name and input")
    function = {"name": block["name"], "arguments": json.dumps(block["input"])}
    return {"id": block["id"], "type": "function", "function": function}


def _result(where: str, block: dict) -> dict:
    if not isinstance(block.get("tool_use_id"), str):
        raise invalid(f"{where}.tool_use_id", "the id of a tool_use")
    text = _text(f"{where}.content", block.get("content", ""))
    return {
        "role": "tool",
        "tool_call_id": block["tool_use_id"],
        "content": f"Error: {text}" if block.get("is_error") else text,
    }


# -- answers
def _usage(usage: dict | None) -> dict:
    usage = usage or {}
    return {"input_tokens": usage.get("prompt_tokens", 0), "output_tokens": usage.get("completion_tokens", 0)}


def from_chat(answer: dict, id: str) -> dict:
    """A chat completion (its first choice) as a Messages answer. Raises ApiError for one that has no such form."""
    choice = answer["choices"][0]
    message = choice["message"]
    content: list[dict] = []
    if message.get("content"):
        content.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or []:
        try:
            given = json.loads(call["function"]["arguments"] or "{}")
            block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": given}
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(502, "invalid_answer", "the model's tool call has no JSON arguments") from error
        content.append(block)
    return {
        "id": f"msg_{id}",
        "type": "message",
        "role": "assistant",
        "model": answer.get("model", ""),
        "content": content,
        "stop_reason": _STOP_REASONS.get(choice.get("finish_reason") or "stop", "end_turn"),
        "stop_sequence": None,
        "usage": _usage(answer.get("usage")),
    }


class Stream:
    """Chunks of a chat completion as the events of a Messages stream: `feed` each, then `finish`."""

    def __init__(self, id: str, model: str) -> None:
        self._id, self._model = id, model
        self._is_begun = False
        self._open: str | int | None = None  # "text", or the number of a tool call
        self._blocks = 0
        self._reason = "end_turn"
        self._usage: dict | None = None

    def _begin(self) -> Iterator[Event]:
        if not self._is_begun:
            self._is_begun = True
            message = {"id": f"msg_{self._id}", "type": "message", "role": "assistant", "model": self._model}
            message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(None)}
            yield "message_start", {"type": "message_start", "message": message}

    def _switch(self, to: str | int | None, block: dict) -> Iterator[Event]:
        """Close the block that is open, and open another (None: none)."""
        if self._open is not None:
            yield "content_block_stop", {"type": "content_block_stop", "index": self._blocks}
            self._blocks += 1
        self._open = to
        if to is not None:
            body = {"type": "content_block_start", "index": self._blocks, "content_block": block}
            yield "content_block_start", body

    def _delta(self, delta: dict) -> Event:
        return "content_block_delta", {"type": "content_block_delta", "index": self._blocks, "delta": delta}

    def feed(self, chunk: dict) -> Iterator[Event]:
        yield from self._begin()
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"][:1]:
            delta = choice.get("delta") or {}
            if delta.get("content"):
                if self._open != "text":
                    yield from self._switch("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": delta["content"]})
            for place, call in enumerate(delta.get("tool_calls") or []):
                number, function = call.get("index", place), call.get("function") or {}
                if self._open != number:
                    block = {"type": "tool_use", "id": call.get("id", ""), "name": function.get("name", "")}
                    yield from self._switch(number, {**block, "input": {}})
                if function.get("arguments"):
                    yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})
            if choice.get("finish_reason"):
                self._reason = _STOP_REASONS.get(choice["finish_reason"], "end_turn")

    def finish(self) -> Iterator[Event]:
        yield from self._begin()
        yield from self._switch(None, {})
        delta = {"stop_reason": self._reason, "stop_sequence": None}
        yield "message_delta", {"type": "message_delta", "delta": delta, "usage": _usage(self._usage)}
        yield "message_stop", {"type": "message_stop"}

"""What the agent's requests and the model's answers look like: OpenAI's chat and text completions. Pure functions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_KINDS = {400: "invalid_request_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}
_ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """An error for the agent: an HTTP status, and a code that programs can tell it by."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def openai(self) -> dict:
        kind = _KINDS.get(self.status, "api_error" if self.status != 504 else "timeout_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict:
        kind = _ANTHROPIC_KINDS.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(self), "code": self.code}}


def invalid(param: str, expected: str) -> ApiError:
    return ApiError(400, "invalid_request", f"{param}: expected {expected}", param)


@dataclass(frozen=True)
class Request:
    """A request as whoever answers sees it: OpenAI's, whatever the agent spoke.

    Attributes:
      id: unique within the sandbox. path: CHAT or TEXT. body: JSON, with "stream" as the agent wants it.
    """

    id: str
    path: str
    body: dict

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def model(self) -> str:
        return str(self.body["model"])[:200]


def check_openai(path: str, body: object) -> dict:
    """The body of an OpenAI request; what the model does not know of it is for the model to say. Raises ApiError."""
    if not isinstance(body, dict):
        raise invalid("body", "a JSON object")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise invalid("model", "a name")
    if not isinstance(body.get("stream", False), bool | None):
        raise invalid("stream", "true or false")
    if path == CHAT and (not isinstance(body.get("messages"), list) or not body["messages"]):
        raise invalid("messages", "a list that is not empty")
    if path == TEXT and not isinstance(body.get("prompt"), str | list):
        raise invalid("prompt", "text, or a list")
    return body


def check_answer(request: Request, answer: object) -> dict:
    """A whole answer of the model. Raises ValueError for what is none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError("expected a completion object with choices")
    for choice in choices:
        if request.path == CHAT and not isinstance(choice.get("message"), dict):
            raise ValueError("choices: expected each to have a message")
        if request.path == TEXT and not isinstance(choice.get("text"), str):
            raise ValueError("choices: expected each to have a text")
    return answer


def check_chunk(chunk: object) -> dict:
    """A piece of a streamed answer. Raises ValueError."""
    if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
        raise ValueError("expected a completion chunk with choices")
    if not all(isinstance(choice, dict) for choice in chunk["choices"]):
        raise ValueError("choices: expected objects")
    return chunk


def chunks_of(request: Request, answer: dict) -> Iterator[dict]:
    """A whole answer as the pieces of a stream."""
    base = {"id": answer.get("id", request.id), "created": answer.get("created", int(time.time()))}
    base |= {"model": answer.get("model", request.model)}
    base["object"] = "chat.completion.chunk" if request.path == CHAT else "text_completion"
    for place, choice in enumerate(answer["choices"]):
        index, reason = choice.get("index", place), choice.get("finish_reason") or "stop"
        if request.path == TEXT:
            yield {**base, "choices": [{**choice, "index": index, "finish_reason": reason}]}
            continue
        message = {key: value for key, value in choice["message"].items() if value is not None}
        calls = message.pop("tool_calls", None)
        if calls:
            message["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        extra = {key: value for key, value in choice.items() if key not in ("message", "finish_reason", "index")}
        delta = {"role": "assistant", **message}
        yield {**base, "choices": [{**extra, "index": index, "delta": delta, "finish_reason": None}]}
        yield {**base, "choices": [{"index": index, "delta": {}, "finish_reason": reason}]}
    if answer.get("usage") and (request.body.get("stream_options") or {}).get("include_usage"):
        yield {**base, "choices": [], "usage": answer["usage"]}


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def parse(data: bytes) -> object:
    """JSON, strictly: no NaN or Infinity. Raises ValueError."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def compact(value: object) -> bytes:
    """JSON in ASCII: half a surrogate pair would be no UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")

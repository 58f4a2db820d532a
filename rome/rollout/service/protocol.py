"""What a client may send, checked once, here. An unknown or unsupported field is an error that names it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from rome.rollout.service.errors import ServiceError, invalid

T = TypeVar("T", "ChatRequest", "CompletionRequest")
MAX_STOPS = 4
MAX_CHOICES = 16
MAX_ALTERNATIVES = 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FunctionCall(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextContent(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextContent] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # clients send back what they got, empty fields included
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        return self.content or "" if not isinstance(self.content, list) else "".join(part.text for part in self.content)


class FunctionSpec(_Strict):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class ToolSpec(_Strict):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Strict):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: str | None = None
    definition: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class _Common(_Strict):
    """Fields of both endpoints. `top_k`, `min_p` and `return_token_ids` are extensions, under the names that other
    open servers give them."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = None
    # accepted only where they change nothing
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[ToolSpec]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> dict[int, ToolSpec]:
        """The tools, by their place, of which the answer must call one; none: it need not."""
        tools = dict(enumerate(self.tools or []))
        if isinstance(self.tool_choice, NamedTool):
            return {i: tool for i, tool in tools.items() if tool.function.name == self.tool_choice.function.name}
        return tools if self.tool_choice == "required" else {}

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """Of the JSON that the answer must be; None: any text."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return wanted.json_schema.definition if wanted.json_schema else {"type": "object"}


class CompletionRequest(_Common):
    """POST /v1/completions. A prompt is text or token ids, or a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: Literal[False] = False

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


def parse(kind: type[T], body: bytes) -> T:
    """The request in a body. Raises ServiceError 400, which names the first field that is wrong."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServiceError(400, f"body: expected JSON: {error}", "body", "invalid_json") from None
    if not isinstance(document, dict):
        raise ServiceError(400, f"body: expected a JSON object, found {type(document).__name__}", "body")
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise invalid(_path(first["loc"]), _reason(first)) from None
    _check_together(request)
    return request


def _check_together(request: ChatRequest | CompletionRequest) -> None:
    if any(not stop for stop in request.stops):
        raise invalid("stop", "expected strings that are not empty")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "expected only with stream")
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs", "expected only with logprobs")
        if None not in (request.max_tokens, request.max_completion_tokens):
            raise invalid("max_tokens", "expected not to be there beside max_completion_tokens")
        _check_constraints(request)


def _check_constraints(request: ChatRequest) -> None:
    choice, wanted = request.tool_choice, request.response_format
    if (choice == "required" or isinstance(choice, NamedTool)) and not request.forced:
        raise invalid("tool_choice", "expected the name of one of the tools, or `required` with tools")
    for index, tool in enumerate(request.offered):
        if tool.function.strict and index not in request.forced:
            raise invalid(f"tools.{index}.function.strict", "expected true only where tool_choice forces a call")
    if wanted is None:
        return
    if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
        raise invalid("response_format.json_schema", "expected with the type json_schema, and only with it")
    if wanted.type != "text" and request.offered:
        raise invalid("response_format", "expected no tools beside it, or the tool_choice none")


def _path(location: tuple[str | int, ...]) -> str:
    """`messages.0.content`, without the branches of unions that pydantic adds."""
    names = [str(part) for part in location if isinstance(part, int) or part.isidentifier()]
    branches = {"str", "int", "none", "bool"}
    return ".".join([names[0], *(name for name in names[1:] if name not in branches)]) if names else "body"


def _reason(error: Any) -> str:
    found = json.dumps(error.get("input"), default=str)
    shown = found if len(found) <= 80 else found[:77] + "..."
    if error["type"] == "extra_forbidden":
        return "this field is not known or not supported"
    if error["type"] == "missing":
        return "expected this field"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {shown}"

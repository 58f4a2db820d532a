"""The HTTP service: OpenAI's chat completions and completions over a `Scheduler`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from rome.rollout.grammar import Grammar, GrammarCompiler, GrammarError, GrammarUnavailable, json_grammar
from rome.rollout.service.answers import ChatShape, Choice, CompletionShape, Shape
from rome.rollout.service.chats import ChatFormat
from rome.rollout.service.errors import ServiceError, invalid
from rome.rollout.service.metrics import ServiceMetrics
from rome.rollout.service.protocol import ChatRequest, CompletionRequest, parse
from rome.rollout.service.scheduler import Job, Part, Scheduler
from rome.rollout.service.text import TextStream
from rome.rollout.stream import Sampling


@dataclass(frozen=True)
class ServiceConfig:
    """`name` of the model as clients know it; `keys`: accepted API keys, none: all may come in; `request_seconds`: from
    arrival to the last token; `body_bytes`: the largest request."""

    name: str
    keys: tuple[str, ...] = ()
    request_seconds: float = 600.0
    body_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: expected a name, found ''")
        if any(not key for key in self.keys):
            raise ValueError("keys: expected no empty one")
        if not self.request_seconds > 0 or self.body_bytes < 1:
            raise ValueError("request_seconds, body_bytes: expected numbers above 0")


def make_app(scheduler: Scheduler, chat: ChatFormat, config: ServiceConfig) -> FastAPI:
    """The ASGI application. The caller owns the scheduler."""
    return _Service(scheduler, chat, config).app


class _Service:
    def __init__(self, scheduler: Scheduler, chat: ChatFormat, config: ServiceConfig) -> None:
        self.scheduler, self.chat, self.config = scheduler, chat, config
        self.metrics = ServiceMetrics(scheduler)
        self.created = int(time.time())
        self._compiler: GrammarCompiler | None = None  # made when first wanted
        self._compiling = threading.Lock()
        self.app = FastAPI(title="ROME", openapi_url=None)
        self.app.add_exception_handler(ServiceError, self._on_error)
        self.app.add_exception_handler(404, self._on_unknown)
        self.app.add_exception_handler(405, self._on_unknown)
        self.app.add_api_route("/health", self.health, methods=["GET"])
        self.app.add_api_route("/metrics", self.show_metrics, methods=["GET"])
        self.app.add_api_route("/v1/models", self.models, methods=["GET"])
        self.app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        self.app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        self.app.add_api_route("/v1/completions", self.completions, methods=["POST"])

    # ------------------------------------------------------------------------------------------------ small routes

    async def health(self) -> Response:
        """200 while requests are served; 503 while the server drains, or if the engine's thread is gone."""
        state = "draining" if self.scheduler.draining else "ok" if self.scheduler.alive else "dead"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, name: str) -> Response:
        self._authorize(request)
        self._check_model(name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, object]:
        longest = self.scheduler.engine.config.max_length
        return {
            "id": self.config.name,
            "object": "model",
            "created": self.created,
            "owned_by": "rome",
            "max_model_len": longest,
        }

    # ------------------------------------------------------------------------------------------------ the two endpoints

    async def chat_completions(self, request: Request) -> Response:
        return await self._counted("chat", request, self._chat)

    async def completions(self, request: Request) -> Response:
        return await self._counted("completions", request, self._completions)

    async def _chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await self._body(request))
        self._check_model(asked.model)
        prompt = self.chat.prompt(asked.messages, asked.offered)
        grammar = await asyncio.to_thread(self._grammar, asked)
        shape = ChatShape(self.chat, asked, self.config.name)
        return await self._answer(request, asked, shape, [prompt], "messages", grammar)

    def _grammar(self, asked: ChatRequest) -> Grammar | None:
        """What the answer must be, if the request says so."""
        if asked.forced:
            places = [f"tools.{index}.function.parameters" for index in asked.forced]
            where, source = places[0] if len(places) == 1 else "tools", self.chat.call_grammar(asked.forced)
        elif asked.answer_schema is not None:
            where, source = "response_format", json_grammar(asked.answer_schema)
        else:
            return None
        try:
            with self._compiling:
                if self._compiler is None:
                    self._compiler = GrammarCompiler(self.chat.vocabulary())
                return self._compiler.compile(source)
        except GrammarUnavailable as error:
            raise invalid("tool_choice" if asked.forced else "response_format", str(error), "not_installed") from None
        except GrammarError as error:
            raise invalid(where, f"expected a JSON schema that can be followed: {error}", "invalid_schema") from None

    async def _completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await self._body(request))
        self._check_model(asked.model)
        shape = CompletionShape(self.chat, asked, self.config.name)
        return await self._answer(request, asked, shape, self._prompts(asked), "prompt")

    def _prompts(self, asked: CompletionRequest) -> list[list[int]]:
        many = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
        if many and isinstance(many[0], int):
            many = [many]
        prompts = [self.chat.encode(one) if isinstance(one, str) else list(one) for one in many]
        if not prompts or not all(prompts):
            raise invalid("prompt", "expected at least one token")
        if any(not 0 <= token < self.chat.vocab_size for prompt in prompts for token in prompt):
            raise invalid("prompt", f"expected token ids in 0..{self.chat.vocab_size - 1}")
        return prompts

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        shape: Shape,
        prompts: Sequence[list[int]],
        field: str,
        grammar: Grammar | None = None,
    ) -> Response:
        choices = [Choice(i, prompt) for i, prompt in enumerate(p for p in prompts for _ in range(asked.n))]
        arrivals: asyncio.Queue[tuple[Choice, Part | ServiceError]] = asyncio.Queue()
        jobs = [self._job(asked, choice, arrivals, field, grammar) for choice in choices]
        self.scheduler.submit(jobs)
        parts = self._parts(request, jobs, arrivals)
        if asked.stream:
            # the first event is awaited here: what fails before it still has a status of its own
            first = await anext(parts)
            return StreamingResponse(self._events(shape, choices, first, parts), media_type="text/event-stream")
        async with contextlib.aclosing(parts):
            async for choice, part in parts:
                choice.add(part)
        return JSONResponse(shape.whole(choices))

    def _job(
        self,
        asked: ChatRequest | CompletionRequest,
        choice: Choice,
        arrivals: asyncio.Queue[tuple[Choice, Part | ServiceError]],
        field: str,
        grammar: Grammar | None,
    ) -> Job:
        longest = self.scheduler.engine.config.max_length
        room = longest - len(choice.prompt)
        if room < 1:
            message = f"expected at most {longest - 1} tokens, found {len(choice.prompt)}"
            raise invalid(field, message, "context_length_exceeded")
        if (asked.limit or 1) > room:
            raise invalid("max_tokens", f"expected at most {room} beside this prompt, found {asked.limit}")
        if asked.seed is None:
            seed = secrets.randbits(64)
        else:  # each choice has a stream of its own
            seed = asked.seed + (choice.index << 32) * 0x9E3779B1 & 2**64 - 1
        sampling = Sampling(
            seed=seed,
            max_tokens=asked.limit or room,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
            alternatives=bool(asked.alternatives),
        )
        loop = asyncio.get_running_loop()

        def deliver(item: Part | ServiceError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(arrivals.put_nowait, (choice, item))

        deadline = time.monotonic() + self.config.request_seconds
        prompt = np.array(choice.prompt, np.int32)
        constraint = None if grammar is None else grammar.begin()
        return Job(prompt, sampling, TextStream(self.chat.piece, asked.stops), deadline, deliver, constraint)

    async def _parts(
        self, request: Request, jobs: Sequence[Job], arrivals: asyncio.Queue[tuple[Choice, Part | ServiceError]]
    ) -> AsyncGenerator[tuple[Choice, Part], None]:
        """All choices' parts as they come. Raises ServiceError if one fails, `_Gone` if the client leaves.

        However it ends, no job goes on: those that are not done are cancelled.
        """
        gone = asyncio.ensure_future(_disconnected(request))
        left = len(jobs)
        try:
            while left:
                arrival = asyncio.ensure_future(arrivals.get())
                await asyncio.wait((arrival, gone), return_when=asyncio.FIRST_COMPLETED)
                if not arrival.done():
                    arrival.cancel()
                    raise _Gone
                choice, item = arrival.result()
                if isinstance(item, ServiceError):
                    raise item
                self.metrics.count(item)
                left -= item.finish is not None
                yield choice, item
        finally:
            gone.cancel()
            self.scheduler.cancel(jobs)

    async def _events(
        self,
        shape: Shape,
        choices: Sequence[Choice],
        first: tuple[Choice, Part],
        parts: AsyncGenerator[tuple[Choice, Part], None],
    ) -> AsyncIterator[str]:
        """Server-sent events; an error after the first one is an event, too."""
        try:
            for event in shape.opening(choices):
                yield event
            for event in shape.events(*first):
                yield event
            async for choice, part in parts:
                for event in shape.events(choice, part):
                    yield event
            for event in shape.closing(choices):
                yield event
        except ServiceError as error:
            yield shape.error(error)
        except _Gone:
            return
        finally:
            await parts.aclose()

    # ------------------------------------------------------------------------------------------------ at the door

    async def _counted(
        self, endpoint: str, request: Request, handler: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        started, status = time.monotonic(), 500
        try:
            self._authorize(request)
            response = await handler(request)
            status = response.status_code
            return response
        except ServiceError as error:
            status = error.status
            raise
        except _Gone:
            status = 499
            return Response(status_code=499)
        finally:
            self.metrics.request(endpoint, status, time.monotonic() - started)

    def _authorize(self, request: Request) -> None:
        if not self.config.keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.config.keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ServiceError(401, "expected a known API key as a bearer token", code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self.config.name:
            message = f"model: expected {self.config.name!r}, found {name[:80]!r}"
            raise ServiceError(404, message, "model", "model_not_found")

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self.config.body_bytes:
                raise ServiceError(413, f"body: expected at most {self.config.body_bytes} bytes", "body")
        return bytes(body)

    async def _on_error(self, request: Request, error: ServiceError) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
        return JSONResponse(error.body, error.status, headers)

    async def _on_unknown(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return JSONResponse(ServiceError(status, f"{request.method} {request.url.path}: no such route").body, status)


class _Gone(Exception):
    """The client has left."""


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

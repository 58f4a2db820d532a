"""The trainer's side of a sandbox's model endpoint, in pull mode: take a request, answer it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rock_env.errors import SpecError
from rock_env.jobs import MAX_WAIT_SECONDS

if TYPE_CHECKING:
    from rock_env.backend import Backend


class ModelRequest:
    """A request of an agent. It is this caller's until the lease ends, and to be answered once.

    Attributes:
      path: "/v1/chat/completions" or "/v1/completions": Anthropic's have been translated.
      body: its JSON, e.g. with "messages", "tools" and "max_tokens".
      attempt: 1; more when somebody else took it before and did not answer.
      deadline: seconds since 1970, when the agent gets a 504.

    `answer`, `send` and `fail` raise LeaseLost when it is not this caller's any more, and SpecError for what is no
    answer; after a connection that was cut, they may be called again.
    """

    def __init__(self, server: ModelServer, row: dict, body: dict) -> None:
        self.id, self.path, self.body = row["id"], row["path"], body
        self.attempt, self.deadline, self.lease = row["attempt"], row["deadline"], row["lease"]
        self._server = server
        self._given = 0

    @property
    def stream(self) -> bool:
        """Whether the agent wants it in pieces. It may be answered in whole all the same."""
        return bool(self.body.get("stream"))

    def answer(self, completion: dict) -> None:
        """Answer with a whole completion, as OpenAI's API has it."""
        self._server._answer(self, completion)

    def send(self, chunks: Iterable[dict], done: bool = False) -> None:
        """The next pieces of a streamed answer (completion chunks), of which `done` ones are the last. Each renews the
        lease; but once there was one, nobody else can take over: the agent gets an error if the rest does not come."""
        chunks = list(chunks)
        self._server._answer(self, chunks, at=self._given, done=done)
        self._given += len(chunks)

    def fail(self, message: str, status: int = 500, code: str = "model_error") -> None:
        """Answer with an error, in the shape of the API that the agent speaks."""
        if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status <= 599:
            raise SpecError(f"status: expected 400..599, got {status!r}")
        self._server._answer(self, {"message": message, "code": code}, status=status)


class ModelServer:
    """Requests of one sandbox. Thread-safe: several may ask for the next one."""

    def __init__(self, backend: Backend, sandbox: str) -> None:
        self._backend, self._sandbox = backend, sandbox

    def next(self, wait: float = MAX_WAIT_SECONDS) -> ModelRequest | None:
        """The oldest request that nobody has, waiting at most `wait` seconds (of which 30 count) for one; or None."""
        seconds = min(max(0.0, float(wait)), MAX_WAIT_SECONDS)
        reply, data = self._backend.call(self._sandbox, "model_next", seconds, seconds=seconds)
        return ModelRequest(self, reply["request"], json.loads(data)) if reply["request"] is not None else None

    def status(self) -> dict[str, int]:
        """{"waiting", "leased", "answered"}: how many requests."""
        return self._backend.call(self._sandbox, "model_status", 0.0)[0]

    def _answer(
        self, request: ModelRequest, value: object, status: int = 200, at: int | None = None, done: bool = True
    ) -> None:
        try:
            data = json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise SpecError(f"answer: expected JSON ({error})") from error
        given = {"request": request.id, "lease": request.lease, "status": status, "at": at, "done": done}
        self._backend.call(self._sandbox, "model_answer", 0.0, data, **given)

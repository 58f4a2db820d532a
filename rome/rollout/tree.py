"""The token ledger of an agent that talks to its model as to any other server: with whole lists of messages.

Such an agent repeats the history in every request, forks it for sub-agents and replaces it when it grows too long. The
tree finds, for each request, the longest history that the model has seen token for token, and renders only what comes
after it: nothing that was sampled is ever tokenised again. Histories that nobody continues, or that the agent changed,
start a new *segment*. All segments of a rollout share its reward, and every sampled response is trained on in exactly
one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rome.models import Message, Renderer
from rome.rollout.engine import Sampled
from rome.rollout.ledger import LedgerError, TokenLedger
from rome.trajectory import Chunk, Status, Task, Trajectory


@dataclass(eq=False)
class _Context:
    """Messages that nobody sampled here, rendered together, the assistant's header included."""

    messages: tuple[Message, ...]
    tokens: np.ndarray
    parent: _Response | None
    responses: list[_Response] = field(default_factory=list)


@dataclass(eq=False)
class _Response:
    """One sampled chunk, and what the agent was told that it says."""

    message: Message
    chunk: Chunk
    parent: _Context
    contexts: list[_Context] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """A request, ready to be sampled: int32[n] tokens of which the first `known` the model has seen before."""

    tokens: np.ndarray
    known: int
    context: _Context


class MessageTree:
    """Everything one rollout asked its model, and what the model said. Thread-safe: sub-agents ask at the same time.

    Args:
      rollout_id: names the rollout; the id of its first segment.
      renderer: of the policy.
      capacity: the most tokens a segment may hold (the engine's `max_length`).
    """

    def __init__(self, rollout_id: str, renderer: Renderer, capacity: int) -> None:
        self.rollout_id, self._renderer, self._capacity = rollout_id, renderer, capacity
        self._roots: list[_Context] = []
        self._responses: list[_Response] = []  # in the order of their sampling
        self._lock = threading.Lock()

    def ask(self, messages: Sequence[Message]) -> Turn:
        """Finds the request's place. Raises LedgerError if it is empty, or leaves no room for a token."""
        wanted = tuple(messages)
        if not wanted:
            raise LedgerError(f"rollout {self.rollout_id}: messages: expected at least one")
        with self._lock:
            context = self._place(wanted)
            before = _tokens_before(context)
            tokens = np.concatenate([before, context.tokens])
            if len(tokens) >= self._capacity:
                expected = f"expected fewer than {self._capacity} tokens"
                raise LedgerError(f"rollout {self.rollout_id}: messages: {expected}, found {len(tokens)}")
            siblings = context.parent.contexts if context.parent else self._roots
            if context not in siblings:
                siblings.append(context)
            return Turn(tokens, len(tokens) if context.responses else len(before), context)

    def answer(self, turn: Turn, sampled: Sampled, error: bool = False) -> Message:
        """Writes down what the model said, and returns it as the agent is told: the next request may repeat it."""
        parsed = self._renderer.parse(sampled.tokens)
        command = parsed.command if parsed.kind == "tool_call" else None
        message = Message("assistant", parsed.text, command)
        text = self._renderer.tokenizer.decode(sampled.tokens.tolist())
        with self._lock:
            name = f"{self.rollout_id}#{len(self._responses)}"
            failed = error or parsed.kind == "malformed"
            chunk = Chunk(name, sampled.tokens, sampled.behavior_logp, sampled.versions, text, error=failed)
            response = _Response(message, chunk, turn.context)
            turn.context.responses.append(response)
            self._responses.append(response)
        return message

    @property
    def responses(self) -> int:
        """How many responses were sampled so far."""
        return len(self._responses)

    def segments(
        self, group_id: str, task: Task, seed: int, final_reward: float | None, status: Status
    ) -> list[Trajectory]:
        """The rollout as trajectories, one for each history that ends in a response.

        A response that several histories share is trained on in the first of them; in the others it is a replayed
        prefix (`prefix_chunks`), which is never trained on.
        """
        with self._lock:
            taken: set[_Response] = set()
            segments = []
            for path in self._paths():
                fresh = next(index for index, response in enumerate(path) if response not in taken)
                taken.update(path)
                suffix = f"~{len(segments)}" if segments else ""
                ledger = self._ledger(path, self.rollout_id + suffix)
                segments.append(
                    Trajectory(
                        id=ledger.trajectory_id,
                        group_id=group_id,
                        task=task,
                        seed=seed,
                        prompt=ledger.prompt,
                        chunks=ledger.chunks,
                        observations=ledger.observations,
                        final_reward=final_reward,
                        status=status,
                        start_version=min(int(c.versions.min()) for c in ledger.chunks),
                        prefix_chunks=fresh,
                    )
                )
            return segments

    def _place(self, wanted: tuple[Message, ...]) -> _Context:
        """The context that the request ends with: a known one, or a new one after the longest known history."""
        best: tuple[int, _Response | None] = (0, None)
        for context, used in self._matches(self._roots, wanted, 0):
            if used == len(wanted):
                return context
            for response in context.responses:
                if used < len(wanted) and response.message == wanted[used] and used + 1 > best[0]:
                    best = used + 1, response
        used, parent = best
        if used == len(wanted):  # a request that ends with the model's own words: it is to go on after them
            raise LedgerError(f"rollout {self.rollout_id}: messages: expected a message after the assistant's last")
        left = wanted[used:]
        render = self._renderer.prompt if parent is None else self._renderer.observation
        return _Context(left, np.array(render(list(left)), np.int32), parent)

    def _matches(
        self, contexts: Sequence[_Context], wanted: tuple[Message, ...], used: int
    ) -> Iterator[tuple[_Context, int]]:
        """Every known context that the request goes through, with how many messages that uses up."""
        for context in contexts:
            end = used + len(context.messages)
            if wanted[used:end] != context.messages:
                continue
            yield context, end
            for response in context.responses:
                if end < len(wanted) and response.message == wanted[end]:
                    yield from self._matches(response.contexts, wanted, end + 1)

    def _paths(self) -> Iterator[list[_Response]]:
        """Root to leaf, as responses; leaves in the order of their sampling."""
        for response in self._responses:
            if any(context.responses for context in response.contexts):
                continue
            path = [response]
            while (parent := path[-1].parent.parent) is not None:
                path.append(parent)
            yield path[::-1]

    def _ledger(self, path: Sequence[_Response], name: str) -> TokenLedger:
        ledger = TokenLedger(name, self._capacity)
        for index, response in enumerate(path):
            context = response.parent
            text = context.messages[-1].content
            if index == 0:
                ledger.append_prompt(context.tokens, text)
            else:
                ledger.append_observation(context.tokens, text)
            ledger.append_chunk(response.chunk)
        return ledger


def _tokens_before(context: _Context) -> np.ndarray:
    """int32[n]: all that stands before a context."""
    parts: list[np.ndarray] = []
    response = context.parent
    while response is not None:
        parts += [response.chunk.tokens, response.parent.tokens]
        response = response.parent.parent
    return np.concatenate(parts[::-1]) if parts else np.zeros(0, np.int32)

"""Agent-native rollouts: the agent is a program in the sandbox that speaks to its model as to any other.

The program, whatever it is written in, finds an OpenAI- or Anthropic-compatible endpoint on its own loopback
(`rock_env.ModelProxy`). Its requests come out here, are sampled by the same stream engine as `rome serve`, and are
written into a `MessageTree`; when the program has ended, the verifier judges, and the tree's segments are trajectories
like any other. The agent never holds tokens, keys or a route to anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rock_env import ModelProxy, Sandbox
from rock_env.errors import RockError
from rock_env.harbor import run_verifier, sandbox_spec
from rome.envs import EnvFailure
from rome.envs.sandboxes import infrastructure
from rome.models import Message, Renderer
from rome.rollout.engine import Finish, Sampled
from rome.rollout.episode import GroupRequest, sampling_key
from rome.rollout.ledger import LedgerError
from rome.rollout.service import RomeChat, Scheduler, ServiceError
from rome.rollout.service.answers import ChatShape, Choice
from rome.rollout.service.protocol import ChatRequest, parse
from rome.rollout.service.scheduler import Job, Part
from rome.rollout.service.text import TextStream
from rome.rollout.stream import Sampling
from rome.rollout.tree import MessageTree, Turn
from rome.trajectory import Status, Trajectory

_CALL_AS_TEXT = re.compile(r"(.*?)<tool_call>(.*)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class NativeConfig:
    """Attributes:
    program: the files of the agent, by path in the sandbox; executable.
    command: that starts it, with the task's instruction as `$ROME_INSTRUCTION`.
    agent_seconds: it is stopped after so long; the verifier still runs (`truncated`).
    request_seconds: for one answer of the model.
    max_requests: of one rollout; more are refused (429).
    max_tokens: of one answer, if the agent asks for no fewer.
    temperature: of every answer; what the agent asks for is not what is trained.
    workers: rollouts at once. max_retries: of a sample that was lost to an infrastructure failure.
    """

    program: dict[str, str]
    command: str
    agent_seconds: float = 120.0
    request_seconds: float = 60.0
    max_requests: int = 64
    max_tokens: int = 64
    temperature: float = 1.0
    workers: int = 8
    max_retries: int = 2

    def __post_init__(self) -> None:
        if not self.program or not self.command:
            raise ValueError(f"program, command: expected both, found {sorted(self.program)} and {self.command!r}")
        for name in ("agent_seconds", "request_seconds", "max_requests", "max_tokens", "workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, found {getattr(self, name)!r}")


class NativeRollouts:
    """Rolls out agents that speak to their model themselves.

    Args:
      scheduler: of the engine that samples; others may use it at the same time.
      renderer, chat: of the policy.
      config: the agent, and its limits.
    """

    def __init__(self, scheduler: Scheduler, renderer: Renderer, chat: RomeChat, config: NativeConfig) -> None:
        self._scheduler, self._renderer, self._chat, self.config = scheduler, renderer, chat, config
        self.lost: dict[str, str] = {}  # sample → why it was given up

    def run(self, requests: Sequence[GroupRequest]) -> list[list[Trajectory]]:
        """The segments of every sample of every group; a group of which a sample was given up is left out."""
        work = [(request, sample) for request in requests for sample in range(request.size)]
        with ThreadPoolExecutor(self.config.workers, thread_name_prefix="native") as pool:
            found = list(pool.map(lambda one: self._sample(*one), work))
        segments = {(request.group_id, sample): part for (request, sample), part in zip(work, found, strict=True)}
        groups = []
        for request in requests:
            found = [segments[request.group_id, sample] for sample in range(request.size)]
            if all(part is not None for part in found):
                groups.append([trajectory for part in found for trajectory in part])
        return groups

    def _sample(self, request: GroupRequest, sample: int) -> list[Trajectory] | None:
        for attempt in range(self.config.max_retries + 1):
            name = f"{request.group_id}/{sample}" + (f"+{attempt}" if attempt else "")
            try:
                return self._rollout(request, name)
            except EnvFailure as error:
                self.lost[name] = str(error)
        return None

    def _rollout(self, request: GroupRequest, name: str) -> list[Trajectory]:
        c, task = self.config, request.task
        tree = MessageTree(name, self._renderer, self._scheduler.engine.config.max_length)
        boxes: list[Sandbox] = []
        with infrastructure(lambda: _stop(boxes)):
            spec = sandbox_spec(task, c.agent_seconds)
            proxy = ModelProxy(request_seconds=c.request_seconds)
            box = Sandbox.start(dataclasses.replace(spec, model_proxy=proxy))
            boxes.append(box)
            box.write_files({path: text.encode() for path, text in c.program.items()})
            variables = {"ROME_INSTRUCTION": task.task.instruction}
            agent = box.start_job(c.command, timeout=c.agent_seconds, env=variables)
            self._serve(box, agent, tree, request.seed)
            status = Status.TRUNCATED if agent.status().exit_code == 124 else Status.COMPLETED
            if not tree.responses:
                raise EnvFailure(Status.INFRA_FAILURE, f"the agent never asked its model: {_last_words(agent)}")
            reward = run_verifier(box, task)
            box.stop()
        return tree.segments(request.group_id, task.task, request.seed, reward, status)

    def _serve(self, box: Sandbox, agent: Any, tree: MessageTree, seed: int) -> None:
        """Answers the agent's requests until it has ended; several at once, as sub-agents ask."""
        threads: list[threading.Thread] = []
        asked = 0
        while agent.status().is_running:
            request = box.model.next(wait=0.5)
            if request is None:
                continue
            asked += 1
            if asked > self.config.max_requests:
                request.fail(f"more than {self.config.max_requests} requests", 429, "rate_limit_exceeded")
                continue
            number = asked
            thread = threading.Thread(target=self._answer, args=(request, tree, f"{seed}/{tree.rollout_id}/{number}"))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(self.config.request_seconds)

    def _answer(self, request: Any, tree: MessageTree, key: str) -> None:
        try:
            try:
                request.answer(self._complete(request, tree, key))
            except (ServiceError, LedgerError) as error:
                status = error.status if isinstance(error, ServiceError) else 400
                request.fail(str(error), status, "invalid_request_error" if status < 500 else "model_error")
        except RockError:
            pass  # the sandbox is gone, or the agent has given the request up: nobody listens

    def _complete(self, request: Any, tree: MessageTree, key: str) -> dict[str, Any]:
        if request.path != "/v1/chat/completions":
            raise ServiceError(404, f"{request.path}: an agent under training asks for chat completions")
        asked = parse(ChatRequest, json.dumps(request.body).encode())
        messages = [_as_sampled(message) for message in self._chat.messages(asked.messages)]
        turn = tree.ask(messages)
        limit = min(asked.limit or self.config.max_tokens, self.config.max_tokens)
        choice = self._draw(turn, limit, key)
        tree.answer(turn, _sampled(choice))
        return ChatShape(self._chat, asked, "policy").whole([choice])

    def _draw(self, turn: Turn, limit: int, key: str) -> Choice:
        """One answer, by the engine that everybody shares."""
        sampling = Sampling(sampling_key(key), limit, self.config.temperature)
        choice, done, failure = Choice(0, turn.tokens.tolist()), threading.Event(), []

        def deliver(item: Part | ServiceError) -> None:
            if isinstance(item, ServiceError):
                failure.append(item)
            else:
                choice.add(item)
            if failure or choice.finish is not None:
                done.set()

        deadline = time.monotonic() + self.config.request_seconds
        job = Job(turn.tokens, sampling, TextStream(self._chat.piece), deadline, deliver)
        self._scheduler.submit([job])
        if not done.wait(self.config.request_seconds + 5.0):
            self._scheduler.cancel([job])
            raise ServiceError(504, "the engine gave no answer in time")
        if failure:
            raise failure[0]
        return choice


def _as_sampled(message: Message) -> Message:
    """An answer to a request without tools holds its call as text; repeated by the agent, it is that answer again."""
    if message.role == "assistant" and message.command is None:
        found = _CALL_AS_TEXT.fullmatch(message.content)
        if found:
            return Message("assistant", found[1], found[2])
    return message


def _sampled(choice: Choice) -> Sampled:
    bursts = choice.bursts
    versions = [np.full(len(burst.tokens), burst.version, np.int32) for burst in bursts]
    return Sampled(
        np.concatenate([burst.tokens for burst in bursts]).astype(np.int32),
        np.concatenate([burst.behavior_logp for burst in bursts]).astype(np.float32),
        np.concatenate([burst.raw_logp for burst in bursts]).astype(np.float32),
        np.concatenate(versions),
        Finish.STOP if choice.finish == "stop" else Finish.LENGTH,
    )


def _stop(boxes: Sequence[Sandbox]) -> None:
    for box in boxes:
        with contextlib.suppress(RockError):  # it is dead already
            box.stop()


def _last_words(agent: Any) -> str:
    reply = b"".join(getattr(piece, "data", b"") for piece in agent.read().pieces)
    return reply[-400:].decode(errors="replace")

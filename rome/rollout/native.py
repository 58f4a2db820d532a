"""Agent-native rollouts: the agent is a program in the sandbox that speaks to its model as to any other.

The program, whatever it is written in, finds an OpenAI- or Anthropic-compatible endpoint on its own loopback
(`rock_env.ModelProxy`). Its requests come out here, are sampled by the same stream engine as `rome serve`, and are
written into a `MessageTree`; when the program has ended, the verifier judges, and the tree's segments are trajectories
like any other. The agent never holds tokens, keys or a route to anything.

`run` works in rounds: requests go to the engine together, once every agent that is under way has asked or ended. So
which of them share the engine's steps is no matter of timing, and the same seed gives the same trajectories, bit for
bit, for agents that ask one thing at a time. (Sub-agents that ask side by side race for the number that their samples'
keys are drawn from.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from rome.rollout.runner import GroupDropped, RolloutStats
from rome.rollout.service import RomeChat, Scheduler, ServiceError
from rome.rollout.service.answers import ChatShape, Choice
from rome.rollout.service.protocol import ChatRequest, parse
from rome.rollout.service.scheduler import Job, Part
from rome.rollout.service.text import TextStream
from rome.rollout.stream import Sampling, StreamEngine
from rome.rollout.sync import AdapterMerger, take_weights
from rome.rollout.tree import MessageTree, Turn
from rome.trajectory import Status, Trajectory

_END_SECONDS = 15.0  # for agents to be ended in
_CALL_AS_TEXT = re.compile(r"(.*?)<tool_call>(.*)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class NativeConfig:
    """Attributes:
    program: the files of the agent, by path in the sandbox; executable.
    command: that starts it, with the task's instruction as `$ROME_INSTRUCTION`.
    variables: of its environment, beside those that name the model's endpoint.
    agent_seconds: it is stopped after so long; the verifier still runs (`truncated`).
    request_seconds: for one answer of the model.
    max_requests: of one rollout; more are refused (429).
    max_tokens: of one answer, if the agent asks for no fewer.
    temperature, top_k, top_p, min_p: of every answer; what the agent asks for is not what is trained.
    workers: rollouts at once. max_retries: of a sample that was lost to an infrastructure failure.
    """

    program: dict[str, str]
    command: str
    variables: dict[str, str] = field(default_factory=dict)
    agent_seconds: float = 120.0
    request_seconds: float = 60.0
    max_requests: int = 64
    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    workers: int = 8
    max_retries: int = 2

    def __post_init__(self) -> None:
        if not self.program or not self.command:
            raise ValueError(f"program, command: expected both, found {sorted(self.program)} and {self.command!r}")
        for name in ("agent_seconds", "request_seconds", "max_requests", "max_tokens", "workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, found {getattr(self, name)!r}")


class _Rounds:
    """Holds requests back until each of `members` threads has one waiting, or has left; then submits all of them.

    A thread's jobs wait under the name of the rollout that it is on; several, if its agent asks side by side.
    """

    def __init__(self, scheduler: Scheduler, members: int, seconds: float) -> None:
        self._scheduler, self._members, self._seconds = scheduler, members, seconds
        self._waiting: dict[str, list[Job]] = {}
        self._lock = threading.Lock()

    def submit(self, rollout: str, job: Job) -> None:
        with self._lock:
            self._waiting.setdefault(rollout, []).append(job)
            self._release()

    def withdraw(self, rollout: str) -> None:
        """The rollout is over: nobody waits for what it asked."""
        with self._lock:
            jobs = self._waiting.pop(rollout, [])
        for job in jobs:
            job.deliver(ServiceError(499, "the agent has ended", code="cancelled"))

    def leave(self) -> None:
        """A thread has nothing left to do."""
        with self._lock:
            self._members -= 1
            self._release()

    def _release(self) -> None:
        if len(self._waiting) < max(1, self._members):
            return
        jobs = [job for rollout in sorted(self._waiting) for job in self._waiting[rollout]]
        self._waiting = {}
        for job in jobs:
            job.deadline = time.monotonic() + self._seconds
        try:
            self._scheduler.submit(jobs)
        except ServiceError as error:
            for job in jobs:
                job.deliver(error)


class NativeRollouts:
    """Rolls out agents that speak to their model themselves; `RolloutRunner`'s methods, as far as `run` goes.

    Args:
      scheduler: of the engine that samples; its queue takes `config.workers` requests. Only for `run` is it this
        object's alone.
      renderer, chat: of the policy.
      config: the agent, and its limits.
      merger: as for `RolloutRunner`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        renderer: Renderer,
        chat: RomeChat,
        config: NativeConfig,
        merger: AdapterMerger | None = None,
    ) -> None:
        self._scheduler, self._renderer, self._chat, self.config = scheduler, renderer, chat, config
        self._merger = merger
        self.stats, self.trace = RolloutStats(), None
        self.lost: dict[str, str] = {}  # attempt at a sample → what it was lost for
        self._lock = threading.Lock()  # of the statistics
        self._over = threading.Event()

    def __enter__(self) -> NativeRollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> StreamEngine:
        return self._scheduler.engine

    def update_weights(self, weights: Any, version: int) -> float:
        """New weights for the next burst (see `take_weights`); returns the seconds that it took."""
        return take_weights(self.engine, self._merger, weights, version)

    def close(self) -> None:
        """Ends every agent, and the scheduler. Idempotent."""
        self._over.set()
        self._scheduler.close()

    def run(
        self, requests: Sequence[GroupRequest], temperature: float | None = None, scored: bool = True
    ) -> list[list[Trajectory]]:
        """The segments of every sample of every group; a group of which a sample was given up is left out.

        `temperature` overrides the config's. Rewards are the verifier's, `scored` or not.
        """
        config = self.config if temperature is None else dataclasses.replace(self.config, temperature=temperature)
        self.engine.forget()
        work = deque((request, sample) for request in requests for sample in range(request.size))
        found: dict[tuple[str, int], list[Trajectory] | None] = {}
        failures: list[BaseException] = []
        members = min(config.workers, len(work))
        rounds = _Rounds(self._scheduler, members, config.request_seconds)

        def member() -> None:
            try:
                while not self._over.is_set():
                    try:
                        request, sample = work.popleft()
                    except IndexError:
                        return
                    found[request.group_id, sample] = self._sample(request, sample, config, rounds)
            except BaseException as error:  # delivered to whoever called
                failures.append(error)
                work.clear()
            finally:
                rounds.leave()

        threads = [threading.Thread(target=member, name="native", daemon=True) for _ in range(members)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: agents are ended, not waited for
            self._over.set()
            for thread in threads:
                thread.join(_END_SECONDS)
            raise
        if failures:
            raise failures[0]
        return self._complete(requests, found)

    def _complete(
        self, requests: Sequence[GroupRequest], found: Mapping[tuple[str, int], list[Trajectory] | None]
    ) -> list[list[Trajectory]]:
        groups = []
        for request in requests:
            name = request.group_id
            parts = [found[name, sample] for sample in range(request.size)]
            if None not in parts:
                groups.append([segment for part in parts for segment in part])
                continue
            sample = parts.index(None)
            reason = self.lost[f"{name}/{sample}"]
            self.stats.dropped_groups[name] = GroupDropped(f"group {name}: sample {sample} was lost: {reason}")
        return groups

    def _sample(
        self, request: GroupRequest, sample: int, config: NativeConfig, rounds: _Rounds
    ) -> list[Trajectory] | None:
        for attempt in range(config.max_retries + 1):
            if self._over.is_set():
                return None
            name = f"{request.group_id}/{sample}" + (f"+{attempt}" if attempt else "")
            started = time.monotonic()
            try:
                segments = self._rollout(request, name, config, rounds)
            except EnvFailure as error:
                self._note(name, started, error)
                with self._lock:
                    self.stats.resampled += attempt < config.max_retries
                continue
            finally:
                rounds.withdraw(name)
            self._note(name, started, None)
            with self._lock:
                self.stats.trajectories += 1
                self.stats.chunks += sum(len(t.chunks) - t.prefix_chunks for t in segments)
                self.stats.truncated += segments[0].status is Status.TRUNCATED
            return segments
        return None

    def _note(self, name: str, started: float, error: EnvFailure | None) -> None:
        """Counts a lost attempt, by its typed status; writes both kinds down for the trace."""
        failed = {} if error is None else {"error": str(error)}
        if (trace := self.trace) is not None:
            lane = f"agent {name.split('+')[0]}"
            trace.add(lane, "rollout", started, time.monotonic() - started, trajectory=name, **failed)
        if error is not None:
            with self._lock:
                self.lost[name] = str(error)
                self.stats.failures[f"{error.status.value}/agent"] += 1

    def _rollout(self, request: GroupRequest, name: str, config: NativeConfig, rounds: _Rounds) -> list[Trajectory]:
        task = request.task
        tree = MessageTree(name, self._renderer, self.engine.config.max_length)
        boxes: list[Sandbox] = []
        with infrastructure(lambda: _stop(boxes)):
            spec = sandbox_spec(task, config.agent_seconds)
            # an answer may take as long as the slowest of the round's agents
            proxy = ModelProxy(request_seconds=config.agent_seconds, lease_seconds=config.agent_seconds)
            box = Sandbox.start(dataclasses.replace(spec, model_proxy=proxy))
            boxes.append(box)
            box.write_files({path: text.encode() for path, text in config.program.items()})
            variables = {**config.variables, "ROME_INSTRUCTION": task.task.instruction}
            agent = box.start_job(config.command, timeout=config.agent_seconds, env=variables)
            self._serve(box, agent, tree, request.seed, config, rounds)
            status = Status.TRUNCATED if agent.status().exit_code == 124 else Status.COMPLETED
            if not tree.responses:
                raise EnvFailure(Status.INFRA_FAILURE, f"the agent never asked its model: {_last_words(agent)}")
            reward = run_verifier(box, task)
            box.stop()
        return tree.segments(request.group_id, task.task, request.seed, reward, status)

    def _serve(
        self, box: Sandbox, agent: Any, tree: MessageTree, seed: int, config: NativeConfig, rounds: _Rounds
    ) -> None:
        """Answers the agent's requests until it has ended; several at once, as sub-agents ask."""
        threads: list[threading.Thread] = []
        asked = 0
        while agent.status().is_running:
            if self._over.is_set():
                raise EnvFailure(Status.ABORTED, "rollouts were ended")
            request = box.model.next(wait=0.1)
            if request is None:
                continue
            asked += 1
            if asked > config.max_requests:
                request.fail(f"more than {config.max_requests} requests", 429, "rate_limit_exceeded")
                continue
            key = f"{seed}/{tree.rollout_id}/{asked}"
            thread = threading.Thread(target=self._answer, args=(request, tree, key, config, rounds), daemon=True)
            thread.start()
            threads.append(thread)
        rounds.withdraw(tree.rollout_id)
        for thread in threads:
            thread.join(config.request_seconds)

    def _answer(self, request: Any, tree: MessageTree, key: str, config: NativeConfig, rounds: _Rounds) -> None:
        try:
            try:
                request.answer(self._reply(request, tree, key, config, rounds))
            except (ServiceError, LedgerError) as error:
                status = error.status if isinstance(error, ServiceError) else 400
                request.fail(str(error), status, "invalid_request_error" if status < 500 else "model_error")
        except RockError:
            pass  # the sandbox is gone, or the agent has given the request up: nobody listens

    def _reply(
        self, request: Any, tree: MessageTree, key: str, config: NativeConfig, rounds: _Rounds
    ) -> dict[str, Any]:
        if request.path != "/v1/chat/completions":
            raise ServiceError(404, f"{request.path}: an agent under training asks for chat completions")
        asked = parse(ChatRequest, json.dumps(request.body).encode())
        messages = [_as_sampled(message) for message in self._chat.messages(asked.messages)]
        turn = tree.ask(messages)
        limit = min(asked.limit or config.max_tokens, config.max_tokens)
        sampling = Sampling(sampling_key(key), limit, config.temperature, config.top_k, config.top_p, config.min_p)
        choice = self._draw(turn, sampling, tree.rollout_id, config, rounds)
        tree.answer(turn, _sampled(choice))
        return ChatShape(self._chat, asked, "policy").whole([choice])

    def _draw(self, turn: Turn, sampling: Sampling, rollout: str, config: NativeConfig, rounds: _Rounds) -> Choice:
        """One answer, by the engine that everybody shares."""
        choice, done, failure = Choice(0, turn.tokens.tolist()), threading.Event(), []

        def deliver(item: Part | ServiceError) -> None:
            if isinstance(item, ServiceError):
                failure.append(item)
            else:
                choice.add(item)
            if failure or choice.finish is not None:
                done.set()

        job = Job(turn.tokens, sampling, TextStream(self._chat.piece), float("inf"), deliver)
        rounds.submit(rollout, job)
        if not done.wait(config.agent_seconds + config.request_seconds + 5.0):
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

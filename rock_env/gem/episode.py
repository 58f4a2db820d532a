"""One episode of a Harbor task: a fresh sandbox, its agents' commands, and at the end the hidden tests.

    begin   a sandbox with the task's files, and for each agent a shell of its own
    act     an agent's command runs in its shell; or it stops
    end     the last agent has stopped, or has used up its steps or its time: only now the tests enter, and judge

A failure of the infrastructure is never a reward: it raises a RockError, and the episode is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rock_env.errors import ResetNeeded, RockError, SpecError
from rock_env.gem.text import CUT, MAX_TEXT, render, run_command
from rock_env.harbor import VerifiedEnvironment, run_verifier, sandbox_spec
from rock_env.sandbox import Sandbox
from rock_env.spec import SandboxSpec

STOP = "<stop>"
"""The action that ends an agent's part; to bash it would be a syntax error."""
MAX_SECONDS = 3600.0
_MAX_STEPS = 100_000


class Step(NamedTuple):
    """Gymnasium's five-tuple."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What an episode may take.

    Attributes:
      max_steps: of each agent; the last one ends its part, and the tests still run.
      max_observation_chars: of a command's output; the rest is cut, and marked.
      command_seconds: a command that takes longer is killed; what it printed is observed, with exit code 124.
    """

    max_steps: int = 64
    max_observation_chars: int = 16_384
    command_seconds: float = 10.0

    def __post_init__(self) -> None:
        bounds = {"max_steps": (1, _MAX_STEPS), "max_observation_chars": (len(CUT) + 1, MAX_TEXT - 64)}
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise SpecError(f"{name}: expected an integer in {least}..{most}, got {value!r}")
        seconds = self.command_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
            raise SpecError(f"command_seconds: expected seconds > 0 and <= {MAX_SECONDS:g}, got {seconds!r}")


@dataclass(frozen=True)
class Place:
    """Where sandboxes start: `start` makes one of a spec; the others are as in rock_env.harbor.sandbox_spec."""

    start: Callable[[SandboxSpec], Sandbox] = Sandbox.start
    backend: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    remote: bool = False


@dataclass
class _Part:
    """One agent in an episode. Its steps run one after another."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    steps: int = 0
    seconds: float = 0.0
    is_over: bool = False


class Episode:
    """A sandbox and the agents in it. Agents may act at the same time, each from a thread of its own.

    Raises (when made, and from `act`):
      RockError: the sandbox did not start, or failed; SandboxDead, for one. The episode is over.
    """

    def __init__(
        self, task: VerifiedEnvironment, agents: Sequence[str], seed: int, settings: Settings, place: Place
    ) -> None:
        self._task, self._settings = task, settings
        self._parts = {agent: _Part() for agent in agents}
        self._ending = threading.Lock()
        # A seed makes what programs draw by themselves the same: bash's RANDOM, Python's hashes, whoever reads it.
        seeds = {"ROCK_SEED": str(seed), "PYTHONHASHSEED": str(seed % 2**32)}
        where = {"images": place.images, "remote": place.remote, "env": seeds}
        spec = sandbox_spec(task, settings.command_seconds, place.backend, **where)
        limits = replace(spec.limits, output_bytes=max(spec.limits.output_bytes, 4 * settings.max_observation_chars))
        self._sandbox = place.start(replace(spec, limits=limits))
        try:
            for number, agent in enumerate(agents):
                self._sandbox.session(agent).run(f"RANDOM={(seed + number) % 2**31}", settings.command_seconds)
        except BaseException:
            self.close()
            raise

    def act(self, agent: str, action: str) -> Step:
        """One step of one agent. The reward is 0 until the last agent's part ends; then it is what the tests say.

        Raises:
          ResetNeeded: the agent's part is over.
          VerifierFailed: the tests left no usable reward.
        """
        _check_action(action)
        part = self._parts[agent]
        with part.lock:
            if part.is_over:
                raise ResetNeeded(f"agent {agent!r} has stopped: the episode goes on without it, or is over")
            try:
                return self._act(agent, part, action)
            except BaseException:
                self.close()
                raise

    def _act(self, agent: str, part: _Part, action: str) -> Step:
        part.steps += 1
        if action.strip() == STOP:
            return self._end(part, "", {"exit_code": None, "timed_out": False, "step": part.steps}, truncated=False)
        result = run_command(self._sandbox.session(agent), action, self._settings.command_seconds)
        part.seconds += result.seconds
        observation = render(result, self._settings.max_observation_chars)
        info = {"exit_code": result.exit_code, "timed_out": result.timed_out, "step": part.steps}
        if part.steps >= self._settings.max_steps or part.seconds >= self._task.limits.agent_seconds:
            return self._end(part, observation, info, truncated=True)
        return Step(observation, 0.0, False, False, info)

    def _end(self, part: _Part, observation: str, info: dict[str, Any], *, truncated: bool) -> Step:
        with self._ending:
            part.is_over = True
            is_last = all(each.is_over for each in self._parts.values())
        reward = 0.0
        if is_last:  # nobody else acts any more
            reward = run_verifier(self._sandbox, self._task)
            self.close()
        return Step(observation, reward, not truncated, truncated, {**info, "verified": is_last})

    def close(self) -> None:
        """End the sandbox; a step that is under way fails. May be called again."""
        for part in self._parts.values():
            part.is_over = True
        with suppress(RockError):  # it is dead already, or whoever held it is
            self._sandbox.stop()


def _check_action(action: object) -> None:
    if not isinstance(action, str) or len(action) > MAX_TEXT:
        raise SpecError(f"action: expected text of at most {MAX_TEXT} characters, got {type(action).__name__}")
    try:
        action.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"action: expected text that is UTF-8 ({error.reason} at character {error.start})") from None

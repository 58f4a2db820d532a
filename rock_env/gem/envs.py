"""Harbor tasks as environments: for one agent (a gymnasium.Env), or for several with names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from rock_env.errors import ResetNeeded, SpecError
from rock_env.gem.episode import Episode, Place, Settings, Step
from rock_env.gem.text import AnyText
from rock_env.harbor import HarborFolder

Sharing = Literal["shared", "isolated"]
MAX_AGENTS = 64
_AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ALONE = "agent"


def check_agents(agents: Sequence[str], sandboxes: str) -> tuple[str, ...]:
    """Raises SpecError for names that are none, or come twice, and for another way of sharing."""
    if sandboxes not in ("shared", "isolated"):
        raise SpecError(f"sandboxes: expected 'shared' or 'isolated', got {sandboxes!r}")
    names = tuple(agents) if not isinstance(agents, str) else ()
    good = all(isinstance(name, str) and _AGENT.fullmatch(name) for name in names)
    if not good or not 1 <= len(names) <= MAX_AGENTS or len(set(names)) != len(names):
        raise SpecError(f"agents: expected 1 to {MAX_AGENTS} different names like planner-1, got {agents!r}")
    return names


def check_reset(seed: int | None, options: dict[str, Any] | None) -> int | None:
    """The seed as Gymnasium takes it. Raises SpecError for what is no seed, and for options."""
    if options:
        raise SpecError(f"options: expected none, got {next(iter(options))!r}")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise SpecError(f"seed: expected an integer in 0..2^63-1 or None, got {seed!r}")
    return int(seed)


class TaskEnv(gymnasium.Env[str, str]):
    """A task as a gymnasium.Env. An action is a shell command for a session, or STOP.

    The observation is the command's output without trailing newlines, followed by `[exit N]` when it failed; at first
    it is the instruction. `info` has `exit_code`, `timed_out`, `step`, and `verified` when the episode has ended. The
    tests enter the sandbox only then, after every process in it was ended. A seed reaches the sandbox: as ROCK_SEED, as
    PYTHONHASHSEED, and as the seed of its shell's RANDOM.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's name and type)

    def __init__(self, task: HarborFolder, settings: Settings | None = None, place: Place | None = None) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._task, self._settings, self._place = task, settings or Settings(), place or Place()
        self._episode: Episode | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """A fresh sandbox. Without a seed the next one of the last seed's stream is drawn. Takes no options.

        Raises:
          RockError: the sandbox did not start; the type says why.
        """
        seed = check_reset(seed, options)
        super().reset(seed=seed)
        self.close()
        drawn = seed if seed is not None else int(self.np_random.integers(2**31))
        self._episode = Episode(self._task, (_ALONE,), drawn, self._settings, self._place)
        return self._task.instruction, {"task": self._task.name, "seed": drawn}

    def step(self, action: str) -> Step:
        """One command, or STOP.

        Raises:
          ResetNeeded: no episode is running.
          RockError: the sandbox or the tests failed (SandboxDead, VerifierFailed, …). There is no reward.
        """
        if self._episode is None:
            raise ResetNeeded("expected reset() before step()")
        return self._episode.act(_ALONE, action)

    def close(self) -> None:
        """End the sandbox. May be called again, and in any state."""
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.close()


class MultiAgentEnv:
    """A task for several agents. Each step names its agent, and is answered with that agent's five-tuple.

    With "shared" sandboxes all agents work on one file system, each in a shell of its own; the tests run once, when the
    last agent's part has ended, and that last step has the reward, which is everyone's. With "isolated" each agent has
    a sandbox and a reward to itself. Different agents may step at the same time, from threads of their own.
    """

    def __init__(
        self,
        task: HarborFolder,
        agents: Sequence[str],
        sandboxes: Sharing = "isolated",
        settings: Settings | None = None,
        place: Place | None = None,
    ) -> None:
        self.agents = check_agents(agents, sandboxes)
        self.sandboxes = sandboxes
        self._task, self._settings, self._place = task, settings or Settings(), place or Place()
        self._random: np.random.Generator | None = None
        self._episodes: dict[str, Episode] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Fresh sandboxes; (observation, info) by agent. Arguments and errors: see TaskEnv."""
        seed = check_reset(seed, options)
        self.close()
        if seed is not None or self._random is None:
            self._random, _ = seeding.np_random(seed)
        drawn = seed if seed is not None else int(self._random.integers(2**31))
        groups = [self.agents] if self.sandboxes == "shared" else [(agent,) for agent in self.agents]
        try:
            for group in groups:
                episode = Episode(self._task, group, drawn, self._settings, self._place)
                self._episodes.update(dict.fromkeys(group, episode))
        except BaseException:
            self.close()
            raise
        info = {"task": self._task.name, "seed": drawn}
        return dict.fromkeys(self.agents, self._task.instruction), {agent: dict(info) for agent in self.agents}

    def step(self, action: str, agent: str) -> Step:
        """One command of one agent, or its STOP. Errors: see TaskEnv."""
        if agent not in self.agents:
            raise SpecError(f"agent: expected one of {', '.join(self.agents)}, got {agent!r}")
        if not self._episodes:
            raise ResetNeeded("expected reset() before step()")
        return self._episodes[agent].act(agent, action)

    def close(self) -> None:
        """End the sandboxes. May be called again, and in any state."""
        episodes, self._episodes = self._episodes, {}
        for episode in set(episodes.values()):
            episode.close()

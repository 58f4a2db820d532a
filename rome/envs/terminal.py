"""Tasks as a chunked Markov decision process: one step is one chunk, run in a fresh sandbox.

    reset   a fresh sandbox with the task's files; the observation is the instruction
    step    a tool call runs in the sandbox's persistent shell; the observation is what it printed
    end     a chunk without a tool call, or the last one allowed: only now the tests enter, and the verifier runs

An infrastructure failure is never a reward: it raises `EnvFailure`, and the episode is to be sampled again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from rock_env import RockError, Sandbox, Snapshot
from rock_env.gem.text import CUT, AnyText, render, run_command
from rock_env.harbor import run_verifier, sandbox_spec
from rome.envs.families import FAMILIES, MAX_HORIZON, MIN_HORIZON
from rome.envs.generate import draft_task
from rome.envs.sandboxes import AWAY_SECONDS, EnvFailure, infrastructure, presence_of
from rome.envs.tasks import HarborTask, load_task
from rome.trajectory import Status

_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class EnvSnapshot:
    """An episode's state between two chunks: files, the shell's variables, functions and directory; no processes."""

    task: HarborTask
    sandbox: Snapshot
    chunks: int
    command_seconds: float
    observation: str

    def delete(self) -> None:
        """Frees it; environments that were restored from it go on. May be called again."""
        self.sandbox.delete()


class TerminalEnv(gymnasium.Env[str, str]):
    """Gymnasium id `rome/Terminal-v0`. Actions and observations are text.

    An action with `<tool_call>COMMAND</tool_call>` runs the command; one without is the final answer. The observation
    is the command's output (stdout and stderr as they came), without trailing newlines, followed by `[exit N]` when it
    failed. `info` has `error` (the command failed), `exit_code`, `timed_out`, and at the end `status`.

    Args:
      task: what `reset` runs when its options name no task: a Harbor folder or a task. None: `reset` draws one from
        `families` and `horizons`, by its seed.
      max_chunks: after so many chunks the episode is truncated; the verifier still runs.
      max_observation_chars: of a command's output; beyond it the rest is cut, and marked.
      command_seconds: a command that takes longer is killed; what it printed is observed with exit code 124.
      backend: what runs the sandboxes: "bubblewrap" or "docker" (rock_env.SandboxSpec.backend).
      start: what starts them, with the arguments of Sandbox.start.
      away_seconds: how long whoever starts them may be away, before that is no passing failure any more. Counted from
        the first failure after a success, of all environments with the same `start`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's name and type)

    def __init__(
        self,
        task: HarborTask | str | Path | None = None,
        *,
        families: Sequence[str] = FAMILIES,
        horizons: Sequence[int] = range(MIN_HORIZON, MAX_HORIZON + 1),
        max_chunks: int = 16,
        max_observation_chars: int = 256,
        command_seconds: float = 5.0,
        backend: str = "bubblewrap",
        start: Callable[..., Sandbox] = Sandbox.start,
        away_seconds: float = AWAY_SECONDS,
    ) -> None:
        if max_chunks < 1 or max_observation_chars <= len(CUT) or command_seconds <= 0:
            raise ValueError(
                f"expected max_chunks ≥ 1, max_observation_chars > {len(CUT)} and command_seconds > 0, "
                f"got {max_chunks}, {max_observation_chars}, {command_seconds}"
            )
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.max_chunks = max_chunks
        self.max_observation_chars = max_observation_chars
        self.command_seconds = command_seconds
        self.backend = backend
        self._start = start
        self._presence = presence_of(start, backend, away_seconds)
        self._families, self._horizons = tuple(families), tuple(horizons)
        self._default = _as_task(task) if task is not None else None
        self._task: HarborTask | None = None
        self._sandbox: Sandbox | None = None
        self._observation = ""
        self._chunks = 0
        self._seconds = 0.0
        self.timings: dict[str, float] = {}
        """Seconds of this episode by stage: start, commands, verify. Not in `info`, which is the same for every run."""

    # --- the episode -------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """A fresh sandbox. `options` may hold `task`: a Harbor folder or a HarborTask.

        Raises:
          TaskFormatError: the folder is malformed.
          SpecError, BackendUnavailable: whoever starts sandboxes can't give what the task asks for, was never there, or
            has gone for good; trying again won't help.
          EnvFailure: the sandbox didn't start; trying again may help.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        chosen = options.pop("task", None)
        if options:
            raise ValueError(f"options: unknown key {next(iter(options))!r}; expected 'task'")
        task = _as_task(chosen) if chosen is not None else self._default or self._draw_task()
        return self._begin(task, None)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Runs one chunk: (observation, reward, terminated, truncated, info). The reward is 0 until the episode ends.

        Raises:
          ResetNeeded: no episode is running.
          EnvFailure: the sandbox or the verifier failed. The episode is over and has no reward.
        """
        if self._sandbox is None or self._task is None:
            raise ResetNeeded("expected reset() before step()")
        self._chunks += 1
        call = _TOOL_CALL.search(action)
        if call is None:
            return self._finish("", {"error": False, "exit_code": 0, "timed_out": False}, truncated=False)
        with infrastructure(self.close, self._presence):
            result = run_command(self._sandbox.session(), call[1], self.command_seconds)
        self._observation = render(result, self.max_observation_chars)
        self._seconds += result.seconds
        self.timings["commands"] += result.seconds
        info = {"error": result.exit_code != 0, "exit_code": result.exit_code, "timed_out": result.timed_out}
        if self._chunks >= self.max_chunks or self._seconds >= self._task.limits.agent_seconds:
            return self._finish(self._observation, info, truncated=True)
        return self._observation, 0.0, False, False, self._info(info)

    def close(self) -> None:
        """Destroys the sandbox. May be called again, and in any state."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            with suppress(RockError):  # it is dead already, or its supervisor is
                sandbox.stop()

    # --- chunk-initialised resampling --------------------------------------------------------------------------------

    def snapshot(self) -> EnvSnapshot:
        """The state between two chunks, to go on from any number of times; files are shared until written to.

        Background processes are not part of it. Raises EnvFailure, and ResetNeeded when no episode is running.
        """
        if self._sandbox is None or self._task is None:
            raise ResetNeeded("expected reset() before snapshot()")
        with infrastructure(self.close, self._presence):
            sandbox = self._sandbox.snapshot()
        return EnvSnapshot(self._task, sandbox, self._chunks, self._seconds, self._observation)

    def restore(self, snapshot: EnvSnapshot) -> tuple[str, dict[str, Any]]:
        """Continues from a snapshot of this or another environment, in a sandbox of its own. Returns what `reset` does,
        with the observation that the snapshot was taken after."""
        self._begin(snapshot.task, snapshot.sandbox)
        self._chunks, self._seconds = snapshot.chunks, snapshot.command_seconds
        self._observation = snapshot.observation
        return self._observation, self._info({})

    # --- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, task: HarborTask, snapshot: Snapshot | None) -> tuple[str, dict[str, Any]]:
        self.close()
        start = time.monotonic()
        with infrastructure(self.close):
            # A snapshot brings its own.
            spec = sandbox_spec(task, self.command_seconds, self.backend) if snapshot is None else None
            self._sandbox = self._presence.start(lambda: self._start(spec, snapshot=snapshot))
        self._task, self._chunks, self._seconds = task, 0, 0.0
        self.timings = {"start": time.monotonic() - start, "commands": 0.0}
        self._observation = task.task.instruction
        return self._observation, self._info({})

    def _finish(
        self, observation: str, info: dict[str, Any], truncated: bool
    ) -> tuple[str, float, bool, bool, dict[str, Any]]:
        start = time.monotonic()
        with infrastructure(self.close, self._presence):
            reward = run_verifier(self._sandbox, self._task)
        self.close()
        self.timings["verify"] = time.monotonic() - start
        info["status"] = (Status.TRUNCATED if truncated else Status.COMPLETED).value
        return observation, reward, not truncated, truncated, self._info(info)

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        return {"task_id": self._task.task.id, "chunks": self._chunks, **info}

    def _draw_task(self) -> HarborTask:
        family = self._families[self.np_random.integers(len(self._families))]
        horizon = self._horizons[self.np_random.integers(len(self._horizons))]
        return draft_task(family, int(self.np_random.integers(2**31)), int(horizon))


def _as_task(task: HarborTask | str | Path) -> HarborTask:
    return task if isinstance(task, HarborTask) else load_task(task)


__all__ = ["AnyText", "EnvFailure", "EnvSnapshot", "TerminalEnv"]

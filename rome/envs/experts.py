"""Scripted experts: the reference solution as a policy would act it out, and plausible failures of it."""

from __future__ import annotations

import random
from collections.abc import Callable

from rome.envs.families import Step
from rome.envs.generate import build_draft
from rome.envs.tasks import HarborTask

# Wrong turns are the mistakes that a policy has to learn to avoid; the rest keeps it from stopping or skipping early.
_WEIGHTS = {"wrong_turn": 6, "wrong_command": 6, "skip_item": 2, "stop_early": 2}


def expert_actions(task: HarborTask, seed: int, flawed: bool) -> list[str | None]:
    """One shell command a chunk, then None: the final stop.

    Without a flaw this is the reference solution, `task.task.horizon` chunks long. With `flawed`, one deliberate
    mistake makes the verifier give 0: a wrong branch, a wrong item or destination, an item left out, or a stop too
    early. Its kind and place depend on `seed`. Tasks of no family have the lines of solution/solve.sh as commands, and
    flawed ones stop early.

    Raises:
      ValueError: the task is of no family and has no solution.
    """
    if not task.task.family:
        return _from_solution(task, seed, flawed)
    steps = build_draft(task.task.family, task.task.seed, task.task.horizon).steps
    if flawed:
        return [*_flawed(steps, random.Random(f"{task.task.id}:{seed}")), None]
    return [*(step.command for step in steps), None]


def _from_solution(task: HarborTask, seed: int, flawed: bool) -> list[str | None]:
    lines = [line.strip() for line in task.solution.splitlines()]
    commands: list[str | None] = [line for line in lines if line and not line.startswith("#")]
    if not commands:
        raise ValueError(f"solution/solve.sh: expected the commands of an expert for task {task.task.id!r}, got none")
    if flawed:
        commands = commands[: random.Random(f"{task.task.id}:{seed}").randrange(len(commands))]
    return [*commands, None]


def _flawed(steps: tuple[Step, ...], rng: random.Random) -> list[str]:
    kinds = {kind: flaws for kind, find in _FLAWS.items() if (flaws := find(steps))}
    names = list(kinds)
    kind = rng.choices(names, [_WEIGHTS[name] for name in names])[0]
    return rng.choice(kinds[kind])


def _wrong_turns(steps: tuple[Step, ...]) -> list[list[str]]:
    commands = [step.command for step in steps]
    return [[*commands[:k], *detour] for k, step in enumerate(steps) for detour in step.detours]


def _wrong_commands(steps: tuple[Step, ...]) -> list[list[str]]:
    commands = [step.command for step in steps]
    return [[*commands[:k], swap, *commands[k + 1 :]] for k, step in enumerate(steps) for swap in step.swaps]


def _skipped_items(steps: tuple[Step, ...]) -> list[list[str]]:
    items = sorted({step.item for step in steps if step.item is not None})
    if len(items) < 2:
        return []
    return [[step.command for step in steps if step.item != item] for item in items]


def _early_stops(steps: tuple[Step, ...]) -> list[list[str]]:
    last = max(k for k, step in enumerate(steps) if step.acts)
    return [[step.command for step in steps[:k]] for k in range(last // 2, last + 1)]


_FLAWS: dict[str, Callable[[tuple[Step, ...]], list[list[str]]]] = {
    "wrong_turn": _wrong_turns,
    "wrong_command": _wrong_commands,
    "skip_item": _skipped_items,
    "stop_early": _early_stops,
}

"""Tasks in Harbor format (rock_env.harbor), with what the rollout knows them by."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from rock_env.harbor import TaskFile, TaskFormatError, TaskLimits, VerifiedEnvironment, Verifier, read_folder
from rome.trajectory import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class HarborTask(VerifiedEnvironment):
    """A validated task: how the rollout names it, its environment and its tests."""

    task: Task


def load_task(path: str | Path) -> HarborTask:
    """Reads and validates a Harbor folder.

    Raises:
      TaskFormatError: the folder or something in it is missing or malformed; the message names file and field.
    """
    folder = read_folder(path)
    known = {name: folder.metadata[name] for name in ("family", "seed", "horizon") if name in folder.metadata}
    return HarborTask(
        task=Task(id=folder.name, instruction=folder.instruction, path=str(path), **known),
        **{each.name: getattr(folder, each.name) for each in fields(VerifiedEnvironment)},
    )


__all__ = ["HarborTask", "TaskFile", "TaskFormatError", "TaskLimits", "Verifier", "load_task"]

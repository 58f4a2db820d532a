"""Environments: agentic tasks as Gymnasium chunked MDPs. One step is one chunk, and it runs in a fresh sandbox."""

from rome.envs.experts import expert_actions
from rome.envs.families import FAMILIES, HELD_OUT_FAMILIES
from rome.envs.generate import draft_task, generate_task
from rome.envs.tasks import HarborTask, TaskFile, TaskFormatError, TaskLimits, Verifier, load_task

__all__ = [
    "FAMILIES",
    "HELD_OUT_FAMILIES",
    "HarborTask",
    "TaskFile",
    "TaskFormatError",
    "TaskLimits",
    "Verifier",
    "draft_task",
    "expert_actions",
    "generate_task",
    "load_task",
]

"""Environments: agentic tasks as Gymnasium chunked MDPs. One step is one chunk, and it runs in a fresh sandbox."""

import gymnasium

from rome.envs.experts import expert_actions
from rome.envs.families import FAMILIES, HELD_OUT_FAMILIES
from rome.envs.generate import draft_task, generate_task
from rome.envs.sandboxes import EnvFailure
from rome.envs.tasks import HarborTask, TaskFile, TaskFormatError, TaskLimits, Verifier, load_task
from rome.envs.terminal import EnvSnapshot, TerminalEnv

if "rome/Terminal-v0" not in gymnasium.registry:
    gymnasium.register("rome/Terminal-v0", entry_point="rome.envs.terminal:TerminalEnv", order_enforce=False)

__all__ = [
    "FAMILIES",
    "HELD_OUT_FAMILIES",
    "EnvFailure",
    "EnvSnapshot",
    "HarborTask",
    "TaskFile",
    "TaskFormatError",
    "TaskLimits",
    "TerminalEnv",
    "Verifier",
    "draft_task",
    "expert_actions",
    "generate_task",
    "load_task",
]

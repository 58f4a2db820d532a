"""Tasks in Harbor's format: reading them, the sandboxes that they need, and the verifier that judges the outcome."""

from rock_env.harbor.format import (
    Environment,
    HarborFolder,
    TaskFile,
    TaskFormatError,
    TaskLimits,
    Tree,
    VerifiedEnvironment,
    Verifier,
    parse_environment,
    parse_task,
    read_folder,
    read_tree,
)
from rock_env.harbor.setup import sandbox_spec
from rock_env.harbor.verifier import run_verifier

__all__ = [
    "Environment",
    "HarborFolder",
    "TaskFile",
    "TaskFormatError",
    "TaskLimits",
    "Tree",
    "VerifiedEnvironment",
    "Verifier",
    "parse_environment",
    "parse_task",
    "read_folder",
    "read_tree",
    "run_verifier",
    "sandbox_spec",
]

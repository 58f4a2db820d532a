"""Procedural tasks: drafted in memory, or written as Harbor folders with the same content."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from rome.envs.families import MAX_HORIZON, MIN_HORIZON, REGISTRY, Draft, Draw
from rome.envs.tasks import HarborTask, TaskFile, TaskLimits, Verifier, load_task
from rome.trajectory import Task

WORKDIR = "/app"
_LIMITS = TaskLimits()
_VERIFIER_SECONDS = 10.0

_TEST_SH = """#!/bin/sh
# Looks at what the agent left behind; never runs it. Only regular files are read: a pipe would block.
answered() {{ [ -f answer.txt ] && [ "$(head -c 8192 answer.txt)" = "$1" ]; }}
hold() {{
  shown=$1; shift
  for file; do [ -f "$file" ] || return 1; done
  [ "$(head -v -c 8192 "$@")" = "$shown" ]
}}
reward=0
if cd {workdir} &&
{checks}
then reward=1; fi
[ -d /logs/verifier ] || mkdir -p /logs/verifier
echo "$reward" > /logs/verifier/reward.txt
"""

_TASK_TOML = """version = "1.0"

[metadata]
family = {family}
seed = {seed}
horizon = {horizon}
programs = {programs}

[verifier]
timeout_sec = {verifier_seconds}

[agent]
timeout_sec = {agent_seconds}

[environment]
build_timeout_sec = 60.0
cpus = {cpus}
memory_mb = {memory_mb}
storage_mb = {storage_mb}
allow_internet = false
"""

_DOCKERFILE = f"""FROM debian:bookworm-slim
WORKDIR {WORKDIR}
COPY files/ {WORKDIR}/
"""


@lru_cache(maxsize=256)
def build_draft(family: str, seed: int, horizon: int) -> Draft:
    """The draft behind a procedural task: its expert's steps with their possible mistakes included.

    Raises:
      ValueError: the family is unknown, or seed or horizon is out of range.
    """
    if family not in REGISTRY:
        raise ValueError(f"family: expected one of {', '.join(REGISTRY)}, got {family!r}")
    if not MIN_HORIZON <= horizon <= MAX_HORIZON:
        raise ValueError(f"horizon: expected {MIN_HORIZON}..{MAX_HORIZON}, got {horizon!r}")
    if seed < 0:
        raise ValueError(f"seed: expected a number ≥ 0, got {seed!r}")
    draft = REGISTRY[family].build(Draw(family, seed, horizon), horizon - 1)
    assert len(draft.steps) == horizon - 1, (family, seed, horizon)
    return draft


def draft_task(family: str, seed: int, horizon: int) -> HarborTask:
    """The task of `generate_task` without its folder: the same files, tests and limits; `task.path` is ''."""
    draft = build_draft(family, seed, horizon)
    checks = " &&\n".join(draft.checks)
    test = _TEST_SH.format(workdir=WORKDIR, checks=checks)
    return HarborTask(
        task=Task(f"{family}-h{horizon:02d}-s{seed}", draft.instruction, family, seed, horizon),
        files={f"{WORKDIR}/{name}": _text_file(draft.files[name]) for name in sorted(draft.files)},
        verifier=Verifier({"test.sh": TaskFile(test.encode(), 0o755)}, _VERIFIER_SECONDS),
        limits=_LIMITS,
        workdir=WORKDIR,
        solution="\n".join(["#!/bin/sh", *(step.command for step in draft.steps), ""]),
        programs=REGISTRY[family].programs,
    )


def _text_file(text: str) -> TaskFile:
    return TaskFile(f"{text}\n".encode() if text else b"")


def generate_task(family: str, seed: int, horizon: int, directory: str | Path) -> HarborTask:
    """Writes the Harbor folder `directory`/<id>/ and returns its task; deterministic in (family, seed, horizon).

    The folder appears whole or not at all (temporary name, then rename), and replaces one of the same name. It isn't
    synced to disk: it can be generated again.
    """
    task = draft_task(family, seed, horizon)
    target = Path(directory) / task.task.id
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{task.task.id}."))
    try:
        _write_folder(scratch / "new", task)
        try:
            os.rename(scratch / "new", target)
        except OSError:  # a folder of that name is there: set it aside, it goes with the scratch folder
            os.rename(target, scratch / "old")
            os.rename(scratch / "new", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_task(target)


def _write_folder(folder: Path, task: HarborTask) -> None:
    made: set[str] = set()

    def write(name: str, content: bytes | str, mode: int = 0o644) -> None:
        path = os.path.join(folder, name)
        parent = os.path.dirname(path)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        with open(path, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            os.fchmod(file.fileno(), mode)

    limits = task.limits
    write("instruction.md", f"{task.task.instruction}\n")
    config = _TASK_TOML.format(
        family=json.dumps(task.task.family),
        seed=task.task.seed,
        horizon=task.task.horizon,
        programs=json.dumps(list(task.programs)),
        verifier_seconds=task.verifier.timeout_seconds,
        agent_seconds=limits.agent_seconds,
        cpus=limits.cpus,
        memory_mb=limits.memory_bytes // 2**20,
        storage_mb=limits.disk_bytes // 2**20,
    )
    write("task.toml", config)
    write("environment/Dockerfile", _DOCKERFILE)
    os.makedirs(folder / "environment" / "files", exist_ok=True)
    for name, file in task.files.items():
        write(f"environment/files/{name.removeprefix(f'{WORKDIR}/')}", file.content, file.mode)
    for name, file in task.verifier.files.items():
        write(f"tests/{name}", file.content, file.mode)
    write("solution/solve.sh", task.solution, 0o755)

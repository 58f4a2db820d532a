"""What a task needs of its sandbox, and what counts as a failure of the infrastructure."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rock_env import BackendUnavailable, FileEntry, Limits, RockError, SandboxSpec, SpecError
from rome.envs.tasks import HarborTask
from rome.trajectory import Status

_PROGRAM_FOLDERS = ("/usr/local/bin", "/usr/bin", "/bin")
_PYTHON_HOME = "/opt/python"


class EnvFailure(RuntimeError):
    """The episode says nothing about the policy: discard it and sample the same initial state again. Never a reward."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status.value}: {message}")
        self.status = status
        self.message = message


@contextmanager
def infrastructure(clean_up: Callable[[], None]) -> Iterator[None]:
    """Turns a sandbox's failures into EnvFailure, after `clean_up`. What trying again can't mend passes as it is."""
    try:
        yield
    except (BackendUnavailable, SpecError):
        clean_up()
        raise
    except RockError as error:
        clean_up()
        raise EnvFailure(Status.INFRA_FAILURE, f"{type(error).__name__}: {error}") from error
    except BaseException:
        clean_up()
        raise


def sandbox_spec(task: HarborTask, command_seconds: float, backend: str = "bubblewrap") -> SandboxSpec:
    """The sandbox of an episode: the task's files and limits, no tests.

    Backends find this machine's programs, but "docker" brings a Python in any case.

    Raises:
      BackendUnavailable: this machine lacks a program that the task needs.
    """
    env, binds = dict(task.env), {}
    for program in task.programs:
        if any(os.access(f"{folder}/{program}", os.X_OK) for folder in _PROGRAM_FOLDERS):
            continue
        if backend == "docker" and program == "python3":
            continue
        if program != "python3":
            raise BackendUnavailable(f"task {task.task.id}: expected the program {program!r} in {_PROGRAM_FOLDERS}")
        # No interpreter where sandboxes can see it: lend them this process's own, read-only.
        binds[sys.base_prefix] = _PYTHON_HOME
        env["PATH"] = f"/usr/local/bin:/usr/bin:/bin:{_PYTHON_HOME}/bin"
        env["LD_LIBRARY_PATH"] = f"{_PYTHON_HOME}/lib"  # a shared libpython is looked for where it was installed
    return SandboxSpec(
        files={path: FileEntry(file.content, file.mode) for path, file in task.files.items()},
        workdir=task.workdir,
        env=env,
        limits=Limits(
            memory_bytes=task.limits.memory_bytes,
            cpus=task.limits.cpus,
            disk_bytes=task.limits.disk_bytes,
            command_seconds=command_seconds,
        ),
        backend=backend,
        readonly_binds=binds,
    )

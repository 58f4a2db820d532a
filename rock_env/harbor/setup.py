"""From an environment to the sandbox that holds it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from rock_env.backend import DEFAULT_BACKEND
from rock_env.errors import BackendUnavailable, SpecError
from rock_env.harbor.format import Environment
from rock_env.spec import FileEntry, Limits, SandboxSpec

_PROGRAM_FOLDERS = ("/usr/local/bin", "/usr/bin", "/bin")
_PYTHON_HOME = "/opt/python"


def sandbox_spec(
    environment: Environment,
    command_seconds: float,
    backend: str | None = None,
    *,
    images: Mapping[str, str] | None = None,
    remote: bool = False,
    env: Mapping[str, str] | None = None,
) -> SandboxSpec:
    """The sandbox of an environment: its files and limits, no tests.

    Backends find this machine's programs, but "docker" brings a Python in any case.

    Args:
      command_seconds: a command that takes longer is killed.
      backend: instead of the environment's own choice, which is "bubblewrap" by default.
      images: what the names of images stand for. For "docker" a name that is not among them is the daemon's; for
        "bubblewrap" it is refused, as it would be a directory of this machine.
      remote: an admin will start it, who knows what images stand for, and whose machine has the programs or has not.
      env: added to the environment's own.

    Raises:
      BackendUnavailable: this machine lacks a program that the environment needs.
      SpecError: an image that is nobody's, or a path or variable that no sandbox takes.
    """
    backend = backend or environment.backend or DEFAULT_BACKEND
    variables, binds = ({}, {}) if remote else _provide(environment.programs, backend)
    image = environment.image if remote else _resolve(environment.image, backend, images or {})
    return SandboxSpec(
        image=image,
        files={path: FileEntry(file.content, file.mode) for path, file in environment.files.items()},
        workdir=environment.workdir,
        env={**environment.env, **variables, **(env or {})},
        limits=Limits(
            memory_bytes=environment.limits.memory_bytes,
            cpus=environment.limits.cpus,
            disk_bytes=environment.limits.disk_bytes,
            command_seconds=command_seconds,
        ),
        backend=backend,
        readonly_binds=binds,
    )


def _resolve(image: str | None, backend: str, images: Mapping[str, str]) -> str | None:
    if image is None:
        return None
    if image in images:
        return images[image]
    if backend == DEFAULT_BACKEND:
        known = ", ".join(sorted(images)) or "none is named"
        raise SpecError(f"image: {image!r} stands for no root file system here ({known}); name one, or use docker")
    return image


def _provide(programs: tuple[str, ...], backend: str) -> tuple[dict[str, str], dict[str, str]]:
    """(variables, read-only binds) that make programs available which sandboxes would not see."""
    env, binds = {}, {}
    for program in programs:
        if any(os.access(f"{folder}/{program}", os.X_OK) for folder in _PROGRAM_FOLDERS):
            continue
        if backend == "docker" and program == "python3":
            continue
        if program != "python3":
            raise BackendUnavailable(f"programs: expected {program!r} in one of {', '.join(_PROGRAM_FOLDERS)}")
        # No interpreter where sandboxes can see it: lend them this process's own, read-only.
        binds[sys.base_prefix] = _PYTHON_HOME
        env["PATH"] = f"/usr/local/bin:/usr/bin:/bin:{_PYTHON_HOME}/bin"
        env["LD_LIBRARY_PATH"] = f"{_PYTHON_HOME}/lib"  # a shared libpython is looked for where it was installed
    return env, binds

"""Tasks in Harbor format: a folder with an instruction, an environment, hidden tests and a reference solution.

    <id>/instruction.md            what the agent is told
         task.toml                 time limits, resources, and metadata (family, seed, horizon of procedural tasks)
         environment/Dockerfile    FROM, WORKDIR, COPY and ENV are understood; anything else needs a container backend
         environment/…             the files that COPY puts into the sandbox, with their modes
         tests/test.sh …           the verifier; it writes /logs/verifier/reward.txt or reward.json
         solution/solve.sh         the reference solution (optional)

A folder is validated once, here, into a `HarborTask`; every fault is a `TaskFormatError` that names file and field.
Format: https://www.harborframework.com/docs/tasks
"""

from __future__ import annotations

import posixpath
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rome.trajectory import Task

MAX_FILE_BYTES = 16 * 2**20
MAX_FILES = 10_000


class TaskFormatError(ValueError):
    """A task folder that can't be used. `file` is relative to the folder; `field` is the key or line at fault."""

    def __init__(self, file: str, field: str, expected: str) -> None:
        super().__init__(f"{file}: {field}: {expected}" if field else f"{file}: {expected}")
        self.file = file
        self.field = field


@dataclass(frozen=True, slots=True)
class TaskFile:
    """Content and permission bits of a file."""

    content: bytes
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Verifier:
    """The hidden tests: paths relative to /tests, `test.sh` among them."""

    files: Mapping[str, TaskFile]
    timeout_seconds: float = 10.0
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """What the agent may use: wall seconds of the whole episode, processors, bytes of memory and of disk."""

    agent_seconds: float = 60.0
    cpus: float = 1.0
    memory_bytes: int = 256 * 2**20
    disk_bytes: int = 64 * 2**20


@dataclass(frozen=True, slots=True)
class HarborTask:
    """A validated task. `files` maps absolute sandbox paths to what stands there when the episode starts."""

    task: Task
    files: Mapping[str, TaskFile]
    verifier: Verifier
    limits: TaskLimits = TaskLimits()
    workdir: str = "/app"
    env: Mapping[str, str] = field(default_factory=dict)
    solution: str = ""
    programs: tuple[str, ...] = ()
    """Names of programs that the sandbox must have beyond the shell and coreutils."""


def load_task(path: str | Path) -> HarborTask:
    """Reads and validates a Harbor folder.

    Raises:
      TaskFormatError: the folder or something in it is missing or malformed; the message names file and field.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TaskFormatError(str(folder), "", "expected a task folder")
    config = _read_config(folder)
    instruction = _read_text(folder, "instruction.md").strip()
    if not instruction:
        raise TaskFormatError("instruction.md", "", "expected an instruction, got an empty file")
    tests = _read_tree(folder / "tests", "tests")
    if "test.sh" not in tests:
        raise TaskFormatError("tests/test.sh", "", "expected the verifier script, got no such file")
    workdir, env, files = _read_environment(folder)
    solution = _read_text(folder, "solution/solve.sh") if (folder / "solution" / "solve.sh").is_file() else ""
    metadata, agent, verifier, machine = (config[name] for name in ("metadata", "agent", "verifier", "environment"))
    return HarborTask(
        task=Task(
            id=folder.name,
            instruction=instruction,
            family=metadata.get("family", ""),
            seed=metadata.get("seed", 0),
            horizon=metadata.get("horizon", 0),
            path=str(folder),
        ),
        files=files,
        verifier=Verifier(tests, float(verifier.get("timeout_sec", 10.0)), verifier.get("env", {})),
        limits=TaskLimits(
            agent_seconds=float(agent.get("timeout_sec", 60.0)),
            cpus=float(machine.get("cpus", 1)),
            memory_bytes=machine.get("memory_mb", 256) * 2**20,
            disk_bytes=machine.get("storage_mb", 64) * 2**20,
        ),
        workdir=workdir,
        env=env,
        solution=solution,
        programs=tuple(metadata.get("programs", ())),
    )


# --- task.toml -------------------------------------------------------------------------------------------------------

_NUMBER, _POSITIVE, _TEXT, _NATURAL, _TABLE, _STRINGS, _FALSE = (
    "a number > 0",
    "a whole number > 0",
    "a string",
    "a whole number ≥ 0",
    "a table of strings",
    "a list of strings",
    "false (sandboxes have no network)",
)
# Every key that is read or may safely be left alone; an unknown one is an error, for it may ask for what isn't given.
_SCHEMA: dict[str, dict[str, str]] = {
    "verifier": {"timeout_sec": _NUMBER, "env": _TABLE},
    "agent": {"timeout_sec": _NUMBER},
    "environment": {
        "build_timeout_sec": _NUMBER,
        "cpus": _NUMBER,
        "memory_mb": _POSITIVE,
        "storage_mb": _POSITIVE,
        "allow_internet": _FALSE,
    },
}
# Metadata is free-form in Harbor; these keys are ours and are read.
_METADATA = {"family": _TEXT, "seed": _NATURAL, "horizon": _NATURAL, "programs": _STRINGS}
_TOP = {"version", "schema_version", "source", "task", "metadata", *_SCHEMA}


def _is(kind: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == _NUMBER:
        return number and 0 < value < float("inf")
    if kind == _POSITIVE:
        return whole and value > 0
    if kind == _NATURAL:
        return whole and value >= 0
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _STRINGS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == _TABLE:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return value is False


def _read_config(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        config = tomllib.loads(_read_text(folder, "task.toml"))
    except tomllib.TOMLDecodeError as error:
        raise TaskFormatError("task.toml", "", f"expected TOML: {error}") from None
    for key in config:
        if key not in _TOP:
            raise TaskFormatError("task.toml", key, f"unknown key; expected one of {', '.join(sorted(_TOP))}")
    sections: dict[str, dict[str, Any]] = {}
    for section in ("metadata", *_SCHEMA):
        values = config.get(section, {})
        if not isinstance(values, dict):
            raise TaskFormatError("task.toml", section, f"expected a table, got {values!r}")
        known = _SCHEMA.get(section, _METADATA)
        for key, value in values.items():
            if key not in known:
                if section == "metadata":
                    continue
                raise TaskFormatError("task.toml", f"{section}.{key}", f"unknown key; expected one of {sorted(known)}")
            if not _is(known[key], value):
                raise TaskFormatError("task.toml", f"{section}.{key}", f"expected {known[key]}, got {value!r}")
        sections[section] = values
    return sections


# --- files -----------------------------------------------------------------------------------------------------------


def _read_text(folder: Path, name: str) -> str:
    return _decode(name, _read_file(folder / name, name))


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise TaskFormatError(name, f"byte {error.start}", "expected UTF-8") from None


def _read_file(path: Path, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise TaskFormatError(name, "", "expected a file, got nothing of that name") from None
    except OSError as error:
        raise TaskFormatError(name, "", f"expected a readable file: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise TaskFormatError(name, "", f"expected at most {MAX_FILE_BYTES} bytes")
    return content


def _read_tree(folder: Path, name: str) -> dict[str, TaskFile]:
    """All regular files under a folder by their path relative to it. Links are refused: they could point outside."""
    if folder.is_symlink() or not folder.is_dir():
        raise TaskFormatError(name, "", "expected a folder")
    files: dict[str, TaskFile] = {}
    pending = [""]
    while pending:
        inner = pending.pop()
        for entry in sorted((folder / inner).iterdir()):
            relative = f"{inner}{entry.name}"
            mode = entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                pending.append(f"{relative}/")
            elif stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
                raise TaskFormatError(f"{name}/{relative}", "mode", "expected permission bits up to 0777")
            elif stat.S_ISREG(mode):
                files[relative] = TaskFile(_read_file(entry, f"{name}/{relative}"), stat.S_IMODE(mode))
            else:
                raise TaskFormatError(f"{name}/{relative}", "", "expected a regular file or a folder")
            if len(files) > MAX_FILES:
                raise TaskFormatError(name, "", f"expected at most {MAX_FILES} files")
    return dict(sorted(files.items()))


def _read_environment(folder: Path) -> tuple[str, dict[str, str], dict[str, TaskFile]]:
    """Interprets the Dockerfile: (working directory, environment variables, files by absolute path)."""
    tree = _read_tree(folder / "environment", "environment")
    where = "environment/Dockerfile"
    if "Dockerfile" not in tree:
        raise TaskFormatError(where, "", "expected a file, got nothing of that name")
    workdir, env, files, based = "/", {}, {}, False
    for number, line in enumerate(_decode(where, tree["Dockerfile"].content).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        keyword, arguments, place = words[0].upper(), words[1:], f"line {number}"
        if keyword == "FROM" and arguments:
            based = True
        elif keyword == "WORKDIR" and len(arguments) == 1:
            workdir = posixpath.normpath(posixpath.join(workdir, arguments[0]))
        elif keyword == "ENV" and len(arguments) == 1 and "=" in arguments[0]:
            name, _, value = arguments[0].partition("=")
            env[name] = value
        elif keyword == "COPY" and len(arguments) == 2:
            files |= _copy(tree, arguments[0], arguments[1], workdir, place)
        else:
            expected = "expected FROM image, WORKDIR path, COPY source target or ENV NAME=value"
            raise TaskFormatError(where, place, f"{expected} (no other step can run without a container), got {line!r}")
    if not based:
        raise TaskFormatError(where, "FROM", "expected a base image")
    return workdir, env, files


def _copy(tree: Mapping[str, TaskFile], source: str, target: str, workdir: str, place: str) -> dict[str, TaskFile]:
    """COPY of a file or of a folder's contents, as Docker does it."""
    where = "environment/Dockerfile"
    root = posixpath.normpath(source.lstrip("/")) if source.strip("/") else "."
    if root == ".." or root.startswith("../"):
        raise TaskFormatError(where, place, f"expected a source inside environment/, got {source!r}")
    absolute = posixpath.normpath(posixpath.join(workdir, target))
    if root in tree:
        into = target.endswith("/") or target in (".", "..")
        return {posixpath.join(absolute, posixpath.basename(root)) if into else absolute: tree[root]}
    prefix = "" if root == "." else f"{root}/"
    found = {name: file for name, file in tree.items() if name.startswith(prefix)}
    if not found and not source.endswith("/"):
        raise TaskFormatError(where, place, f"expected a source that exists in environment/, got {source!r}")
    return {posixpath.join(absolute, name.removeprefix(prefix)): file for name, file in found.items()}

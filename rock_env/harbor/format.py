"""Harbor's format of tasks: a folder with an instruction, an environment, hidden tests and a reference solution.

    <id>/instruction.md            what the agent is told
         task.toml                 time limits, resources, and metadata (family, seed, horizon of procedural tasks)
         environment/Dockerfile    FROM, WORKDIR, COPY and ENV are understood; anything else needs a container backend
         environment/…             the files that COPY puts into the sandbox, with their modes
         tests/test.sh …           the verifier; it writes /logs/verifier/reward.txt or reward.json
         solution/solve.sh         the reference solution (optional)

An environment alone is `task.toml` and `environment/`. Either is validated once, here, from its files in memory; every
fault is a `TaskFormatError` that names file and field. Format: https://www.harborframework.com/docs/tasks
"""

from __future__ import annotations

import posixpath
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rock_env.errors import SpecError

MAX_FILE_BYTES = 16 * 2**20
MAX_FILES = 10_000


class TaskFormatError(SpecError):
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


Tree = Mapping[str, TaskFile]
"""The files of a folder by their path relative to it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a sandbox is made of.

    Attributes:
      files: absolute paths inside -> what stands there at the start.
      programs: that the sandbox must have beyond the shell and coreutils.
      image, backend: what task.toml asks for; None: whoever starts it chooses.
    """

    files: Mapping[str, TaskFile]
    limits: TaskLimits = TaskLimits()
    workdir: str = "/app"
    env: Mapping[str, str] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    image: str | None = None
    backend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedEnvironment(Environment):
    """An environment whose outcome can be judged. `solution` is the reference's script, "" when there is none."""

    verifier: Verifier
    solution: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarborFolder(VerifiedEnvironment):
    """A validated task folder."""

    name: str
    instruction: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_folder(path: str | Path) -> HarborFolder:
    """Reads and validates a task folder; files that the format does not know are left alone.

    Raises:
      TaskFormatError: the folder or something in it is missing or malformed; the message names file and field.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TaskFormatError(str(folder), "", "expected a task folder")
    tree = {name: TaskFile(_read_file(folder / name, name)) for name in ("task.toml", "instruction.md")}
    for part in ("tests", "environment"):
        tree |= {f"{part}/{name}": file for name, file in read_tree(folder / part, part).items()}
    if (folder / _SOLUTION).is_file():
        tree[_SOLUTION] = TaskFile(_read_file(folder / _SOLUTION, _SOLUTION))
    return parse_task(tree, folder.name)


def parse_task(tree: Tree, name: str) -> HarborFolder:
    """Validates the files of a task. Raises TaskFormatError."""
    config = _parse_config(tree)
    instruction = _text(tree, "instruction.md").strip()
    if not instruction:
        raise TaskFormatError("instruction.md", "", "expected an instruction, got an empty file")
    tests = _part(tree, "tests")
    if "test.sh" not in tests:
        raise TaskFormatError("tests/test.sh", "", "expected the verifier script, got no such file")
    verifier = config["verifier"]
    return HarborFolder(
        name=name,
        instruction=instruction,
        metadata=config["metadata"],
        verifier=Verifier(tests, float(verifier.get("timeout_sec", 10.0)), verifier.get("env", {})),
        solution=_text(tree, _SOLUTION) if _SOLUTION in tree else "",
        **_environment(tree, config),
    )


def parse_environment(tree: Tree) -> Environment:
    """Validates the files of an environment alone (or of a task, whose other parts are left alone)."""
    return Environment(**_environment(tree, _parse_config(tree)))


def _environment(tree: Tree, config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of Environment."""
    workdir, env, files = _parse_dockerfile(_part(tree, "environment"))
    machine = config["environment"]
    limits = TaskLimits(
        agent_seconds=float(config["agent"].get("timeout_sec", 60.0)),
        cpus=float(machine.get("cpus", 1)),
        memory_bytes=machine.get("memory_mb", 256) * 2**20,
        disk_bytes=machine.get("storage_mb", 64) * 2**20,
    )
    asked = {"image": machine.get("docker_image"), "backend": machine.get("backend")}
    programs = tuple(config["metadata"].get("programs", ()))
    return {"files": files, "limits": limits, "workdir": workdir, "env": env, "programs": programs, **asked}


# --- task.toml -------------------------------------------------------------------------------------------------------

_SOLUTION = "solution/solve.sh"
# A path would be a place on the machine of whoever starts the task.
_IMAGE_NAME = re.compile(r"[a-z0-9]+([._/:@-]+[A-Za-z0-9]+)*\Z")
_NUMBER, _POSITIVE, _TEXT, _NATURAL, _TABLE, _STRINGS, _IMAGE, _FALSE = (
    "a number > 0 (and < 2^32)",
    "a whole number > 0 (and < 2^32)",
    "a string",
    "a whole number ≥ 0 (and < 2^63)",
    "a table of strings",
    "a list of strings",
    "the name of an image",
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
        "docker_image": _IMAGE,
        "backend": _TEXT,
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
        return number and 0 < value < 2**32
    if kind == _POSITIVE:
        return whole and 0 < value < 2**32
    if kind == _NATURAL:
        return whole and 0 <= value < 2**63
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _IMAGE:
        return isinstance(value, str) and _IMAGE_NAME.match(value) is not None and ".." not in value
    if kind == _STRINGS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == _TABLE:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return value is False


def _parse_config(tree: Tree) -> dict[str, dict[str, Any]]:
    try:
        config = tomllib.loads(_text(tree, "task.toml"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TaskFormatError):
            raise
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


def _text(tree: Tree, name: str) -> str:
    if name not in tree:
        raise TaskFormatError(name, "", "expected a file, got nothing of that name")
    return _decode(name, tree[name].content)


def _part(tree: Tree, folder: str) -> dict[str, TaskFile]:
    """The files below a folder, by their path relative to it."""
    files = {name.removeprefix(f"{folder}/"): file for name, file in tree.items() if name.startswith(f"{folder}/")}
    if not files:
        raise TaskFormatError(folder, "", "expected a folder")
    return files


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


def read_tree(folder: Path, name: str = "") -> dict[str, TaskFile]:
    """All regular files under a folder by their path relative to it. Links are refused: they could point outside."""
    if folder.is_symlink() or not folder.is_dir():
        raise TaskFormatError(name or str(folder), "", "expected a folder")
    above = f"{name}/" if name else ""
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
                raise TaskFormatError(f"{above}{relative}", "mode", "expected permission bits up to 0777")
            elif stat.S_ISREG(mode):
                files[relative] = TaskFile(_read_file(entry, f"{above}{relative}"), stat.S_IMODE(mode))
            else:
                raise TaskFormatError(f"{above}{relative}", "", "expected a regular file or a folder")
            if len(files) > MAX_FILES:
                raise TaskFormatError(name or str(folder), "", f"expected at most {MAX_FILES} files")
    return dict(sorted(files.items()))


def _parse_dockerfile(tree: Tree) -> tuple[str, dict[str, str], dict[str, TaskFile]]:
    """Interprets environment/Dockerfile: (working directory, environment variables, files by absolute path)."""
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

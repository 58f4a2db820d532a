"""What a caller asks of a sandbox, and what it answers. Validated here, once, into frozen dataclasses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from rock_env.errors import SpecError
from rock_env.model_proxy.settings import ModelProxy
from rock_env.network import NetworkPolicy

MIB = 1 << 20
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def _number(owner: str, name: str, value: object, minimum: float, *, integer: bool, optional: bool) -> None:
    if value is None and optional:
        return
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not minimum <= value < float("inf"):
        kind = "an integer" if integer else "a finite number"
        none = " or None" if optional else ""
        raise SpecError(f"{owner}.{name}: expected {kind} >= {minimum}{none}, got {value!r}")


@dataclass(frozen=True)
class Limits:
    """Resource limits. None lifts a limit; a limit that the machine cannot enforce refuses to start.

    Attributes:
      memory_bytes: of all processes together, including the files they write (the writable layer lives in memory).
      pids: processes and threads, including the sandbox's own two.
      cpus: cores' worth of CPU time, e.g. 0.5.
      disk_bytes: of the writable layer; in Docker, of all writable directories together, each of which has its share.
      output_bytes: of one command; the middle is dropped beyond it and the result is marked truncated.
      command_seconds: default timeout of a command.
      lifetime_seconds: of the sandbox, after which it is destroyed.
    """

    memory_bytes: int | None = 256 * MIB
    pids: int | None = 64
    cpus: float | None = 1.0
    disk_bytes: int | None = 64 * MIB
    output_bytes: int = 64 << 10
    command_seconds: float = 10.0
    lifetime_seconds: float | None = 3600.0

    def __post_init__(self) -> None:
        _number("limits", "memory_bytes", self.memory_bytes, 4 * MIB, integer=True, optional=True)
        _number("limits", "pids", self.pids, 4, integer=True, optional=True)
        _number("limits", "cpus", self.cpus, 0.01, integer=False, optional=True)
        _number("limits", "disk_bytes", self.disk_bytes, 64 << 10, integer=True, optional=True)
        _number("limits", "output_bytes", self.output_bytes, 16, integer=True, optional=False)
        _number("limits", "command_seconds", self.command_seconds, 0.001, integer=False, optional=False)
        _number("limits", "lifetime_seconds", self.lifetime_seconds, 0.001, integer=False, optional=True)

    def to_wire(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class FileEntry:
    """A file for a sandbox: `content` (str is UTF-8) and permission bits (None: an existing file's, else 0644)."""

    content: bytes | str = b""
    mode: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.content, bytes | str):
            raise SpecError(f"FileEntry.content: expected bytes or str, got {type(self.content).__name__}")
        if self.mode is not None and not (isinstance(self.mode, int) and 0 <= self.mode <= 0o777):
            raise SpecError(f"FileEntry.mode: expected permission bits 0..0o777 or None, got {self.mode!r}")

    @property
    def data(self) -> bytes:
        return self.content.encode() if isinstance(self.content, str) else self.content


def check_path(name: str, path: object) -> str:
    """A path inside the sandbox: a non-empty str without NUL. `..` and links are resolved inside: they need no ban."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise SpecError(f"{name}: expected a non-empty path without NUL, got {path!r}")
    return path


def check_env(name: str, env: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (env or {}).items():
        if not isinstance(key, str) or not _ENV_NAME.match(key):
            raise SpecError(f"{name}: expected names like FOO_1, got {key!r}")
        if not isinstance(value, str) or "\0" in value:
            raise SpecError(f"{name}[{key!r}]: expected a str without NUL, got {value!r}")
    return dict(env or {})


@dataclass(frozen=True)
class SandboxSpec:
    """A sandbox to start.

    Attributes:
      image: a root file system (directory), used read-only below a writable layer; None: a minimal tree over the
        host's /usr. For the docker backend also the name of an image that the daemon has, and None is an image made of
        this machine's programs.
      files: written before the start, owned by the sandbox user. Relative keys are below `workdir`; a key that ends in
        "/" makes a directory.
      workdir: absolute; created when missing; where commands start.
      env: added to the minimal environment. Nothing of the host's environment is passed on.
      network: what it may reach; by default nothing: a network namespace of its own with nothing but loopback.
      backend: "bubblewrap" or "docker" (rock_env.backend.register_backend); None: bubblewrap, or what an admin has.
      readonly_binds: host path -> path inside, e.g. an interpreter outside /usr.
      model_proxy: an endpoint inside for agents that speak to a model themselves; None: none.
    """

    image: str | None = None
    files: Mapping[str, bytes | str | FileEntry] = field(default_factory=dict)
    workdir: str = "/app"
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    network: NetworkPolicy = field(default_factory=NetworkPolicy)
    backend: str | None = None
    readonly_binds: Mapping[str, str] = field(default_factory=dict)
    model_proxy: ModelProxy | None = None

    def __post_init__(self) -> None:
        if self.image is not None:
            check_path("image", self.image)
        if not check_path("workdir", self.workdir).startswith("/"):
            raise SpecError(f"workdir: expected an absolute path, got {self.workdir!r}")
        if not isinstance(self.limits, Limits):
            raise SpecError(f"limits: expected Limits, got {type(self.limits).__name__}")
        if not isinstance(self.network, NetworkPolicy):
            raise SpecError(f"network: expected a NetworkPolicy, got {self.network!r}")
        if self.backend is not None and not isinstance(self.backend, str):
            raise SpecError(f"backend: expected a name or None, got {self.backend!r}")
        if self.model_proxy is not None and not isinstance(self.model_proxy, ModelProxy):
            raise SpecError(f"model_proxy: expected a ModelProxy or None, got {type(self.model_proxy).__name__}")
        check_env("env", self.env)
        for path, entry in self.files.items():
            check_path("files", path)
            if not isinstance(entry, bytes | str | FileEntry):
                raise SpecError(f"files[{path!r}]: expected bytes, str or FileEntry, got {type(entry).__name__}")
        for source, target in self.readonly_binds.items():
            if not check_path("readonly_binds", source).startswith("/") or not check_path(
                f"readonly_binds[{source!r}]", target
            ).startswith("/"):
                raise SpecError(f"readonly_binds: expected absolute paths, got {source!r}: {target!r}")


@dataclass(frozen=True)
class CommandResult:
    """The outcome of a command.

    Attributes:
      exit_code: 0..255; 128 + n after signal n; 124 after a timeout.
      output: stdout and stderr interleaved, decoded as UTF-8 with errors replaced.
      timed_out: the command was killed at its deadline; `output` holds what it had written.
      truncated: the middle of the output was dropped.
      signal: the signal that ended the command, if one did (for a shell: by the 128 + n convention).
      oom_killed: the memory limit killed a process of the sandbox during the command.
      seconds: wall-clock time.
    """

    exit_code: int
    output: str
    timed_out: bool = False
    truncated: bool = False
    signal: int | None = None
    oom_killed: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class SandboxStats:
    """Resources used since the start; None where this machine does not account for them."""

    cpu_seconds: float | None
    memory_bytes: int | None
    memory_peak_bytes: int | None
    pids: int | None
    disk_bytes: int


@dataclass(frozen=True)
class FileInfo:
    """A directory entry: `kind` is "file", "directory", "symlink" or "other"; `size` in bytes; a link's `target`."""

    name: str
    kind: str
    size: int
    mode: int
    target: str = ""

"""The SDK: a sandbox, its sessions, its files, its snapshots. Thread-safe and synchronous."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from rock_env.backend import DEFAULT_BACKEND, Backend, get_backend
from rock_env.errors import FileError, LimitNotEnforceable, SpecError
from rock_env.forward import Forward, check_port
from rock_env.jobs import (
    DEFAULT_BUFFER_BYTES,
    JOB_PATTERN,
    MAX_BUFFER_BYTES,
    MIN_BUFFER_BYTES,
    Job,
    JobStatus,
    check_size,
)
from rock_env.model_proxy.client import ModelServer
from rock_env.network import NetworkPolicy
from rock_env.spec import (
    MIB,
    CommandResult,
    FileEntry,
    FileInfo,
    SandboxSpec,
    SandboxStats,
    check_env,
    check_path,
)

_UPLOAD_BATCH_BYTES = 8 * MIB
_JOB_ID = re.compile(JOB_PATTERN)


def _check_command(name: str, command: object) -> str:
    if not isinstance(command, str) or "\0" in command:
        raise SpecError(f"{name}: expected a str without NUL, got {command!r}")
    return command


def argv_of(command: str | list[str]) -> list[str]:
    """The arguments of a command: shell text is for a fresh bash."""
    if isinstance(command, str):
        return ["bash", "--norc", "--noprofile", "-c", _check_command("command", command)]
    if not command:
        raise SpecError("command: expected at least one argument")
    return [_check_command("command", part) for part in command]


def _check_job(id: object) -> str:
    if not isinstance(id, str) or not _JOB_ID.fullmatch(id):
        raise SpecError(f"job: expected 1 to 64 letters, digits, dots, dashes or underscores, got {id!r}")
    return id


def _seconds(timeout: float | None, default: float) -> float:
    if timeout is None:
        return default
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise SpecError(f"timeout: expected seconds > 0 or None, got {timeout!r}")
    return float(timeout)


class Session:
    """A persistent bash: directory, variables and functions last from one command to the next.

    After `exit N` (which returns N) or a timeout, the next command finds the same directory, variables and functions in
    a fresh shell. Standard input of every command is /dev/null. Commands of one session run one after another.
    """

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.name = name
        self._sandbox = sandbox

    def run(self, command: str, timeout: float | None = None) -> CommandResult:
        """Run shell text and wait for it (not for its background jobs), at most `timeout` seconds."""
        box, limits = self._sandbox, self._sandbox.spec.limits
        seconds = _seconds(timeout, limits.command_seconds)
        return box._backend.run(box.id, self.name, _check_command("command", command), seconds, limits.output_bytes)


class Snapshot:
    """The files of a sandbox at one moment, from which any number of sandboxes can start. Processes are not part of it;
    the directory, variables and functions of idle sessions are."""

    def __init__(self, backend: Backend, id: str, spec: SandboxSpec) -> None:
        self.id = id
        self.spec = spec
        self._backend = backend

    def delete(self) -> None:
        """Free it (sandboxes started from it are unaffected). Idempotent."""
        self._backend.drop_snapshot(self.id)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.delete()


class Sandbox:
    """A live sandbox. Make one with `Sandbox.start`; a context manager stops it."""

    def __init__(self, backend: Backend, id: str, spec: SandboxSpec) -> None:
        self.id = id
        self.spec = spec
        self._backend = backend

    @classmethod
    def start(cls, spec: SandboxSpec | None = None, *, snapshot: Snapshot | None = None) -> Sandbox:
        """Start a sandbox, from a snapshot if given (whose spec is the default; `files` of an explicit spec are added).

        Raises:
          BackendUnavailable: the machine lacks what the backend needs.
          LimitNotEnforceable: a limit of the spec cannot be enforced here.
          LimitExceeded: the files do not fit into disk_bytes.
        """
        if spec is None:
            spec = snapshot.spec if snapshot is not None else SandboxSpec()
            files_spec = _without_files(spec) if snapshot is not None else spec
        else:
            files_spec = spec
        if spec.backend is None:
            spec = replace(spec, backend=DEFAULT_BACKEND if snapshot is None else snapshot.spec.backend)
        if snapshot is not None and snapshot.spec.backend != spec.backend:
            raise SpecError(f"backend: the snapshot is of {snapshot.spec.backend!r}, the spec has {spec.backend!r}")
        backend = get_backend(spec.backend) if snapshot is None else snapshot._backend
        _require_enforceable(backend, spec.network)
        id = backend.create(files_spec, snapshot.id if snapshot is not None else None)
        return cls(backend, id, spec)

    @classmethod
    def connect(
        cls,
        url: str | None = None,
        token: str | None = None,
        *,
        id: str | None = None,
        spec: SandboxSpec | None = None,
        ca_file: str | Path | None = None,
    ) -> Sandbox:
        """A sandbox of a `rock` admin, with the same methods as a local one: the live one named `id`, or a new one.

        Args:
          url, token: the admin's address, and an API key, or (with `id`) a token for that sandbox; by default
            $ROCK_URL and $ROCK_API_KEY.
          ca_file: certificates to trust instead of the system's.

        Raises:
          Unauthorized, Forbidden: the token is not valid, or not for this.
          QuotaExceeded, NoCapacity: there is no room for a new one.
          BackendUnavailable: nobody answers, or the extra `rock` is not installed.
        """
        from rock_env.remote import Client  # imports the extra `rock`

        client = Client(url, token, ca_file=ca_file)
        return client.start(spec) if id is None else client.sandbox(id)

    # -- commands
    def execute(
        self,
        command: str | list[str],
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> CommandResult:
        """Run one process: shell text by a fresh bash, or an argument list directly."""
        limits, argv = self.spec.limits, argv_of(command)
        seconds = _seconds(timeout, limits.command_seconds)
        inside = check_path("cwd", cwd) if cwd is not None else None
        return self._backend.execute(self.id, argv, seconds, inside, check_env("env", env), limits.output_bytes)

    def start_job(
        self,
        command: str | list[str],
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        *,
        stdin: bool = False,
        terminal: tuple[int, int] | None = None,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        id: str | None = None,
    ) -> Job:
        """Start a command that runs by itself until it ends, its timeout, or the sandbox's end.

        Args:
          stdin: whether its standard input will be written; else it is /dev/null.
          terminal: (rows, columns) of a pseudo-terminal to run it in, which is its input and output.
          buffer_bytes: how much output is kept for whoever reads it.
          id: its name; if there is a job of that name, that one is meant, and nothing is started.
        """
        if isinstance(buffer_bytes, bool) or not isinstance(buffer_bytes, int):
            raise SpecError(f"buffer_bytes: expected an integer, got {buffer_bytes!r}")
        if not MIN_BUFFER_BYTES <= buffer_bytes <= MAX_BUFFER_BYTES:
            raise SpecError(f"buffer_bytes: expected {MIN_BUFFER_BYTES}..{MAX_BUFFER_BYTES}, got {buffer_bytes!r}")
        _require_capability(self._backend, "terminal" if terminal is not None else "jobs")
        row, _ = self._backend.call(
            self.id,
            "job_start",
            0.0,
            job=_check_job(id if id is not None else secrets.token_hex(8)),
            argv=argv_of(command),
            env=check_env("env", env),
            cwd=check_path("cwd", cwd) if cwd is not None else None,
            seconds=None if timeout is None else _seconds(timeout, 0.0),
            stdin=bool(stdin),
            size=check_size(terminal) if terminal is not None else None,
            buffer_bytes=buffer_bytes,
        )
        return Job(self._backend, self.id, JobStatus.from_wire(row))

    def job(self, id: str) -> Job:
        """A job by its id. Raises JobNotFound when there is none (any more)."""
        row, _ = self._backend.call(self.id, "job_status", 0.0, job=_check_job(id), seconds=0.0)
        return Job(self._backend, self.id, JobStatus.from_wire(row))

    def jobs(self) -> list[JobStatus]:
        """The jobs that run, and the latest that have ended (together at most 64), in the order of their start."""
        rows = self._backend.call(self.id, "job_list", 0.0)[0]["jobs"]
        return [JobStatus.from_wire(row) for row in rows]

    def session(self, name: str = "default") -> Session:
        """A persistent shell by name; the same name gives the same shell."""
        if not isinstance(name, str) or not name:
            raise SpecError(f"session: expected a non-empty name, got {name!r}")
        return Session(self, name)

    def forward(self, port: int, local_port: int = 0) -> Forward:
        """A listener on this machine's loopback, whose connections reach `port` of the sandbox's own loopback.

        Args:
          local_port: where to listen; 0: any that is free. See the result's `local_port` and `url`.
        """
        _require_capability(self._backend, "forward")
        return Forward(self._backend, self.id, check_port("port", port), check_port("local_port", local_port, 0))

    # -- the agent's model
    @property
    def model(self) -> ModelServer:
        """What programs inside ask of their model, to be answered: see ModelProxy, mode "pull"."""
        return ModelServer(self._backend, self.id)

    # -- files
    def write_file(self, path: str, content: bytes | str, mode: int | None = None) -> None:
        """Write a file atomically, owned by the sandbox user, making missing directories."""
        if check_path("path", path).endswith("/"):
            raise SpecError(f"path: expected a file name, got {path!r}")
        self._backend.put(self.id, {path: FileEntry(content, mode)}, {})

    def write_files(self, files: Mapping[str, bytes | str | FileEntry]) -> None:
        """Write several files in one request; each is atomic. A key that ends in "/" makes a directory."""
        entries = {check_path("files", p): e if isinstance(e, FileEntry) else FileEntry(e) for p, e in files.items()}
        self._backend.put(self.id, entries, {})

    def read_file(self, path: str, max_bytes: int = 64 * MIB) -> bytes:
        """The contents of a regular file. Raises FileError (ENOENT, EISDIR, EFBIG beyond max_bytes, ...)."""
        return self._backend.read(self.id, check_path("path", path), max_bytes)

    def list_files(self, path: str = ".", recursive: bool = False) -> list[FileInfo]:
        """Entries of a directory; with `recursive`, of everything below it, parents first. Links are not followed."""
        return self._backend.list(self.id, check_path("path", path), recursive)

    def upload(self, local: str | Path, remote: str) -> None:
        """Copy a local file or directory to `remote` (the path of the copy). Links are copied as links.

        Raises FileError, also for what goes wrong here.
        """
        local, remote = Path(local), check_path("remote", remote)
        with _local_errors("upload", local):
            if local.is_dir():
                self._upload_tree(local, remote)
                return
            content, mode = local.read_bytes(), stat.S_IMODE(local.stat().st_mode) & 0o777
        self.write_file(remote, content, mode)

    def _upload_tree(self, local: Path, remote: str) -> None:
        files: dict[str, FileEntry] = {f"{remote.rstrip('/')}/": FileEntry()}
        links: dict[str, str] = {}
        size = 0
        for folder, directories, names in os.walk(local):
            inside = os.path.normpath(os.path.join(remote, os.path.relpath(folder, local)))
            for name in sorted((*directories, *names)):
                source, target = Path(folder, name), f"{inside}/{name}"
                if source.is_symlink():
                    links[target] = os.readlink(source)
                elif source.is_dir():
                    files[f"{target}/"] = FileEntry()
                elif source.is_file():
                    files[target] = FileEntry(source.read_bytes(), stat.S_IMODE(source.stat().st_mode) & 0o777)
                    size += len(files[target].data)
                if size > _UPLOAD_BATCH_BYTES:
                    self._backend.put(self.id, files, {})
                    files, size = {}, 0
        self._backend.put(self.id, files, links)

    def download(self, remote: str, local: str | Path) -> list[str]:
        """Copy a file or directory of the sandbox to `local` (the path of the copy; a file goes into a directory).

        Nothing is ever written outside `local`: links are recreated only when they point inside the copied directory.
        Returns the entries that were left out (other links, devices, sockets), relative to `remote`.
        Raises FileError, also for what goes wrong here.
        """
        local, remote = Path(local), check_path("remote", remote)
        with _local_errors("download", local):
            try:
                infos = self.list_files(remote, recursive=True)
            except FileError as error:
                if error.errno_name != "ENOTDIR":
                    raise
                target = local / os.path.basename(remote) if local.is_dir() else local
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_local(target, self.read_file(remote), self.list_files(remote)[0].mode)
                return []
            return self._download_tree(remote, infos, local)

    def _download_tree(self, remote: str, infos: list[FileInfo], local: Path) -> list[str]:
        left_out: list[str] = []
        links: list[FileInfo] = []
        local.mkdir(parents=True, exist_ok=True)
        for info in infos:
            target = local / info.name
            if os.path.isabs(info.name) or ".." in info.name.split("/"):  # no supervisor of ours says so
                left_out.append(info.name)
            elif info.kind == "directory":
                if target.is_symlink():  # of an earlier copy
                    target.unlink()
                target.mkdir(exist_ok=True)
            elif info.kind == "file":
                _write_local(target, self.read_file(os.path.join(remote, info.name)), info.mode)
            elif info.kind == "symlink" and _stays_inside(info):
                links.append(info)
            else:
                left_out.append(info.name)
        for info in links:  # last, so that nothing is written through one
            link = local / info.name
            if link.is_symlink():  # of an earlier copy
                link.unlink()
            os.symlink(info.target, link)
        return left_out

    # -- copies
    def snapshot(self) -> Snapshot:
        """The files (and idle sessions' state) as they are now. Copies the writable layer; shares what lies below."""
        return Snapshot(self._backend, self._backend.snapshot(self.id), _without_files(self.spec))

    def fork(self, n: int = 1) -> list[Sandbox]:
        """`n` independent sandboxes that continue from this one's files and idle sessions; this one is unchanged."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SpecError(f"n: expected an integer >= 1, got {n!r}")
        forks: list[Sandbox] = []
        with self.snapshot() as snapshot:
            try:
                for _ in range(n):
                    forks.append(Sandbox.start(snapshot=snapshot))
            except BaseException:
                for sandbox in forks:
                    sandbox.stop()
                raise
        return forks

    # -- network
    def set_network_policy(self, policy: NetworkPolicy) -> None:
        """Change what the sandbox may reach, now: connections that the new policy does not allow are cut.

        Programs that start afterwards, and sessions, find the proxy in http_proxy and https_proxy.

        Raises:
          LimitNotEnforceable: the backend can only keep the network closed.
        """
        if not isinstance(policy, NetworkPolicy):
            raise SpecError(f"network: expected a NetworkPolicy, got {policy!r}")
        _require_enforceable(self._backend, policy)
        self._backend.set_network_policy(self.id, policy)
        self.spec = replace(self.spec, network=policy)

    # -- life
    def kill_all(self) -> None:
        """End every process inside, background jobs and daemons too; files stay, and the sandbox goes on.

        A session's next command gets a fresh shell in the same directory; its variables and functions are lost.
        """
        self._backend.kill_all(self.id)

    def stats(self) -> SandboxStats:
        return self._backend.stats(self.id)

    @property
    def is_alive(self) -> bool:
        return self._backend.is_alive(self.id)

    def stop(self) -> None:
        """End every process and free everything. Idempotent; also when the sandbox or its supervisor has died."""
        self._backend.destroy(self.id)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def _require_enforceable(backend: Backend, policy: NetworkPolicy) -> None:
    if not policy.is_closed and "network_allowlist" not in backend.capabilities:
        raise LimitNotEnforceable(
            f"network: backend {backend.name!r} cannot enforce an allowlist, only a closed network"
        )


def _require_capability(backend: Backend, name: str) -> None:
    if name not in backend.capabilities:
        raise LimitNotEnforceable(f"{name}: backend {backend.name!r} does not offer it")


def _without_files(spec: SandboxSpec) -> SandboxSpec:
    return replace(spec, files={})


def _stays_inside(info: FileInfo) -> bool:
    """Whether a link points below the downloaded directory, wherever the copy's other links lead.

    Only first of all may it go up: from its own directory, which is a real one, and not from where a link has led.
    """
    parts = [part for part in info.target.split("/") if part not in ("", ".")]
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return not os.path.isabs(info.target) and ups <= info.name.count("/") and ".." not in parts[ups:]


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "")


@contextmanager
def _local_errors(what: str, local: Path) -> Iterator[None]:
    """Turns what this machine's file system refuses into FileError."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        where = error.filename2 or error.filename or local
        raise FileError(f"{what} {where}: {error.strerror}", _errno_name(error)) from error


def _write_local(path: Path, data: bytes, mode: int) -> None:
    """Write a downloaded file by way of a temporary name, never through a link that lies at `path`."""
    temporary = path.with_name(f".{path.name}.rock-tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode | 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink()
        raise

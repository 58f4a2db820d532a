"""What we ask of the Docker Engine API, by the `docker` package: what it can enforce, containers, what others left."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rock_env.errors import BackendUnavailable, LimitNotEnforceable, RequestTimeout, RockError
from rock_env.spec import Limits
from rock_env.supervisor import linux

if TYPE_CHECKING:
    import docker

LABEL = "rock-env.owner"
_API_SECONDS = 60
# The field of Limits, and what the engine says of itself when the machine lets it enforce that.
_CONTROLS = {"memory_bytes": ("MemoryLimit",), "pids": ("PidsLimit",), "cpus": ("CpuCfsPeriod", "CpuCfsQuota")}


def load() -> Any:
    """The `docker` package. Raises BackendUnavailable where it is not installed."""
    try:
        import docker
    except ImportError as error:
        raise BackendUnavailable("docker: the Python package is missing: pip install 'docker>=7.1'") from error
    return docker


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns the errors of the package, and of the connection below it, into ours."""
    import requests

    docker = load()
    try:
        yield
    except RockError:
        raise
    except requests.exceptions.Timeout as error:
        raise RequestTimeout(f"docker: {what}: no answer within {_API_SECONDS} s") from error
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
        raise BackendUnavailable(f"docker: {what}: {_text(error)}") from error


def _text(error: Exception) -> str:
    return str(getattr(error, "explanation", None) or error).strip()


def owner() -> str:
    """This process, so that a later one can tell whether it still runs: boot, pid namespace, pid, start time."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getpid()}/{linux.start_time(os.getpid())}"


def is_orphan(label: str) -> bool:
    """Whether the owner in a label was a process of this machine and pid namespace that has ended."""
    boot, namespace, pid, started = ([*label.split("/"), "", "", "", ""])[:4]
    mine = owner().split("/")
    if (boot, namespace) != (mine[0], mine[1]) or not pid.isdigit():
        return False
    return str(linux.start_time(int(pid))) != started


class Engine:
    """A connection to one daemon. Every method may be called from any thread and raises rock_env.errors only."""

    def __init__(self, base_url: str | None) -> None:
        docker = load()
        options = docker.utils.kwargs_from_env() if base_url is None else {"base_url": base_url}
        with translated("no daemon answers"):
            self.api: docker.APIClient = docker.APIClient(**options, version="auto", timeout=_API_SECONDS)
            self.info: dict = self.api.info()
        self.url = base_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if self.api.base_url.startswith("https://"):
            raise NotImplementedError(f"docker: {self.url}: a daemon over TLS; use its unix socket, or one over ssh")
        if not any(option.startswith("name=seccomp") for option in self.info.get("SecurityOptions") or []):
            raise BackendUnavailable("docker: the daemon runs without seccomp, which every sandbox needs")

    @property
    def is_local(self) -> bool:
        """Whether the daemon's files are this machine's."""
        return self.url.startswith(("unix://", "http+unix://"))

    @property
    def maps_users(self) -> bool:
        """Whether ids inside are not the host's (rootless, or userns-remap): then only some 65,000 of them exist."""
        options = self.info.get("SecurityOptions") or []
        return any(option.startswith(("name=rootless", "name=userns")) for option in options)

    def enforces(self, limit: str) -> bool:
        """Whether the daemon can enforce a field of Limits here."""
        return all(self.info.get(name) for name in _CONTROLS.get(limit, ()))

    def check(self, limits: Limits) -> None:
        """Refuse what cannot be enforced: the daemon itself would only warn, and run without it."""
        for limit, names in _CONTROLS.items():
            value = getattr(limits, limit)
            if value is not None and not self.enforces(limit):
                missing = ", ".join(name for name in names if not self.info.get(name))
                raise LimitNotEnforceable(
                    f"limits.{limit}={value} cannot be enforced by this Docker daemon ({missing} is not supported on "
                    f"its machine). Give it up with Limits({limit}=None)"
                )

    def remove(self, container: str) -> None:
        """Kill a container and remove it with all that is its own; returns when it is gone. Idempotent."""
        docker = load()
        with translated("remove a container"):
            try:
                self.api.remove_container(container, v=True, force=True)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                if error.status_code != 409:  # its removal is in progress: it ended by itself
                    raise
                with_deadline = {"condition": "removed", "timeout": _API_SECONDS}
                try:
                    self.api.wait(container, **with_deadline)
                except docker.errors.NotFound:
                    return

    def sweep(self) -> int:
        """Remove the containers of processes that died without doing so. Returns how many."""
        with translated("list containers"):
            found = self.api.containers(all=True, filters={"label": LABEL})
        orphans = [c["Id"] for c in found if is_orphan(c["Labels"].get(LABEL, ""))]
        for container in orphans:
            self.remove(container)
        return len(orphans)

    def attach(self, container: str) -> tuple[socket.socket, io.RawIOBase | socket.socket]:
        """The standard streams of a container that has not started yet, and what must be kept while they are used, and
        closed."""
        with translated("attach to a container"):
            params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1, "logs": 0}
            kept = self.api.attach_socket(container, params=params)
        return getattr(kept, "_sock", kept), kept

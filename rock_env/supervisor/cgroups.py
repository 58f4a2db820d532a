"""Control groups, version 1 and 2: what this machine lets us enforce, and one group per sandbox."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

from rock_env.supervisor import linux

_V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "freezer")
_V2_CONTROLLERS = ("memory", "pids", "cpu")
_CPU_PERIOD_US = 100_000
_NAME = re.compile(r"rock-(\d+)-(\d+)-(\d+)\Z")


def _unescape(path: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), path)


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 65536):
            pieces.append(piece)
        return b"".join(pieces).decode()
    finally:
        os.close(fd)


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def join(directories: list[str]) -> None:
    """Move the calling process into groups."""
    for directory in directories:
        _write(f"{directory}/cgroup.procs", "0")


def _keyed(text: str, key: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _mounted() -> Iterator[tuple[str, str, str, str]]:
    """Mounted hierarchies: (controller of version 1, or "" for version 2; mount point; its root; this process's path).

    A mount of several controllers comes once for each.
    """
    membership = {}
    for line in _read("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            membership[name] = path
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split(" ", 2)
        root, point = (_unescape(f) for f in left.split(" ")[3:5])
        if fstype == "cgroup":
            for name in options.split(" ")[-1].split(","):
                if name in _V1_CONTROLLERS and name in membership:
                    yield name, point, root, membership[name]
        elif fstype == "cgroup2" and "" in membership:
            yield "", point, root, membership[""]


def _directory(point: str, root: str, path: str) -> str:
    """Where the group `path` lies below a mount."""
    relative = os.path.relpath(path, root)
    return point if relative.startswith("..") else os.path.normpath(os.path.join(point, relative))


class Hierarchies:
    """Where groups may be made: {controller: directory} (version 2 controllers share one directory).

    `missing[controller]` says why a controller cannot be used.
    """

    def __init__(self) -> None:
        self.version = 0
        self.base: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    @classmethod
    def detect(cls) -> Hierarchies:
        self = cls()
        for name, point, root, path in _mounted():
            if name:
                self._offer(name, point, root, path, 1)
            else:
                self._offer_v2(point, root, path)
        for name in _V2_CONTROLLERS:
            if name not in self.base:
                self.missing.setdefault(name, f"no writable cgroup with the {name} controller")
        return self

    def _offer(self, name: str, point: str, root: str, path: str, version: int) -> None:
        directory = _directory(point, root, path)
        if os.access(directory, os.W_OK):
            self.base.setdefault(name, directory)
            self.version = self.version or version
        else:
            self.missing[name] = f"{directory} is not writable"

    def _offer_v2(self, point: str, root: str, path: str) -> None:
        """A group below the machine's root group when we may write there, else below our own (delegated) group."""
        own = os.path.normpath(os.path.join(point, os.path.relpath(path, root)))
        for directory in dict.fromkeys((point, own)):
            if not os.access(directory, os.W_OK):
                continue
            try:
                available = set(_read(f"{directory}/cgroup.controllers").split())
                for name in _V2_CONTROLLERS:
                    if name in available and name not in _read(f"{directory}/cgroup.subtree_control").split():
                        _write(f"{directory}/cgroup.subtree_control", f"+{name}")
            except OSError:  # e.g. EBUSY: a group with processes cannot delegate
                continue
            enabled = set(_read(f"{directory}/cgroup.subtree_control").split())
            if not enabled & set(_V2_CONTROLLERS):
                continue
            for name in _V2_CONTROLLERS:
                if name in enabled and name not in self.base:
                    self.base[name] = directory
                    self.version = 2
            return

    def directories(self) -> set[str]:
        return set(self.base.values())


def supervisor_name(pid_namespace: int, pid: int, started: int) -> str:
    return f"rock-{pid_namespace}-{pid}-{started}"


def is_stale(name: str, pid_namespace: int) -> bool:
    """Whether a directory was left by a supervisor of this pid namespace that no longer runs."""
    match = _NAME.match(name)
    if not match or int(match[1]) != pid_namespace:
        return False
    return linux.start_time(int(match[2])) != int(match[3])


def sweep(hierarchies: Hierarchies, pid_namespace: int) -> None:
    """Remove the groups, and kill the processes, of supervisors that died without cleaning up."""
    for directory in hierarchies.directories():
        for name in os.listdir(directory):
            if is_stale(name, pid_namespace):
                remove_tree(os.path.join(directory, name), kill=True)


def remove_tree(directory: str, *, kill: bool, seconds: float = 2.0) -> bool:
    """Remove a group and its children, killing what still runs there; True when nothing is left."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            children = [entry.path for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
            for child in (*children, directory):
                if kill:
                    for pid in _read(f"{child}/cgroup.procs").split():
                        os.kill(int(pid), signal.SIGKILL)
                os.rmdir(child)
            return True
        except FileNotFoundError:
            return True
        except (OSError, ProcessLookupError):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)


class Group:
    """The control group of one sandbox: one directory per controller (version 1) or one for all (version 2)."""

    def __init__(self, version: int, paths: dict[str, str]) -> None:
        self.version = version
        self._paths = paths
        self.directories = list(dict.fromkeys(paths.values()))
        self._counter_fds: dict[str, int] = {}

    @classmethod
    def make(cls, hierarchies: Hierarchies, supervisor: str, name: str) -> Group:
        """A new group: all of its directories, or none."""
        paths = {c: os.path.join(base, supervisor, name) for c, base in hierarchies.base.items()}
        self = cls(hierarchies.version, paths)
        made = []
        try:
            for directory in self.directories:
                os.mkdir(directory)
                made.append(directory)
        except OSError:
            for directory in made:
                os.rmdir(directory)
            raise
        return self

    @classmethod
    def own(cls) -> Group:
        """The group that this process is in, to be read only: a container's, seen from inside."""
        paths: dict[str, str] = {}
        version = 1
        for name, point, root, path in _mounted():
            directory = _directory(point, root, path)
            if not os.path.isdir(directory):  # named as the host sees it
                directory = point
            if name:
                if version == 1:
                    paths.setdefault(name, directory)
                continue
            try:
                available = set(_read(f"{directory}/cgroup.controllers").split()) & set(_V2_CONTROLLERS)
            except OSError:
                continue
            if available and not paths:
                version = 2
                paths = dict.fromkeys(available, directory)
        return cls(version, paths)

    def apply(self, memory_bytes: int | None, pids: int | None, cpus: float | None) -> None:
        """Set limits; every one given must have its controller (checked at the edge)."""
        if memory_bytes is not None:
            memory = self._paths["memory"]
            if self.version == 1:
                _write(f"{memory}/memory.limit_in_bytes", str(memory_bytes))
                if os.path.exists(f"{memory}/memory.memsw.limit_in_bytes"):
                    _write(f"{memory}/memory.memsw.limit_in_bytes", str(memory_bytes))
            else:
                _write(f"{memory}/memory.max", str(memory_bytes))
                if os.path.exists(f"{memory}/memory.swap.max"):
                    _write(f"{memory}/memory.swap.max", "0")
        if pids is not None:
            _write(f"{self._paths['pids']}/pids.max", str(pids))
        if cpus is not None:
            quota = max(1000, round(cpus * _CPU_PERIOD_US))
            cpu = self._paths["cpu"]
            if self.version == 1:
                _write(f"{cpu}/cpu.cfs_quota_us", str(quota))
            else:
                _write(f"{cpu}/cpu.max", f"{quota} {_CPU_PERIOD_US}")

    def _number(self, controller: str, v1: str, v2: str) -> int | None:
        directory = self._paths.get(controller)
        if directory is None:
            return None
        try:
            return int(_read(f"{directory}/{v1 if self.version == 1 else v2}"))
        except (OSError, ValueError):
            return None

    def usage(self) -> dict[str, float | int | None]:
        if self.version == 1:
            nanoseconds = self._number("cpuacct", "cpuacct.usage", "")
            cpu_seconds = None if nanoseconds is None else nanoseconds / 1e9
        elif "cpu" in self._paths:
            cpu_seconds = _keyed(_read(f"{self._paths['cpu']}/cpu.stat"), "usage_usec") / 1e6
        else:
            cpu_seconds = None
        return {
            "cpu_seconds": cpu_seconds,
            "memory_bytes": self._number("memory", "memory.usage_in_bytes", "memory.current"),
            "memory_peak_bytes": self._number("memory", "memory.max_usage_in_bytes", "memory.peak"),
            "pids": self._number("pids", "pids.current", "pids.current"),
        }

    def oom_kills(self) -> int:
        """How many processes the memory limit has killed so far."""
        return self._counter("memory", "memory.oom_control" if self.version == 1 else "memory.events", "oom_kill")

    def hits(self) -> dict[str, int]:
        """How often each limit has bitten so far: {field of Limits: count}."""
        return {
            "memory_bytes": self.oom_kills(),
            "pids": self._counter("pids", "pids.events", "max"),
            "cpus": self._counter("cpu", "cpu.stat", "nr_throttled"),
        }

    def _counter(self, controller: str, file: str, key: str) -> int:
        """A number of a group's file, which stays open; 0 where there is no such file."""
        directory = self._paths.get(controller)
        if directory is None:
            return 0
        try:
            if file not in self._counter_fds:
                self._counter_fds[file] = os.open(f"{directory}/{file}", os.O_RDONLY | os.O_CLOEXEC)
            return _keyed(os.pread(self._counter_fds[file], 4096, 0).decode(), key)
        except OSError:
            return 0

    def pids(self) -> list[int]:
        directory = self._paths.get("pids") or next(iter(self.directories), None)
        if directory is None:
            return []
        try:
            return [int(pid) for pid in _read(f"{directory}/cgroup.procs").split()]
        except OSError:
            return []

    def freeze(self, frozen: bool, seconds: float = 1.0) -> bool:
        """Stop or resume every process; False where the machine cannot (then nothing has changed)."""
        if self.version == 2:
            control, on, off, state = "cgroup.freeze", "1", "0", "cgroup.events"
            directory = next(iter(self.directories))
        else:
            control, on, off, state = "freezer.state", "FROZEN", "THAWED", "freezer.state"
            directory = self._paths.get("freezer", "")
        if not directory:
            return False
        deadline = time.monotonic() + seconds
        while True:
            _write(f"{directory}/{control}", on if frozen else off)
            now = _read(f"{directory}/{state}")
            is_frozen = _keyed(now, "frozen") == 1 if self.version == 2 else now.strip() == "FROZEN"
            if is_frozen == frozen or time.monotonic() > deadline:
                return is_frozen == frozen
            time.sleep(0.0005)

    def remove(self) -> bool:
        """Remove the directories; False while the kernel still counts a process in one (call again)."""
        for fd in self._counter_fds.values():
            os.close(fd)
        self._counter_fds = {}
        remaining = []
        for directory in self.directories:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:
                remaining.append(directory)
        self.directories = remaining
        return not remaining

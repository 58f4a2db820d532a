"""A base image made of this machine's own programs, without a registry: `host_rootfs` writes it as a tar stream.

bash, the usual command line tools and a Python, each with the shared libraries it needs, at the paths they have here.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rock_env.docker.channel import LEAST_PYTHON
from rock_env.errors import BackendUnavailable
from rock_env.supervisor.files import EPOCH
from rock_env.supervisor.store import base_tree

NEEDED = ("bash", "sh", "env", "cat", "ls", "sleep")
_TOOLS = (
    *NEEDED, "arch", "awk", "b2sum", "base32", "base64", "basename", "bunzip2", "bzip2", "chgrp", "chmod", "chown",
    "cksum", "cmp", "comm", "cp", "csplit", "cut", "date", "dd", "df", "diff", "diff3", "dirname", "du",
    "echo", "egrep", "expand", "expr", "factor", "false", "fgrep", "find", "fmt", "fold", "getent",
    "grep", "groups", "gunzip", "gzip", "head", "hostname", "id", "install", "jq", "join", "kill", "link", "ln",
    "logname", "mawk", "md5sum", "mkdir", "mkfifo", "mknod", "mktemp", "mv", "nice", "nl", "nohup",
    "nproc", "numfmt", "od", "paste", "patch", "pathchk", "pgrep", "pkill", "pr", "printenv", "printf", "ps",
    "ptx", "pwd", "readlink", "realpath", "renice", "rm", "rmdir", "sdiff", "sed", "seq", "setsid", "sha1sum",
    "sha224sum", "sha256sum", "sha384sum", "sha512sum", "shred", "shuf", "sort", "split", "stat", "stdbuf", "stty",
    "sum", "sync", "tac", "tail", "tar", "tee", "test", "timeout", "touch", "tr", "true", "truncate", "tsort", "tty",
    "uname", "unexpand", "uniq", "unlink", "unxz", "uptime", "users", "vdir", "wc", "which", "who", "whoami",
    "xargs", "xz", "xzcat", "yes", "zcat",
)  # fmt: skip
_WHERE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DATA = ("/etc/ld.so.cache", "/usr/lib/os-release", "/usr/share/zoneinfo/UTC", "/usr/lib/locale/C.utf8")
_SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip"})
_SKIPPED |= {"site-packages", "dist-packages"}
_ASK_PYTHON = (
    "import sys, sysconfig; p = sysconfig.get_path;"
    " print(*sys.version_info[:2], sys.base_prefix, sys.executable, p('stdlib'), p('platstdlib'), sep='\\n')"
)
_PYTHON_HOME = "/opt/python"  # of an interpreter that is in a place of its own here, perhaps a private one


class _Python(NamedTuple):
    """An interpreter: how it is called, where it is installed, and its parts."""

    version: tuple[int, int]
    prefix: str
    executable: str
    libraries: tuple[str, ...]


def find_python() -> _Python:
    """The interpreter to put into the image: /usr/bin/python3, else the one that runs this program.

    Raises:
      BackendUnavailable: neither is there, and new enough for a rocklet.
    """
    own = os.path.join(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    for path in ("/usr/bin/python3", own):
        if os.access(path, os.X_OK) and (python := _ask(path)).version >= LEAST_PYTHON:
            return python
    raise BackendUnavailable(
        f"docker: no Python {'.'.join(map(str, LEAST_PYTHON))} on this machine to make a base image of; "
        "name an image in the spec"
    )


def _ask(path: str) -> _Python:
    result = subprocess.run([path, "-I", "-S", "-c", _ASK_PYTHON], capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        raise BackendUnavailable(f"docker: {path} does not run: {result.stderr.strip()[-200:]}")
    major, minor, prefix, executable, *libraries = result.stdout.splitlines()
    return _Python((int(major), int(minor)), prefix, executable, tuple(dict.fromkeys(libraries)))


class _Tree:
    """What goes into the image: {absolute path: path of the file here, or "" for a directory}; links by their text."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.moved: dict[str, str] = {}
        self._programs: list[str] = []

    def place(self, path: str) -> str:
        """Where a path of this machine is in the image. A shared libpython goes to where every loader looks."""
        for prefix, new in self.moved.items():
            if path.startswith(f"{prefix}/"):
                name = os.path.basename(path)
                return f"/usr/lib/{name}" if name.startswith("libpython") else new + path[len(prefix) :]
        return path

    def add(self, path: str) -> None:
        """A file, with the links that lead to it. Directories that are links themselves (/bin) are resolved."""
        for _ in range(40):
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if path in self.files or path in self.links:
                return
            if not os.path.islink(path):
                break
            self.links[path] = os.readlink(path)
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        if os.path.isfile(path):
            self.files[path] = path

    def add_directory(self, path: str) -> None:
        for folder, directories, names in os.walk(path):
            directories[:] = sorted(name for name in set(directories) - _SKIPPED if not name.startswith("config-"))
            for name in names:
                if ".opt-" not in name:  # compiled for python -O
                    self.add(os.path.join(folder, name))

    def add_program(self, path: str) -> None:
        self.add(path)
        self._programs.append(os.path.realpath(path))

    def add_libraries(self) -> None:
        """The shared libraries of every program, and of every extension module, that has been added."""
        objects = {path for path in self.files if path.endswith(".so") or ".so." in path}
        objects |= {path for path in self._programs if _is_elf(path)}
        for library in _libraries(sorted(objects)):
            self.add(library)


def _is_elf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _libraries(objects: list[str]) -> Iterator[str]:
    """What `ldd` says these files need, the loader included."""
    if not objects:
        return
    result = subprocess.run(["ldd", *objects], capture_output=True, text=True, timeout=60, env={"PATH": _WHERE})
    for line in result.stdout.splitlines():
        for word in line.split():
            if word.startswith("/") and not word.endswith(":") and os.path.exists(word):
                yield word


def _collect() -> _Tree:
    tree = _Tree()
    for name in _TOOLS:
        found = shutil.which(name, path=_WHERE)
        if found:
            tree.add_program(found)
        elif name in NEEDED:
            raise BackendUnavailable(f"docker: no {name} on this machine to make a base image of")
    python = find_python()
    tree.add_program(python.executable)
    for library in python.libraries:
        tree.add_directory(library)
    if not python.prefix.startswith("/usr"):
        tree.moved[python.prefix] = _PYTHON_HOME
    if os.path.dirname(python.executable) != "/usr/bin":
        tree.links["/usr/bin/python3"] = tree.place(os.path.realpath(python.executable))
    else:
        tree.add_program("/usr/bin/python3")
    for path in _DATA:
        if os.path.isdir(path):
            tree.add_directory(path)
        elif os.path.exists(path):
            tree.add(path)
    tree.add_libraries()
    return tree


class HostRootfs:
    """The tree, found once. `digest` changes with what is in it; `write` streams it as a tar."""

    def __init__(self, passwd: bytes, group: bytes) -> None:
        self._tree = _collect()
        self._accounts = {"etc/passwd": passwd, "etc/group": group}

    @property
    def digest(self) -> str:
        """Of every path, size and time, and of the accounts: 16 hexadecimal digits."""
        whole = hashlib.sha256()
        for path in sorted(self._tree.files):
            status = os.stat(path)
            whole.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
        whole.update(repr((sorted(self._tree.links.items()), sorted(self._accounts.items()))).encode())
        return whole.hexdigest()[:16]

    def write(self, file: io.RawIOBase | io.BufferedIOBase) -> None:
        """Write an uncompressed tar, everything owned by root."""
        directories, links, texts = base_tree()
        texts |= self._accounts
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            made: set[str] = set()
            for name, mode in directories.items():
                _put(tar, made, name, tarfile.DIRTYPE, mode)
            place = self._tree.place
            links |= {place(path).lstrip("/"): place(target) for path, target in self._tree.links.items()}
            for name, target in links.items():
                if name not in texts:
                    _put(tar, made, name, tarfile.SYMTYPE, 0o777, target=target)
            for name, data in texts.items():
                _put(tar, made, name, tarfile.REGTYPE, 0o644, data)
            for path in sorted(self._tree.files):
                name = place(path).lstrip("/")
                if name not in made:
                    with open(path, "rb") as source:
                        status = os.fstat(source.fileno())
                        # With its own time, by which a Python module's compiled form is known to belong to it.
                        _put(tar, made, name, tarfile.REGTYPE, status.st_mode & 0o755, source.read(),
                             time=int(status.st_mtime))  # fmt: skip


def _put(
    tar: tarfile.TarFile,
    made: set[str],
    name: str,
    kind: bytes,
    mode: int,
    data: bytes = b"",
    target: str = "",
    time: int = EPOCH,
) -> None:
    """Add one entry, after the directories it lies in."""
    if name in made:
        return
    for parent in _parents(name):
        if parent not in made:
            _put(tar, made, parent, tarfile.DIRTYPE, 0o755)
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.size, info.linkname = kind, mode, time, len(data), target
    tar.addfile(info, io.BytesIO(data))
    made.add(name)


def _parents(name: str) -> Iterable[str]:
    parts = name.split("/")[:-1]
    return ("/".join(parts[: i + 1]) for i in range(len(parts)))

"""A container's writable directories as a tar stream, out and in."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from typing import Protocol


class Sink(Protocol):
    """Takes the stream."""

    def write(self, data: bytes) -> int: ...


def write(places: list[str], sink: Sink, max_bytes: int, part_bytes: int) -> None:
    """Write everything below `places`, with modes, times, links and fifos, in parts. Nothing may run meanwhile.

    Raises OSError(EFBIG) when the files have more bytes, holes counted.
    """
    opened: list[tuple[str, int]] = []
    try:
        with tarfile.open(fileobj=sink, mode="w|", bufsize=part_bytes, format=tarfile.PAX_FORMAT) as tar:
            _add_all(tar, places, opened, max_bytes)
    finally:
        for path, mode in reversed(opened):
            os.chmod(path, mode)


def _add_all(tar: tarfile.TarFile, places: list[str], opened: list[tuple[str, int]], max_bytes: int) -> None:
    total = 0
    for place in places:
        for path in _walk(place, opened):
            info = tar.gettarinfo(path)
            if info is None:  # a socket: without its listener only a name
                continue
            info.name = path.lstrip("/")
            info.uname = info.gname = ""
            if not info.isreg():
                tar.addfile(info)
                continue
            total += info.size
            if total > max_bytes:
                raise OSError(errno.EFBIG, "more bytes than may be copied", path)
            _permit(path, stat.S_IRUSR, opened)
            with open(path, "rb") as content:
                tar.addfile(info, content)


def _walk(place: str, opened: list[tuple[str, int]]) -> Iterator[str]:
    """A directory and everything below it, parents first; also what its owner has forbidden himself to read."""
    pending = [(place, True)]
    while pending:
        path, is_directory = pending.pop()
        yield path
        if is_directory:
            _permit(path, stat.S_IRUSR | stat.S_IXUSR, opened)
            with os.scandir(path) as entries:
                below = sorted(((e.path, e.is_dir(follow_symlinks=False)) for e in entries), reverse=True)
            pending += below


def _permit(path: str, needed: int, opened: list[tuple[str, int]]) -> None:
    """See to it that the owner, which we are, has a permission; `opened` remembers the mode that it had."""
    mode = stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode)
    if mode & needed != needed:
        os.chmod(path, mode | needed)
        opened.append((path, mode))


def read(fd: int, into: str) -> None:
    """Extract a tar stream below directory `into`, everything owned by this process's user."""

    def keep(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        return None if member.ischr() or member.isblk() else member

    with os.fdopen(fd, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
        tar.extraction_filter = keep  # the attribute: the argument is not known to every Python 3.11
        if not hasattr(tarfile, "data_filter"):
            tar.extractall(into, members=(member for member in tar if keep(member, into) is not None))
        else:
            tar.extractall(into)

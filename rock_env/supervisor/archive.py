"""A container's writable directories as a tar stream, out and in. Each runs in a child of its own: see Rocklet."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager


def write(places: list[str], fd: int, max_bytes: int) -> None:
    """Write everything below `places`, with modes, times, links and fifos, to `fd`. Nothing may run meanwhile.

    Raises OSError(EFBIG) when the files have more bytes, holes counted.
    """
    total = 0
    with os.fdopen(fd, "wb", buffering=1 << 16) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        tar.format = tarfile.PAX_FORMAT
        for place in places:
            for path in _walk(place):
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
                with _permission(path, stat.S_IRUSR), open(path, "rb") as content:
                    tar.addfile(info, content)


def _walk(path: str) -> Iterator[str]:
    """A directory and everything below it, parents first; also what its owner has forbidden himself to read."""
    yield path
    with _permission(path, stat.S_IRUSR | stat.S_IXUSR):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)
            else:
                yield entry.path


@contextmanager
def _permission(path: str, needed: int) -> Iterator[None]:
    """See to it that the owner, which we are, has a permission."""
    mode = stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode)
    if mode & needed == needed:
        yield
        return
    os.chmod(path, mode | needed)
    try:
        yield
    finally:
        os.chmod(path, mode)


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

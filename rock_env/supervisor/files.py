"""File operations inside a sandbox's root, done by the supervisor on directory descriptors.

Every path is resolved by openat2(RESOLVE_IN_ROOT) or is a single name below an open directory, so that neither `..` nor
a symbolic link, even one swapped in meanwhile, reaches anything outside the sandbox.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from rock_env.supervisor.faults import Fault, file_fault
from rock_env.supervisor.linux import open_in_root

EPOCH = 1_735_689_600  # 2025-01-01T00:00:00Z, the time of every file of a fresh sandbox: listings are deterministic
_EPOCH_NS = (EPOCH * 10**9, EPOCH * 10**9)
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_counter = 0


def _temporary_name() -> str:
    global _counter
    _counter += 1
    return f".rock-{_counter}.tmp"


def _split(path: str) -> tuple[str, str]:
    parent, name = os.path.split(path.rstrip("/"))
    if name in ("", ".", ".."):
        raise Fault("file", f"{path}: not a file name", "EINVAL")
    return parent or "/", name


def _owned(fd: int, owner: int) -> None:
    os.chown(fd, owner, owner)


def make_directories(root_fd: int, path: str, owner: int, mode: int = 0o755) -> int:
    """Open directory `path`, making what is missing of it (owned by `owner`). Returns an O_PATH descriptor."""
    try:
        return open_in_root(root_fd, path, _DIRECTORY)
    except FileNotFoundError:
        pass
    parent, name = _split(path)
    parent_fd = make_directories(root_fd, parent, owner)
    try:
        os.mkdir(name, mode, dir_fd=parent_fd)
        os.chown(name, owner, owner, dir_fd=parent_fd, follow_symlinks=False)
    except FileExistsError:
        pass  # a dangling link, or the sandbox was faster; the open decides
    finally:
        os.close(parent_fd)
    return open_in_root(root_fd, path, _DIRECTORY)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def write_file(root_fd: int, path: str, data: memoryview, mode: int | None, owner: int) -> None:
    """Replace `path` atomically: all of `data` or nothing. mode None: an existing file's permissions, else 0644."""
    parent, name = _split(path)
    parent_fd = make_directories(root_fd, parent, owner)
    temporary = _temporary_name()
    try:
        if mode is None:
            mode = 0o644
            try:
                existing = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
                if stat.S_ISREG(existing.st_mode):
                    mode = stat.S_IMODE(existing.st_mode) & 0o777
            except FileNotFoundError:
                pass
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=parent_fd)
        try:
            _write_all(fd, data)
            os.fchown(fd, owner, owner)
            os.fchmod(fd, mode)
            os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
        finally:
            os.close(fd)
    finally:
        os.close(parent_fd)


def write_symlink(root_fd: int, path: str, target: str, owner: int) -> None:
    parent, name = _split(path)
    parent_fd = make_directories(root_fd, parent, owner)
    temporary = _temporary_name()
    try:
        os.symlink(target, temporary, dir_fd=parent_fd)
        try:
            os.chown(temporary, owner, owner, dir_fd=parent_fd, follow_symlinks=False)
            os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
    finally:
        os.close(parent_fd)


def _write_new(root_fd: int, path: str, data: memoryview, mode: int | None, owner: int) -> None:
    """Create a file where nobody can look yet, without a temporary name. What is in its place goes the long way."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = open_in_root(root_fd, path, flags, 0o600)
    except (FileNotFoundError, FileExistsError):
        write_file(root_fd, path, data, mode, owner)
        return
    try:
        _write_all(fd, data)
        os.fchown(fd, owner, owner)
        os.fchmod(fd, 0o644 if mode is None else mode)
    finally:
        os.close(fd)


def put(root_fd: int, entries: list[dict], blob: bytes, owner: int, workdir: str, unseen: bool = False) -> None:
    """Write entries {"path", "kind", "mode", "size"} whose contents lie one after another in `blob`.

    `unseen`: the sandbox does not run yet, and will not when this fails.
    """
    view, offset = memoryview(blob), 0
    write = _write_new if unseen else write_file
    for entry in entries:
        path = os.path.join(workdir, entry["path"])
        size = entry.get("size", 0)
        try:
            if entry["kind"] == "directory":
                os.close(make_directories(root_fd, path, owner, entry.get("mode") or 0o755))
            elif entry["kind"] == "symlink":
                write_symlink(root_fd, path, entry["target"], owner)
            else:
                write(root_fd, path, view[offset : offset + size], entry.get("mode"), owner)
        except OSError as error:
            raise file_fault(error, f"write {entry['path']}") from error
        offset += size


def read_file(root_fd: int, path: str, max_bytes: int) -> bytes:
    """The contents of a regular file of at most `max_bytes`."""
    try:
        fd = open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            kind = stat.S_IFMT(os.fstat(fd).st_mode)
            if kind != stat.S_IFREG:
                name = "EISDIR" if kind == stat.S_IFDIR else "EINVAL"
                raise Fault("file", f"read {path}: not a regular file", name)
            pieces, total = [], 0
            while total <= max_bytes:
                piece = os.read(fd, min(1 << 20, max_bytes + 1 - total))
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
                total += len(piece)
            raise Fault("file", f"read {path}: larger than max_bytes={max_bytes}", "EFBIG")
        finally:
            os.close(fd)
    except OSError as error:
        raise file_fault(error, f"read {path}") from error


def _describe(name: str, directory_fd: int) -> dict:
    status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "other")
    info = {"name": name, "kind": kind, "size": status.st_size, "mode": stat.S_IMODE(status.st_mode), "target": ""}
    if kind == "symlink":
        info["target"] = os.readlink(name, dir_fd=directory_fd)
    return info


def list_directory(root_fd: int, path: str) -> list[dict]:
    """Entries of a directory, sorted by name. A file gives one entry: itself."""
    try:
        fd = open_in_root(root_fd, path, os.O_PATH)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                parent, name = _split(path)
                parent_fd = open_in_root(root_fd, parent, _DIRECTORY)
                try:
                    return [_describe(name, parent_fd)]
                finally:
                    os.close(parent_fd)
        finally:
            os.close(fd)
        fd = open_in_root(root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            infos = []
            for name in sorted(os.listdir(fd)):
                try:
                    infos.append(_describe(name, fd))
                except FileNotFoundError:
                    continue  # removed by the sandbox meanwhile
            return infos
        finally:
            os.close(fd)
    except OSError as error:
        raise file_fault(error, f"list {path}") from error


def walk(root_fd: int, path: str, limit: int = 100_000) -> list[dict]:
    """Every entry below a directory, parents first, with "name" relative to it. Links are not followed."""
    try:
        os.close(open_in_root(root_fd, path, _DIRECTORY))
    except OSError as error:
        raise file_fault(error, f"walk {path}") from error
    found: list[dict] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        for info in list_directory(root_fd, os.path.join(path, prefix) if prefix else path):
            info["name"] = os.path.join(prefix, info["name"])
            found.append(info)
            if info["kind"] == "directory":
                pending.append(info["name"])
            if len(found) > limit:
                raise Fault("file", f"walk {path}: more than {limit} entries", "E2BIG")
    return found


def reset_times(directory_fd: int) -> None:
    """Give every entry below a directory, and it, the constant EPOCH."""
    for _, directories, names, fd in os.fwalk(".", topdown=False, dir_fd=directory_fd):
        for name in (*names, *directories):
            os.utime(name, ns=_EPOCH_NS, dir_fd=fd, follow_symlinks=False)
    os.utime(directory_fd, ns=_EPOCH_NS)


def _entries(directory_fd: int) -> Iterator[tuple[str, os.stat_result]]:
    for name in os.listdir(directory_fd):
        yield name, os.stat(name, dir_fd=directory_fd, follow_symlinks=False)


def _copy_attributes(fd: int, status: os.stat_result, xattr_path: str | int) -> None:
    target = f"/proc/self/fd/{fd}"
    for attribute in os.listxattr(xattr_path):
        os.setxattr(target, attribute, os.getxattr(xattr_path, attribute))


def copy_layer(
    source_fd: int, target_fd: int, links: dict[tuple[int, int], str] | None = None, prefix: str = ""
) -> int:
    """Copy an overlay's upper directory with owners, modes, times, hard links, whiteouts and overlay attributes.

    Both descriptors are directories open for reading. Returns the bytes of file content copied.
    """
    links = {} if links is None else links
    copied = 0
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    for name, status in _entries(source_fd):
        kind = stat.S_IFMT(status.st_mode)
        identity = (status.st_dev, status.st_ino)
        relative = f"{prefix}{name}"
        if status.st_nlink > 1 and kind != stat.S_IFDIR:
            first = links.setdefault(identity, relative)
            if first is not relative:
                depth = prefix.count("/")
                os.link("../" * depth + first, name, src_dir_fd=target_fd, dst_dir_fd=target_fd, follow_symlinks=False)
                continue
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=target_fd)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=source_fd)
            made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=target_fd)
            try:
                copied += copy_layer(inner, made, links, f"{relative}/")
                _copy_attributes(made, status, inner)
            finally:
                os.close(inner)
                os.close(made)
        elif kind == stat.S_IFREG:
            inner = os.open(name, os.O_RDONLY | flags, dir_fd=source_fd)
            made = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=target_fd)
            try:
                offset = 0
                while offset < status.st_size:
                    count = os.sendfile(made, inner, offset, status.st_size - offset)
                    if count == 0:
                        break
                    offset += count
                copied += offset
                _copy_attributes(made, status, inner)
            finally:
                os.close(inner)
                os.close(made)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=target_fd)
        elif kind == stat.S_IFSOCK:
            continue  # a socket without its listener is only a name
        else:  # fifos, and overlay whiteouts (character device 0/0)
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target_fd)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target_fd, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target_fd)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target_fd, follow_symlinks=False)
    return copied

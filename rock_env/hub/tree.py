"""What an entry of the hub holds: files by path, with modes. Its digest, and its form on disk.

The digest is SHA-256 over a canonical JSON list of every file's path, permission bits, size and SHA-256, sorted by
path: the same files give the same digest on every machine. Empty folders are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from rock_env.errors import EntryCorrupt, SpecError
from rock_env.harbor import TaskFile, Tree
from rock_env.harbor.format import MAX_FILE_BYTES, MAX_FILES

MAX_BYTES = 256 << 20
_MAX_PATH_BYTES = 1024
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class FileSum:
    """A file of an entry: permission bits, bytes, and SHA-256 in hexadecimal."""

    path: str
    mode: int
    size: int
    sha256: str


Manifest = tuple[FileSum, ...]


def check_paths(paths: Iterable[str]) -> None:
    """Raises SpecError for a path that is not plainly below the folder, or that is also a folder of another."""
    known = set(paths)
    if len(known) > MAX_FILES:
        raise SpecError(f"hub entry: expected at most {MAX_FILES} files, got {len(known)}")
    for path in known:
        parts = path.split("/")
        try:
            lengths = [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            raise SpecError(f"hub entry: path {path!r}: expected UTF-8") from None
        plain = all(part not in ("", ".", "..") and part.isprintable() for part in parts)
        if not plain or max(lengths) > _MAX_NAME_BYTES or sum(lengths) + len(parts) > _MAX_PATH_BYTES:
            expected = "expected a relative path of printable names, without empty, '.' or '..' parts"
            raise SpecError(f"hub entry: path {path[:200]!r}: {expected}")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in known:
                raise SpecError(f"hub entry: path {path!r}: {'/'.join(parts[:end])!r} is a file")


def check_tree(tree: Tree) -> None:
    """Raises SpecError for files that no entry may hold."""
    check_paths(tree)
    if not tree:
        raise SpecError("hub entry: expected files, got an empty folder")
    for path, file in tree.items():
        if len(file.content) > MAX_FILE_BYTES:
            raise SpecError(f"hub entry: {path}: expected at most {MAX_FILE_BYTES} bytes")
    size = sum(len(file.content) for file in tree.values())
    if size > MAX_BYTES:
        raise SpecError(f"hub entry: expected at most {MAX_BYTES} bytes in all, got {size}")


def manifest_of(tree: Tree) -> Manifest:
    return tuple(_sum_of(path, tree[path]) for path in sorted(tree))


def _sum_of(path: str, file: TaskFile) -> FileSum:
    return FileSum(path, file.mode, len(file.content), hashlib.sha256(file.content).hexdigest())


def encode_manifest(manifest: Manifest) -> bytes:
    return json.dumps([astuple(each) for each in manifest], separators=(",", ":")).encode()


def digest_of(manifest: bytes) -> str:
    """ "sha256:HEX" of an encoded manifest: what an entry is pinned by."""
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def decode_manifest(data: bytes, digest: str, entry: str) -> Manifest:
    """The inverse of encode_manifest. Raises EntryCorrupt, for `entry`, if it is not the one with this digest."""
    found = digest_of(data)
    if found != digest:
        raise EntryCorrupt(f"hub entry {entry}: its manifest: expected {digest}, got {found}")
    try:
        manifest = tuple(
            FileSum(str(path), int(mode), int(size), str(sha)) for path, mode, size, sha in json.loads(data)
        )
        check_paths(each.path for each in manifest)
    except (ValueError, TypeError) as error:
        raise EntryCorrupt(f"hub entry {entry}: its manifest: expected a list of files ({error})") from error
    return manifest


def check_file(expected: FileSum, file: TaskFile | None, entry: str) -> None:
    """Raises EntryCorrupt if a file is not what the manifest says."""
    at = f"hub entry {entry}: file {expected.path}"
    if file is None:
        raise EntryCorrupt(f"{at}: expected sha256:{expected.sha256}, got no such file")
    found = _sum_of(expected.path, file)
    if found != expected:
        shown = f"mode {expected.mode:o}, {expected.size} bytes, sha256:{expected.sha256}"
        raise EntryCorrupt(
            f"{at}: expected {shown}, got mode {found.mode:o}, {found.size} bytes, sha256:{found.sha256}"
        )


def write_tree(tree: Tree, folder: Path, *, mode: int | None = None) -> None:
    """Write files below a folder of ours that has none of them, and sync them to disk.

    Args:
      mode: of every file, instead of its own.
    """
    folders = {folder}
    for path in sorted(tree):
        target = folder / path
        if target.parent not in folders:
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.update(p for p in target.parents if p.is_relative_to(folder))
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(tree[path].content)
            file.flush()
            os.fchmod(fd, tree[path].mode if mode is None else mode)
            os.fsync(fd)
    for each in folders:
        sync_folder(each)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

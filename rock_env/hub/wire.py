"""An entry's files as a tar archive, as they travel between a hub's two ends."""

from __future__ import annotations

from rock_env.admin import archive
from rock_env.errors import SpecError
from rock_env.harbor import TaskFile, Tree
from rock_env.spec import FileEntry


def pack(tree: Tree) -> bytes:
    return archive.pack({path: FileEntry(file.content, file.mode) for path, file in tree.items()}, {})


def unpack(data: bytes) -> Tree:
    """The inverse of `pack`. Folders are implied. Paths are not checked here: see rock_env.hub.tree.check_tree.

    Raises:
      SpecError: it is no tar archive, or holds something else than files and folders.
    """
    files, links = archive.unpack(data, "")
    if links:
        raise SpecError(f"archive: expected no links, got {next(iter(links))!r}")
    kept = {path: entry for path, entry in files.items() if not path.endswith("/")}
    return {path: TaskFile(entry.data, 0o644 if entry.mode is None else entry.mode) for path, entry in kept.items()}

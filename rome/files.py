"""Files that are either there in full or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Writes `data` to `path` as `atomic_open` does. Text is encoded as UTF-8. Raises OSError as the system gave it."""
    with atomic_open(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write what will be at `path` when the block ends, through a temporary name, fsync and rename.

    A reader sees the old file or the new one, never a part; after an error, a crash or on a full disk the old file is
    untouched, and (but after a crash) no temporary name is left. Raises OSError as the system gave it.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

"""Checkpoints of everything a run needs to continue bit-exactly, by Orbax.

One checkpoint holds the train state (parameters, optimizer), a JSON cursor (stage, step, task cursor, curriculum,
PRNG, number of metric records) and the sample buffer. Orbax writes to a temporary name and renames, so a kill leaves
the previous checkpoint; a CRC of every array, kept in the cursor, tells a damaged file from a good one.
"""

from __future__ import annotations

import json
import logging
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, or is damaged; names the path and the part."""


def _checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of every leaf's bytes, by its path in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).tobytes())
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _cursor_crc(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _placed_like(restored: Any, template: Any) -> Any:
    """Orbax commits what it restores to a device; a committed argument is another program to jit than a free one."""
    return restored if getattr(template, "committed", True) else jnp.array(np.asarray(restored))


@contextmanager
def _told_once() -> Iterator[None]:
    """A failed write is told by the error that it raises, and by nobody else.

    Orbax logs its traceback too. And Orbax closes its event loop at the first write that fails, so that the others can
    report neither success nor failure to anybody: TensorStore's threads and asyncio print that, some of it late. Once a
    save has failed, they are kept from it for good.
    """
    before, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    sys.unraisablehook = before
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Checkpointer:
    """Saves and restores `(state, cursor, buffer)` under a directory; keeps the newest `keep` steps."""

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False) -> None:
        """`read_only` leaves alone what another process may be writing."""
        self._directory = Path(directory).absolute()
        if not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
        elif not self._directory.is_dir():
            raise CheckpointError(f"{self._directory}: expected a directory of checkpoints, found none")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's global step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, cursor: dict[str, Any], buffer: bytes = b"") -> None:
        """Writes one checkpoint; returns when it is on disk. Raises CheckpointError (disk full…), the old one kept."""
        document = {**cursor, "checksums": _checksums(state), "buffer_crc": zlib.crc32(buffer)}
        buffer_array = np.frombuffer(buffer or b"\0", np.uint8)
        document["buffer_bytes"] = len(buffer)
        document["crc"] = _cursor_crc(document)
        try:
            with _told_once():
                written = self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        cursor=ocp.args.JsonSave(document),
                        buffer=ocp.args.StandardSave({"bytes": buffer_array}),
                    ),
                )
                self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self._directory / str(step)}: could not be written: {error}") from error
        if not written:  # Orbax skips such a step without a word
            raise CheckpointError(
                f"{self._directory / str(step)}: expected a step after the newest checkpoint's, {self.latest_step}"
            )

    def cursor(self, step: int) -> dict[str, Any]:
        """The JSON cursor of a checkpoint, which tells what state it holds."""
        cursor = dict(self._restore(step, "cursor", ocp.args.JsonRestore()))
        if cursor.pop("crc", None) != _cursor_crc(cursor):
            raise self._damaged(step, "its cursor is damaged (the CRC differs)")
        return cursor

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any], bytes]:
        """`(state, cursor, buffer)` of the checkpoint; `template` is a state of the same structure and shapes."""
        cursor = self.cursor(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        state = self._restore(step, "state", ocp.args.StandardRestore(abstract))
        found = _checksums(state)
        for name, expected in cursor.pop("checksums").items():
            if found.get(name) != expected:
                raise self._damaged(step, f"state{name} is damaged (its CRC differs)")
        buffer = np.asarray(self._restore(step, "buffer", ocp.args.StandardRestore())["bytes"]).tobytes()
        buffer = buffer[: cursor.pop("buffer_bytes")]
        if zlib.crc32(buffer) != cursor.pop("buffer_crc"):
            raise self._damaged(step, "the sample buffer is damaged (its CRC differs)")
        return jax.tree.map(_placed_like, state, template), cursor, buffer

    def _restore(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax and TensorStore raise a dozen types for a damaged file
            raise self._damaged(step, f"{item} can't be read ({type(error).__name__}: {error})") from error

    def _damaged(self, step: int, what: str) -> CheckpointError:
        advice = "Delete this folder to continue from the checkpoint before it."
        return CheckpointError(f"{self._directory / str(step)}: {what}. {advice}")

    def close(self) -> None:
        self._manager.close()

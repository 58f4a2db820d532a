"""References, entries, and what every hub can do."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rock_env.errors import BackendUnavailable, LimitExceeded, RockError, SpecError
from rock_env.harbor import Tree, parse_environment, parse_task, read_tree, sandbox_spec
from rock_env.hub.tree import check_tree, sync_folder, write_tree

SCHEME = "hub://"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
VERSION = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}"
DIGEST = r"sha256:[0-9a-f]{64}"
_REFERENCE = re.compile(rf"(?:({NAME})/)?({NAME})@(?:({DIGEST})|({VERSION}))")
_DESCRIPTION_CHARACTERS = 200
_EXPECTED = "expected [OWNER/]NAME@VERSION or [OWNER/]NAME@sha256:DIGEST"


@dataclass(frozen=True, slots=True)
class Reference:
    """What names an entry. Without an owner it is one's own: another's public entry never stands in for it."""

    name: str
    version: str | None = None
    digest: str | None = None
    owner: str | None = None

    @classmethod
    def parse(cls, text: str | Reference) -> Reference:
        """Raises SpecError for what is no reference; "hub://" before it is left out."""
        if isinstance(text, Reference):
            return text
        match = _REFERENCE.fullmatch(text.removeprefix(SCHEME)) if isinstance(text, str) else None
        if match is None:
            raise SpecError(f"hub reference: {_EXPECTED}, got {text!r}")
        owner, name, digest, version = match.groups()
        return cls(name, version, digest, owner)

    def __str__(self) -> str:
        return f"{f'{self.owner}/' if self.owner else ''}{self.name}@{self.digest or self.version}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a hub knows of a version.

    Attributes:
      kind: "task" (instruction, environment, hidden tests) or "environment".
      size: bytes of its `files` files.
      created_at: seconds since 1970.
    """

    owner: str
    name: str
    version: str
    digest: str
    kind: str
    description: str
    public: bool
    size: int
    files: int
    created_at: float

    @property
    def reference(self) -> str:
        return f"{self.owner}/{self.name}@{self.version}"


def describe(tree: Tree, name: str) -> tuple[str, str]:
    """(kind, description) of files that an entry may hold; what is malformed is not published.

    Raises:
      SpecError, TaskFormatError: they are neither a task nor an environment; the message names file and field.
    """
    check_tree(tree)
    sandbox_spec(parse_environment(tree), command_seconds=1.0, remote=True)  # its paths and variables are possible
    if "instruction.md" not in tree and not any(path.startswith("tests/") for path in tree):
        return "environment", ""
    lines = parse_task(tree, name).instruction.splitlines()
    return "task", "".join(c for c in lines[0] if c.isprintable())[:_DESCRIPTION_CHARACTERS]


class Hub(ABC):
    """A registry of versions that never change. Every method may be called from any thread."""

    @abstractmethod
    def publish(self, tree: Tree, name: str, version: str, *, public: bool = False) -> Entry:
        """Add a version. Publishing the same files again changes nothing (but makes it public, if asked to).

        Raises:
          VersionTaken: the version has other content, or had it before it was deleted.
          SpecError: the files are no task and no environment.
          LimitExceeded, QuotaExceeded: there is no room.
        """

    @abstractmethod
    def fetch(self, reference: str | Reference) -> tuple[Entry, Tree]:
        """An entry and its files, whose digests have been verified.

        Raises:
          EntryNotFound: there is none, or it is another's and not public.
          EntryCorrupt: it is not what was published.
        """

    @abstractmethod
    def search(self, query: str = "") -> list[Entry]:
        """One's own and public entries in which every word of `query` occurs."""

    @abstractmethod
    def delete(self, reference: str | Reference) -> Entry:
        """Remove a version of one's own. Its name stays taken: only the same content may be published by it again."""

    def list(self) -> list[Entry]:
        return self.search()

    def push(self, folder: str | Path, reference: str | Reference, *, public: bool = False) -> Entry:
        """Publish everything in a folder as NAME@VERSION. Links and devices are refused. Raises as `publish` does."""
        wanted = Reference.parse(reference)
        if wanted.version is None or wanted.owner is not None:
            raise SpecError(f"push: expected NAME@VERSION, got {str(wanted)!r}")
        return self.publish(read_tree(Path(folder)), wanted.name, wanted.version, public=public)

    def pull(self, reference: str | Reference, folder: str | Path) -> Entry:
        """Write a verified entry to `folder`, which must be new or empty; it appears whole or not at all.

        Raises:
          SpecError: something is there already.
          EntryNotFound, EntryCorrupt: see `fetch`.
        """
        target = Path(folder)
        if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
            raise SpecError(f"pull: expected a new or an empty folder, got {str(target)!r}")
        entry, tree = self.fetch(reference)
        with store_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                (scratch / "new").mkdir()
                write_tree(tree, scratch / "new")
                os.rename(scratch / "new", target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return entry


@contextmanager
def store_errors(place: Path) -> Iterator[None]:
    """Turns a file system's faults into typed errors that name the place."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RockError):
            raise
        cls = LimitExceeded if error.errno in (errno.ENOSPC, errno.EDQUOT) else BackendUnavailable
        raise cls(f"{place}: {error.strerror or error}") from error

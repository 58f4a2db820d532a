"""The hub in a folder. One folder serves many owners (an admin's tenants), processes and threads.

    owners/OWNER/NAME/VERSION.json   what is known of a version; it stays after a deletion, so that it is not reused
    objects/HEX/manifest.json        of the content with the digest sha256:HEX …
    objects/HEX/files/…              … and its files, read-only; their modes are in the manifest
    tmp/                             what is being written; what a killed process left there is swept
    lock                             held to publish and to delete, for a moment

Objects and records appear by one rename or link each, the object first: whatever is killed in between leaves at most
an object that no record names, which the next deletion sweeps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from rock_env.errors import BackendUnavailable, EntryCorrupt, EntryNotFound, QuotaExceeded, VersionTaken
from rock_env.harbor import TaskFile, Tree
from rock_env.hub.base import Entry, Hub, Reference, describe, store_errors
from rock_env.hub.tree import (
    FileSum,
    Manifest,
    check_file,
    decode_manifest,
    digest_of,
    encode_manifest,
    manifest_of,
    sync_folder,
    write_tree,
)

T = TypeVar("T")
_LOCK_SECONDS = 60.0
_READ_ONLY = 0o444
_MAX_MANIFEST_BYTES = 16 << 20


def default_folder() -> Path:
    """$ROCK_HUB, else rock/hub in $XDG_DATA_HOME (~/.local/share)."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(os.environ.get("ROCK_HUB") or os.path.join(data, "rock", "hub")).absolute()


@dataclass(frozen=True, slots=True)
class _Record(Entry):
    """An entry as it is kept; `deleted_at` in seconds since 1970, once its content is gone."""

    deleted_at: float | None = None

    @property
    def entry(self) -> Entry:
        return Entry(**{field.name: getattr(self, field.name) for field in fields(Entry)})


class LocalHub(Hub):
    """A hub in a folder, as one owner sees it.

    Args:
      folder: made when missing; by default the user's (see default_folder).
      owner: whose entries are published and deleted; another's are seen when they are public.
      max_bytes: of one owner's entries together; None: no bound.
      is_operator: every owner's entries are seen, and may be deleted.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        owner: str = "local",
        *,
        max_bytes: int | None = None,
        is_operator: bool = False,
    ) -> None:
        Reference.parse(f"{owner}/x@1")  # an owner is a name
        self.folder = Path(folder) if folder is not None else default_folder()
        self.owner = owner
        self._max_bytes = max_bytes
        self._is_operator = is_operator

    # -- reading
    def fetch(self, reference: str | Reference) -> tuple[Entry, Tree]:
        return self._read(reference, lambda record: (record.entry, self._read_object(record)))

    def get(self, reference: str | Reference) -> tuple[Entry, bytes]:
        """An entry and its encoded manifest, without its files. Raises as `fetch` does."""
        return self._read(reference, lambda record: (record.entry, encode_manifest(self._read_manifest(record))))

    def _read(self, reference: str | Reference, read: Callable[[_Record], T]) -> T:
        wanted = Reference.parse(reference)
        with store_errors(self.folder):
            try:
                return read(self._find(wanted))
            except EntryCorrupt:
                with self._lock():  # it may have been deleted (and pushed again) meanwhile: now nothing moves
                    return read(self._find(wanted))

    def search(self, query: str = "") -> list[Entry]:
        words = query.lower().split()
        found = []
        with store_errors(self.folder):
            for record in self._records():
                text = f"{record.reference} {record.kind} {record.description}".lower()
                if self._may_see(record) and all(word in text for word in words):
                    found.append(record.entry)
        return sorted(found, key=lambda e: (e.owner, e.name, e.created_at, e.version))

    def _may_see(self, record: _Record) -> bool:
        return record.deleted_at is None and (self._is_operator or record.public or record.owner == self.owner)

    def _find(self, wanted: Reference) -> _Record:
        owner = wanted.owner or self.owner
        if wanted.version is not None:
            record = self._read_record(self._record_path(owner, wanted.name, wanted.version))
            records = [record] if record is not None else []
        else:
            records = [r for r in self._records(owner, wanted.name) if r.digest == wanted.digest]
        seen = [record for record in records if self._may_see(record)]
        if not seen:
            raise EntryNotFound(f"no hub entry {wanted}")
        return seen[0]

    def _record_path(self, owner: str, name: str, version: str) -> Path:
        return self.folder / "owners" / owner / name / f"{version}.json"

    def _records(self, owner: str = "*", name: str = "*") -> Iterator[_Record]:
        for path in sorted((self.folder / "owners").glob(f"{owner}/{name}/*.json")):
            record = self._read_record(path)
            if record is not None:
                yield record

    def _read_record(self, path: Path) -> _Record | None:
        try:
            return _Record(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise EntryCorrupt(f"hub record {path}: expected JSON with the fields of an entry ({error})") from error

    def _object(self, digest: str) -> Path:
        return self.folder / "objects" / digest.removeprefix("sha256:")

    def _read_manifest(self, record: Entry) -> Manifest:
        try:
            data = _read_regular(self._object(record.digest) / "manifest.json", _MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            at = f"hub entry {record.reference}: its manifest"
            raise EntryCorrupt(f"{at}: expected {record.digest}, got no such file") from None
        return decode_manifest(data, record.digest, record.reference)

    def _read_object(self, record: Entry) -> Tree:
        return {each.path: self._read_file(record, each) for each in self._read_manifest(record)}

    def _read_file(self, record: Entry, expected: FileSum) -> TaskFile:
        try:
            content = _read_regular(self._object(record.digest) / "files" / expected.path, expected.size)
            file = TaskFile(content, expected.mode)
        except (FileNotFoundError, NotADirectoryError):
            file = None
        check_file(expected, file, record.reference)
        return file

    # -- writing
    def publish(self, tree: Tree, name: str, version: str, *, public: bool = False) -> Entry:
        Reference.parse(f"{name}@{version}")
        kind, description = describe(tree, name)
        manifest = manifest_of(tree)
        digest = digest_of(encode_manifest(manifest))
        size, now = sum(each.size for each in manifest), time.time()
        new = _Record(self.owner, name, version, digest, kind, description, public, size, len(tree), now)
        with store_errors(self.folder), self._staging() as scratch:
            self._known(new)  # before anything is written
            self._stage(tree, manifest, scratch / "object")
            with self._lock():
                known = self._known(new)
                if known is not None and known.deleted_at is None:
                    new = replace(known, public=known.public or public)
                else:
                    self._check_quota(new)
                self._place(new, scratch)
                if new != known:
                    self._write_record(new, scratch)
        return new.entry

    def _known(self, new: _Record) -> _Record | None:
        """The record of this version. Raises VersionTaken if it stands for other content."""
        known = self._read_record(self._record_path(new.owner, new.name, new.version))
        if known is not None and known.digest != new.digest:
            gone = " and was deleted" if known.deleted_at is not None else ""
            raise VersionTaken(
                f"{new.name}@{new.version} is {known.digest}{gone}: a version never changes, so choose another for"
                f" {new.digest}"
            )
        return known

    def _check_quota(self, new: _Record) -> None:
        if self._max_bytes is None:
            return
        used = sum(record.size for record in self._records(new.owner) if record.deleted_at is None)
        if used + new.size > self._max_bytes:
            raise QuotaExceeded(f"hub: {new.owner} may keep {self._max_bytes} bytes; {used} are used, {new.size} asked")

    def _stage(self, tree: Tree, manifest: Manifest, folder: Path) -> None:
        (folder / "files").mkdir(parents=True)
        write_tree(tree, folder / "files", mode=_READ_ONLY)
        write_tree({"manifest.json": TaskFile(encode_manifest(manifest))}, folder, mode=_READ_ONLY)

    def _is_intact(self, record: Entry) -> bool:
        try:
            self._read_object(record)
        except (EntryCorrupt, OSError):
            return False
        return True

    def _place(self, record: Entry, scratch: Path) -> None:
        """Move the staged object to its place, unless an intact one is there. A damaged one is replaced."""
        target = self._object(record.digest)
        if self._is_intact(record):
            return
        target.parent.mkdir(exist_ok=True)
        if os.path.lexists(target):
            os.rename(target, scratch / "damaged")
        os.rename(scratch / "object", target)
        sync_folder(target.parent)

    def _write_record(self, record: _Record, scratch: Path) -> None:
        target = self._record_path(record.owner, record.name, record.version)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_tree({"record.json": TaskFile(json.dumps(asdict(record)).encode(), 0o644)}, scratch)
        os.replace(scratch / "record.json", target)
        for folder in (target.parent, *target.parent.parents[:3]):
            sync_folder(folder)

    def delete(self, reference: str | Reference) -> Entry:
        wanted = Reference.parse(reference)
        with store_errors(self.folder), self._staging() as scratch, self._lock():
            record = self._find(wanted)
            if record.owner != self.owner and not self._is_operator:
                raise EntryNotFound(f"no hub entry {wanted} of {self.owner}")
            self._write_record(replace(record, deleted_at=time.time()), scratch)
            self._sweep_objects(scratch)
        return record.entry

    def _sweep_objects(self, scratch: Path) -> None:
        """Remove what no record names. Under the lock nobody is between placing an object and its record."""
        named = {record.digest for record in self._records() if record.deleted_at is None}
        for path in (self.folder / "objects").iterdir():
            if f"sha256:{path.name}" not in named:
                os.rename(path, scratch / path.name)

    # -- the folder
    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise BackendUnavailable(f"hub {self.folder}: others have held its lock for {_LOCK_SECONDS:g} s")
                time.sleep(0.01)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder to write to, removed at the end. It is locked, so that others see that it is in use."""
        tmp = self.folder / "tmp"
        tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep_staging(tmp)
        while True:
            scratch = tmp / secrets.token_hex(8)
            scratch.mkdir()
            with contextlib.suppress(FileNotFoundError):  # somebody took it for a leftover, just now
                fd = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if _try_lock(fd) and os.fstat(fd).st_nlink:
                    break
                os.close(fd)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(fd)

    def _sweep_staging(self, tmp: Path) -> None:
        for path in tmp.iterdir():
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue  # gone already
            try:
                if _try_lock(fd):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _read_regular(path: Path, size: int) -> bytes:
    """At most one byte more than expected: enough to tell. Never through a link, never waiting at a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(error.errno, "a link", str(path)) from error
        raise
    with os.fdopen(fd, "rb") as file:
        return file.read(size + 1)

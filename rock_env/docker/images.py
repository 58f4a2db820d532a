"""Images: the one made of this machine's own programs, and what every image needs before a sandbox can use it.

A prepared image is the caller's with one more layer: /etc/passwd and /etc/group name the users that sandboxes run as.
Preparing runs nothing. Prepared images stay in the daemon, tagged `rock-env:...`, and are found again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import posixpath
import tarfile
import tempfile
import threading
from typing import Any

from rock_env.docker.engine import LABEL, Engine, load, owner, translated
from rock_env.docker.rootfs import HostRootfs
from rock_env.errors import BackendUnavailable, SpecError
from rock_env.supervisor.files import EPOCH

REPOSITORY = "rock-env"
USERS = 4096  # sandboxes of one daemon that have an id of their own
_FIRST_UID, _FIRST_MAPPED_UID = 1_500_100_000, 20_000  # far from the ids of people, services and the other backend
_MAX_SEED_BYTES = 1 << 30


def first_uid(engine: Engine) -> int:
    """The first of the USERS ids."""
    return _FIRST_MAPPED_UID if engine.maps_users else _FIRST_UID


def _accounts(first: int) -> tuple[bytes, bytes]:
    """Lines of /etc/passwd and /etc/group: every id is called agent."""
    ids = range(first, first + USERS)
    passwd = "".join(f"agent:x:{id}:{id}:agent:/home/agent:/bin/bash\n" for id in ids)
    return passwd.encode(), "".join(f"agent:x:{id}:\n" for id in ids).encode()


class Images:
    """Of one daemon. Every method may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._prepared: dict[str | None, str] = {}
        self._seeds: dict[tuple[str, str], bytes] = {}
        self._environments: dict[str, dict[str, str]] = {}

    def prepare(self, image: str | None) -> str:
        """The id of an image that a sandbox can use.

        Args:
          image: a reference that the daemon has ("debian:12"); a directory with a root file system, which is imported;
            None: a minimal system made of this machine's programs.

        Raises:
          SpecError: there is no such image.
        """
        with self._lock:
            if image not in self._prepared:
                with translated(f"prepare image {image or 'of this machine'!r}"):
                    self._prepared[image] = self._prepare(image)
            return self._prepared[image]

    def _prepare(self, image: str | None) -> str:
        passwd, group = _accounts(first_uid(self._engine))
        if image is None:
            rootfs = HostRootfs(b"root:x:0:0:root:/root:/bin/bash\n" + passwd, b"root:x:0:\n" + group)
            with tempfile.TemporaryFile() as file:
                return self._find(rootfs.digest) or self._import(rootfs.digest, lambda: rootfs.write(file), file)
        if os.path.isdir(image):
            with tempfile.TemporaryFile() as file:
                with tarfile.open(fileobj=file, mode="w|") as tar:
                    tar.add(image, arcname=".", filter=_as_root)
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
                base = self._find(digest) or self._import(digest, lambda: None, file)
        else:
            base = self._id_of(image)
        recipe = hashlib.sha256(base.encode() + passwd + group).hexdigest()[:16]
        return self._find(recipe) or self._extend(base, recipe, {"passwd": passwd, "group": group})

    def _id_of(self, image: str) -> str:
        try:
            return self._engine.api.inspect_image(image)["Id"]
        except load().errors.ImageNotFound as error:
            raise SpecError(f"image: {image!r} is not in this Docker daemon: docker pull it first") from error

    def _find(self, tag: str) -> str | None:
        with contextlib.suppress(load().errors.ImageNotFound):
            return self._engine.api.inspect_image(f"{REPOSITORY}:{tag}")["Id"]
        return None

    def _import(self, tag: str, write: Any, file: Any) -> str:
        write()
        file.seek(0)
        answer = self._engine.api.import_image_from_data(file, repository=REPOSITORY, tag=tag)
        found = self._find(tag)
        if found is None:
            raise BackendUnavailable(f"docker: the import of an image failed: {answer[-300:]}")
        return found

    def _extend(self, base: str, tag: str, accounts: dict[str, bytes]) -> str:
        """`base` with its own accounts, then ours that it does not name."""
        api = self._engine.api
        container = api.create_container(base, command=["true"], labels={LABEL: owner()}, network_disabled=True)["Id"]
        try:
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as tar:
                for name, lines in accounts.items():
                    own = _read(self._engine, container, f"/etc/{name}")
                    text = own if own.endswith(b"\n") or not own else own + b"\n"
                    _add(tar, f"etc/{name}", text + lines)
            api.put_archive(container, "/", stream.getvalue())
            api.commit(container, repository=REPOSITORY, tag=tag)
        finally:
            self._engine.remove(container)
        found = self._find(tag)
        if found is None:
            raise BackendUnavailable("docker: the commit of a prepared image failed")
        return found

    def environment(self, image: str) -> dict[str, str]:
        """The variables that a prepared image sets (ENV)."""
        with self._lock:
            if image not in self._environments:
                with translated("inspect an image"):
                    lines = self._engine.api.inspect_image(image)["Config"].get("Env") or []
                self._environments[image] = dict(line.split("=", 1) for line in lines if "=" in line)
            return self._environments[image]

    def seeds(self, image: str, places: list[str]) -> dict[str, bytes]:
        """What a prepared image has below directories: {place: tar, for its parent}; empty ones are left out."""
        with self._lock:
            unknown = [place for place in places if (image, place) not in self._seeds]
            if unknown and image != self._prepared.get(None):
                with translated("read directories of an image"):
                    self._read_seeds(image, unknown)
            return {place: seed for place in places if (seed := self._seeds.get((image, place), b""))}

    def _read_seeds(self, image: str, places: list[str]) -> None:
        api = self._engine.api
        container = api.create_container(image, command=["true"], labels={LABEL: owner()}, network_disabled=True)["Id"]
        try:
            for place in places:
                data = io.BytesIO()
                with contextlib.suppress(load().errors.NotFound):
                    for piece in api.get_archive(container, place)[0]:
                        data.write(piece)
                        if data.tell() > _MAX_SEED_BYTES:
                            raise SpecError(
                                f"image: more than {_MAX_SEED_BYTES} bytes in {place}, which must be writable"
                            )
                self._seeds[image, place] = data.getvalue() if _has_entries(data) else b""
        finally:
            self._engine.remove(container)


def _has_entries(data: io.BytesIO) -> bool:
    """Whether a tar of a directory has more in it than the directory."""
    data.seek(0)
    if not data.getbuffer().nbytes:
        return False
    with tarfile.open(fileobj=data) as tar:
        return len(tar.getnames()) > 1


def _as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, EPOCH
    tar.addfile(info, io.BytesIO(data))


def _read(engine: Engine, container: str, path: str) -> bytes:
    """A file of a container; b"" where there is none (or where it is a link, which leads elsewhere)."""
    try:
        stream, _ = engine.api.get_archive(container, path)
    except load().errors.NotFound:
        return b""
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
        member = tar.getmember(posixpath.basename(path))
        file = tar.extractfile(member) if member.isreg() else None
        return file.read() if file is not None else b""

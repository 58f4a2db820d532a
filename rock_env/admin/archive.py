"""Files in transit: tar archives from and to users, descriptions and contents between admin and worker.

An archive is only ever unpacked by a backend, which resolves each path inside the sandbox: `..`, absolute names and
links have no other meaning there than for the sandbox's own programs.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rock_env.errors import FileError, LimitExceeded, SpecError
from rock_env.spec import FileEntry, check_path

if TYPE_CHECKING:
    from rock_env.backend import Backend

_KEEP_MODE = "ROCK.keep_mode"  # a member whose mode is left to the receiver: an existing file's, else 0644
_MAX_MEMBERS = 100_000


def files_of(entries: list[dict], blob: bytes) -> dict[str, FileEntry]:
    """The files of descriptions and contents (rock_env.bubblewrap.entries_of); links are left out."""
    files: dict[str, FileEntry] = {}
    offset = 0
    for entry in entries:
        if entry["kind"] != "symlink":
            files[entry["path"]] = FileEntry(blob[offset : offset + entry["size"]], entry["mode"])
            offset += entry["size"]
    return files


def pack(files: Mapping[str, FileEntry], links: Mapping[str, str]) -> bytes:
    """A tar archive. Names are kept as they are: relative ones stay relative."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, entry in files.items():
            member = tarfile.TarInfo(path)
            member.type = tarfile.DIRTYPE if path.endswith("/") else tarfile.REGTYPE
            member.size = len(entry.data)
            member.mode = 0o644 if entry.mode is None else entry.mode
            if entry.mode is None:
                member.pax_headers = {_KEEP_MODE: "1"}
            tar.addfile(member, io.BytesIO(entry.data))
        for path, target in links.items():
            member = tarfile.TarInfo(path)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def unpack(data: bytes, below: str) -> tuple[dict[str, FileEntry], dict[str, str]]:
    """Files (directories end in "/") and symbolic links of a tar archive, with names below `below`.

    Raises:
      SpecError: it is no tar archive, or has a member that is no file, directory or symbolic link.
    """
    files: dict[str, FileEntry] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for count, member in enumerate(tar):
                if count >= _MAX_MEMBERS:
                    raise SpecError(f"archive: expected at most {_MAX_MEMBERS} members")
                path = os.path.join(below, check_path("archive", member.name))
                if member.isdir():
                    files[f"{path.rstrip('/')}/"] = FileEntry()
                elif member.issym():
                    links[path] = check_path("archive", member.linkname)
                elif member.isreg() and not member.issparse():  # whose size is not bounded by the archive's
                    content = tar.extractfile(member)
                    mode = None if _KEEP_MODE in member.pax_headers else member.mode & 0o777
                    files[path] = FileEntry(content.read() if content else b"", mode)
                else:
                    raise SpecError(f"archive: {member.name!r} is neither a file, a directory nor a symbolic link")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"archive: expected an uncompressed tar archive ({error})") from error
    return files, links


def pack_tree(backend: Backend, sandbox: str, path: str, max_bytes: int) -> bytes:
    """A tar archive of what lies at `path` of a sandbox; names are relative to it (a single file keeps its own name).

    Links are packed as links; devices and sockets are left out.
    """
    try:
        infos = backend.list(sandbox, path, True)
    except FileError as error:
        if error.errno_name != "ENOTDIR":
            raise
        mode = backend.list(sandbox, path, False)[0].mode & 0o777
        return pack({os.path.basename(path): FileEntry(backend.read(sandbox, path, max_bytes), mode)}, {})
    files: dict[str, FileEntry] = {}
    links: dict[str, str] = {}
    left = max_bytes
    for info in infos:
        if info.kind == "directory":
            files[f"{info.name}/"] = FileEntry(b"", info.mode & 0o777)
        elif info.kind == "symlink":
            links[info.name] = info.target
        elif info.kind == "file":
            if info.size > left:
                raise LimitExceeded(f"archive of {path}: more than {max_bytes} bytes")
            content = backend.read(sandbox, os.path.join(path, info.name), left)
            files[info.name] = FileEntry(content, info.mode & 0o777)
            left -= len(content)
    return pack(files, links)

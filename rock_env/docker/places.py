"""Which directories of a container are writable, and how much of the disk limit each gets."""

from __future__ import annotations

import posixpath

from rock_env.errors import LimitNotEnforceable, SpecError
from rock_env.spec import SandboxSpec

_HOME = "/home/agent"
# Writable beside the working directory, with their shares of disk_bytes; /tests and /logs are where a task's tests and
# its reward go (Harbor's format).
PLACES = ("/tmp", _HOME, "/var/tmp", "/logs", "/tests")
_STICKY = ("/tmp", "/var/tmp")
_INODE_BYTES = 4096
_LEAST_PLACE_BYTES = 64 << 10


def places_of(spec: SandboxSpec) -> list[str]:
    """The directories that are writable in a sandbox of this spec; the first holds the working directory.

    Besides the fixed ones, a file of the spec makes the directory it lies in writable. One inside another is left out.
    """
    wanted = [spec.workdir, *PLACES]
    for name in spec.files:
        path = posixpath.normpath(posixpath.join(spec.workdir, name))
        if not any(_is_below(path, place) for place in wanted):
            wanted.append(path if name.endswith("/") else posixpath.dirname(path))
    wanted = list(dict.fromkeys(posixpath.normpath(place) for place in wanted))
    for place in wanted:
        if place in ("/", "//") or any(_is_below(place, system) for system in ("/proc", "/sys", "/dev")):
            raise SpecError(f"files, workdir: {place} cannot be a writable directory of a container")
    places = [place for place in wanted if not any(_is_below(place, other) for other in wanted if other != place)]
    return sorted(places, key=lambda place: not _is_below(posixpath.normpath(spec.workdir), place))


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def shares_of(places: list[str], disk_bytes: int | None) -> dict[str, int | None]:
    """How large each place may become: half for the first, a quarter for /tmp, what remains in equal parts.

    Raises LimitNotEnforceable when that leaves too little for one.
    """
    if disk_bytes is None:
        return dict.fromkeys(places)
    others = [place for place in places[1:] if place != "/tmp"]
    each = disk_bytes // 4 // max(1, len(others))
    shares = {place: each for place in others} | {"/tmp": disk_bytes // 4} | {places[0]: disk_bytes // 2}
    shares = {place: shares[place] // _INODE_BYTES * _INODE_BYTES for place in places}
    if min(shares.values()) < _LEAST_PLACE_BYTES:
        raise LimitNotEnforceable(
            f"limits.disk_bytes={disk_bytes}: expected at least {_LEAST_PLACE_BYTES * 4 * max(1, len(others))}, "
            f"as it is shared by {', '.join(places)}"
        )
    return shares


def tmpfs_options(place: str, share: int | None, uid: int) -> str:
    """Mount options of a place: executable, as a root file system is."""
    mode = "1777" if place in _STICKY else "0755"
    options = f"rw,exec,nosuid,nodev,mode={mode},uid={uid},gid={uid}"
    return options if share is None else f"{options},size={share},nr_inodes={max(1024, share // _INODE_BYTES)}"

"""The processes of this machine, as /proc tells of them."""

from __future__ import annotations

from pathlib import Path


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def descendants(*roots: int) -> dict[int, str]:
    """{pid: start time} of these processes and of all below them, zombies too."""
    parents = {int(p.name): int(s[1]) for p in Path("/proc").glob("[0-9]*") if (s := stat(int(p.name)))}
    found = set(roots)
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return {pid: fields[19] for pid in found if (fields := stat(pid))}


def still_there(processes: dict[int, str]) -> list[int]:
    """Those of {pid: start time} that were not reaped."""
    return [pid for pid, start in processes.items() if (fields := stat(pid)) and fields[19] == start]

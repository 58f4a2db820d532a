"""What a process with sandboxes has on this machine, to be looked for after its end."""

from __future__ import annotations

import time
from pathlib import Path

from processes import descendants, still_there

from rock_env.client import state_directory
from rock_env.supervisor import cgroups


class Footprint:
    """All of a live process: those below it, and what the keepers of its sandboxes have made, named after them."""

    def __init__(self, root: int, *keepers: int) -> None:
        self.processes = descendants(root)
        self._marks = [f"-{keeper}-" for keeper in keepers]

    def what_is_left(self) -> list[str]:
        folders = [Path(state_directory()), *map(Path, cgroups.Hierarchies.detect().directories())]
        places = [str(path) for folder in folders for path in folder.glob("rock-*")]
        places += Path("/proc/self/mountinfo").read_text().splitlines()
        left = [f"process {pid}" for pid in still_there(self.processes)]
        return left + [place for place in places if any(mark in place for mark in self._marks)]

    def assert_gone(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.what_is_left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []

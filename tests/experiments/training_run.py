"""Whole runs as processes of their own: started, halted at a moment, killed, and what they write and leave."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from footprint import Footprint
from processes import descendants, stat

HERE = Path(__file__).parent
_COMMAND = [sys.executable, str(HERE.parents[1] / "experiments" / "ipa_train.py"), f"--config={HERE / 'tiny_run.py'}"]
_DEADLINE = 280.0  # seconds of one run; on an idle machine it takes about ten


def _prepare(file_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and what they start, ignore it


class Run:
    """One process that trains in `workdir`; it ends with its `with` block, whatever happens there.

    `environment`: variables beside those of this process. `file_bytes`: the size above which files are refused.
    """

    def __init__(
        self,
        workdir: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        file_bytes: int = resource.RLIM_INFINITY,
    ) -> None:
        self.workdir = workdir
        self.metrics = workdir / "metrics.jsonl"
        self.log = workdir.parent / f"{workdir.name}.{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*_COMMAND, f"--workdir={workdir}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=lambda: _prepare(file_bytes),
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = _DEADLINE) -> tuple[int, str]:
        """(exit code, what it printed)."""
        return self.process.wait(seconds), self.output

    def halt(self, reached: Callable[[], bool]) -> None:
        """Halts the run (SIGSTOP) as soon as `reached()`; fails if it ends before, or never gets there."""
        deadline = time.monotonic() + _DEADLINE
        while not reached():
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"never got there:\n{self.output}"
            time.sleep(0.002)
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self, number: int = signal.SIGCONT) -> str:
        """A run that was halted goes on to its end, or ends by a signal, and leaves nothing on this machine.

        What it printed.
        """
        footprint = self._footprint()
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        code, output = self.wait()
        assert code == {signal.SIGCONT: 0, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number], output
        footprint.assert_gone(60.0 if number == signal.SIGKILL else 2.0)
        return output

    def _footprint(self) -> Footprint:
        """Its keepers of sandboxes are those of its children that have a session of their own."""
        root, keepers = self.process.pid, []
        for pid in descendants(root):
            _, parent, _, session, *_ = stat(pid) or [""] * 4
            if (parent, session) == (str(root), str(pid)):
                keepers.append(pid)
        assert keepers, "the run has no sandboxes yet"
        footprint = Footprint(root, *keepers)
        assert footprint.what_is_left()
        return footprint

    def stages(self) -> list[str]:
        lines = self.metrics.read_bytes().split(b"\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line)["stage"] for line in lines]


def has_record(run: Run, stage: str, number: int) -> Callable[[], bool]:
    return lambda: run.stages().count(stage) >= number


def has_checkpoint(run: Run, number: int) -> Callable[[], bool]:
    return lambda: (run.workdir / "checkpoints" / str(number)).is_dir()


def ended(workdir: Path, *arguments: str, **settings: Any) -> tuple[int, str]:
    """(exit code, what it printed) of a run that nothing disturbs."""
    with Run(workdir, *arguments, **settings) as run:
        return run.wait()


def finished(workdir: Path, *arguments: str, **settings: Any) -> str:
    """What a run that succeeds prints."""
    code, output = ended(workdir, *arguments, **settings)
    assert code == 0, output
    return output


def refused(workdir: Path, *arguments: str, **settings: Any) -> str:
    """What a run that can't go on says: exit code 2, and no traceback."""
    code, output = ended(workdir, *arguments, **settings)
    assert code == 2, output
    assert "Traceback" not in output
    return output


def records(workdir: Path, stage: str = "", keep_measured: bool = False) -> list[dict[str, Any]]:
    """The metrics (of one stage) without what a clock measured."""

    def is_measured(name: str) -> bool:
        return name == "time" or name.startswith("time/") or name.endswith("tokens_per_second")

    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in found if stage in ("", record["stage"])]
    return [{k: v for k, v in record.items() if keep_measured or not is_measured(k)} for record in found]

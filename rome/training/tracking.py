"""What a run tells: metrics as JSON lines and TensorBoard (Weights & Biases on request), and a live line for people.

`metrics.jsonl` is the record; TensorBoard is a view that can be rebuilt from it, so a resumed run's curves are exactly
those of a run that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rome.files import atomic_write

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_STAGE = re.compile(r"[A-Za-z0-9_.-]+")
_RESERVED = ("step", "stage", "time")


class MetricsError(ValueError):
    """A metric that cannot be recorded, or a metrics file that does not hold what a checkpoint says it does."""


def read_metrics(path: str | os.PathLike[str], problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Reads the complete records of a `metrics.jsonl`; a last line cut off by a crash is left out. [] if no file.

    Args:
        problems: where to note lines that are no records, to go on without them (default: they raise).

    Raises:
        MetricsError: a complete line that is not a record; names the line.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int) or not isinstance(record["stage"], str):
                raise TypeError("step must be an integer and stage a string")
        except (ValueError, TypeError, KeyError) as error:
            message = f"{path}, line {number}: not a metrics record: {error}"
            if problems is None:
                raise MetricsError(message) from error
            problems.append(message)
            continue
        records.append(record)
    return records


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/<stage>/` under a run directory.

    A record is `{"step", "stage", "time", name: float, …}` on one line, handed to the operating system before `write`
    returns: it survives the death of the process (call `sync` for the death of the machine). A value that is not
    finite is written as null. Opening an existing run drops a line that a crash cut off and appends after it.

    Args:
        directory: the run directory; created if missing.
        tensorboard: whether to write TensorBoard event files too.
        wandb: arguments of `wandb.init` (needs the extra `tracking`), or None.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, tensorboard: bool = True, wandb: Mapping[str, Any] | None = None
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._boards: dict[str, SummaryWriter] = {}
        self._wandb = _start_wandb(self.directory, wandb) if wandb is not None else None
        self.num_records = len(read_metrics(self.path))
        self._file = self._open(self.num_records)

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Appends one record. Values are Python, NumPy or JAX scalars.

        Raises:
            MetricsError: a stage that is no file name, a reserved or empty metric name, a value that is no scalar.
        """
        if self._file.closed:
            raise MetricsError("the metrics writer is closed")
        if not _STAGE.fullmatch(stage):
            raise MetricsError(f"stage: expected letters, digits, '_', '.' or '-', got {stage!r}")
        record: dict[str, Any] = {"step": int(step), "stage": stage, "time": time.time()}
        for name, value in metrics.items():
            if not isinstance(name, str) or not name or name in _RESERVED:
                raise MetricsError(f"metric name: expected a string other than {_RESERVED}, got {name!r}")
            record[name] = _scalar(name, value)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self.num_records += 1
        self._to_board(record)
        if self._wandb is not None:  # one global counter: stages each count their own steps
            named = {f"{stage}/{name}": value for name, value in record.items() if name != "stage"}
            self._wandb.log(named, step=self.num_records)

    def restore(self, num_records: int) -> None:
        """Returns to the moment when `num_records` records had been written (stored in a checkpoint).

        Later records are dropped atomically from `metrics.jsonl`, and TensorBoard's files are rebuilt from the rest.

        Raises:
            MetricsError: fewer records than `num_records` exist.
        """
        if not 0 <= num_records <= self.num_records:
            raise MetricsError(f"{self.path} holds {self.num_records} records, the checkpoint needs {num_records}")
        if num_records == self.num_records:
            return
        self._file.close()
        self._file = self._open(num_records)
        self.num_records = num_records
        self._close_boards()
        shutil.rmtree(self.directory / "tensorboard", ignore_errors=True)
        for record in read_metrics(self.path):
            self._to_board(record)

    def sync(self) -> None:
        """Makes every record durable. Call it before a checkpoint that stores `num_records`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for board in self._boards.values():
            board.flush()

    def close(self) -> None:
        """Flushes and closes everything. May be called twice."""
        if self._file.closed:
            return
        self.sync()
        self._file.close()
        self._close_boards()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, num_records: int) -> TextIO:
        """Opens for appending after the first `num_records` lines; what follows them is dropped."""
        data = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(line + b"\n" for line in data.split(b"\n")[:num_records])
        if kept != data:
            atomic_write(self.path, kept)
        return open(self.path, "a", encoding="utf-8")

    def _to_board(self, record: Mapping[str, Any]) -> None:
        if not self._tensorboard:
            return
        stage = record["stage"]
        if stage not in self._boards:  # one event folder a stage: stages count their own steps
            from tensorboardX import SummaryWriter  # it imports torch where there is one: a second of every start

            self._boards[stage] = SummaryWriter(str(self.directory / "tensorboard" / stage), flush_secs=10)
        for name, value in record.items():
            if name not in _RESERVED and value is not None:
                self._boards[stage].add_scalar(name, value, record["step"], walltime=record["time"])

    def _close_boards(self) -> None:
        for board in self._boards.values():
            board.close()
        self._boards.clear()


def _scalar(name: str, value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise MetricsError(f"metric {name!r}: expected a scalar, got {value!r}") from error
    return number if math.isfinite(number) else None


def _start_wandb(directory: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MetricsError("Weights & Biases was asked for but is not installed: pip install '.[tracking]'") from error
    return wandb.init(dir=str(directory), **arguments)


class Progress:
    """Shows where a run is: a live display in a terminal, one plain line each `interval` seconds elsewhere.

    Everything printed or logged meanwhile appears above the live display. Use as a context manager::

        with Progress("rome_tiny") as progress:
            progress.start("ipa", total=200)
            progress.update(step, success=0.4, tokens_per_second=5200.0)
    """

    def __init__(self, name: str, *, interval: float = 10.0, console: Console | None = None) -> None:
        self.console = console or Console()
        self._name = name
        self._interval = interval
        self._stage, self._step, self._total = "", 0, 0
        self._values: dict[str, float] = {}
        self._history: deque[float] = deque(maxlen=24)
        self._times: deque[tuple[int, float]] = deque(maxlen=20)
        self._last_line = -math.inf
        self._printed: tuple[str, int] | None = None
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            before = (sys.stdout, sys.stderr)
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
            self._redirect_logging(before)
        return self

    def __exit__(self, *_: object) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._stage:
            self._print_line()

    def start(self, stage: str, total: int, step: int = 0) -> None:
        """Begins a stage of `total` steps, `step` of which are done (a resumed run)."""
        if self._stage:
            self._print_line()
        self._stage, self._step, self._total = stage, step, total
        self._values.clear()
        self._history.clear()
        self._times.clear()
        self._times.append((step, time.monotonic()))
        self._last_line = time.monotonic()

    def update(self, step: int, **values: float) -> None:
        """Moves to `step`. `success` (0..1) and `tokens_per_second` have columns of their own; others follow."""
        now = time.monotonic()
        self._step = step
        self._times.append((step, now))
        self._values.update(values)
        if "success" in values:
            self._history.append(values["success"])
        if self._live is None and now - self._last_line >= self._interval:
            self._print_line()
            self._last_line = now

    def log(self, message: str) -> None:
        """Prints a line above the display."""
        self.console.print(message, markup=False, highlight=False)

    def eta_seconds(self) -> float | None:
        """Seconds to the end of the stage at the pace of the last steps; None before there is a pace."""
        (first, start), (last, end) = self._times[0], self._times[-1]
        if last <= first or end <= start:
            return None
        return (self._total - last) * (end - start) / (last - first)

    def _print_line(self) -> None:
        if self._printed == (self._stage, self._step):
            return
        self._printed = (self._stage, self._step)
        fields = [f"{self._name} {self._stage} {self._step}/{self._total}", *self._fields().values()]
        self.console.print(" | ".join(fields), markup=False, highlight=False, soft_wrap=True)

    def _fields(self) -> dict[str, str]:
        values = dict(self._values)
        fields = {}
        if "success" in values:
            fields["success"] = f"success {values.pop('success'):.3f}"
        if "tokens_per_second" in values:
            fields["speed"] = f"{values.pop('tokens_per_second'):,.0f} tok/s"
        fields |= {name: f"{name} {value:.4g}" for name, value in values.items()}
        eta = self.eta_seconds() if self._times else None
        if eta is not None and self._step < self._total:
            fields["eta"] = f"eta {format_duration(eta)}"
        return fields

    def _render(self) -> Group:
        if not self._stage:
            return Group(Text(f"{self._name} starting …", style="dim"))
        fields = self._fields()
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=28)
        stage, step = Text(self._stage, style="magenta"), Text(f"{self._step}/{self._total}")
        head.add_row(Text(self._name, style="bold"), stage, bar, step, Text(fields.pop("eta", ""), style="dim"))
        body = Text(no_wrap=True, overflow="ellipsis")
        styles = {"success": "bold green", "speed": "cyan"}
        for name, text in fields.items():
            spark = f" {sparkline(self._history)}" if name == "success" else ""
            body.append(f"{text}{spark}  ", style=styles.get(name, "dim"))
        return Group(head, body)

    def _redirect_logging(self, before: tuple[Any, Any]) -> None:
        """Handlers made earlier hold the real streams, and would write through the live display."""
        loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is before[0] else sys.stderr)


def sparkline(values: Any) -> str:
    """A curve of numbers in 0..1 as block characters; anything outside is clipped."""
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[min(7, max(0, int(value * 8)))] for value in values if math.isfinite(value))


def format_duration(seconds: float) -> str:
    """`3725` → `1h02m`, `62` → `1m02s`, `5` → `5s`."""
    total = max(0, round(seconds))
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

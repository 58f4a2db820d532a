import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import wait_until

from rome.training.tracking import MetricsError, MetricsWriter, Progress, format_duration, read_metrics, sparkline


def board(directory: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory / "tensorboard" / stage)).Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write_some(writer: MetricsWriter, first: int, last: int) -> None:
    for step in range(first, last):
        writer.write(step, "ipa", {"train/success": np.float32(step / 8), "eval/x": step})


def test_records_reach_the_file_at_once_and_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, "sft", {"train/loss": 1.5})
        writer.write(4, "ipa", {"train/success": np.float32(0.25), "bad": float("nan")})
        records = read_metrics(tmp_path / "metrics.jsonl")  # before close
        assert writer.num_records == 2
    assert [(r["step"], r["stage"]) for r in records] == [(3, "sft"), (4, "ipa")]
    assert records[0]["train/loss"] == 1.5
    assert abs(records[0]["time"] - time.time()) < 60
    assert records[1]["train/success"] == 0.25
    assert records[1]["bad"] is None
    assert board(tmp_path, "sft") == {"train/loss": [(3, 1.5)]}
    assert board(tmp_path, "ipa") == {"train/success": [(4, 0.25)]}


def test_restored_run_is_that_of_a_run_never_interrupted(tmp_path):
    with MetricsWriter(tmp_path / "whole") as writer:
        write_some(writer, 0, 8)
    with MetricsWriter(tmp_path / "cut") as writer:
        write_some(writer, 0, 3)
        writer.sync()
        checkpoint = writer.num_records
        write_some(writer, 3, 6)  # lost work: steps after the checkpoint
    with MetricsWriter(tmp_path / "cut") as writer:
        assert writer.num_records == 6
        writer.restore(checkpoint)
        write_some(writer, 3, 8)

    def timeless(directory: Path) -> list[dict]:
        return [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(directory / "metrics.jsonl")]

    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert board(tmp_path / "cut", "ipa") == board(tmp_path / "whole", "ipa")


def test_restore_needs_the_records_and_can_drop_all(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        write_some(writer, 0, 2)
        with pytest.raises(MetricsError, match="holds 2 records, the checkpoint needs 3"):
            writer.restore(3)
        writer.restore(0)
        assert writer.num_records == 0
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "tensorboard").exists()


def test_line_cut_off_by_a_crash_is_dropped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_some(writer, 0, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "sta')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    with MetricsWriter(tmp_path) as writer:
        write_some(writer, 2, 3)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_records_survive_the_death_of_the_process(tmp_path):
    code = (
        "import sys, time\nfrom rome.training.tracking import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1])\nfor step in range(5): w.write(step, 'ipa', {'x': step})\n"
        "print('written', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd())
    try:
        assert child.stdout.readline() == b"written\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=20)
    assert [r["x"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_damaged_line_is_named_or_noted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "ipa"}\n{"step": "two", "stage": "ipa"}\n{"step": 3, "stage": "ipa"}\n')
    with pytest.raises(MetricsError, match="line 2"):
        read_metrics(path)
    problems: list[str] = []
    assert [r["step"] for r in read_metrics(path, problems)] == [1, 3]
    assert "line 2" in problems[0]


@pytest.mark.parametrize(
    ("stage", "metrics", "part"),
    [
        ("a/b", {}, "stage"),
        ("", {}, "stage"),
        ("ipa", {"time": 1.0}, "metric name"),
        ("ipa", {"": 1.0}, "metric name"),
        ("ipa", {"x": "high"}, "metric 'x'"),
        ("ipa", {"x": np.zeros(3)}, "metric 'x'"),
    ],
)
def test_what_cannot_be_recorded_is_named_and_leaves_no_trace(tmp_path, stage, metrics, part):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(MetricsError, match=part):
            writer.write(1, stage, metrics)
        assert writer.num_records == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_closed_writer_refuses(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.close()
    writer.close()
    with pytest.raises(MetricsError, match="closed"):
        writer.write(1, "ipa", {})


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the tracking extra is installed")
def test_missing_extra_is_named(tmp_path):
    with pytest.raises(MetricsError, match="tracking"):
        MetricsWriter(tmp_path, wandb={"mode": "offline"})


def drive(progress: Progress, steps: int) -> None:
    progress.start("ipa", steps)
    for step in range(1, steps + 1):
        time.sleep(0.02)
        progress.update(step, success=step / steps, tokens_per_second=5200.0)


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Progress("tiny", interval=0.0, console=Console(file=sys.stdout, width=40)) as progress:
        drive(progress, 3)
        progress.log("a [bracketed] message")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("tiny")] == [f"tiny ipa {n}/3" for n in (1, 2, 3)]
    assert lines[0].split(" | ")[1:3] == ["success 0.333", "5,200 tok/s"]
    assert "eta" in lines[0]
    assert "a [bracketed] message" in lines
    assert not any("\x1b" in line for line in lines)


def test_interval_limits_the_lines(capsys):
    with Progress("tiny", interval=60.0, console=Console(file=sys.stdout)) as progress:
        drive(progress, 5)
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == ["tiny ipa 5/5"]


def test_in_a_terminal_prints_and_logs_stand_above_the_display(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("test_tracking")
    handler = logging.StreamHandler()  # holds the real stderr, as handlers made at start-up do
    logger.addHandler(handler)
    try:
        with Progress("tiny", console=Console(file=terminal, force_terminal=True, width=100)) as progress:
            drive(progress, 4)
            wait_until(lambda: "4/4" in terminal.getvalue())  # the display has been drawn
            print("printed line")
            logger.warning("logged line")
            time.sleep(0.3)
            assert handler.stream is not terminal
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)
    text = terminal.getvalue()
    assert "4/4" in text
    assert "█" in text  # the sparkline
    for line in ("printed line", "logged line"):  # alone on its line, after the display was erased
        before, after = text.split(line, 1)
        assert before.endswith("\x1b[2K")
        assert after.startswith(("\n", "\r\n"))


def test_resumed_stage_keeps_the_pace_of_its_own_steps():
    progress = Progress("tiny", console=Console(file=io.StringIO()))
    progress.start("ipa", total=1000, step=900)
    assert progress.eta_seconds() is None
    time.sleep(0.05)
    progress.update(910)
    assert 0.3 < progress.eta_seconds() < 90.0


def test_small_formats():
    assert [format_duration(s) for s in (0.4, 5, 62, 3725)] == ["0s", "5s", "1m02s", "1h02m"]
    assert sparkline([0.0, 0.5, 1.0, 2.0, float("nan")]) == "▁▅██"


def test_jsonl_is_strict_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "ipa", {"a": float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)

"""Runs a config over a grid of values, one process after the other, and tabulates the evaluations.

    python experiments/sweep.py --config=configs/rome_tiny.py --workdir=runs/seeds --grid.seed=0,1,2
    python experiments/sweep.py --config=configs/rome_tiny.py --workdir=runs/levels \
        --grid.ipa.ratio_level=token,chunk,trajectory --grid.seed=0,1

Every `--grid.KEY=A,B,…` multiplies the runs; all other flags go to `ipa_train.py` as they are. A sweep that was
interrupted goes on where it stopped: runs resume, finished ones are only read.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table


def parse(argv: list[str]) -> tuple[dict[str, list[str]], Path, list[str]]:
    """(grid by config key, directory of the sweep, flags for every run). Raises SystemExit on a malformed grid."""
    grid: dict[str, list[str]] = {}
    directory, rest = Path("runs/sweep"), []
    for flag in argv:
        name, _, value = flag.partition("=")
        if name.startswith("--grid."):
            grid[name.removeprefix("--grid.")] = [item for item in value.split(",") if item]
        elif name == "--workdir":
            directory = Path(value)
        else:
            rest.append(flag)
    empty = [key for key, values in grid.items() if not values]
    if not grid or empty:
        raise SystemExit(f"sweep: expected --grid.KEY=A,B,… with at least one value, found {empty or 'no grid'}")
    return grid, directory, rest


def main(argv: list[str]) -> int:
    grid, directory, rest = parse(argv)
    script = Path(__file__).with_name("ipa_train.py")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    results = []
    for point in points:
        name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
        overrides = [f"--config.{key}={value}" for key, value in point.items()]
        command = [sys.executable, str(script), *rest, *overrides, f"--workdir={directory / name}"]
        status = subprocess.run(command, check=False).returncode
        if status:
            print(f"sweep: {name} ended with status {status}", file=sys.stderr)
            return status
        results.append((name, json.loads((directory / name / "result.json").read_text(encoding="utf-8"))))
    show(Console(), results)
    plot(directory, [name for name, _ in results])
    return 0


def show(console: Console, results: list[tuple[str, dict]]) -> None:
    """One row a run, with 95 % intervals, and the mean over the runs."""
    stages = list(results[0][1])
    table = Table("run", *stages)
    for name, result in results:
        cells = (f"{result[s]['success']:.3f} [{result[s]['low']:.3f}, {result[s]['high']:.3f}]" for s in stages)
        table.add_row(name, *cells)
    values = {s: np.array([result[s]["success"] for _, result in results]) for s in stages}
    table.add_row("mean ± s.d.", *(f"{values[s].mean():.3f} ± {values[s].std():.3f}" for s in stages))
    console.print(table)


def plot(directory: Path, names: list[str]) -> None:
    """`learning_curve.png`: success on fresh training tasks over IPA steps (running mean of 9), and the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rome.training.tracking import read_metrics

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in names:
        records = read_metrics(directory / name / "metrics.jsonl")
        success = [r["train/success"] for r in records if r["stage"] == "ipa" and "train/success" in r]
        smooth = [np.mean(success[max(0, i - 8) : i + 1]) for i in range(len(success))]
        (line,) = axes.plot(range(1, len(smooth) + 1), smooth, label=name)
        points = [(r["step"], r["eval/success"]) for r in records if r["stage"] == "eval" and "eval/success" in r]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color())
    axes.set(xlabel="IPA step", ylabel="success", ylim=(0, 1), title="line: fresh training tasks, dot: held-out seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "learning_curve.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure what asynchrony is worth: the same long-tailed environments, engine and trainer, waiting or not.

python benchmarks/rollout.py [--median-ms 150] [--steps 10] [--rounds 3] [--json FILE] [--learning 3]
                             [--multiplex | --simulate | --faults]

An episode has up to five tool calls, each of which takes a log-normal time (σ 0.6), and one in a hundred ten times that
(ROLL Flash's setting, arXiv 2510.11345). Synchronous training is shown twice: our deterministic lockstep mode, and the
strongest synchronous peer we can build: the same free-running engine, waiting for the last sample of the batch before
it trains. `--learning N` compares what is learned a sample, over N seeds. `--multiplex` compares multiplexing with a
static split on two devices (see `rollouts/two_devices.py`). `--simulate` measures latencies, holds the simulator's
predictions (`rome.rollout.simulator`) against such runs, and then has it predict clusters (see `rollouts/cluster.py`).
`--faults` breaks things under a running job (see `faults.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rollouts import cluster, two_devices
from rollouts.jobs import (
    BATCH,
    GROUP_SIZE,
    GROUPS,
    Outcome,
    Training,
    latencies_of,
    measure,
    roll_out,
)

from rome.rollout import BackgroundRollouts, SampleBuffer
from rome.rollout.simulator import Latencies, Plan, simulate


def lockstep(slots: int, median: float, steps: int, seed: int = 0) -> Outcome:
    training = Training(slots, median, seed)
    with training.runner as runner:
        return measure(training, lambda: runner.run(list(itertools.islice(training.requests, GROUPS))), steps)


def free_running(slots: int, median: float, steps: int, *settings: Any) -> Outcome:
    training = Training(slots, median, *settings)
    with training.runner:
        return measure_synchronous(training, steps)


def measure_synchronous(training: Training, steps: int) -> Outcome:
    return measure(training, lambda: roll_out(training.runner, training.requests), steps)


def asynchronous(ratio: float) -> Callable[..., Outcome]:
    def run(slots: int, median: float, steps: int, *settings: Any) -> Outcome:
        training = Training(slots, median, *settings)
        buffer = SampleBuffer(ratio, GROUPS)
        with training.runner, BackgroundRollouts(training.runner, buffer, training.requests):
            return measure(training, lambda: buffer.get_batch(GROUPS, training.version, timeout=600), steps)

    return run


MODES: dict[str, tuple[Callable[..., Outcome], int]] = {
    "synchronous, lockstep": (lockstep, BATCH),
    "synchronous, free-running": (free_running, BATCH),
    "asynchronous, ratio 1": (asynchronous(1.0), BATCH),
    "asynchronous, ratio 2": (asynchronous(2.0), BATCH),
    "asynchronous, ratio 2, 3 × the slots": (asynchronous(2.0), 3 * BATCH),
}


def throughput(console: Console, median: float, steps: int, rounds: int) -> dict[str, Any]:
    found: dict[str, list[Outcome]] = {name: [] for name in MODES}
    for _ in range(rounds):  # side by side: the machine's moods hit all of them
        for name, (run, slots) in MODES.items():
            found[name].append(run(slots, median, steps))
    base = "synchronous, free-running"
    table = Table(title=f"{BATCH} samples a step; a call takes {1e3 * median:.0f} ms in the median; {rounds} rounds")
    for title in ("", "samples/s", f"÷ {base}", "in training", "staleness"):
        table.add_column(title)
    rows = {}
    for name, outcomes in found.items():
        ratios = [o.rate / b.rate for o, b in zip(outcomes, found[base], strict=True)]
        rows[name] = {
            "samples_per_second": statistics.median(o.rate for o in outcomes),
            "ratios": ratios,
            "train_share": statistics.median(o.train_share for o in outcomes),
            "staleness": statistics.median(o.staleness for o in outcomes),
        }
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        r = rows[name]
        table.add_row(
            name, f"{r['samples_per_second']:.1f}", spread, f"{r['train_share']:.0%}", f"{r['staleness']:.2f}"
        )
    console.print(table)
    return rows


def learning(console: Console, seeds: int, steps: int) -> dict[str, Any]:
    """Success by step: both have seen as many samples at a step."""
    table = Table(title=f"success on training tasks after n steps of {BATCH} samples, mean of {seeds} seeds")
    marks = [m for m in (1, 5, 10, 20, 30, 40, 60, 80) if m <= steps]
    for title in ("", *(f"n = {m}" for m in marks), "area"):
        table.add_column(title)
    rows = {}
    for name in ("synchronous, lockstep", "asynchronous, ratio 2"):
        run, slots = MODES[name]
        curves = np.array([run(slots, 0.01, steps, seed).success for seed in range(seeds)])
        rows[name] = {"curves": curves.tolist(), "area": float(curves.mean())}
        near = [curves[:, max(0, m - 2) : m + 3].mean() for m in marks]
        table.add_row(name, *(f"{value:.2f}" for value in near), f"{curves.mean():.3f}")
    console.print(table)
    return rows


def calibrate(median: float, steps: int) -> tuple[Outcome, Latencies]:
    """A synchronous run, and what it took. Turns are measured with few slots and with many."""
    training, wide = (Training(slots, median, 0, 0.0) for slots in (BATCH, 3 * BATCH))
    with training.runner, wide.runner:
        outcome = measure_synchronous(training, steps)
        measure_synchronous(wide, 2)
    return outcome, latencies_of(training.runner, training, training.runner.turns[5:] + wide.runner.turns[5:])


ALONE = Plan("synchronous", hosts=1, slots=BATCH, groups=GROUPS, group_size=GROUP_SIZE, cores=1)
BESIDE = dataclasses.replace(ALONE, mode="split", hosts=2)  # rollouts and training share the core
PLANS = {
    "synchronous, free-running": ALONE,
    "asynchronous, ratio 2": dataclasses.replace(BESIDE, async_ratio=2.0),
    "asynchronous, ratio 2, 3 × the slots": dataclasses.replace(BESIDE, async_ratio=2.0, slots=3 * BATCH),
}


def validation(console: Console, median: float, steps: int, rounds: int) -> tuple[dict[str, Any], Latencies]:
    """Predictions from a synchronous run, against runs that the simulator knows nothing of."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):  # measured and predicted under the same load, as far as it goes
        outcome, latencies = calibrate(median, steps)
        for name, plan in PLANS.items():
            run, slots = MODES[name]
            measured = outcome.rate if plan is ALONE else run(slots, median, 3 * steps, 0, 0.0).rate
            predicted = simulate(plan, latencies, 4 * steps, seed=0).samples_per_second
            found.setdefault(name, []).append((measured, predicted))
    table = Table(title=f"samples/s, predicted from a synchronous run's latencies; {rounds} rounds")
    for title in ("", "measured", "predicted", "error"):
        table.add_column(title)
    rows = {}
    for name, pairs in found.items():
        errors = [predicted / measured - 1 for measured, predicted in pairs]
        rows[name] = {"measured": [m for m, _ in pairs], "predicted": [p for _, p in pairs], "errors": errors}
        middle = [statistics.median(column) for column in zip(*pairs, strict=True)]
        spread = f"{statistics.median(errors):+.0%} [{min(errors):+.0%}, {max(errors):+.0%}]"
        table.add_row(name, f"{middle[0]:.1f}", f"{middle[1]:.1f}", spread)
    console.print(table)
    return rows, latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--median-ms", type=float, default=150.0, help="not with --multiplex and --faults")
    parser.add_argument("--steps", type=int, help="default: 10; with --simulate 4, with --multiplex 3")
    parser.add_argument("--rounds", type=int, help="default: 3; with --simulate 1")
    parser.add_argument("--learning", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--learning-steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--multiplex", action="store_true", help="instead of the comparison")
    instead.add_argument("--simulate", action="store_true", help="instead of the comparison")
    instead.add_argument(
        "--faults", action="store_true", help="instead of the comparison; steps and rounds are its own"
    )
    arguments = parser.parse_args()
    console, median = Console(), arguments.median_ms / 1e3
    steps = arguments.steps or (4 if arguments.simulate else 3 if arguments.multiplex else 10)
    rounds = arguments.rounds or (1 if arguments.simulate else 3)
    results: dict[str, Any] = {}
    if arguments.faults:
        import faults

        results["faults"] = faults.compare(console, arguments.steps or 16, arguments.rounds or 2)
    elif arguments.multiplex:
        results["multiplexing"] = two_devices.report(console, two_devices.in_a_process(steps, rounds))
    elif arguments.simulate:
        results["validation"], latencies = validation(console, median, steps, rounds)
        means = {name: statistics.mean(getattr(latencies, name)) for name in ("environment", "reset", "train")}
        results["latencies"] = {**means, "turn": dataclasses.asdict(latencies.turn)}
        results["cluster"] = cluster.scaled_up(console, latencies)
        results["full_scale"] = cluster.full_scale(console)
    else:
        results["throughput"] = throughput(console, median, steps, rounds)
    if arguments.learning:
        results["learning"] = learning(console, arguments.learning, arguments.learning_steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

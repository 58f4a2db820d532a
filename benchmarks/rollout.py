"""Measure what asynchrony is worth: the same long-tailed environments, engine and trainer, waiting or not.

python benchmarks/rollout.py [--median-ms 150] [--steps 10] [--json FILE] [--learning 3]

An episode has up to five tool calls, each of which takes a log-normal time (σ 0.6), and one in a hundred ten times that
(ROLL Flash's setting, arXiv 2510.11345). Synchronous training is shown twice: our deterministic lockstep mode, and the
strongest synchronous peer we can build: the same free-running engine, waiting for the last sample of the batch before
it trains. `--learning N` compares what is learned a sample, over N seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "rollout"))
from rollout_toys import MODEL, Journal, ToyEnv, ToyRenderer, toy_params, toy_task

from rome.ipa import ObjectiveConfig
from rome.rollout import (
    BackgroundRollouts,
    DecodeEngine,
    EngineConfig,
    GroupRequest,
    RolloutConfig,
    RolloutRunner,
    SampleBuffer,
)
from rome.rollout.background import free_run
from rome.rollout.runner import Group
from rome.training.policy import PolicySettings, PolicyTrainer
from rome.training.state import OptimizerConfig, init_state_on, make_optimizer
from rome.trajectory import Trajectory

GROUPS, GROUP_SIZE = 16, 4
BATCH = GROUPS * GROUP_SIZE
SIGMA, STRAGGLERS, SLOWER = 0.6, 0.01, 10.0


class SlowEnv(ToyEnv):
    """Each answer takes a time that follows from the task's seed and the step. Success: even first tokens only."""

    def __init__(self, journal: Journal, median: float) -> None:
        super().__init__(journal)
        self.median, self.even = median, True

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        self.clock = np.random.default_rng(time.monotonic_ns())
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        slower = SLOWER if self.clock.random() < STRAGGLERS else 1.0
        time.sleep(self.median * slower * float(np.exp(SIGMA * self.clock.standard_normal())))
        words = action.replace("<tool_call>", "").replace("</tool_call>", "").split()
        self.even &= bool(words) and int(words[0]) % 2 == 0
        text, _, over, cut, info = super().step(action)
        return text, float(self.even and (over or cut)), over, cut, info


def requests(seed: int) -> Iterator[GroupRequest]:
    for number in itertools.count():
        yield GroupRequest(toy_task(f"t{number}"), f"g{number}", GROUP_SIZE, 1_000_003 * seed + number)


class Training:
    """A policy, its trainer and its rollouts."""

    def __init__(self, slots: int, median: float, seed: int = 0) -> None:
        optimizer = OptimizerConfig(name="adamw", learning_rate=1e-2, schedule="constant", warmup_steps=2)
        settings = PolicySettings(10_000, GROUPS, GROUP_SIZE, 96, 8, 8, optimizer)
        objective = ObjectiveConfig(gamma=1.0, failure_reward=0.0)
        self.transformation = make_optimizer(optimizer, settings.steps)
        self.state = init_state_on(None, jax.tree.map(jnp.copy, toy_params(seed)), self.transformation, MODEL)
        self.trainer = PolicyTrainer(MODEL, objective, self.transformation, settings)
        self.trainer.warmup(self.state)
        config = EngineConfig(slots=slots, cohorts=2, max_length=96, extend_buckets=(8, 16), max_chunk_tokens=10)
        self.engine = DecodeEngine(self.state.params, MODEL, config, ToyRenderer.stop_ids, pad_id=0)
        self.engine.warmup()
        journal = Journal()
        self.runner = RolloutRunner(
            self.engine, ToyRenderer(), lambda: SlowEnv(journal, median), RolloutConfig(env_threads=slots)
        )
        self.requests, self.version, self.train_seconds = requests(seed), 0, 0.0

    def update(self, groups: list[list[Trajectory]]) -> float:
        """One step on the groups; returns their success rate."""
        started = time.perf_counter()
        samples = [t for group in groups for t in group]
        self.state, _ = self.trainer.update(self.state, samples, self.version)
        self.version += 1
        self.engine.update_params(self.state.params, self.version)
        self.train_seconds += time.perf_counter() - started
        return sum(t.succeeded for t in samples) / len(samples)


@dataclass
class Outcome:
    """Samples a second after the first step, success by step, share of the time in training, mean staleness."""

    rate: float
    success: list[float]
    train_share: float
    staleness: float


def measure(training: Training, batch: Callable[[], list[list[Trajectory]]], steps: int) -> Outcome:
    success, ages = [training.update(batch())], []
    started, training.train_seconds = time.perf_counter(), 0.0
    for _ in range(steps):
        groups = batch()
        ages += [training.version - t.start_version for group in groups for t in group]
        success.append(training.update(groups))
    seconds = time.perf_counter() - started
    return Outcome(steps * BATCH / seconds, success, training.train_seconds / seconds, statistics.mean(ages))


def lockstep(slots: int, median: float, steps: int, seed: int = 0) -> Outcome:
    training = Training(slots, median, seed)
    with training.runner as runner:
        return measure(training, lambda: runner.run(list(itertools.islice(training.requests, GROUPS))), steps)


def free_running(slots: int, median: float, steps: int, seed: int = 0) -> Outcome:
    training = Training(slots, median, seed)

    def batch() -> list[list[Trajectory]]:
        for request in itertools.islice(training.requests, GROUPS):
            training.runner.admit(Group(request))
        while free_run(training.runner):
            pass
        return [group.samples for group in training.runner.take_finished()]

    with training.runner:
        return measure(training, batch, steps)


def asynchronous(ratio: float) -> Callable[..., Outcome]:
    def run(slots: int, median: float, steps: int, seed: int = 0) -> Outcome:
        training = Training(slots, median, seed)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--median-ms", type=float, default=150.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--learning-steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    results = {"throughput": throughput(console, arguments.median_ms / 1e3, arguments.steps, arguments.rounds)}
    if arguments.learning:
        results["learning"] = learning(console, arguments.learning, arguments.learning_steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

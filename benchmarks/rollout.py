"""Measure what asynchrony is worth: the same long-tailed environments, engine and trainer, waiting or not.

python benchmarks/rollout.py [--median-ms 150] [--steps 10] [--json FILE] [--learning 3] [--simulate] [--faults]

An episode has up to five tool calls, each of which takes a log-normal time (σ 0.6), and one in a hundred ten times that
(ROLL Flash's setting, arXiv 2510.11345). Synchronous training is shown twice: our deterministic lockstep mode, and the
strongest synchronous peer we can build: the same free-running engine, waiting for the last sample of the batch before
it trains. `--learning N` compares what is learned a sample, over N seeds. `--simulate` measures latencies, holds the
simulator's predictions (`rome.rollout.simulator`) against such runs and against multiplexing on eight fake devices,
and then has it predict a cluster of 64 hosts. `--faults` breaks things under a running job (see `faults.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
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
from rome.models.sharding import MeshConfig, make_mesh
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
from rome.rollout.episode import Episode
from rome.rollout.runner import Group
from rome.rollout.simulator import Latencies, Plan, Turn, TurnTime, best_split, simulate
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


class Probe(RolloutRunner):
    """A runner that takes the time of its turns and of its environments' calls."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: dict[str, list[float]] = {"reset": [], "step": []}
        self.turns: list[Turn] = []
        self.devices = 1

    def turn(self, cohort: int, temperature: float | None = None) -> None:
        config, stats, ready = self.engine.config, self.engine.stats, self.ready(cohort)
        prompts = len({e.request.group_id for e in ready if not e.ledger.chunks})
        steps, started = stats.decode_steps, time.perf_counter()
        super().turn(cohort, temperature)
        if ready:
            seconds, steps = time.perf_counter() - started, stats.decode_steps - steps
            rows, passes = config.slots_per_cohort / self.devices, math.ceil(prompts / config.prompt_rows)
            self.turns.append(Turn(steps, rows, passes, seconds))

    def _take(self, episode: Episode) -> None:
        self.calls[episode.stage].append(episode.job.seconds)
        super()._take(episode)


class Training:
    """A policy, its trainer and its rollouts. Learning changes the episodes; a `learning_rate` of 0 keeps them."""

    def __init__(
        self,
        slots: int,
        median: float,
        seed: int = 0,
        learning_rate: float = 1e-2,
        meshes: tuple[Any, ...] = (None,),
    ) -> None:
        optimizer = OptimizerConfig(name="adamw", learning_rate=learning_rate, schedule="constant", warmup_steps=2)
        settings = PolicySettings(10_000, GROUPS, GROUP_SIZE, 96, 8, 8, optimizer)
        objective = ObjectiveConfig(gamma=1.0, failure_reward=0.0)
        self.transformation = make_optimizer(optimizer, settings.steps)
        self.state = init_state_on(None, jax.tree.map(jnp.copy, toy_params(seed)), self.transformation, MODEL)
        self.trainer = PolicyTrainer(MODEL, objective, self.transformation, settings)
        self.trainer.warmup(self.state)
        config = EngineConfig(
            slots=slots,
            cohorts=2,
            max_length=96,
            extend_buckets=(8, 16),
            max_chunk_tokens=10,
            prompt_rows=4 if meshes == (None,) else 8,
        )
        self.engine = DecodeEngine(self.state.params, MODEL, config, ToyRenderer.stop_ids, pad_id=0, meshes=meshes)
        self.engine.warmup()
        journal = Journal()
        self.runner = Probe(
            self.engine, ToyRenderer(), lambda: SlowEnv(journal, median), RolloutConfig(env_threads=slots)
        )
        self.requests, self.version, self.meshes = requests(seed), 0, meshes
        self.updates: list[float] = []  # seconds
        self.trained: list[Trajectory] = []

    def update(self, groups: list[list[Trajectory]]) -> float:
        """One step on the groups; returns their success rate."""
        started = time.perf_counter()
        samples = [t for group in groups for t in group]
        self.state, _ = self.trainer.update(self.state, samples, self.version)
        self.version += 1
        self.engine.update_params(self.state.params, self.version)
        self.updates.append(time.perf_counter() - started)
        self.trained += samples
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
    started, before = time.perf_counter(), len(training.updates)
    for _ in range(steps):
        groups = batch()
        ages += [training.version - t.start_version for group in groups for t in group]
        success.append(training.update(groups))
    seconds = time.perf_counter() - started
    return Outcome(steps * BATCH / seconds, success, sum(training.updates[before:]) / seconds, statistics.mean(ages))


def lockstep(slots: int, median: float, steps: int, seed: int = 0) -> Outcome:
    training = Training(slots, median, seed)
    with training.runner as runner:
        return measure(training, lambda: runner.run(list(itertools.islice(training.requests, GROUPS))), steps)


def free_running(slots: int, median: float, steps: int, *settings: Any) -> Outcome:
    training = Training(slots, median, *settings)
    with training.runner:
        return measure_synchronous(training, steps)


def measure_synchronous(training: Training, steps: int) -> Outcome:
    def batch() -> list[list[Trajectory]]:
        for request in itertools.islice(training.requests, GROUPS):
            training.runner.admit(Group(request))
        while free_run(training.runner):
            pass
        return [group.samples for group in training.runner.take_finished()]

    return measure(training, batch, steps)


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


def latencies_of(training: Training, turns: list[Turn], **changes: Any) -> Latencies:
    """What a synchronous run took, in which nothing else was going on; without its first update and first turns."""
    calls = training.runner.calls
    found = {
        "environment": calls["step"],
        "reset": calls["reset"],
        "episodes": [[len(chunk.tokens) for chunk in t.chunks] for t in training.trained],
        "turn": TurnTime.fit(turns),
        "train": training.updates[1:],
    }
    return Latencies(**{**found, **changes})


def calibrate(median: float, steps: int) -> tuple[Outcome, Latencies]:
    """A synchronous run, and what it took. Turns are measured with few slots and with many."""
    training, wide = (Training(slots, median, 0, 0.0) for slots in (BATCH, 3 * BATCH))
    with training.runner, wide.runner:
        outcome = measure_synchronous(training, steps)
        measure_synchronous(wide, 2)
    return outcome, latencies_of(training, training.runner.turns[5:] + wide.runner.turns[5:])


ALONE = Plan("synchronous", hosts=1, slots=BATCH, groups=GROUPS, group_size=GROUP_SIZE, cores=1)
BESIDE = dataclasses.replace(ALONE, mode="split", hosts=2)  # rollouts and training share the core
PLANS = {
    "synchronous, free-running": ALONE,
    "asynchronous, ratio 2": dataclasses.replace(BESIDE, async_ratio=2.0),
    "asynchronous, ratio 2, 3 × the slots": dataclasses.replace(BESIDE, async_ratio=2.0, slots=3 * BATCH),
}
WIDE, NARROW = 0, 1
FAKE = "8 fake devices, "


def fake_devices(median: float, steps: int) -> dict[str, Any]:
    """(measured, predicted) samples a second of a static split and of multiplexing, four devices and four, and how long
    the moves took; run it where there are eight."""
    narrow = make_mesh(MeshConfig(data=4), jax.devices()[4:])
    training = Training(BATCH, median, 0, 0.0, (make_mesh(MeshConfig(data=8)), narrow))
    turns: dict[float, list[Turn]] = {}
    moves = []
    with training.runner:
        for placement, devices in ((WIDE, 8), (NARROW, 4)):
            training.engine.move_to(placement)
            training.runner.devices, before = devices, len(training.runner.turns)
            measure_synchronous(training, 2)
            turns[BATCH / 2 / devices] = training.runner.turns[before + 5 :]
        for number in range(8):
            started = time.perf_counter()
            training.engine.move_to(number % 2)
            moves.append(time.perf_counter() - started)
    fits = {rows: TurnTime.fit(measured) for rows, measured in turns.items()}
    latencies = latencies_of(
        training,
        turns[BATCH / 2 / 4],
        turn=lambda steps, rows, passes: fits[rows](steps, rows, passes),
        train=[4 * seconds for seconds in training.updates[1:]],  # of four hosts
        move=moves,
    )
    plan = Plan("split", 8, BATCH // 4, GROUPS, GROUP_SIZE, train_hosts=4, prompt_rows=8, cores=1)
    found: dict[str, Any] = {"moves": moves}
    for mode, meshes in (("split", (narrow,)), ("multiplexed", (make_mesh(MeshConfig(data=8)), narrow))):
        outcome = borrowing(Training(BATCH, median, 0, 0.0, meshes), steps)
        predicted = simulate(dataclasses.replace(plan, mode=mode), latencies, 4 * steps, seed=0)
        found[FAKE + mode] = (outcome.rate, predicted.samples_per_second)
    return found


def borrowing(training: Training, steps: int) -> Outcome:
    """Asynchronous; an engine with two placements lends devices to training."""
    engine, buffer = training.engine, SampleBuffer(1.0, GROUPS)

    def batch() -> list[list[Trajectory]]:
        engine.move_to(WIDE)
        groups = buffer.get_batch(GROUPS, training.version, timeout=600)
        engine.move_to(len(training.meshes) - 1)
        return groups

    with training.runner, BackgroundRollouts(training.runner, buffer, training.requests):
        return measure(training, batch, steps)


def in_eight_devices(median: float, steps: int) -> dict[str, Any]:
    """`fake_devices` in a process of its own: their number is fixed when JAX starts."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [
            sys.executable,
            __file__,
            f"--fake-devices={path}",
            f"--median-ms={1e3 * median}",
            f"--steps={steps}",
        ]
        subprocess.run(
            command, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, check=True, timeout=1800
        )
        return json.loads(path.read_text())


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
        fake = in_eight_devices(median, steps)
        latencies = dataclasses.replace(latencies, move=fake.pop("moves"))
        for name, pair in fake.items():
            found.setdefault(name, []).append(tuple(pair))
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


CLUSTER_STEPS, HOSTS, HALF, SHARE = 3, 64, 32, 4
TRAIN_FACTORS = (1, 25, 200)


def turn_times(measured: TurnTime) -> dict[str, TurnTime]:
    """As measured; of a policy 16 times as slow; and of one 64 times as slow, all of whose time goes with the rows that
    a host computes, so that more hosts make it faster."""
    rows = BATCH / SHARE / 2
    by_rows = TurnTime(step_row=64 * (measured.step / rows + measured.step_row))
    return {"decoding × 1": measured, "decoding × 16": measured.times(16), "decoding × 64, by rows": by_rows}


def cluster(console: Console, latencies: Latencies, steps: int, turns: dict[str, TurnTime]) -> list[dict[str, Any]]:
    """64 hosts as fast as this machine, each with a quarter of its slots and of its batch, where decoding and training
    cost more than they do for the toy policy. Training on any number of hosts, and on half of them (where its state
    needs so many). Prints each case as it is known; k hosts train."""
    batch = HOSTS * BATCH // SHARE
    console.print(f"{HOSTS} hosts, {batch} samples a step: predicted samples/s (hosts that train)")
    rows = []
    for (name, turn), train in itertools.product(turns.items(), TRAIN_FACTORS):
        update = HOSTS / SHARE * train * np.asarray(latencies.train)
        mix = dataclasses.replace(latencies, turn=turn, train=update)
        groups = HOSTS * GROUPS // SHARE
        plan = Plan("split", HOSTS, BATCH // SHARE, groups, GROUP_SIZE, train_hosts=HALF, engines=8)
        plans = [plan, dataclasses.replace(plan, mode="multiplexed")]
        together = simulate(dataclasses.replace(plan, mode="synchronous"), mix, steps, seed=0)
        best = [best_split(plan, mix, steps, seed=0) for plan in plans]
        half = [simulate(plan, mix, steps, seed=0) for plan in plans]
        gains = [b.samples_per_second / a.samples_per_second for a, b in ([p for _, p in best], half)]
        row = {"turn": name, "train": train, "synchronous": dataclasses.asdict(together), "gains": gains}
        row |= {"best": [(k, dataclasses.asdict(p)) for k, p in best], "half": [dataclasses.asdict(p) for p in half]}
        rows.append(row)
        found = " → ".join(f"{p.samples_per_second:.0f} ({k})" for k, p in best)
        halves = " → ".join(f"{p.samples_per_second:.0f}" for p in half)
        idle = ", ".join(f"{p.utilisation['idle']:.0%}" for p in (best[0][1], best[1][1]))
        console.print(
            f"{name}, training × {train}: synchronous {together.samples_per_second:.0f}; "
            f"best split → multiplexed {found}: {gains[0]:.2f} ×, idle {idle}; {HALF} train {halves}: {gains[1]:.2f} ×"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--median-ms", type=float, default=150.0)
    parser.add_argument("--steps", type=int, help="default: 10; with --simulate 4")
    parser.add_argument("--rounds", type=int, help="default: 3; with --simulate 1")
    parser.add_argument("--learning", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--learning-steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--simulate", action="store_true", help="instead of the comparison")
    parser.add_argument("--faults", action="store_true", help="instead of the comparison; steps and rounds are its own")
    parser.add_argument("--fake-devices", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    console, median = Console(), arguments.median_ms / 1e3
    steps = arguments.steps or (4 if arguments.simulate else 10)
    rounds = arguments.rounds or (1 if arguments.simulate else 3)
    if arguments.fake_devices:
        arguments.fake_devices.write_text(json.dumps(fake_devices(median, steps)))
        return
    results: dict[str, Any] = {}
    if arguments.faults:
        import faults

        results["faults"] = faults.compare(console, arguments.steps or 16, arguments.rounds or 2)
    elif arguments.simulate:
        results["validation"], latencies = validation(console, median, steps, rounds)
        means = {name: statistics.mean(getattr(latencies, name)) for name in ("environment", "reset", "train", "move")}
        results["latencies"] = {**means, "turn": dataclasses.asdict(latencies.turn)}
        results["cluster"] = cluster(console, latencies, CLUSTER_STEPS, turn_times(latencies.turn))
    else:
        results["throughput"] = throughput(console, median, steps, rounds)
    if arguments.learning:
        results["learning"] = learning(console, arguments.learning, arguments.learning_steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

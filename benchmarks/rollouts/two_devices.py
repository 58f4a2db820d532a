"""Two devices, each with a core of its own: what is multiplexing worth over the only static split, one and one, and
over time-sharing? Started by `benchmarks/rollout.py --multiplex`, which sets what XLA reads from the environment:

python benchmarks/rollouts/two_devices.py FILE [--rounds 3] [--steps 3]

All modes use the same engine, trainers and environments, in turns. An episode has up to eight tool calls; a batch is
128 samples. Only successful samples have a return, so the rate of success says how long an update takes beside the
rollouts: a third succeeds where rollouts are heavy, as in most agentic training; where training is, all do, and are
trained on twice.

Devices of XLA's CPU client share its threads, so that one that works uses the cores of one that idles. Accelerators
can't; here threads are tied to cores to forbid it (`on_core`, `lend_threads`). Only a part of an update escapes: its
large products run partly on the second core, also while the second device decodes there, in every mode.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from rollouts.jobs import (
    MODEL,
    Journal,
    Learner,
    Outcome,
    Probe,
    SlowEnv,
    ToyRenderer,
    latencies_of,
    measure,
    requests,
    roll_out,
)

from rome.ipa import ObjectiveConfig
from rome.models import init_params
from rome.models.sharding import Mesh, MeshConfig, make_mesh
from rome.rollout import BackgroundRollouts, DecodeEngine, EngineConfig, RolloutConfig, SampleBuffer
from rome.rollout.simulator import Latencies, Plan, Turn, TurnTime, simulate
from rome.training.memory import dispatch_synchronously
from rome.training.policy import PolicySettings, PolicyTrainer
from rome.training.state import OptimizerConfig, init_state_on, make_optimizer
from rome.trajectory import Trajectory

POLICY = dataclasses.replace(
    MODEL, hidden_size=128, num_layers=8, num_heads=4, num_kv_heads=1, head_dim=32, intermediate_size=384
)
GROUPS, GROUP_SIZE = 16, 8
ENGINE = EngineConfig(slots=128, cohorts=2, max_length=256, extend_buckets=(4, 16), prompt_rows=8, max_chunk_tokens=24)
ROW_LENGTH, MICRO_ROWS, MAX_CHUNKS = 256, 2, 64
CORES = sorted(os.sched_getaffinity(0))[:2]
WIDE, NARROW = 0, 1
SKIPPED = 2  # updates before the flow is steady


@dataclass(frozen=True)
class Regime:
    """Attributes:
    success: the share of samples that are trained on.
    modes: that are compared.
    epochs: over a batch.
    median: seconds of a tool call.
    """

    name: str
    success: float
    modes: tuple[str, ...]
    epochs: int = 1
    median: float = 0.02


SPLIT, MULTIPLEXED, PAUSED = "split 1 + 1, α = {}", "multiplexed, α = {}", "both pause, α = {}"
BOTH_TRAIN = "synchronous, both train"
REGIMES = (
    Regime(
        "rollouts heavy",
        0.35,
        (BOTH_TRAIN, *(name.format(ratio) for ratio in (1, 2) for name in (SPLIT, MULTIPLEXED, PAUSED))),
    ),
    Regime("training heavy", 1.0, (SPLIT.format(2), MULTIPLEXED.format(2)), epochs=2),
)


class ChanceEnv(SlowEnv):
    """Up to eight calls; whether an episode succeeds is drawn."""

    max_chunks = 8

    def __init__(self, journal: Journal, regime: Regime) -> None:
        super().__init__(journal, regime.median)
        self.success = regime.success

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        text, _, over, cut, info = super().step(action)
        return text, float((over or cut) and self.clock.random() < self.success), over, cut, info


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What the calling thread does meanwhile, a device's program included, it does on this core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def lend_threads(cores: Iterable[int]) -> None:
    """Where the threads run that XLA's CPU client shares between all devices.

    They do the parts of large operations, of whatever device, so that one device would use idle cores of others; and
    whole programs of several devices, which need all cores.
    """
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            if (task / "comm").read_text().strip() == "tf_XLAEigen":
                os.sched_setaffinity(int(task.name), cores)


class TimedEngine(DecodeEngine):
    """Decodes on the cores of its devices alone; notes when it did, and on how many."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.computed: list[tuple[float, float, int]] = []  # since, until, devices

    def move_to(self, placement: int) -> None:
        super().move_to(placement)
        lend_threads(CORES if placement == WIDE else CORES[1:])

    def _advance(self, *arguments: Any) -> np.ndarray:
        started, devices = time.perf_counter(), 2 if self.placement == WIDE else 1
        try:
            with nullcontext() if devices == 2 else on_core(CORES[1]):
                return super()._advance(*arguments)
        finally:
            self.computed.append((started, time.perf_counter(), devices))


class FirstDevice(Learner):
    """Trains on the first device."""

    def update(self, groups: list[list[Trajectory]]) -> float:
        with on_core(CORES[0]):
            return super().update(groups)


class Machine:
    """An engine that fits on both devices and on the second alone; learners on the first, and on both."""

    def __init__(self) -> None:
        dispatch_synchronously()  # a program of one device runs in the thread that starts it
        both = make_mesh(MeshConfig(data=2))
        params = jax.device_get(init_params(POLICY, jax.random.key(0)))
        optimizer = OptimizerConfig(name="adamw", learning_rate=0.0, schedule="constant", warmup_steps=2)
        settings = PolicySettings(10_000, GROUPS, GROUP_SIZE, ROW_LENGTH, MAX_CHUNKS, MICRO_ROWS, optimizer)
        transformation = make_optimizer(optimizer, settings.steps)
        objective = ObjectiveConfig(gamma=1.0, failure_reward=0.0)
        meshes = (both, make_mesh(MeshConfig(), jax.devices()[1:]))
        self.engine = TimedEngine(params, POLICY, ENGINE, ToyRenderer.stop_ids, pad_id=0, meshes=meshes)
        self.engine.warmup()

        def learner(kind: type[Learner], mesh: Mesh | None) -> Learner:
            state = init_state_on(mesh, jax.tree.map(jnp.asarray, params), transformation, POLICY)
            trainer = PolicyTrainer(POLICY, objective, transformation, settings, mesh=mesh)
            trainer.warmup(state)
            return kind(trainer, state, self.engine)

        self.one, self.both = learner(FirstDevice, None), learner(Learner, both)

    def runner(self, regime: Regime, placement: int) -> Probe:
        """With its engine there."""
        self.engine.move_to(placement)
        journal = Journal(observation_tokens=2)
        config = RolloutConfig(env_threads=ENGINE.slots)
        runner = Probe(self.engine, ToyRenderer(), lambda: ChanceEnv(journal, regime), config)
        runner.devices = 2 if placement == WIDE else 1
        return runner


class Measured(NamedTuple):
    """Samples a second; shares of all device-seconds in decoding and in training; mean staleness in versions."""

    rate: float
    decoding: float
    training: float
    staleness: float


def synchronous(machine: Machine, regime: Regime, steps: int) -> Measured:
    """Both roll out, to the last sample; then both train."""
    wanted = requests(0, GROUP_SIZE)
    with machine.runner(regime, WIDE) as runner:
        outcome = measure(machine.both, lambda: roll_out(runner, wanted, GROUPS), steps)
    return summary(machine, outcome, 2)


def split(machine: Machine, regime: Regime, steps: int, ratio: float) -> Measured:
    """The second device rolls out, the first trains."""
    with machine.runner(regime, NARROW) as runner, feeding(runner, ratio) as (buffer, _):
        outcome = measure(machine.one, lambda: take(buffer, machine.one), steps, SKIPPED)
    return summary(machine, outcome, 1)


def multiplexed(machine: Machine, regime: Regime, steps: int, ratio: float) -> Measured:
    """Both roll out; the first is lent to each update."""

    def batch() -> list[list[Trajectory]]:
        machine.engine.move_to(WIDE)
        groups = take(buffer, machine.one)
        machine.engine.move_to(NARROW)
        return groups

    with machine.runner(regime, WIDE) as runner, feeding(runner, ratio) as (buffer, _):
        outcome = measure(machine.one, batch, steps, SKIPPED)
    return summary(machine, outcome, 1)


def paused(machine: Machine, regime: Regime, steps: int, ratio: float) -> Measured:
    """Both roll out, and pause while both train; what is in flight stays."""

    def batch() -> list[list[Trajectory]]:
        rollouts.resume()
        groups = take(buffer, machine.both)
        rollouts.pause()
        return groups

    with machine.runner(regime, WIDE) as runner, feeding(runner, ratio) as (buffer, rollouts):
        outcome = measure(machine.both, batch, steps, SKIPPED)
    return summary(machine, outcome, 2)


@contextmanager
def feeding(runner: Probe, ratio: float) -> Iterator[tuple[SampleBuffer, BackgroundRollouts]]:
    buffer = SampleBuffer(ratio, GROUPS)
    with BackgroundRollouts(runner, buffer, requests(0, GROUP_SIZE)) as rollouts:
        yield buffer, rollouts


def take(buffer: SampleBuffer, learner: Learner) -> list[list[Trajectory]]:
    return buffer.get_batch(GROUPS, learner.version, timeout=300)


def summary(machine: Machine, outcome: Outcome, trainers: int) -> Measured:
    since, until = outcome.span
    busy = sum(
        devices * max(0.0, min(end, until) - max(start, since)) for start, end, devices in machine.engine.computed
    )
    return Measured(outcome.rate, busy / (2 * (until - since)), trainers * outcome.train_share / 2, outcome.staleness)


Mode = Callable[[Machine, Regime, int], Measured]
MODES: dict[str, Mode] = {
    BOTH_TRAIN: synchronous,
    **{
        name.format(ratio): functools.partial(mode, ratio=float(ratio))
        for ratio in (1, 2)
        for name, mode in ((SPLIT, split), (MULTIPLEXED, multiplexed), (PAUSED, paused))
    },
}


# -- what the simulator says ------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """What synchronous rollouts on two devices and on one took, moves, and updates on one; updates on both; and by
    placement the mean seconds of a turn, and those of the turns that a batch takes."""

    latencies: Latencies
    updates_on_both: list[float]
    turns: dict[int, float]
    batches: dict[int, float]


def calibrate(machine: Machine, regime: Regime) -> Calibration:
    turns: dict[int, list[Turn]] = {}
    batches: dict[int, float] = {}
    wanted = requests(1, GROUP_SIZE)
    for placement in (WIDE, NARROW):
        with machine.runner(regime, placement) as runner:
            before = len(machine.one.updates)
            measure(machine.one, functools.partial(roll_out, runner, wanted, GROUPS), 2)
            turned = len(runner.turns)
            groups = roll_out(runner, wanted, GROUPS)
            batches[placement] = sum(turn.seconds for turn in runner.turns[turned:])
            turns[placement] = runner.turns[5:]
    machine.engine.move_to(WIDE)
    for _ in range(3):
        machine.both.update(groups)
    moves = []
    for number in range(8):
        started = time.perf_counter()
        machine.engine.move_to((NARROW, WIDE)[number % 2])
        moves.append(time.perf_counter() - started)
    rows = ENGINE.slots_per_cohort
    fits = {rows / devices: TurnTime.fit(turns[placement]) for placement, devices in ((WIDE, 2), (NARROW, 1))}
    latencies = latencies_of(
        runner,
        machine.one,
        turns[NARROW],
        turn=lambda steps, rows, passes: fits[rows](steps, rows, passes),
        train=machine.one.updates[before:],
        move=moves,
    )
    means = {placement: statistics.mean(turn.seconds for turn in found) for placement, found in turns.items()}
    return Calibration(latencies, machine.both.updates[-2:], means, batches)


def predictions(calibration: Calibration) -> dict[str, float]:
    """Samples a second by mode."""
    latencies = calibration.latencies
    # the simulator's update is on one of two hosts that would share it
    both_train = dataclasses.replace(latencies, train=2 * np.asarray(calibration.updates_on_both))
    plan = Plan("split", 2, ENGINE.slots, GROUPS, GROUP_SIZE, prompt_rows=ENGINE.prompt_rows)
    together = dataclasses.replace(plan, mode="synchronous", slots=ENGINE.slots // 2)
    found = {BOTH_TRAIN: (together, both_train)}
    for ratio in (1, 2):
        apart = dataclasses.replace(plan, async_ratio=float(ratio))
        lending = dataclasses.replace(apart, mode="multiplexed")
        pausing = dataclasses.replace(lending, park=True, train_hosts=2, slots=ENGINE.slots // 2)
        found[SPLIT.format(ratio)] = (apart, latencies)
        found[MULTIPLEXED.format(ratio)] = (lending, latencies)
        found[PAUSED.format(ratio)] = (pausing, dataclasses.replace(both_train, move=(0.0,)))
    return {name: simulate(*case, steps=40, seed=0, skip=SKIPPED).samples_per_second for name, case in found.items()}


def compare(machine: Machine, regime: Regime, steps: int, rounds: int) -> dict[str, Any]:
    machine.one.epochs = machine.both.epochs = regime.epochs
    calibration = calibrate(machine, regime)
    measured: dict[str, list[Measured]] = {name: [] for name in regime.modes}
    for _ in range(rounds):
        for name, outcomes in measured.items():
            outcomes.append(MODES[name](machine, regime, steps))
            print(f"{regime.name}: {name}: {outcomes[-1].rate:.1f} samples/s", file=sys.stderr, flush=True)
    predicted = predictions(calibration)
    latencies = calibration.latencies
    return {
        "measured": measured,
        "predicted": {name: predicted[name] for name in measured},
        "update": statistics.mean(latencies.train),
        "update_on_both": statistics.mean(calibration.updates_on_both),
        "move": statistics.mean(latencies.move),
        "turn": calibration.turns[NARROW],
        "turn_on_both": calibration.turns[WIDE],
        "batch": calibration.batches[NARROW],
    }


def in_a_process(steps: int, rounds: int) -> dict[str, Any]:
    """What `main` finds, in a process with two devices: JAX counts them when it starts."""
    if len(CORES) < 2:
        raise SystemExit("--multiplex: expected two cores, one for each device, found one")
    flags = (
        "--xla_force_host_platform_device_count=2",
        # products and loops of one device are not to be spread over the threads of both
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_use_xnnpack=false",
        "--xla_disable_hlo_passes=cpu-parallel-task-assigner",
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    environment["NPROC"] = "4"  # XLA's threads: with one a device, devices that meet can lock each other up
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `run` then ends the process before it raises
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, __file__, str(path), f"--steps={steps}", f"--rounds={rounds}"]
        subprocess.run(command, env=environment, check=True, timeout=3600)
        return json.loads(path.read_text())


def report(console: Console, found: dict[str, Any]) -> dict[str, Any]:
    """Prints a table for each regime; ratios are to the better of the splits, round by round."""
    for regime in REGIMES:
        part = found[regime.name]
        rates = {name: [Measured(*outcome).rate for outcome in rounds] for name, rounds in part["measured"].items()}
        base = max(
            (name for name in rates if name.startswith("split")), key=lambda name: statistics.median(rates[name])
        )
        part["ratios"] = {name: [a / b for a, b in zip(rates[name], rates[base], strict=True)] for name in rates}
        ms = {name: 1e3 * part[name] for name in ("turn", "turn_on_both", "move")}
        console.print(
            f"{regime.name}: a turn takes {ms['turn']:.0f} ms on one device and {ms['turn_on_both']:.0f} ms on both, "
            f"the turns of a batch {part['batch']:.2f} s on one; an update {part['update']:.2f} s on one and "
            f"{part['update_on_both']:.2f} s on both; a move {ms['move']:.0f} ms"
        )
        rounds, samples = len(rates[base]), GROUPS * GROUP_SIZE
        table = Table(title=f"{regime.name}: {samples} samples a step, {rounds} rounds; ratios to {base}")
        for title in ("", "samples/s", "÷ split", "decoding", "training", "staleness", "predicted"):
            table.add_column(title)
        for name, outcomes in part["measured"].items():
            middle = Measured(*map(statistics.median, zip(*outcomes, strict=True)))
            ratios = part["ratios"][name]
            predicted = part["predicted"].get(name)
            table.add_row(
                name,
                f"{middle.rate:.1f}",
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                f"{middle.decoding:.0%}",
                f"{middle.training:.0%}",
                f"{middle.staleness:.2f}",
                "" if predicted is None else f"{predicted:.1f} ({predicted / middle.rate - 1:+.0%})",
            )
        console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    machine = Machine()
    found = {regime.name: compare(machine, regime, arguments.steps, arguments.rounds) for regime in REGIMES}
    arguments.file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

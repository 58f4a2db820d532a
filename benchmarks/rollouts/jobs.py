"""What `benchmarks/rollout.py` measures: environments with a long tail, an engine and a trainer."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "rollout"))
from rollout_toys import MODEL, Journal, ToyEnv, ToyRenderer, toy_params, toy_task

from rome.ipa import ObjectiveConfig
from rome.rollout import DecodeEngine, EngineConfig, GroupRequest, RolloutConfig, RolloutRunner
from rome.rollout.background import free_run
from rome.rollout.episode import Episode
from rome.rollout.runner import Group
from rome.rollout.simulator import Latencies, Turn, TurnTime
from rome.training.policy import PolicySettings, PolicyTrainer
from rome.training.state import OptimizerConfig, TrainState, init_state_on, make_optimizer
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


def requests(seed: int, size: int = GROUP_SIZE) -> Iterator[GroupRequest]:
    for number in itertools.count():
        yield GroupRequest(toy_task(f"t{number}"), f"g{number}", size, 1_000_003 * seed + number)


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


class Learner:
    """A trainer, its state, and the engine that it publishes to; keeps what it was given and how long it took."""

    def __init__(self, trainer: PolicyTrainer, state: TrainState, engine: DecodeEngine) -> None:
        self.trainer, self.state, self.engine = trainer, state, engine
        self.epochs = 1  # over a batch
        self.updates: list[float] = []  # seconds
        self.trained: list[Trajectory] = []

    @property
    def version(self) -> int:
        return self.engine.version

    def update(self, groups: list[list[Trajectory]]) -> float:
        """One step on the groups; returns their success rate."""
        started = time.perf_counter()
        samples = [t for group in groups for t in group]
        for _ in range(self.epochs):
            self.state, _ = self.trainer.update(self.state, samples, self.version)
        self.engine.update_params(self.state.params, self.version + 1)
        self.updates.append(time.perf_counter() - started)
        self.trained += samples
        return sum(t.succeeded for t in samples) / len(samples)


class Training(Learner):
    """A policy, its trainer and its rollouts. Learning changes the episodes; a `learning_rate` of 0 keeps them."""

    def __init__(self, slots: int, median: float, seed: int = 0, learning_rate: float = 1e-2) -> None:
        optimizer = OptimizerConfig(name="adamw", learning_rate=learning_rate, schedule="constant", warmup_steps=2)
        settings = PolicySettings(10_000, GROUPS, GROUP_SIZE, 96, 8, 8, optimizer)
        objective = ObjectiveConfig(gamma=1.0, failure_reward=0.0)
        transformation = make_optimizer(optimizer, settings.steps)
        state = init_state_on(None, jax.tree.map(jnp.copy, toy_params(seed)), transformation, MODEL)
        trainer = PolicyTrainer(MODEL, objective, transformation, settings)
        trainer.warmup(state)
        config = EngineConfig(slots=slots, cohorts=2, max_length=96, extend_buckets=(8, 16), max_chunk_tokens=10)
        engine = DecodeEngine(state.params, MODEL, config, ToyRenderer.stop_ids, pad_id=0)
        engine.warmup()
        super().__init__(trainer, state, engine)
        journal = Journal()
        self.runner = Probe(engine, ToyRenderer(), lambda: SlowEnv(journal, median), RolloutConfig(env_threads=slots))
        self.requests = requests(seed)


@dataclass
class Outcome:
    """Samples a second after the first steps, success by step, share of the time in training, mean staleness; and the
    time (of `time.perf_counter`) that counted."""

    rate: float
    success: list[float]
    train_share: float
    staleness: float
    span: tuple[float, float]


def measure(learner: Learner, batch: Callable[[], list[list[Trajectory]]], steps: int, skip: int = 1) -> Outcome:
    """`steps` updates on what `batch` gives, after `skip` that don't count."""
    success, ages = [learner.update(batch()) for _ in range(skip)], []
    started, before, trained = time.perf_counter(), len(learner.updates), len(learner.trained)
    for _ in range(steps):
        groups = batch()
        ages += [learner.version - t.start_version for group in groups for t in group]
        success.append(learner.update(groups))
    now = time.perf_counter()
    seconds, samples = now - started, len(learner.trained) - trained
    share = sum(learner.updates[before:]) / seconds
    return Outcome(samples / seconds, success, share, statistics.mean(ages), (started, now))


def roll_out(runner: RolloutRunner, wanted: Iterator[GroupRequest], groups: int = GROUPS) -> list[list[Trajectory]]:
    """The next groups, free-running, to the last sample."""
    for request in itertools.islice(wanted, groups):
        runner.admit(Group(request))
    while free_run(runner):
        pass
    return [group.samples for group in runner.take_finished()]


def latencies_of(runner: Probe, learner: Learner, turns: Sequence[Turn], **changes: Any) -> Latencies:
    """What a synchronous run took, in which nothing else was going on; without its first update."""
    found = {
        "environment": runner.calls["step"],
        "reset": runner.calls["reset"],
        "episodes": [[len(chunk.tokens) for chunk in t.chunks] for t in learner.trained],
        "turn": TurnTime.fit(turns),
        "train": learner.updates[1:],
    }
    return Latencies(**{**found, **changes})

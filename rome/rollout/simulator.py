"""A discrete-event simulation of rollouts and training on a cluster, fed with measured latencies.

It answers what no two-core machine can: how many samples a second would n hosts give, synchronous, with k of them set
apart for training, or multiplexed? What it simulates is this package's own loop (`free_run`, `Admission`,
`SampleBuffer`, `DecodeEngine.move_to`): a turn of a cohort starts when some of its slots are ready and has waited
`gather_seconds` for more; groups are admitted while the buffer will have room; staleness is bounded by sample.
`benchmarks/rollout.py --simulate` holds its predictions against the real loop.

The rollout hosts are shared out among `engines`, each of which spans several of them with one mesh and, multiplexed,
lends some of them to training. Environments are never short of threads. Hosts neither fail nor differ.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from rome.rollout.events import Process, Scheduler, Signal, Work

MODES = ("synchronous", "split", "multiplexed")
STAGES = ("decode", "train", "move")


class SimulatorError(ValueError):
    """A plan or latencies that can't be simulated. Names the field and what was expected."""


class Turn(NamedTuple):
    """A measured turn: decode steps, the rows that the program computes on a host, passes over new prompts, seconds."""

    steps: int
    rows: float
    passes: int
    seconds: float


@dataclass(frozen=True)
class TurnTime:
    """Seconds of a turn: fixed + prompt·passes + row·rows + steps·(step + step_row·rows).

    `rows` are a cohort's slots divided by the hosts that share them, live or not: shapes are static.
    """

    fixed: float = 0.0
    prompt: float = 0.0
    row: float = 0.0
    step: float = 0.0
    step_row: float = 0.0

    def __call__(self, steps: int, rows: float, passes: int) -> float:
        return self.fixed + self.prompt * passes + self.row * rows + steps * (self.step + self.step_row * rows)

    def times(self, factor: float) -> TurnTime:
        """That of a policy which takes `factor` times as long."""
        return TurnTime(*(factor * value for value in astuple(self)))

    @classmethod
    def fit(cls, turns: Sequence[Turn]) -> TurnTime:
        """Non-negative least squares."""
        columns = [(1.0, t.passes, t.rows, t.steps, t.steps * t.rows) for t in turns]
        found, _ = nnls(np.array(columns, float), np.array([t.seconds for t in turns], float))
        return cls(*map(float, found))


@dataclass(frozen=True)
class Latencies:
    """What was measured; each sample is drawn with equal probability.

    Attributes:
      environment, reset: seconds of a step and of a reset.
      episodes: of each episode, the tokens of its chunks.
      turn: seconds of a turn.
      train: seconds of a batch's update on one host.
      move: seconds in which weights and caches go to other hosts, between two turns.
    """

    environment: Sequence[float]
    reset: Sequence[float]
    episodes: Sequence[Sequence[int]]
    turn: TurnTime
    train: Sequence[float]
    move: Sequence[float] = (0.0,)

    def __post_init__(self) -> None:
        for name in ("environment", "reset", "train", "move"):
            values = np.asarray(getattr(self, name), float)
            if not values.size or not (np.isfinite(values) & (values >= 0)).all():
                raise SimulatorError(f"{name}: expected one or more finite seconds >= 0")
        if not self.episodes or not all(len(e) and min(e) >= 1 for e in self.episodes):
            raise SimulatorError("episodes: expected one or more, each of one or more chunks of at least one token")


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
      mode: `synchronous` (all roll out, then all train), `split` (`train_hosts` train, the others roll out) or
        `multiplexed` (all roll out, and lend `train_hosts` of them to each update).
      slots: of a host, at most: multiplexed, what all hold together must fit on those that don't train.
      park: multiplexed: instead, it need only fit on all hosts. While some train, as many cohorts go on as fit on the
        others (none, if all train), the next ones in turn each time; the rest waits in the hosts' own memory.
      groups, group_size: of a batch.
      train_serial: the share of an update that more hosts don't make faster.
      cores: None: every host computes for itself. Else all of them share so many, equally, as fake devices do.
    """

    mode: str
    hosts: int
    slots: int
    groups: int
    group_size: int
    train_hosts: int = 1
    async_ratio: float = 1.0
    engines: int = 1
    cohorts: int = 2
    gather_seconds: float = 0.005
    prompt_rows: int = 4
    train_serial: float = 0.0
    cores: float | None = None
    park: bool = False

    def __post_init__(self) -> None:
        most = self.hosts if self.park else self.narrow
        checks = {
            "mode": (self.mode in MODES, f"one of {MODES}"),
            "hosts": (self.hosts >= 1, "at least 1"),
            "engines": (1 <= self.engines <= most, f"1..{most} (the hosts that always roll out, or with park all)"),
            "groups": (self.groups >= 1, "at least 1"),
            "group_size": (self.group_size >= 1, "at least 1"),
            "cohorts": (self.cohorts >= 1, "at least 1"),
            "slots": (self.slots >= self.cohorts, "at least one a cohort"),
            "async_ratio": (self.async_ratio > 0 or self.mode == "synchronous", "more than 0"),
            "train_serial": (0 <= self.train_serial <= 1, "a share in [0, 1]"),
            "park": (not self.park or self.mode == "multiplexed", "False unless multiplexed"),
            "cores": (self.cores is None or self.cores > 0, "more than 0"),
        }
        if self.mode != "synchronous":
            most = self.hosts if self.park else self.hosts - 1
            checks["train_hosts"] = (1 <= self.train_hosts <= most, f"1..{most}")
        for name in ("mode", "hosts", "train_hosts", *checks):
            valid, expected = checks.get(name, (True, ""))
            if not valid:
                raise SimulatorError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

    @property
    def narrow(self) -> int:
        """Hosts that roll out while others train."""
        return self.hosts if self.mode == "synchronous" else self.hosts - self.train_hosts

    @property
    def wide(self) -> int:
        """Hosts that roll out while nobody trains."""
        return self.narrow if self.mode == "split" else self.hosts

    @property
    def capacity(self) -> int:
        """Groups in flight and waiting, at most."""
        return math.ceil((1 + self.async_ratio) * self.groups)


@dataclass
class Prediction:
    """Attributes:
    samples_per_second: trained on, after the first steps.
    utilisation: share of all host-seconds, by stage; `idle` is the rest.
    environments: steps of environments under way, on average.
    staleness: age in versions of a sample trained on → how many.
    dropped_stale: samples thrown away for their group's age.
    """

    samples_per_second: float
    utilisation: dict[str, float]
    environments: float
    staleness: dict[int, int]
    dropped_stale: int
    finished_samples: int
    decoded_tokens: int
    seconds: float


def simulate(plan: Plan, latencies: Latencies, steps: int, seed: int, skip: int = 1) -> Prediction:
    """`steps` updates after `skip` that don't count. The same seed gives the same prediction."""
    if steps < 1 or skip < 0:
        raise SimulatorError(f"steps, skip: expected at least 1 and 0, found {steps} and {skip}")
    return _Simulation(plan, latencies, np.random.default_rng(seed)).run(steps, skip)


def best_split(plan: Plan, latencies: Latencies, steps: int, seed: int) -> tuple[int, Prediction]:
    """The number of training hosts with which the plan, split or multiplexed, gives the most samples a second.

    Up to 31 hosts every number is tried; beyond, one in hosts/8, and then ever closer to the best.
    """
    limit, found = plan.hosts if plan.park else plan.hosts - plan.engines, {}

    def rate(hosts: int) -> float:
        if hosts not in found:
            found[hosts] = simulate(replace(plan, train_hosts=hosts), latencies, steps, seed)
        return found[hosts].samples_per_second

    stride = plan.hosts // 8 if plan.hosts > 31 else 1
    tried = range(1, limit + 1, stride)
    best = max(tried, key=rate)
    while stride > 1:
        stride = max(1, stride // 2)
        best = max((k for k in (best - stride, best, best + stride) if 1 <= k <= limit), key=rate)
    return best, found[best]


class _Group:
    """The samples of one initial state; `missing` of them are not over."""

    def __init__(self, episodes: Sequence[Sequence[int]]) -> None:
        self.samples = [_Sample(self, episode) for episode in episodes]
        self.missing = len(self.samples)


class _Sample:
    """One trajectory: `turns` chunks of it are decoded; the environment answers the last of them at `answered`,
    which is known once it is `ready`."""

    def __init__(self, group: _Group, chunks: Sequence[int]) -> None:
        self.group, self.chunks, self.turns = group, chunks, 0
        self.answered, self.ready = 0.0, False
        self.start_version = -1

    @property
    def over(self) -> bool:
        return self.turns == len(self.chunks)


class _Engine:
    """Slots in cohorts on `span` of its `wide` hosts; those in `awake` take turns. `queue` waits for a slot."""

    def __init__(self, wide: int, narrow: int, plan: Plan) -> None:
        self.wide = self.span = wide
        self.rows = max(1, plan.slots * (wide if plan.park else narrow) // plan.cohorts)
        self.cohorts: list[list[_Sample]] = [[] for _ in range(plan.cohorts)]
        self.awake = self.cohorts
        self.park, self._first = plan.park, 0
        self.queue: deque[_Sample] = deque()
        self.groups = 0
        self.in_turn = self.moving = False
        self.given, self.turn_over, self.moved = Signal(), Signal(), Signal()

    def move_to(self, span: int) -> None:
        self.span, self.moving, self.awake = span, False, self.cohorts
        if self.park and span < self.wide:
            count = len(self.cohorts) * span // self.wide
            self.awake = [self.cohorts[(self._first + i) % len(self.cohorts)] for i in range(count)]
            self._first += count


class _Simulation:
    def __init__(self, plan: Plan, latencies: Latencies, rng: np.random.Generator) -> None:
        self.plan, self.latencies, self.rng = plan, latencies, rng
        self.clock = Scheduler(plan.cores)
        narrow, wide = _shares(plan.narrow, plan.engines), _shares(plan.wide, plan.engines)
        self.spans = {"narrow": narrow, "wide": wide}
        self.engines = [_Engine(w, n, plan) for w, n in zip(wide, narrow, strict=True)]
        self.version, self.in_flight, self.allowance = 0, 0, plan.capacity
        self.buffer: list[_Group] = []
        self.changed = Signal()
        self.staleness: Counter[int] = Counter()
        self.dropped_stale = self.finished = self.decoded = 0
        self.environment_seconds = 0.0
        self._busy = dict.fromkeys(STAGES, 0.0)  # host-seconds
        self._at_work = dict.fromkeys(STAGES, 0)  # hosts, now
        self._counted = 0.0

    def run(self, steps: int, skip: int) -> Prediction:
        if self.plan.mode == "synchronous":
            self.allowance = 0  # the trainer asks for each batch
        for engine in self.engines:
            self.clock.start(self._engine(engine))
        self._admit()
        marks: list[tuple[float, dict[str, float], float]] = []
        self.clock.run(self._trainer(steps + skip, lambda step: step == skip and marks.append(self._mark())))
        (began, busy, called), (now, busy_now, called_now) = *marks, self._mark()
        hosts, seconds = self.plan.hosts, now - began
        used = {stage: (busy_now[stage] - busy[stage]) / (hosts * seconds) for stage in STAGES}
        return Prediction(
            samples_per_second=steps * self.plan.groups * self.plan.group_size / seconds,
            utilisation={**used, "idle": 1.0 - sum(used.values())},
            environments=(called_now - called) / seconds,
            staleness=dict(sorted(self.staleness.items())),
            dropped_stale=self.dropped_stale,
            finished_samples=self.finished,
            decoded_tokens=self.decoded,
            seconds=now,
        )

    # -- what is counted ----------------------------------------------------------------------------------------------

    def _mark(self) -> tuple[float, dict[str, float], float]:
        self._work("decode", 0)
        return self.clock.now, dict(self._busy), self.environment_seconds

    def _work(self, stage: str, hosts: int) -> None:
        """`hosts` more (or fewer) are at it from now on."""
        for name, count in self._at_work.items():
            self._busy[name] += count * (self.clock.now - self._counted)
        self._counted = self.clock.now
        self._at_work[stage] += hosts

    def _draw(self, samples: Sequence[Any]) -> Any:
        return samples[self.rng.integers(len(samples))]

    # -- groups -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Starts groups while the buffer will have room, each with the engine that has the fewest."""
        while self.in_flight + len(self.buffer) < self.allowance:
            group = _Group([self._draw(self.latencies.episodes) for _ in range(self.plan.group_size)])
            engine = min(self.engines, key=lambda engine: engine.groups / engine.rows)
            engine.queue.extend(group.samples)
            engine.groups += 1
            self.in_flight += 1
            self.clock.fire(engine.given)

    def _deliver(self, engine: _Engine, group: _Group) -> None:
        self.in_flight -= 1
        engine.groups -= 1
        self.finished += len(group.samples)
        self.buffer.append(group)
        self._discard_stale()
        self.clock.fire(self.changed)

    def _discard_stale(self) -> None:
        if self.plan.mode == "synchronous":
            return
        limit = self.version - self.plan.async_ratio
        fresh = [group for group in self.buffer if all(s.start_version >= limit for s in group.samples)]
        self.dropped_stale += (len(self.buffer) - len(fresh)) * self.plan.group_size
        self.buffer = fresh

    # -- processes ----------------------------------------------------------------------------------------------------

    def _trainer(self, steps: int, before: Callable[[int], Any]) -> Process:
        """Takes batches; calls `before(step)` first."""
        plan = self.plan
        trainers = plan.hosts if plan.mode == "synchronous" else plan.train_hosts
        speed = plan.train_serial + (1 - plan.train_serial) / trainers
        for step in range(steps):
            before(step)
            if plan.mode == "synchronous":
                self.allowance = self.in_flight + len(self.buffer) + plan.groups
                self._admit()
            while len(self.buffer) < plan.groups:
                yield self.changed
            batch, self.buffer = self.buffer[: plan.groups], self.buffer[plan.groups :]
            self.staleness.update(self.version - s.start_version for group in batch for s in group.samples)
            if plan.mode == "synchronous":
                self.allowance = 0
            self._admit()
            yield from self._move("narrow")
            self._work("train", trainers)
            yield Work(speed * float(self._draw(self.latencies.train)))
            self._work("train", -trainers)
            self.version += 1
            self._discard_stale()
            self._admit()
            yield from self._move("wide")

    def _move(self, where: str) -> Process:
        """Multiplexed: all engines go to their narrow or wide hosts; ends when the last of them is there."""
        if self.plan.mode != "multiplexed":
            return
        for engine, span in zip(self.engines, self.spans[where], strict=True):
            engine.moving = True
            self.clock.start(self._move_engine(engine, span))
        for engine in self.engines:
            while engine.moving:
                yield engine.moved

    def _move_engine(self, engine: _Engine, span: int) -> Process:
        while engine.in_turn:
            yield engine.turn_over
        hosts = max(engine.span, span)
        self._work("move", hosts)
        yield float(self._draw(self.latencies.move))
        self._work("move", -hosts)
        engine.move_to(span)
        self.clock.fire(engine.moved)

    def _engine(self, engine: _Engine) -> Process:
        """`free_run`, for ever."""
        while True:
            self._admit()
            for cohort in engine.cohorts:
                self._fill(engine, cohort)
                self._settle(engine, cohort)
            awake = engine.awake
            if any(sample.ready for cohort in awake for sample in cohort):
                for cohort in awake:
                    if any(sample.ready for sample in cohort):
                        yield from self._turn(engine, cohort)
            elif any(awake):
                waiting = min(sample.answered for cohort in awake for sample in cohort)
                yield min(1.0, waiting - self.clock.now)
            elif not awake or (any(engine.cohorts) and not engine.queue):
                yield engine.moved  # all that it has is parked
            elif not engine.queue:
                yield engine.given

    def _fill(self, engine: _Engine, cohort: list[_Sample]) -> None:
        while engine.queue and len(cohort) < engine.rows:
            sample = engine.queue.popleft()
            sample.answered = self.clock.now + float(self._draw(self.latencies.reset))
            cohort.append(sample)

    def _settle(self, engine: _Engine, cohort: list[_Sample]) -> None:
        """Takes note of the environments' answers, and takes out the samples that are over."""
        for sample in [sample for sample in cohort if not sample.ready and sample.answered <= self.clock.now]:
            sample.ready = True
            if sample.over:
                cohort.remove(sample)
                sample.group.missing -= 1
                if not sample.group.missing:
                    self._deliver(engine, sample.group)

    def _turn(self, engine: _Engine, cohort: list[_Sample]) -> Process:
        patience = max(sample.answered for sample in cohort) - self.clock.now
        if patience > 0:
            yield min(patience, self.plan.gather_seconds)
            self._settle(engine, cohort)
        ready = [sample for sample in cohort if sample.ready]
        while engine.moving:
            yield engine.moved
        if all(cohort is not other for other in engine.awake):
            return
        engine.in_turn, span = True, engine.span
        prompts = len({id(sample.group) for sample in ready if not sample.turns})
        for sample in ready:
            if not sample.turns:
                sample.start_version = self.version
        lengths = [sample.chunks[sample.turns] for sample in ready]
        passes = math.ceil(prompts / self.plan.prompt_rows)
        self._work("decode", span)
        yield Work(self.latencies.turn(max(lengths), engine.rows / span, passes))
        self._work("decode", -span)
        self.decoded += sum(lengths)
        engine.in_turn = False
        self.clock.fire(engine.turn_over)
        for sample in ready:
            seconds = float(self._draw(self.latencies.environment))
            self.environment_seconds += seconds
            sample.turns, sample.answered, sample.ready = sample.turns + 1, self.clock.now + seconds, False


def _shares(hosts: int, engines: int) -> list[int]:
    """The hosts, as evenly as they go."""
    return [hosts * (i + 1) // engines - hosts * i // engines for i in range(engines)]

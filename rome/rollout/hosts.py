"""Rollout hosts on Ray: actors that each run an engine and its environments, feeding one sample buffer.

`RolloutHost` is what an actor holds: a free-running `RolloutRunner` in a thread. `HostPool` starts the actors, sends
them weights and replaces those that die or fall silent. `HostedRollouts` feeds the buffer from a pool, as
`BackgroundRollouts` does from a runner in this process. What a lost host had in flight is sampled again elsewhere,
under new keys; finished groups were sent before and are never lost.

Weights go through Ray's object store, once a version whatever the number of hosts; a host swaps them between two turns.
Where training moves adapters alone, hosts get the base once, when they start (`rome.rollout.sync`).
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from rome.rollout.background import RolloutStopped, RolloutThread, free_run
from rome.rollout.buffer import SampleBuffer
from rome.rollout.episode import GroupRequest
from rome.rollout.runner import Group, GroupDropped, RolloutRunner
from rome.rollout.sync import AdapterUpdate
from rome.rollout.trace import Span, Trace
from rome.trajectory import Status, Trajectory

MakeRunner = Callable[[Any, int], RolloutRunner]


class HostsLost(RuntimeError):
    """Host after host was lost, without one finished group in between. Says why the last one was."""


@dataclass(frozen=True)
class HostConfig:
    """Attributes:
    hosts: how many.
    cpus: that Ray reserves for each.
    boot_seconds: until a host has started and compiled its shapes.
    silent_seconds: a host that completed no round of its loop for so long is replaced; longer than the longest turn.
    max_losses: hosts lost in a row, without a finished group in between, after which the run is given up.
    """

    hosts: int
    cpus: float = 1.0
    boot_seconds: float = 300.0
    silent_seconds: float = 120.0
    max_losses: int = 4

    def __post_init__(self) -> None:
        for name, least in (("hosts", 1), ("max_losses", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        for name in ("boot_seconds", "silent_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected seconds > 0, found {getattr(self, name)!r}")
        if self.cpus < 0:
            raise ValueError(f"cpus: expected at least 0, found {self.cpus}")


@dataclass
class RolloutTotals:
    """What a runner did so far, or all the hosts of a pool.

    Attributes:
      failures: discarded episodes by `<status>/<stage>`; those of `aborted/host` went with a host.
      dropped: group id → why it was given up.
      cancelled: samples that their group no longer needed.
      swap_seconds: the longest that a host needed to take over new weights, from their arrival on.
    """

    resampled: int = 0
    cancelled: int = 0
    lost_hosts: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, GroupDropped] = field(default_factory=dict)
    waited_seconds: float = 0.0
    decoded_tokens: int = 0
    generate_seconds: float = 0.0
    swap_seconds: float = 0.0

    @classmethod
    def of(cls, runner: RolloutRunner) -> RolloutTotals:
        stats, engine = runner.stats, runner.engine.stats
        return cls(
            resampled=stats.resampled,
            cancelled=stats.cancelled,
            failures=Counter(stats.failures),
            dropped=dict(stats.dropped_groups),
            waited_seconds=stats.waited_seconds,
            decoded_tokens=engine.decoded_tokens,
            generate_seconds=engine.seconds,
        )

    def add(self, other: RolloutTotals) -> None:
        """Adds another's counts to these."""
        self.resampled += other.resampled
        self.cancelled += other.cancelled
        self.lost_hosts += other.lost_hosts
        self.failures += other.failures
        self.dropped |= other.dropped
        self.waited_seconds += other.waited_seconds
        self.decoded_tokens += other.decoded_tokens
        self.generate_seconds += other.generate_seconds
        self.swap_seconds = max(self.swap_seconds, other.swap_seconds)


class Report(NamedTuple):
    """What a host says when it is asked.

    `finished` groups are handed over once, as are `spans`, on the host's clock, which showed `clock`; `silent_seconds`
    have passed since its loop last came round.
    """

    finished: list[tuple[str, list[Trajectory]]]
    stats: RolloutTotals
    silent_seconds: float
    version: int
    spans: list[Span]
    clock: float


class RolloutHost:
    """One engine and its environments, free-running in a thread. Every method may be called from any thread.

    Args:
      make_runner: (params, version) → a runner whose engine is warm.
      params, version: the weights to start with, as numpy arrays.
      update: newer ones, as for `update_weights`.
    """

    def __init__(
        self, make_runner: MakeRunner, params: Any, version: int, update: tuple[Any, int] | None = None
    ) -> None:
        self._runner = make_runner(params, version)
        if update is not None:
            self._runner.update_weights(*update)
        self._inbox: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._outbox: list[tuple[str, list[Trajectory]]] = []
        self._changed, self._updating = threading.Condition(), threading.Lock()
        self._failure: BaseException | None = None
        self._stats, self._swap_seconds = RolloutTotals(), 0.0
        self._epoch, self._came_round = 0, time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._main, name="rollout-host", daemon=True)
        self._thread.start()

    def ready(self) -> int:
        """The host's process id, once it can decode."""
        return os.getpid()

    def admit(self, groups: Sequence[tuple[GroupRequest, Sequence[int]]]) -> None:
        """Queues groups, each a request and the number of the attempt at each sample."""
        for request, attempts in groups:
            self._inbox.put(Group(request, attempts))

    def update_weights(self, weights: Any, version: int) -> None:
        """Swaps the weights between two turns; trajectories in flight go on under the new ones.

        Ray runs an actor's calls side by side, so a newer version may arrive first: an older one is passed over.
        """
        with self._updating:
            if version > self._runner.engine.version:
                self._swap_seconds = max(self._swap_seconds, self._runner.update_weights(weights, version))

    def take(self, seconds: float, traced: bool = False) -> Report:
        """The groups finished since the last call; waits up to `seconds` for one. Raises what the loop failed with.

        While calls are `traced`, what happens is written down, and handed over by the next.
        """
        trace = self._runner.trace
        if traced != (trace is not None):
            self._runner.trace = Trace() if traced else None
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._outbox and self._failure is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._failure is not None:
                raise self._failure
            finished, self._outbox = self._outbox, []
            spans = [] if trace is None else trace.drain()
            now = time.monotonic()
            return Report(finished, self._stats, now - self._came_round, self._runner.engine.version, spans, now)

    def reset(self, seconds: float) -> None:
        """Abandons everything in flight, closes its environments and forgets what was not taken yet."""
        with self._changed:
            epoch = self._epoch
            self._inbox.put(None)
            if not self._changed.wait_for(lambda: self._epoch > epoch or self._failure is not None, seconds):
                raise RolloutStopped(f"the host did not stop within {seconds:g} s")

    def close(self, seconds: float) -> None:
        """Closes every environment and ends the loop."""
        self._closed.set()
        self._inbox.put(None)
        self._thread.join(seconds)

    def _main(self) -> None:
        try:
            while not self._closed.is_set():
                self._take_in()
                busy = free_run(self._runner)
                self._hand_over()
                if not busy:
                    time.sleep(0.005)
        except BaseException as caught:  # delivered to whoever asks
            with self._changed:
                self._failure = caught
                self._changed.notify_all()
        finally:
            self._runner.close()

    def _take_in(self) -> None:
        while not self._inbox.empty():
            group = self._inbox.get()
            if group is not None:
                self._runner.admit(group, self._runner.config.redundancy)
                continue
            self._runner.reset()
            with self._changed:
                self._outbox, self._epoch = [], self._epoch + 1
                self._changed.notify_all()

    def _hand_over(self) -> None:
        runner = self._runner
        finished = [(group.request.group_id, group.samples) for group in runner.take_finished()]
        totals = RolloutTotals.of(runner)
        totals.swap_seconds = self._swap_seconds
        # the causes of a dropped group may be anything, and not everything can be pickled
        totals.dropped = {name: GroupDropped(str(error)) for name, error in totals.dropped.items()}
        with self._changed:
            news = bool(finished) or len(totals.dropped) > len(self._stats.dropped)
            self._stats, self._came_round = totals, time.monotonic()
            self._outbox += finished
            if news:
                self._changed.notify_all()


class _Seat:
    """A place in the pool, the actor that has it now, and what that actor was given."""

    def __init__(self, actor: Any, boot_seconds: float) -> None:
        self.actor = actor
        self.held: dict[str, Group] = {}
        self.stats = RolloutTotals()
        self.booting = True
        self.pending = actor.ready.remote()  # the one question that is open
        self.deadline = time.monotonic() + boot_seconds
        self.updates: list[Any] = []  # open weight updates
        self.later = math.inf  # how much our clock shows more than its; answers that took long show too much


class HostPool:
    """Ray actors that roll out, and the weights that they sample from. Close it (or use `with`) when done.

    Args:
      make_runner: as for `RolloutHost`; pickled with cloudpickle.
      params, version: the weights to start with; `Adapted` ones if updates are to hold adapters alone.
      config: how many hosts, and their deadlines.

    Joins the Ray cluster at `RAY_ADDRESS`, or starts Ray on this machine and ends it again in `close`. Hosts are spread
    over the nodes. Raises HostsLost if none of them boots in time.
    """

    def __init__(self, make_runner: MakeRunner, params: Any, version: int, config: HostConfig) -> None:
        import ray

        self.ray, self.config, self._make_runner = ray, config, make_runner
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(ray, config)
        self.version = version
        # a host starts with whole weights, and with what was published since, if that was adapters
        self._start, self._update = ray.put((_on_host(params), version)), None
        self._gone = RolloutTotals()  # of hosts that are no more
        self._lock = threading.Lock()  # of seats and weights: the trainer publishes while a thread replaces hosts
        self.losses = 0
        self.trace: Trace | None = None  # where hosts' spans go; set it to have them traced
        self.seats = [self._seat() for _ in range(config.hosts)]
        try:
            ready, _ = ray.wait([seat.pending for seat in self.seats], timeout=config.boot_seconds)
            if not ready:
                raise HostsLost(f"no rollout host started within {config.boot_seconds:g} s")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> HostPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> RolloutTotals:
        """Of all hosts, the lost ones included."""
        total = RolloutTotals()
        for stats in (self._gone, *(seat.stats for seat in self.seats)):
            total.add(stats)
        return total

    def publish(self, update: Any, version: int) -> None:
        """Sends new weights (whole, or an `AdapterUpdate`) to every host, without waiting for them."""
        weights = self.ray.put((_on_host(update), version))
        with self._lock:
            if isinstance(update, AdapterUpdate):
                self._update = weights
            else:
                self._start, self._update = weights, None
            self.version = version
            for seat in self.seats:
                seat.updates.append(seat.actor.update.remote(weights))

    def replace(self, seat: _Seat, reason: BaseException) -> list[Group]:
        """Puts a new host in the seat of a lost one. Returns what that had in flight; raises HostsLost in the end."""
        self._kill(seat.actor)
        self._gone.add(seat.stats)
        self._gone.failures[f"{Status.ABORTED.value}/host"] += sum(group.request.size for group in seat.held.values())
        self._gone.lost_hosts += 1
        self.losses += 1
        if self.losses > self.config.max_losses:
            raise HostsLost(f"{self.losses} hosts were lost in a row; the last: {reason}") from reason
        lost, seat.held = list(seat.held.values()), {}
        with self._lock:
            self.seats[self.seats.index(seat)] = self._seat()
        return lost

    def check_updates(self, seat: _Seat) -> None:
        """Raises what an update of the weights failed with."""
        with self._lock:
            if not seat.updates:
                return
            done, seat.updates = self.ray.wait(seat.updates, num_returns=len(seat.updates), timeout=0)
        self.ray.get(done)

    def close(self, seconds: float = 20.0) -> None:
        """Closes every environment and ends the hosts. Idempotent."""
        seats, self.seats = self.seats, []
        closing = [seat.actor.close.remote(seconds) for seat in seats if not seat.booting]
        if closing:
            self.ray.wait(closing, num_returns=len(closing), timeout=seconds)
        for seat in seats:
            self._kill(seat.actor)
        if self._owns_ray and self.ray.is_initialized():
            self.ray.shutdown()

    def _seat(self) -> _Seat:
        options = {"num_cpus": self.config.cpus, "max_concurrency": 4, "scheduling_strategy": "SPREAD"}
        actor = self.ray.remote(**options)(RolloutHostActor).remote(self._make_runner, self._start, self._update)
        return _Seat(actor, self.config.boot_seconds)

    def _kill(self, actor: Any) -> None:
        self.ray.kill(actor, no_restart=True)


class RolloutHostActor(RolloutHost):
    """RolloutHost whose weights come as one object of Ray's store."""

    def __init__(self, make_runner: MakeRunner, start: tuple[Any, int], update: tuple[Any, int] | None) -> None:
        super().__init__(make_runner, *start, update)

    def update(self, weights: tuple[Any, int]) -> None:
        self.update_weights(*weights)


class HostedRollouts(RolloutThread):
    """Feeds a buffer with groups from the hosts of `pool`. The other arguments are `RolloutThread`'s.

    The pool outlives it: after `stop`, another may use the hosts.
    """

    def __init__(
        self,
        pool: HostPool,
        buffer: SampleBuffer,
        requests: Iterable[GroupRequest],
        known: Iterable[GroupRequest] = (),
    ) -> None:
        super().__init__(buffer, requests, known)
        self._pool = pool

    def _tick(self) -> bool:
        self._admit()
        if self._admission.hopeless and not self._in_flight():
            return False  # not even a batch is left: nothing could become of it
        self._listen(timeout=0.1)
        return True

    def _in_flight(self) -> list[GroupRequest]:
        return [group.request for seat in self._pool.seats for group in seat.held.values()]

    def _abandon(self) -> None:
        self._reset_hosts()

    def _admit(self) -> None:
        """Gives each group to the host that has the fewest."""
        ready = [seat for seat in self._pool.seats if not seat.booting]
        while ready and (group := self._admission.next(len(self._in_flight()))) is not None:
            seat = min(ready, key=lambda seat: len(seat.held))
            seat.held[group.request.group_id] = group
            seat.actor.admit.remote([(group.request, group.attempts)])

    def _listen(self, timeout: float) -> None:
        """Takes in what hosts have to say; replaces those that are dead or silent."""
        ray, pool = self._pool.ray, self._pool
        asked = {seat.pending: seat for seat in pool.seats}
        answered, _ = ray.wait(list(asked), num_returns=1, timeout=timeout)
        for seat in list(pool.seats):
            try:
                if seat.pending in answered:
                    self._hear(seat, ray.get(seat.pending))
                elif time.monotonic() > seat.deadline:
                    what = "did not start" if seat.booting else "gave no answer"
                    raise TimeoutError(f"a rollout host {what} in time")
                pool.check_updates(seat)
            except (ray.exceptions.RayError, TimeoutError) as lost:
                for group in pool.replace(seat, lost):
                    self._admission.again(group)

    def _hear(self, seat: _Seat, answer: Report | int) -> None:
        config = self._pool.config
        if isinstance(answer, Report):
            if answer.silent_seconds > config.silent_seconds:
                raise TimeoutError(f"a rollout host decoded nothing for {answer.silent_seconds:.0f} s")
            seat.stats = answer.stats
            seat.later = min(seat.later, time.monotonic() - answer.clock)
            if (trace := self._pool.trace) is not None and answer.spans:
                trace.merge(answer.spans, f"host {self._pool.seats.index(seat)}", seat.later)
            for name in set(answer.stats.dropped) & set(seat.held):
                del seat.held[name]
            for name, samples in answer.finished:
                group = seat.held.pop(name, None)
                if group is not None:  # else it was finished before a reset that we did not see the end of
                    group.finished = dict(enumerate(samples))
                    self._admission.deliver([group])
                    self._pool.losses = 0
        seat.booting = False
        seat.pending = seat.actor.take.remote(1.0, self._pool.trace is not None)
        seat.deadline = time.monotonic() + config.silent_seconds

    def _reset_hosts(self, seconds: float = 30.0) -> None:
        """Has every host abandon its work; one that does not is replaced."""
        ray, pool = self._pool.ray, self._pool
        resets = {seat.actor.reset.remote(seconds): seat for seat in pool.seats if not seat.booting}
        if not resets:
            return
        done, _ = ray.wait(list(resets), num_returns=len(resets), timeout=seconds)
        for reset, seat in resets.items():
            try:
                if reset not in done:
                    raise TimeoutError(f"a rollout host did not stop within {seconds:g} s")
                ray.get(reset)
                seat.held = {}
            except (ray.exceptions.RayError, RolloutStopped, TimeoutError) as lost:
                pool.replace(seat, lost)


def _on_host(params: Any) -> Any:
    return jax.tree.map(np.asarray, jax.device_get(params))


def _start_ray(ray: Any, config: HostConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
        return
    cpus = max(os.cpu_count() or 1, int(np.ceil(config.hosts * config.cpus)))
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)

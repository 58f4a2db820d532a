"""RolloutRunner: many environments in flight around one decode engine.

Slots are split into cohorts that take turns: while the engine decodes one cohort, the environments of the others run
in threads. Both modes are the same four moves on a cohort: settle (take the environments' answers), fill (give free
slots the next trajectories), settle their resets, turn (append, decode, send the chunks to the environments).

* `run` is the deterministic lockstep mode: a cohort's turn starts when *all* its environments have answered, and free
  slots are filled in slot order. Which tokens share a batch depends on the policy and the environments alone, never on
  timing: the same seed gives the same trajectories, bit for bit.
* `rome.rollout.background` drives the free-running mode: a turn starts as soon as some slots are ready.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rome.envs import EnvFailure
from rome.models import Renderer
from rome.rollout.engine import DecodeEngine
from rome.rollout.episode import ChunkEnv, Deadlines, Episode, GroupRequest
from rome.rollout.rewards import RewardStage
from rome.rollout.sync import AdapterMerger, take_weights
from rome.rollout.trace import Trace
from rome.rollout.workers import DeadlineExceeded, EnvWorkers, Job
from rome.trajectory import Status, Trajectory


class GroupDropped(RuntimeError):
    """A group that could not be completed; says why. Kept in `RolloutStats.dropped_groups`, not raised."""


@dataclass(frozen=True)
class RolloutConfig:
    """Attributes:
    env_threads: environment calls that run at once.
    max_retries: how often a sample lost to an infrastructure failure is started again; then its group is dropped.
    deadlines: of the environment calls.
    gather_seconds: free-running mode only: how long a turn waits for more slots once one is ready.
    redundancy: free-running mode only: samples of a group that are started beyond its size. The first to finish make
      the group, the others are cancelled: stragglers hold nothing up, but long episodes become rarer than they are.
    """

    env_threads: int = 16
    max_retries: int = 3
    deadlines: Deadlines = field(default_factory=Deadlines)
    gather_seconds: float = 0.005
    redundancy: int = 0

    def __post_init__(self) -> None:
        if self.env_threads < 1:
            raise ValueError(f"env_threads: expected at least 1, found {self.env_threads}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries: expected at least 0, found {self.max_retries}")
        if self.gather_seconds < 0:
            raise ValueError(f"gather_seconds: expected at least 0, found {self.gather_seconds}")
        if self.redundancy < 0:
            raise ValueError(f"redundancy: expected at least 0, found {self.redundancy}")


@dataclass
class RolloutStats:
    """Counts since the runner was made.

    Attributes:
      failures: discarded episodes by `<status>/<stage>`, e.g. `timeout/step`.
      cancelled: samples that their group no longer needed (`redundancy`).
      dropped_groups: group id → why it was given up.
      waited_seconds: the engine idle, waiting for environments.
      hung_calls: environment calls abandoned at their deadline.
    """

    trajectories: int = 0
    chunks: int = 0
    truncated: int = 0
    resampled: int = 0
    cancelled: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    dropped_groups: dict[str, GroupDropped] = field(default_factory=dict)
    waited_seconds: float = 0.0
    hung_calls: int = 0


class Group:
    """A request and what has become of its samples."""

    def __init__(self, request: GroupRequest, attempts: Sequence[int] | None = None) -> None:
        self.request = request
        self.attempts = list(attempts or [0] * request.size)  # of each sample, the number of the one in flight
        self.retries = [0] * len(self.attempts)
        self.finished: dict[int, Trajectory] = {}
        self.given_up = 0  # samples that were lost too often

    def extend(self, size: int) -> None:
        """Makes it a group of `size` samples, if it has fewer, of which `request.size` are needed."""
        missing = max(0, size - len(self.attempts))
        self.attempts += [max(self.attempts)] * missing  # a number that no earlier round has used
        self.retries += [0] * missing

    @property
    def samples(self) -> list[Trajectory]:
        """What is finished, in the order of the samples' numbers."""
        return [self.finished[sample] for sample in sorted(self.finished)]

    @property
    def complete(self) -> bool:
        return len(self.finished) >= self.request.size


class RolloutRunner:
    """Rolls out groups of trajectories with one engine. Use one at a time; close it (or use `with`) when done.

    Args:
      engine: decode slots and weights. Its `warmup` is up to the caller.
      renderer: tokens ↔ messages.
      env_factory: makes a fresh environment; called in worker threads.
      config: threads, retries and deadlines.
      rewards: scores finished trajectories in worker threads, once their slot is free; None: as the verifier says.
      merger: makes the engine's weights of an update that holds adapters alone; None: updates hold whole weights.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        renderer: Renderer,
        env_factory: Callable[[], ChunkEnv],
        config: RolloutConfig | None = None,
        rewards: RewardStage | None = None,
        merger: AdapterMerger | None = None,
    ) -> None:
        self.engine, self.renderer, self.env_factory = engine, renderer, env_factory
        self._merger = merger
        self.config, self.rewards = config or RolloutConfig(), rewards
        self.stats = RolloutStats()
        self.trace: Trace | None = None  # set it to have what happens written down
        self._workers = EnvWorkers(self.config.env_threads)
        self._slots: list[Episode | None] = [None] * engine.config.slots
        self._queue: deque[Episode] = deque()
        self._groups: dict[str, Group] = {}
        self._closing: list[Episode] = []
        self._scoring: list[tuple[Episode, Job]] = []
        self._finished: list[Group] = []

    def __enter__(self) -> RolloutRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, requests: Sequence[GroupRequest], temperature: float | None = None, scored: bool = True
    ) -> list[list[Trajectory]]:
        """Rolls out the groups in lockstep mode, deterministically.

        Args:
          requests: with distinct group ids.
          temperature: overrides the engine's, e.g. for an evaluation; 0 is greedy.
          scored: False leaves the reward stage out: rewards are the verifier's.

        Returns:
          The complete groups in the order of the requests, samples in order. Every trajectory is reliable: lost ones
          were sampled again from the same initial state. A group that was given up is missing here and named in
          `stats.dropped_groups`.
        """
        ids = [request.group_id for request in requests]
        repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
        if repeated:
            raise ValueError(f"requests: expected distinct group ids, found {repeated} repeatedly")
        rewards = self.rewards
        try:
            self.rewards = rewards if scored else None
            for request in requests:
                self.admit(Group(request))
            cohorts = range(self.engine.config.cohorts)
            for cohort in cohorts:
                self.fill(cohort)
            while self.busy:
                for cohort in cohorts:
                    self.settle(cohort)
                    self.fill(cohort)
                    self.settle(cohort)
                    self.turn(cohort, temperature)
                if not any(self._slots):
                    self.settle_any(timeout=1.0)  # nothing left but to score
            complete = {group.request.group_id: group for group in self.take_finished()}
        finally:
            self.rewards = rewards
            self.reset()
        return [complete[name].samples for name in ids if name in complete]

    def update_weights(self, weights: Any, version: int) -> float:
        """New weights for the next turn, from any thread (see `take_weights`); returns the seconds that it took."""
        return take_weights(self.engine, self._merger, weights, version)

    # -- the moves ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any trajectory is in a slot, in the queue or being scored."""
        return bool(self._queue) or bool(self._scoring) or any(episode is not None for episode in self._slots)

    @property
    def in_flight(self) -> int:
        """Groups that are admitted and not yet complete."""
        return len(self._groups)

    def admit(self, group: Group, redundancy: int = 0) -> None:
        """Queues all samples of a group, and `redundancy` more."""
        group.extend(group.request.size + redundancy)
        self._groups[group.request.group_id] = group
        for sample, attempt in enumerate(group.attempts):
            self._queue.append(self._episode(group, sample, attempt))

    def fill(self, cohort: int) -> None:
        """Gives the cohort's free slots the next trajectories of the queue, in slot order, and starts their resets."""
        deadlines = self.config.deadlines
        for slot in self.engine.cohort_slots(cohort):
            if self._slots[slot] is not None or not self._queue:
                continue
            episode = self._queue.popleft()
            episode.slot, episode.started = slot, time.monotonic()
            self._slots[slot] = episode
            self.engine.insert(slot, episode.key)
            call = functools.partial(
                episode.open, env_factory=self.env_factory, renderer=self.renderer, deadlines=deadlines
            )
            episode.stage, episode.job = "reset", self._workers.submit(call, deadlines.reset, late=episode.close)

    def settle(self, cohort: int, enough: int | None = None, timeout: float | None = None) -> None:
        """Waits until `enough` (default: all) of the cohort's environment calls have ended; takes their results, and
        those of the reward stage."""
        self._take_scores()
        waiting = [e for slot in self.engine.cohort_slots(cohort) if (e := self._slots[slot]) is not None and e.job]
        if waiting:
            started = time.perf_counter()
            jobs = [episode.job for episode in waiting]
            self._workers.wait(jobs, len(jobs) if enough is None else enough, timeout)
            self.stats.waited_seconds += time.perf_counter() - started
        for episode in waiting:
            if episode.job.settled:
                self._take(episode)

    def settle_any(self, timeout: float) -> None:
        """Waits up to `timeout` seconds until any environment call, of whatever cohort, or a score has come."""
        jobs = [episode.job for episode in self._slots if episode is not None and episode.job is not None]
        jobs += [job for _, job in self._scoring]
        started = time.perf_counter()
        self._workers.wait(jobs, 1, timeout)
        self.stats.waited_seconds += time.perf_counter() - started
        self._take_scores()

    def ready(self, cohort: int) -> list[Episode]:
        """The cohort's trajectories whose next chunk can be decoded, in slot order."""
        episodes = (self._slots[slot] for slot in self.engine.cohort_slots(cohort))
        return [episode for episode in episodes if episode is not None and episode.job is None]

    def turn(self, cohort: int, temperature: float | None = None) -> None:
        """Decodes one chunk for every ready trajectory of the cohort and sends the chunks to the environments.

        Where the engine's pages are scarce, some or all of them stay ready for a later turn.
        """
        started, deadlines = time.monotonic(), self.config.deadlines
        # asserts that what the engine holds is an exact prefix of what it is fed
        deltas = {e.slot: e.ledger.delta(self.engine.processed(e.slot)) for e in self.ready(cohort)}
        deltas = self.engine.affordable(cohort, deltas)
        episodes = [self._slots[slot] for slot in deltas]
        if not episodes:
            return
        sampled = self.engine.generate(cohort, deltas, temperature)
        seconds = time.monotonic() - started
        if (trace := self.trace) is not None:  # another thread may take it away
            tokens = sum(len(chunk.tokens) for chunk in sampled.values())
            version = self.engine.version
            trace.add(f"decode {cohort}", f"{len(episodes)} chunks", started, seconds, tokens=tokens, version=version)
        for episode in episodes:
            chunk = sampled[episode.slot]
            episode.generated(chunk, seconds)
            self.stats.chunks += 1
            call = functools.partial(
                episode.act,
                renderer=self.renderer,
                deadlines=deadlines,
                tokens=chunk.tokens,
                index=len(episode.ledger.chunks),
                room=episode.ledger.room - len(chunk.tokens),
            )
            episode.stage, episode.job = "step", self._workers.submit(call, deadlines.step, late=episode.close)

    def take_finished(self) -> list[Group]:
        """The groups completed since the last call, in order of completion."""
        finished, self._finished = self._finished, []
        return finished

    def unfinished(self) -> list[GroupRequest]:
        """The requests still in flight."""
        return [group.request for group in self._groups.values()]

    def reset(self) -> None:
        """Abandons everything in flight, or finished and not taken, and closes every environment. Never blocks longer
        than the close deadline."""
        for episode in self._slots:
            if episode is not None:
                self._release(episode)
        self._workers.abandon([job for _, job in self._scoring])
        self._scoring.clear()
        self._queue.clear()
        self._groups.clear()
        self._finished.clear()
        self._reap(wait=True)

    def close(self) -> None:
        """Closes every environment and ends the worker threads. Idempotent."""
        self.reset()
        self._workers.close()

    # -- one episode -------------------------------------------------------------------------------------------------

    def _note(self, lane: str, episode: Episode, job: Job) -> None:
        if (trace := self.trace) is not None and job.started is not None:
            failed = {} if job.error is None else {"error": str(job.error)}
            trace.add(lane, episode.stage, job.started, job.seconds, trajectory=episode.id, **failed)

    def _episode(self, group: Group, sample: int, attempt: int) -> Episode:
        return Episode(group.request, sample, attempt, self.engine.config.max_length)

    def _take(self, episode: Episode) -> None:
        """Takes the result of the episode's settled environment call."""
        if self._slots[episode.slot] is not episode:
            return  # released a moment ago, with its group
        self._note(f"slot {episode.slot}", episode, episode.job)
        group, job = self._groups[episode.request.group_id], episode.job
        if job.error is not None:
            self._lost(group, episode, job.error)
        elif episode.stage == "reset":
            if episode.opened(job.value):
                episode.job = None
            else:
                self._drop(group, f"the prompt leaves no room in max_length={self.engine.config.max_length} tokens")
        else:
            trajectory = episode.answered(self.renderer, job.value)
            episode.job = None
            if trajectory is not None:
                if self.engine.config.record_experts:
                    trajectory = trajectory.with_experts(self.engine.routed_experts(episode.slot))
                self._release(episode)
                self._score(group, episode, trajectory)

    def _score(self, group: Group, episode: Episode, trajectory: Trajectory) -> None:
        """Sends a finished trajectory through the reward stage, if there is one."""
        if self.rewards is None:
            self._record(group, episode.sample, trajectory)
            return
        episode.stage, rewards = "reward", self.rewards
        job = self._workers.submit(lambda job: rewards(trajectory), self.config.deadlines.reward)
        self._scoring.append((episode, job))

    def _take_scores(self) -> None:
        settled = [entry for entry in self._scoring if entry[1].settled]
        self._scoring = [entry for entry in self._scoring if not entry[1].settled]
        for episode, job in settled:
            self._note("reward", episode, job)
            group = self._groups.get(episode.request.group_id)
            if group is None or group.request is not episode.request:
                continue  # given up meanwhile
            if job.error is not None:
                self._lost(group, episode, job.error)
            else:
                timings = {**job.value.timings, "reward": job.seconds}
                self._record(group, episode.sample, replace(job.value, timings=timings))

    def _record(self, group: Group, sample: int, trajectory: Trajectory) -> None:
        group.finished[sample] = trajectory
        self.stats.trajectories += 1
        self.stats.truncated += trajectory.status is Status.TRUNCATED
        if group.complete:
            self.stats.cancelled += len(group.attempts) - len(group.finished)
            self._abandon(group)
            self._finished.append(group)

    def _abandon(self, group: Group) -> list[str]:
        """Forgets a group; what it has in flight is released. Returns the stages that this was in."""
        del self._groups[group.request.group_id]
        self._queue = deque(episode for episode in self._queue if episode.request is not group.request)
        flying = [e for e in self._slots if e is not None and e.request is group.request]
        for episode in flying:
            self._release(episode)
        return [episode.stage for episode in flying]

    def _lost(self, group: Group, episode: Episode, error: BaseException) -> None:
        """Discards an episode that says nothing about the policy, and starts its sample again."""
        if isinstance(error, EnvFailure):
            status = Status(error.status)
        elif isinstance(error, DeadlineExceeded):
            status = Status.TIMEOUT
            self.stats.hung_calls += 1
        elif isinstance(error, OSError):
            status = Status.INFRA_FAILURE
        else:
            raise error  # a bug, in the environment or here: never hidden behind retries
        self.stats.failures[f"{status.value}/{episode.stage}"] += 1
        if episode.stage != "reward":  # then its slot may be another's by now
            self._release(episode)
        sample = episode.sample
        if group.retries[sample] >= self.config.max_retries:
            group.given_up += 1
            if len(group.attempts) - group.given_up < group.request.size:
                times = group.retries[sample] + 1
                self._drop(group, f"sample {sample} was lost {times} times, last in {episode.stage}: {error}", error)
            return
        group.retries[sample] += 1
        group.attempts[sample] += 1
        self.stats.resampled += 1
        self._queue.appendleft(self._episode(group, sample, group.attempts[sample]))

    def _drop(self, group: Group, reason: str, cause: BaseException | None = None) -> None:
        """Gives a group up: its other samples are aborted."""
        name = group.request.group_id
        dropped = GroupDropped(f"group {name}: {reason}")
        dropped.__cause__ = cause
        self.stats.dropped_groups[name] = dropped
        self.stats.failures.update(f"{Status.ABORTED.value}/{stage}" for stage in self._abandon(group))

    def _release(self, episode: Episode) -> None:
        """Frees the slot and closes the environment, in a worker."""
        if episode.job is not None:
            self._workers.abandon([episode.job])
        self.engine.free(episode.slot)
        self._slots[episode.slot] = None
        episode.job = self._workers.submit(lambda job: episode.close(), self.config.deadlines.close)
        self._closing.append(episode)
        self._reap()

    def _reap(self, wait: bool = False) -> None:
        """Forgets environments that are closed; a close that failed or hung is counted."""
        if wait:
            self._workers.wait([episode.job for episode in self._closing], len(self._closing))
        for episode in self._closing:
            if episode.job.settled and episode.job.error is not None:
                self.stats.failures[f"{type(episode.job.error).__name__}/close"] += 1
        self._closing = [episode for episode in self._closing if not episode.job.settled]

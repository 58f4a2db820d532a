"""The IPA stage: roll out groups, buffer them, update the policy, publish the weights; synchronous or asynchronous."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from rome.data import TaskSampler, TaskSpec
from rome.envs import draft_task
from rome.rollout import (
    BackgroundRollouts,
    GroupRequest,
    HostedRollouts,
    HostPool,
    RolloutRunner,
    RolloutTotals,
    SampleBuffer,
    Trace,
)
from rome.rollout.sync import num_bytes, update_of
from rome.training.resampling import Expert, Resampler, Start, experts_to_imitate
from rome.training.settings import RunSettings
from rome.trajectory import Trajectory


def request_for(spec: TaskSpec, group_id: str, size: int, run_seed: int, start: Start | None = None) -> GroupRequest:
    """A group of `size` samples of the task; the sampling seed is a hash of the run's seed and the group's name."""
    digest = hashlib.sha256(f"{run_seed}/{group_id}".encode()).digest()
    task = draft_task(spec.family, spec.seed, spec.horizon)
    expert, prefix = start or (None, 0)
    return GroupRequest(task, group_id, size, int.from_bytes(digest[:4], "big"), expert, prefix)


WIDE, NARROW = 0, 1  # the engine's placements with `mesh.multiplex`: all devices, those that don't train
FRUITLESS_ROUNDS = 3  # rounds of requests of which not one group came back, after which a run gives up


class RolloutsFailed(RuntimeError):
    """Group after group had to be given up; says why the last one was."""


class Pending(NamedTuple):
    """What a group was asked for: its task, and where it starts (None: the initial state)."""

    spec: TaskSpec
    start: Start | None


class GroupSource:
    """Supplies the trainer with batches of groups, and knows what a checkpoint needs to supply the same ones again.

    At asynchronous ratio 0, `batch` rolls out and returns: deterministic. Above 0, a thread rolls out while the trainer
    trains (with a `pool`: has the hosts do so); `stop` brings it to a standstill before `state_dict` makes a
    checkpoint. Groups are numbered by the sampler's cursor; one given out to be sampled and not yet trained on is
    pending, and is sampled again on resume.

    With `mesh.multiplex`, rollouts have left the training devices when `batch` returns, with all that is in flight, and
    are back on all devices when `publish` does.

    With `rollout.filter_groups` > 0 the buffer drops groups without variance; others are sampled in their place, and
    the sampler learns of their success all the same.

    With `resampling.fraction` > 0 some groups start from the prefix of an expert instead (see
    `rome.training.resampling`); `demonstrations` are the experts. What the last batch asks to imitate is in `experts`.
    """

    def __init__(
        self,
        settings: RunSettings,
        runner: RolloutRunner,
        sampler: TaskSampler,
        demonstrations: Sequence[Trajectory] = (),
        pool: HostPool | None = None,
    ) -> None:
        self._settings, self._runner, self._pool, self.sampler = settings, runner, pool, sampler
        self.buffer = SampleBuffer(settings.rollout.async_ratio, settings.rl.groups, settings.rollout.filter_groups)
        # experts that leave no room for a token of the policy, or fit in no row, are none
        fitting = (
            t
            for t in demonstrations
            if t.num_tokens < settings.engine.max_length and len(t.chunks) <= settings.rl.max_chunks
        )
        self._resampler = Resampler(settings.resampling, fitting, settings.seed)
        self.experts: list[Expert] = []
        self._resampling_metrics: dict[str, float] = {}
        self._move_metrics: dict[str, float] = {}
        self._sync_metrics: dict[str, float] = {}
        self._filtered_rates: list[float] = []  # success of groups filtered since the last batch
        self._filter_metrics: dict[str, float] = {}
        self._lock = threading.Lock()  # of the sampler, the resampler and what is pending: rollouts draw requests
        self._pending: dict[str, Pending] = {}
        self._retry: list[str] = []
        self._lost_before: dict[str, float] = {}  # what `metrics` counted before this process
        self._background: BackgroundRollouts | HostedRollouts | None = None

    @property
    def is_asynchronous(self) -> bool:
        return self.buffer.async_ratio > 0

    def batch(self, version: int) -> list[list[Trajectory]]:
        """`rl.groups` complete groups that are fresh at `version`."""
        wanted = self._settings.rl.groups
        if self.is_asynchronous:
            self._start()
            groups = self.buffer.get_batch(wanted, version, self._settings.rollout.batch_seconds)
            self._move(NARROW, "time/shrink")
        else:
            self.buffer.set_version(version)
            fruitless = 0
            while (missing := wanted - len(self.buffer)) > 0:
                complete = self._runner.run([self._next_request() for _ in range(missing)])
                for group in complete:
                    self.buffer.put_group(group)
                fruitless = 0 if complete else fruitless + 1
                if fruitless == FRUITLESS_ROUNDS:
                    *_, reason = self.stats.dropped.values()
                    raise RolloutsFailed(f"not one group could be completed in {fruitless} rounds; the last: {reason}")
            groups = self.buffer.get_batch(wanted, version)
        with self._lock:
            self._record(groups)
            self._forget_dropped()
        return groups

    def _record(self, groups: list[list[Trajectory]]) -> None:
        """Tells the sampler, or the resampler, what became of their groups."""
        self._record_filtered()
        rates, self._filtered_rates = self._filtered_rates, []
        resampled, forks = [], []
        for group in groups:
            spec, start = self._pending.pop(group[0].group_id)
            if start is None:
                rates.append(self._observe(spec, group))
            else:
                resampled.append((start, group))
                forks += [fork.prefix / len(start.expert.chunks) for fork in self._resampler.record(start, group)]
        self.experts = experts_to_imitate(self._settings.ipa.imitation, resampled)
        if self.buffer.filter_groups and rates:
            self._filter_metrics = {"rollout/success": sum(rates) / len(rates)}
        self._resampling_metrics = {}
        if resampled:
            samples = [t for _, group in resampled for t in group]
            self._resampling_metrics = {
                "resampling/groups": float(len(resampled)),
                "resampling/success": sum(t.succeeded for t in samples) / len(samples),
                "resampling/prefix_mean": sum(start.prefix for start, _ in resampled) / len(resampled),
                "resampling/imitated": float(len(self.experts)),
                **({"resampling/crucial_position": sum(forks) / len(forks)} if forks else {}),
            }

    def _record_filtered(self) -> None:
        """Groups that the buffer filtered are finished: no batch will hold them."""
        for group in self.buffer.take_filtered():
            self._filtered_rates.append(self._observe(self._pending.pop(group[0].group_id).spec, group))

    def _observe(self, spec: TaskSpec, group: list[Trajectory]) -> float:
        """Takes in a group from the initial state; returns its success rate."""
        rate = success_rate(group)
        self.sampler.record(spec.family, spec.horizon, rate)
        self._resampler.observe(group)
        return rate

    @property
    def stats(self) -> RolloutTotals:
        """What this process's runner and the hosts did so far."""
        total = RolloutTotals.of(self._runner)
        if self._pool is not None:
            total.add(self._pool.stats)
        return total

    @property
    def trace(self) -> Trace | None:
        """Where rollouts, those of hosts too, write down what happens when; None: nowhere."""
        return self._runner.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._runner.trace = trace
        if self._pool is not None:
            self._pool.trace = trace

    def publish(self, params: Any, version: int) -> None:
        """New weights for whatever rolls out; of `Adapted` ones, only the adapters travel."""
        started, update = time.monotonic(), update_of(params)
        self._runner.update_weights(params, version)
        if self._pool is not None:
            self._pool.publish(update, version)
        self._sync_metrics = {"time/sync": time.monotonic() - started, "sync/bytes": float(num_bytes(update))}
        self.buffer.set_version(version)
        self._move(WIDE, "time/expand")

    def _move(self, placement: int, metric: str) -> None:
        """With multiplexing: moves the rollouts, and notes the seconds until they are there."""
        mesh = self._settings.mesh
        if not mesh.multiplex:
            return
        started = time.monotonic()
        self._runner.engine.move_to(placement)
        self._move_metrics |= {
            metric: time.monotonic() - started,
            "devices/training": float(mesh.train.size),
            "devices/rolling_out_meanwhile": float(mesh.narrow.size),
        }

    def metrics(self) -> dict[str, float]:
        """What was lost so far, by reason (stale samples, failed episodes, groups given up); resampling; moves."""
        counts = self.buffer.stats  # they survive checkpoints by themselves
        return {
            "buffer/dropped_stale": float(counts.dropped_stale),
            "buffer/dropped_with_group": float(counts.dropped_with_group),
            "buffer/filtered_solved": float(counts.filtered_solved),
            "buffer/filtered_failed": float(counts.filtered_failed),
            **self._lost(),
            **self._filter_metrics,
            **self._resampling_metrics,
            **self._move_metrics,
            **self._sync_metrics,
            **({"time/sync_host": self.stats.swap_seconds} if self._pool is not None else {}),
            **(self._resampler.metrics() if self._settings.resampling.fraction else {}),
        }

    def _lost(self) -> dict[str, float]:
        stats = self.stats
        lost = {
            "rollout/resampled": float(stats.resampled),
            **({"rollout/cancelled": float(stats.cancelled)} if self._settings.rollout.redundancy else {}),
            "rollout/dropped_groups": float(len(stats.dropped)),
            **({"rollout/lost_hosts": float(stats.lost_hosts)} if self._pool is not None else {}),
            **{f"rollout/failures/{reason}": float(count) for reason, count in stats.failures.items()},
        }
        before = self._lost_before
        return {name: before.get(name, 0.0) + lost.get(name, 0.0) for name in {**before, **lost}}

    def stop(self) -> None:
        """Ends background rollouts, if any; what was in flight stays pending. `batch` starts them again."""
        if self._background is not None:
            background, self._background = self._background, None
            background.stop()
            self.buffer.take_discarded()  # by now only this list of pending ones knows what is to be sampled again
            with self._lock:
                self._record_filtered()
            self._retry = self._unbuffered()

    def state_dict(self) -> tuple[dict[str, Any], bytes]:
        """(JSON cursor, buffer bytes). Call it while nothing rolls out."""
        pending = [
            [name, spec.family, spec.horizon, spec.seed, *([start.expert.id, start.prefix] if start else [])]
            for name, (spec, start) in self._pending.items()
        ]
        cursor = {"sampler": self.sampler.state_dict(), "pending": pending, "lost": self._lost()}
        resampler = self._resampler.state_dict(start for _, start in self._pending.values() if start)
        return cursor, msgpack.packb({"buffer": self.buffer.state_dict(), "resampler": resampler})

    def load_state_dict(self, cursor: dict[str, Any], buffer: bytes) -> None:
        """The inverse of `state_dict`."""
        state = msgpack.unpackb(buffer)
        self.sampler.load_state_dict(cursor["sampler"])
        experts = self._resampler.load_state_dict(state["resampler"])
        self._pending = {
            name: Pending(TaskSpec(*spec), Start(experts[start[0]], start[1]) if start else None)
            for name, *spec, start in ((*entry[:4], entry[4:]) for entry in cursor["pending"])
        }
        self._lost_before = {str(name): float(count) for name, count in cursor["lost"].items()}
        self.buffer.load_state_dict(state["buffer"])
        self._record_filtered()
        self._retry = self._unbuffered()

    def _unbuffered(self) -> list[str]:
        """Pending groups that the buffer does not hold, in the order in which they were drawn."""
        waiting = set(self.buffer.group_ids())
        return [name for name in self._pending if name not in waiting]

    def _next_request(self) -> GroupRequest:
        with self._lock:
            if self._retry:
                return self._request(self._retry.pop(0))
            number = self.sampler.cursor
            spec = self.sampler.next(1)[0]
            start = self._resampler.next(number, self.sampler.success)
            if start is not None:
                task = start.expert.task
                spec = TaskSpec(task.family, task.horizon, task.seed)
            name = f"group-{number}"
            self._pending[name] = Pending(spec, start)
            return self._request(name)

    def _request(self, name: str) -> GroupRequest:
        spec, start = self._pending[name]
        return request_for(spec, name, self._settings.rl.group_size, self._settings.seed, start)

    def _requests(self) -> Iterator[GroupRequest]:
        while True:
            yield self._next_request()

    def _start(self) -> None:
        if self._background is None:
            known = [self._request(name) for name in self.buffer.group_ids()]
            if self._pool is None:
                self._background = BackgroundRollouts(self._runner, self.buffer, self._requests(), known)
            else:
                self._background = HostedRollouts(self._pool, self.buffer, self._requests(), known)
            self._background.start()

    def _forget_dropped(self) -> None:
        """Groups that the runner gave up (their sandbox failed again and again) will not come back."""
        for name in self.stats.dropped:
            self._pending.pop(name, None)


def success_rate(group: Sequence[Trajectory]) -> float:
    """Of a group's rollouts; the segments of one (`MessageTree`) count once."""
    rollouts = {t.id.partition("~")[0]: t.succeeded for t in group}
    return sum(rollouts.values()) / len(rollouts)


def rollout_metrics(groups: list[list[Trajectory]], version: int) -> dict[str, float]:
    """What a batch of groups looks like: staleness of all; success and lengths of those from the initial state."""
    staleness = [version - t.start_version for group in groups for t in group]
    ages = {f"buffer/staleness_{age}": staleness.count(age) / len(staleness) for age in range(max(staleness) + 1)}
    ages |= {"buffer/staleness_mean": sum(staleness) / len(staleness), "buffer/staleness_max": float(max(staleness))}
    groups = [group for group in groups if not group[0].prefix_chunks]
    if not groups:  # every one of them was resampled from a prefix
        return ages
    samples = [t for group in groups for t in group]
    count = len(samples)
    rates = [success_rate(group) for group in groups]
    return {
        "train/success": sum(rates) / len(rates),
        "train/reward_mean": sum(float(t.final_reward or 0.0) for t in samples) / count,
        "train/groups_all_failed": sum(rate == 0 for rate in rates) / len(rates),
        "train/groups_all_solved": sum(rate == 1 for rate in rates) / len(rates),
        "train/truncated_fraction": sum(t.status.value == "truncated" for t in samples) / count,
        "rollout/chunks_mean": sum(len(t.chunks) for t in samples) / count,
        "rollout/tokens_mean": sum(t.num_tokens for t in samples) / count,
        "rollout/error_fraction": sum(c.error for t in samples for c in t.chunks) / sum(len(t.chunks) for t in samples),
        **ages,
    }

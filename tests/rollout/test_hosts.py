"""Rollout hosts as real Ray actors: fed, updated, killed, hung, replaced; only their unfinished work is lost."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from pathlib import Path

import jax
import pytest
from rollout_toys import (
    MODEL,
    Journal,
    ToyEnv,
    ToyRenderer,
    endless_requests,
    toy_engine,
    toy_params,
    toy_requests,
)
from waiting import wait_until

from rome.models.lora import Adapted, LoraConfig, adapt, merge
from rome.rollout import Deadlines, RolloutConfig, RolloutRunner, SampleBuffer
from rome.rollout.buffer import BufferClosed
from rome.rollout.hosts import HostConfig, HostedRollouts, HostPool, HostsLost
from rome.rollout.sync import AdapterMerger, update_of
from rome.rollout.trace import Trace

ray = pytest.importorskip("ray")
WAIT = 240.0
pytestmark = pytest.mark.timeout(600)


class TracedEnv(ToyEnv):
    """Leaves a file while it is open."""

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__(Journal())
        self.folder, self.seconds, self.file = folder, seconds, None

    def reset(self, *, seed=None, options=None):
        self.file = self.folder / f"env-{os.getpid()}-{id(self)}"
        self.file.touch()
        return super().reset(seed=seed, options=options)

    def step(self, action):
        time.sleep(self.seconds)
        return super().step(action)

    def close(self):
        super().close()
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def make_runner(folder, seconds, params, version):
    """Runs in the host, with merged weights if it is given adapters.

    A file `broken` makes every host fail; one named `hang` makes one of them stop for ever."""
    if (folder / "broken").exists():
        raise RuntimeError("no policy for you")
    engine = toy_engine()
    engine.warmup()
    merger = None
    if isinstance(params, Adapted):
        merger = AdapterMerger(params, MODEL)
        params = merger(params)
    if version:
        engine.update_params(params, version)
    generate = engine.generate

    def perhaps_hang(*args, **kwargs):
        try:
            (folder / "hang").unlink()
        except FileNotFoundError:
            return generate(*args, **kwargs)
        time.sleep(3600)

    engine.generate = perhaps_hang
    deadlines = Deadlines(reset=60, step=60, verify=60, close=60)
    config = RolloutConfig(env_threads=4, deadlines=deadlines)
    return RolloutRunner(engine, ToyRenderer(), lambda: TracedEnv(folder, seconds), config, merger=merger)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on this machine; its workers find the toys."""
    here = Path(__file__).parent
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), str(here.parent), before]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def pool(cluster, tmp_path_factory):
    """Two hosts whose environments take a moment, and the folder that they are traced in."""
    folder = tmp_path_factory.mktemp("traces")
    with make_pool(folder) as made:
        yield made, folder


def make_pool(folder, seconds=0.02, params=None, **config):
    settings = {"hosts": 2, "boot_seconds": WAIT, "silent_seconds": 60.0, **config}
    make = functools.partial(make_runner, folder, seconds)
    return HostPool(make, params or toy_params(), 0, HostConfig(**settings))


def buffer_at(pool, ratio):
    buffer = SampleBuffer(ratio, 2)
    buffer.set_version(pool.version)
    return buffer


def consume(buffer, steps, batch=2, publish=None):
    """What a trainer does: takes batches, checks their age, publishes. Returns the groups."""
    groups = []
    for _ in range(steps):
        version = buffer.version
        taken = buffer.get_batch(batch, version, timeout=WAIT)
        for sample in itertools.chain(*taken):
            assert 0 <= version - sample.start_version <= buffer.async_ratio
        groups += taken
        if publish:
            publish(toy_params((version + 1) % 2), version + 1)
            buffer.set_version(version + 1)
    return groups


def pids(pool):
    return ray.get([seat.actor.ready.remote() for seat in pool.seats], timeout=WAIT)


def versions(pool):
    return [report.version for report in ray.get([seat.actor.take.remote(0.0) for seat in pool.seats], timeout=WAIT)]


def test_hosts_feed_the_trainer_under_weights_that_change_and_close_their_environments(pool):
    pool, folder = pool
    buffer, trace, began = buffer_at(pool, 1.0), Trace(), time.monotonic()
    pool.trace = trace
    with HostedRollouts(pool, buffer, endless_requests()) as rollouts:
        groups = consume(buffer, 8, publish=pool.publish)
        # what happened there comes with the answers, on the clock of this process
        wait_until(lambda: {span.lane.partition(": ")[0] for span in trace.spans} == {"host 0", "host 1"})
        pool.trace = None
        opened_by = {path.name.split("-")[1] for path in folder.glob("env-*")}
        unfinished = rollouts.stop()
    assert len({group[0].group_id for group in groups}) == 16
    stamps = {int(v) for group in groups for t in group for c in t.chunks for v in c.versions}
    assert len(stamps) > 2
    assert opened_by <= {str(pid) for pid in pids(pool)}
    assert {request.group_id for request in unfinished}.isdisjoint(g[0].group_id for g in groups)
    wait_until(lambda: not list(folder.glob("env-*")))
    stats = pool.stats
    assert stats.decoded_tokens >= sum(len(c.tokens) for group in groups for t in group for c in t.chunks)
    assert 0 < stats.swap_seconds < WAIT
    assert all(began <= span.start <= span.start + span.seconds <= time.monotonic() for span in trace.spans)
    assert {"reset", "step"} <= {span.name for span in trace.spans}


def test_the_pool_outlives_the_rollouts_and_the_same_request_gives_the_same_tokens_wherever_it_runs(pool):
    pool, _ = pool
    requests, tokens = toy_requests(groups=4, size=2), []
    for _ in range(2):
        buffer = buffer_at(pool, 1.0)
        with HostedRollouts(pool, buffer, list(requests)):
            groups = consume(buffer, 2)
        tokens.append({t.id: [c.tokens.tolist() for c in t.chunks] for group in groups for t in group})
    assert len(tokens[0]) == 8
    assert tokens[0] == tokens[1]


def test_a_killed_host_loses_nothing_but_its_unfinished_work(pool):
    pool, _ = pool
    buffer, victim = buffer_at(pool, 2.0), pids(pool)[0]
    before = pool.stats
    with HostedRollouts(pool, buffer, endless_requests()) as rollouts:
        groups = consume(buffer, 2)
        wait_until(lambda: pool.seats[0].held)
        os.kill(victim, signal.SIGKILL)
        groups += consume(buffer, 8)
        wait_until(lambda: pool.stats.lost_hosts > before.lost_hosts and not any(seat.booting for seat in pool.seats))
        groups += consume(buffer, 3)
        rollouts.stop()
    assert victim not in pids(pool)
    names = [group[0].group_id for group in groups]
    assert len(set(names)) == len(names)
    again = [t for group in groups for t in group if t.id.endswith("+1")]
    assert again, "what the host had in flight was sampled again"
    assert pool.stats.failures["aborted/host"] >= before.failures["aborted/host"] + 2


def test_a_hung_host_is_replaced(cluster, tmp_path):
    with make_pool(tmp_path, silent_seconds=8.0) as pool:
        buffer = buffer_at(pool, 1.0)
        with HostedRollouts(pool, buffer, endless_requests()) as rollouts:
            consume(buffer, 1)
            (tmp_path / "hang").touch()
            wait_until(lambda: pool.stats.lost_hosts == 1)
            consume(buffer, 6)
            rollouts.stop()


def test_a_host_that_got_new_weights_before_it_booted_ends_up_with_them(pool):
    pool, _ = pool
    buffer, lost, last = buffer_at(pool, 30.0), pool.stats.lost_hosts, pool.version + 2
    os.kill(pids(pool)[1], signal.SIGKILL)
    with HostedRollouts(pool, buffer, endless_requests()):
        wait_until(lambda: pool.stats.lost_hosts > lost)
        pool.publish(toy_params(1), last - 1)
        pool.publish(toy_params(0), last)
        wait_until(lambda: not any(seat.booting for seat in pool.seats))
        wait_until(lambda: versions(pool) == [last, last])
    time.sleep(0.5)
    assert versions(pool) == [last, last]


def test_adapters_travel_alone_and_reach_a_host_that_replaces_another(cluster, tmp_path):
    """The base goes to a host when it starts; its weights are those of the last update then."""
    start = adapt(toy_params(), MODEL, LoraConfig(rank=2, targets=("wq", "lm_head")), jax.random.key(1))
    later = start.replace(adapters=jax.tree.map(lambda leaf: leaf + 0.2, start.adapters))
    engine = toy_engine()
    engine.update_params(merge(later), 3)
    requests = toy_requests(groups=2, size=2)
    with RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal())) as runner:
        expected = {t.id: [c.tokens.tolist() for c in t.chunks] for g in runner.run(requests) for t in g}
    with make_pool(tmp_path, seconds=0.0, params=start, hosts=1) as pool:
        pool.publish(update_of(later), 3)
        wait_until(lambda: versions(pool) == [3])
        with HostedRollouts(pool, buffer_at(pool, 30.0), endless_requests()):
            os.kill(pids(pool)[0], signal.SIGKILL)
            wait_until(lambda: pool.stats.lost_hosts == 1 and not pool.seats[0].booting)
        buffer = buffer_at(pool, 1.0)
        with HostedRollouts(pool, buffer, list(requests)):
            groups = consume(buffer, 1)
    assert {t.id: [c.tokens.tolist() for c in t.chunks] for g in groups for t in g} == expected


def test_hosts_that_fail_again_and_again_end_the_run_with_the_reason(cluster, tmp_path):
    (tmp_path / "broken").touch()
    with make_pool(tmp_path, max_losses=2) as pool:
        buffer = buffer_at(pool, 1.0)
        rollouts = HostedRollouts(pool, buffer, endless_requests())
        rollouts.start()
        with pytest.raises(BufferClosed) as caught:
            buffer.get_batch(2, 0, timeout=WAIT)
        assert isinstance(caught.value.__cause__, HostsLost)
        with pytest.raises(HostsLost, match="no policy for you"):
            rollouts.stop()


@pytest.mark.parametrize(
    ("field", "value"), [("hosts", 0), ("cpus", -1.0), ("boot_seconds", 0.0), ("silent_seconds", -1.0)]
)
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        HostConfig(**{"hosts": 1, field: value})


def test_a_synchronous_buffer_is_refused():
    with pytest.raises(ValueError, match="async_ratio"):
        HostedRollouts(None, SampleBuffer(0.0, 1), [])

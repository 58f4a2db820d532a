"""Break things under a running job, and see whether it goes on and learns the same.

python benchmarks/faults.py [--steps 16] [--seeds 2] [--json FILE]     (or benchmarks/rollout.py --faults)

The job: a toy policy learns, on two Ray hosts, to begin its tool calls with even tokens. Each call runs in a sandbox of
a real admin, and a judge behind an OpenAI-compatible endpoint adds to the reward. The admin and the judge are reached
through relays on loopback. The same job with faults: 5 % of the tools hang all along; at a quarter of the steps a Ray
host is killed; at half of them the worker that holds all sandboxes; at three quarters both relays drop every
connection and take none for a while. Clean runs with several seeds tell what noise is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import random
import select
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "rollout"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "rock_env" / "admin"))
from admin_harness import AdminProcess
from rollout_toys import MODEL, Journal, ToyEnv, ToyRenderer, toy_params, toy_task

from rock_env import BackendUnavailable, Sandbox, SandboxSpec
from rock_env.remote import Client
from rome.envs import EnvFailure
from rome.envs.sandboxes import infrastructure
from rome.ipa import ObjectiveConfig
from rome.rollout import (
    Deadlines,
    DecodeEngine,
    EngineConfig,
    GroupRequest,
    HostConfig,
    HostedRollouts,
    HostPool,
    JudgeConfig,
    RewardConfig,
    RewardStage,
    RolloutConfig,
    RolloutRunner,
    SampleBuffer,
)
from rome.training.policy import PolicySettings, PolicyTrainer
from rome.training.state import OptimizerConfig, init_state, make_optimizer
from rome.trajectory import Status

IMPORTS = [str(Path(__file__).resolve().parent), *sys.path[:2]]  # of the hosts
GROUPS, GROUP_SIZE, SLOTS = 8, 4, 24
HANGING, TOOL_SECONDS, DROPPED_SECONDS = 0.05, 8.0, 5.0


@dataclass(frozen=True)
class Services:
    """Where hosts find what they need, and whether their tools hang."""

    admin: str
    key: str
    judge: str
    hanging: float


class SandboxedEnv(ToyEnv):
    """Success: the first token of each tool call is even. Every call is a command in a sandbox of the admin."""

    def __init__(self, services: Services) -> None:
        super().__init__(Journal())
        self.services, self.even = services, True
        self.client: Client | None = None
        self.box: Sandbox | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        with self._failures():
            self.client = Client(self.services.admin, self.services.key)
            self.box = self.client.start(SandboxSpec(), idle_seconds=300)
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        hangs = random.random() < self.services.hanging
        with self._failures():
            self.box.execute("sleep 600" if hangs else "true", timeout=600)
        words = action.replace("<tool_call>", "").replace("</tool_call>", "").split()
        self.even &= bool(words) and int(words[0]) % 2 == 0
        text, _, over, cut, info = super().step(action)
        return text, float(self.even and (over or cut)), over, cut, info

    def close(self) -> None:
        super().close()
        box, client, self.box, self.client = self.box, self.client, None, None
        with contextlib.suppress(Exception):  # the network may be gone; the admin ends what is idle
            if box is not None:
                box.stop()
        if client is not None:
            client.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """An admin that can't be reached now can be later."""
        try:
            with infrastructure(lambda: None):
                yield
        except BackendUnavailable as error:
            raise EnvFailure(Status.INFRA_FAILURE, str(error)) from error


def make_runner(services: Services, params: Any, version: int) -> RolloutRunner:
    """Runs in the hosts."""
    shapes = EngineConfig(slots=SLOTS, cohorts=2, max_length=96, extend_buckets=(8, 16), max_chunk_tokens=10)
    engine = DecodeEngine(params, MODEL, shapes, ToyRenderer.stop_ids, pad_id=0, version=version)
    engine.warmup()
    deadlines = Deadlines(reset=60.0, step=TOOL_SECONDS, verify=TOOL_SECONDS, close=30.0, reward=30.0)
    judge = JudgeConfig(weight=0.2, url=services.judge, model="judge", seconds=10.0)
    config = RolloutConfig(env_threads=SLOTS, max_retries=20, deadlines=deadlines)
    return RolloutRunner(
        engine, ToyRenderer(), lambda: SandboxedEnv(services), config, RewardStage(RewardConfig(judge=judge))
    )


class Judge(ThreadingHTTPServer):
    """Gives 1 for what passed its tests, else 0, as a chat completion."""

    daemon_threads = True

    class _Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            message = {"role": "assistant", "content": json.dumps({"score": float("TESTS: passed" in asked)})}
            body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self._Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Relay:
    """A TCP relay on loopback to a port of loopback; `drop` cuts all connections and refuses new ones for a while."""

    def __init__(self, target: int) -> None:
        self._target, self._open, self._lock = target, set(), threading.Lock()
        self._down_until, self._closed = 0.0, False
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.2)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def drop(self, seconds: float) -> None:
        with self._lock:
            self._down_until = time.monotonic() + seconds
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self.drop(math.inf)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
            except TimeoutError:
                continue
            if time.monotonic() < self._down_until:
                near.close()
                continue
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()
        self._server.close()

    def _carry(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError), near, socket.create_connection(("127.0.0.1", self._target), 10) as far:
            with self._lock:
                self._open |= {near, far}
            try:
                while True:
                    for end in select.select([near, far], [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        (far if end is near else near).sendall(data)
            finally:
                with self._lock:
                    self._open -= {near, far}


@dataclass
class Outcome:
    """Of one run: success in its first and in its last quarter, with 95 % intervals; what was lost, by reason."""

    name: str
    steps: int
    first: float
    last: float
    margin: float
    lost_hosts: int
    resampled: int
    failures: dict[str, int]
    seconds: float
    happened: list[str]


class Job:
    """One run of the job, and what can be done to it."""

    def __init__(self, admin: AdminProcess, judge: Judge, faulty: bool) -> None:
        self.admin, self.faulty = admin, faulty
        self.relays = [Relay(int(admin.url.rpartition(":")[2])), Relay(judge.server_port)]
        urls = [f"http://127.0.0.1:{relay.port}" for relay in self.relays]
        self.services = Services(urls[0], admin.key, f"{urls[1]}/v1", HANGING if faulty else 0.0)

    def kill_host(self, pool: HostPool) -> str:
        seat = next(seat for seat in pool.seats if not seat.booting)
        os.kill(pool.ray.get(seat.actor.ready.remote(), timeout=120), signal.SIGKILL)
        return "a Ray host was killed"

    def kill_worker(self, pool: HostPool) -> str:
        os.kill(self.admin.worker_pid(), signal.SIGKILL)
        return "the sandboxes' worker was killed"

    def drop_network(self, pool: HostPool) -> str:
        for relay in self.relays:
            relay.drop(DROPPED_SECONDS)
        return f"the network was gone for {DROPPED_SECONDS:g} s"

    def run(self, name: str, steps: int, seed: int) -> Outcome:
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
        settings = PolicySettings(10_000, GROUPS, GROUP_SIZE, 96, 8, 8, optimizer)
        transformation = make_optimizer(optimizer, settings.steps)
        state = init_state(jax.tree.map(jnp.copy, toy_params(0)), transformation)
        trainer = PolicyTrainer(MODEL, ObjectiveConfig(gamma=1.0, failure_reward=0.0), transformation, settings)
        trainer.warmup(state)
        faults: dict[int, Callable[[HostPool], str]] = {}
        if self.faulty:
            faults = {steps // 4: self.kill_host, steps // 2: self.kill_worker, 3 * steps // 4: self.drop_network}
        requests = (GroupRequest(toy_task(f"t{n}"), f"g{n}", GROUP_SIZE, 100_003 * seed + n) for n in range(10**6))
        buffer, success, happened, started = SampleBuffer(1.0, GROUPS), [], [], time.monotonic()
        config = HostConfig(2, cpus=0.5, silent_seconds=120.0)
        with (
            HostPool(functools.partial(make_runner, self.services), state.params, 0, config) as pool,
            HostedRollouts(pool, buffer, requests),
        ):
            for step in range(steps):
                if step in faults:
                    happened.append(f"step {step}: {faults[step](pool)}")
                groups = buffer.get_batch(GROUPS, step, timeout=900)
                samples = [t for group in groups for t in group]
                success.append(sum(t.succeeded for t in samples) / len(samples))
                state, _ = trainer.update(state, samples, step)
                pool.publish(state.params, step + 1)
            stats = pool.stats
        quarter = max(1, steps // 4)
        first, last = (statistics.mean(part) for part in (success[:quarter], success[-quarter:]))
        count = quarter * GROUPS * GROUP_SIZE
        margin = 1.96 * math.sqrt(max(last * (1 - last), 1 / count) / count)
        failures, seconds = dict(Counter(stats.failures)), time.monotonic() - started
        return Outcome(
            name, len(success), first, last, margin, stats.lost_hosts, stats.resampled, failures, seconds, happened
        )

    def close(self) -> None:
        for relay in self.relays:
            relay.close()


def compare(console: Console, steps: int, seeds: int) -> dict[str, Any]:
    """Clean runs with several seeds, and one with faults."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing that was started outlives this
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*IMPORTS, before]))
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        admin = AdminProcess(Path(folder) / "admin").start()
        stack.callback(admin.stop)
        judge = Judge()
        stack.callback(judge.server_close)
        stack.callback(judge.shutdown)
        for name, seed, faulty in [
            *((f"clean, seed {n}", n, False) for n in range(seeds)),
            ("faults, seed 0", 0, True),
        ]:
            job = Job(admin, judge, faulty)
            try:
                outcomes.append(job.run(name, steps, seed))
            finally:
                job.close()
            console.print(f"{name}: {outcomes[-1].seconds:.0f} s; {'; '.join(outcomes[-1].happened) or 'no faults'}")
    table = Table(title=f"{steps} steps of {GROUPS * GROUP_SIZE} samples; success in the first and the last quarter")
    for title in ("", "steps", "first", "last", "lost hosts", "sampled again", "lost samples by reason"):
        table.add_column(title)
    for o in outcomes:
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(o.failures.items())) or "none"
        last = f"{o.last:.2f} ± {o.margin:.2f}"
        table.add_row(o.name, f"{o.steps}", f"{o.first:.2f}", last, f"{o.lost_hosts}", f"{o.resampled}", reasons)
    console.print(table)
    return {"outcomes": [asdict(o) for o in outcomes]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = compare(Console(), arguments.steps, arguments.seeds)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Many simulated sandboxes on a simulated Ray cluster: what the control plane can do. See `sandbox.py --simulated N`.

Real are the admin's control plane, its database (SQLite on disk), its scheduler and reconcile loop, Ray and its calls,
and a worker in an actor on each node. Simulated are the nodes (Ray processes of this machine) and the sandboxes: their
backend keeps a name and starts no process.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rock_env import SandboxSpec, register_backend
from rock_env.admin.auth import ADMIN_TENANT, SCOPES, Principal
from rock_env.admin.control import ControlPlane, Record, StartRequest
from rock_env.admin.models import State
from rock_env.admin.server import Admin, AdminConfig
from rock_env.backend import CAPABILITIES
from rock_env.errors import SandboxDead
from rock_env.spec import CommandResult, FileEntry, FileInfo, SandboxStats

_SECONDS = 600.0  # until anything that is waited for counts as hung
_NODE_ATTEMPTS = 5
_HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
_WHO = Principal("benchmark", ADMIN_TENANT, True, None, frozenset(SCOPES))


class SimulatedBackend:
    """Sandboxes that are names: commands answer at once, with nothing."""

    name = "simulated"
    capabilities = CAPABILITIES - {"jobs"}
    audit_log = "/dev/null"

    def __init__(self) -> None:
        self._made = 0
        self._live: set[str] = set()

    def create(self, spec: SandboxSpec, snapshot: str | None = None) -> str:
        self._made += 1
        handle = f"simulated:{self._made}"
        self._live.add(handle)
        return handle

    def execute(
        self, sandbox: str, argv: list[str], seconds: float, cwd: str | None, env: Mapping[str, str], output_bytes: int
    ) -> CommandResult:
        if sandbox not in self._live:
            raise SandboxDead(f"sandbox {sandbox} has ended: it was stopped")
        return CommandResult(exit_code=0, output="")

    def run(self, sandbox: str, session: str, command: str, seconds: float, output_bytes: int) -> CommandResult:
        return self.execute(sandbox, [command], seconds, None, {}, output_bytes)

    def put(self, sandbox: str, files: Mapping[str, FileEntry], links: Mapping[str, str]) -> None:
        self.execute(sandbox, [], 0.0, None, {}, 0)

    def list(self, sandbox: str, path: str, recursive: bool) -> list[FileInfo]:
        return []

    def stats(self, sandbox: str) -> SandboxStats:
        raise SandboxDead(f"sandbox {sandbox} has ended: it was stopped")

    def is_alive(self, sandbox: str) -> bool:
        return sandbox in self._live

    def destroy(self, sandbox: str) -> None:
        self._live.discard(sandbox)

    def close(self) -> None:
        self._live.clear()


def register() -> None:
    """In each worker's process, before it serves."""
    register_backend("simulated", SimulatedBackend)


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def _add_node(cluster: Any) -> Any:
    """Ray gives a node 30 seconds to start, which a busy machine may not have."""
    attempts = 1
    while True:
        try:
            return cluster.add_node(num_cpus=0)
        except Exception as error:  # of no other type
            if attempts == _NODE_ATTEMPTS or "timed out" not in str(error):
                raise
            attempts += 1


@asynccontextmanager
async def running(nodes: int, capacity: int) -> AsyncIterator[tuple[Admin, Any, dict[str, Any]]]:
    """(an admin, the cluster, its nodes but the head by their worker's name); each of `nodes` nodes has a worker."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))  # other nodes do not have this file
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        added = [_add_node(cluster) for _ in range(nodes - 1)]
        with tempfile.TemporaryDirectory() as folder:
            settings = {"workers": 0, "capacity": capacity, "ray": cluster.address, "orphan_seconds": 30.0}
            settings |= {"reconcile_seconds": 5.0, "worker_seconds": 300.0}  # all nodes share this machine's cores
            admin = Admin(AdminConfig(Path(folder), backends=("simulated",), **settings), register)
            await admin.start()
            try:
                yield admin, cluster, {f"ray-{node.node_id[:16]}": node for node in added}
            finally:
                await admin.stop()
    finally:
        cluster.shutdown()


async def start(control: ControlPlane, count: int, clients: int) -> tuple[float, list[float], list[Record]]:
    """(seconds in all, milliseconds of each, the records) of `count` starts, `clients` at a time."""
    spec, latencies, records = SandboxSpec(backend="simulated"), [], []
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            began = time.perf_counter()
            record = await control.start(_WHO, StartRequest(spec, idle_seconds=3600.0, queue_seconds=_SECONDS))
            await control.settled(record, _SECONDS)
            if record.state is State.RUNNING:
                latencies.append(1e3 * (time.perf_counter() - began))
            records.append(record)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, latencies, records


async def use(control: ControlPlane, records: list[Record], count: int, clients: int) -> tuple[float, list[float]]:
    """The same of `count` commands, in one sandbox after another."""
    latencies: list[float] = []
    left = iter(range(count))

    async def client() -> None:
        for number in left:
            arguments = {"argv": ["true"], "seconds": 10.0, "cwd": None, "env": {}, "output_bytes": 1024}
            began = time.perf_counter()
            await control.call(records[number % len(records)], "execute", 60.0, **arguments)
            latencies.append(1e3 * (time.perf_counter() - began))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, latencies


async def stop(control: ControlPlane, records: list[Record], clients: int) -> float:
    """Seconds to end them all, `clients` at a time."""
    left = iter(records)

    async def client() -> None:
        for record in left:
            await control.stop(record, "the benchmark is over")

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began


async def kill_a_node(admin: Admin, cluster: Any, node: Any, name: str) -> dict[str, float]:
    """Kill a node under new requests. What it had is declared lost; what is started meanwhile and after it runs."""
    control = admin.control
    there = [record for record in control.live.values() if record.row.worker == name]
    began = time.perf_counter()
    killing = asyncio.create_task(asyncio.to_thread(cluster.remove_node, node, False))
    found = {"sandboxes on it": float(len(there))}
    _, _, meanwhile = await start(control, 200, 8)
    await killing
    async with asyncio.timeout(_SECONDS):
        while not all(record.state is State.LOST for record in there) or name in control.scheduler.hosts:
            await asyncio.sleep(0.05)
    found["seconds until all are declared lost"] = time.perf_counter() - began
    found["of 200 starts meanwhile: running"] = sum(record.state is State.RUNNING for record in meanwhile)
    found["of 200 starts meanwhile: failed or lost with it"] = 200 - found["of 200 starts meanwhile: running"]
    seconds, _, again = await start(control, len(there), 64)
    found["started again on the others"] = sum(record.state is State.RUNNING for record in again)
    found["seconds for that"] = seconds
    return found


def _percentiles(name: str, seconds: float, latencies: list[float]) -> dict[str, float]:
    values = sorted(latencies)
    at = lambda part: values[min(len(values) - 1, int(part * len(values)))]  # noqa: E731
    found = {"p50 ms": statistics.median(values), "p95 ms": at(0.95), "p99 ms": at(0.99), "max ms": values[-1]}
    return {f"{name}: a second": len(values) / seconds, **{f"{name}: {key}": value for key, value in found.items()}}


async def measure(count: int, nodes: int) -> AsyncIterator[dict[str, float]]:
    """What was found, by name, as it is found. Everything has ended when this is exhausted."""
    capacity = 200 + -(-count // (nodes - 1))
    async with running(nodes, capacity) as (admin, cluster, added):
        control, hosts = admin.control, admin.control.scheduler.hosts
        before, cpu = rss_mb(os.getpid()), time.process_time()
        seconds, latencies, records = await start(control, count, 64)
        yield {"sandboxes running": float(len(latencies)), **_percentiles("placements", seconds, latencies)}
        yield {"placements: CPU ms of the control plane": 1e3 * (time.process_time() - cpu) / count}
        spread = Counter(record.row.worker for record in records)
        yield {"fewest on a node": min(spread.values()), "most on a node": max(spread.values())}
        yield _percentiles("commands", *await use(control, records, 5000, 64))
        began = time.perf_counter()
        for host in hosts.values():
            await admin.reconciler.round(host)
        yield {"reconcile round over all nodes, ms": 1e3 * (time.perf_counter() - began)}
        yield {"control plane, MB": rss_mb(os.getpid())}
        yield {"control plane, KB a sandbox": 1024 * (rss_mb(os.getpid()) - before) / count}
        yield {"a worker, MB (median)": statistics.median(rss_mb(host.pid or 0) for host in hosts.values())}
        name, node = next(iter(added.items()))
        yield {f"a node dies: {key}": value for key, value in (await kill_a_node(admin, cluster, node, name)).items()}
        live = list(control.live.values())
        yield {"stops: a second": len(live) / await stop(control, live, 64)}
        yield {"live at the end": float(len(control.live))}


def text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def show(found: dict[str, float], nodes: int) -> None:
    table = Table(title=f"Control plane over Ray: {nodes} simulated nodes, SIMULATED sandboxes (no processes)")
    table.add_column("what")
    table.add_column("", justify="right")
    for name, value in found.items():
        table.add_row(name, text(value))
    Console().print(table)

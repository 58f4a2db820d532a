"""Measure the sandboxes of this machine: latency of every operation (local, and over REST), CPU time per sandbox, 200
live at once. Needs the extra `rock`.

python benchmarks/sandbox.py [--repeats 50] [--live 200] [--docker-repeats 20] [--swerex PYTHON] [--rlrock PYTHON]
                             [--json FILE]
python benchmarks/sandbox.py --simulated 10000 [--nodes 10] [--json FILE]

`--swerex`, `--rlrock`: a Python that has `swe-rex`, or `rl-rock[rocklet]`, whose local sessions are measured in the
same run (`python -m venv V; V/bin/pip install 'rl-rock[rocklet]'`, then `--rlrock V/bin/python`).
`--simulated`: only this: the control plane over Ray (extra `ray`) with so many sandboxes that are names alone.
Docker's rows need a daemon at $DOCKER_HOST; `python tests/docker_daemon.py python benchmarks/sandbox.py` starts one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rock_env import Limits, Sandbox, SandboxSpec, doctor, get_backend
from rock_env.remote import Client

TEN_FILES = {f"file_{number}.txt": f"line {number}\n" for number in range(10)}
LIVE_LIMITS = Limits(memory_bytes=64 << 20, pids=16, disk_bytes=1 << 20)


class Results:
    """Milliseconds per operation, by name."""

    def __init__(self, prefix: str = "", samples: dict[str, list[float]] | None = None) -> None:
        self._prefix = prefix
        self.samples: dict[str, list[float]] = {} if samples is None else samples

    def named(self, prefix: str) -> Results:
        """The same table; names get a prefix."""
        return Results(prefix, self.samples)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.samples.setdefault(self._prefix + name, []).append(1e3 * (time.perf_counter() - start))

    def add(self, name: str, milliseconds: list[float]) -> None:
        self.samples.setdefault(self._prefix + name, []).extend(milliseconds)

    def rows(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "median_ms": statistics.median(values),
                "p95_ms": sorted(values)[min(len(values) - 1, round(0.95 * len(values)))],
                "n": len(values),
            }
            for name, values in self.samples.items()
        }


def supervisor_cpu_seconds() -> float:
    """CPU time of the supervisor and of every process that it has reaped: all that sandboxes cost."""
    keeper = get_backend("bubblewrap").supervisor().keeper_pid
    pid = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def measure_operations(results: Results, repeats: int, backend: str = "bubblewrap") -> None:
    prefix = "" if backend == "bubblewrap" else f"{backend}: "
    results = results.named(prefix)
    for _ in range(repeats):
        with results.time("start (10 files)"):
            box = Sandbox.start(SandboxSpec(files=TEN_FILES, backend=backend))
        session = box.session()
        with results.time("session: first command"):
            session.run("true")
        for _ in range(20):
            with results.time("session: true (builtin)"):
                session.run("true")
        for _ in range(5):
            with results.time("session: /bin/true"):
                session.run("/bin/true")
        for _ in range(3):
            with results.time("execute: true"):
                box.execute(["true"])
            with results.time("write_file (1 KiB)"):
                box.write_file("written", b"x" * 1024)
            with results.time("read_file (1 KiB)"):
                box.read_file("written")
        with results.time("snapshot"):
            snapshot = box.snapshot()
        with results.time("start from snapshot"):
            restored = Sandbox.start(snapshot=snapshot)
        with results.time("fork"):
            forks = box.fork()
        for one in (restored, *forks, box):
            with results.time("stop"):
                one.stop()
        snapshot.delete()


def measure_concurrency(results: Results, repeats: int) -> None:
    with ThreadPoolExecutor(16) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            with results.time("16 concurrent starts (all)"):
                boxes = list(pool.map(lambda _: Sandbox.start(SandboxSpec(files=TEN_FILES)), range(16)))
            with results.time("16 concurrent first commands (all)"):
                list(pool.map(lambda box: box.session().run("true"), boxes))
            results.add("16 concurrent sessions: start and first command", [1e3 * (time.perf_counter() - started)])
            with results.time("16 concurrent stops (all)"):
                list(pool.map(lambda box: box.stop(), boxes))


def measure_docker(results: Results, repeats: int) -> None:
    """The same operations in containers; the first start, which also makes the image, by itself."""
    report = doctor("docker")["backend"]
    if not report["ok"]:
        print(f"docker: not measured: {report['how']}")
        return
    print(f"docker: {report['how']}")
    with results.time("docker: first start, with the image"):
        Sandbox.start(SandboxSpec(backend="docker")).stop()
    measure_operations(results, repeats, "docker")
    with ThreadPoolExecutor(16) as pool:
        with results.time("docker: 16 concurrent starts (all)"):
            boxes = list(pool.map(lambda _: Sandbox.start(SandboxSpec(files=TEN_FILES, backend="docker")), range(16)))
        with results.time("docker: 16 concurrent first commands (all)"):
            list(pool.map(lambda box: box.session().run("true"), boxes))
        with results.time("docker: 16 concurrent stops (all)"):
            list(pool.map(lambda box: box.stop(), boxes))


def used_mb() -> float:
    """Memory of the whole machine that is neither free nor the page cache's, kernel's own included."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    value = lambda name: int(fields[name].split()[0]) / 1024  # noqa: E731
    return value("MemTotal") - value("MemAvailable")


def measure_live(results: Results, count: int) -> float:
    """Also returns the MB that a live sandbox with a session takes."""
    boxes: list[Sandbox] = []
    before = used_mb()
    try:
        with results.time(f"{count} live: start all"):
            boxes.extend(Sandbox.start(SandboxSpec(files=TEN_FILES, limits=LIVE_LIMITS)) for _ in range(count))
        with results.time(f"{count} live: a command in each"):
            for box in boxes:
                box.session().run("true", timeout=30)
        each = (used_mb() - before) / count
        for _ in range(50):
            with results.time(f"{count} live: session: true"):
                boxes[0].session().run("true")
        with results.time(f"{count} live: one more start"):
            boxes.append(Sandbox.start(SandboxSpec(files=TEN_FILES)))
        return each
    finally:
        with results.time(f"{count} live: stop all"):
            for box in boxes:
                box.stop()


def measure_peer(results: Results, python: str, program: str, repeats: int) -> None:
    """Another's local sessions, which are a bash without a sandbox, in an interpreter that has it."""
    peer = Path(__file__).parent / "peers" / program
    answer = subprocess.run([python, str(peer), str(repeats)], capture_output=True, text=True, timeout=900)
    if answer.returncode:
        raise RuntimeError(f"{program}: {answer.stderr[-2000:]}")
    for name, values in json.loads(answer.stdout.splitlines()[-1]).items():
        results.add(name, values)


@contextmanager
def rest_client() -> Iterator[Client]:
    """A client of an admin with one worker, both processes of their own, on loopback."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "ROCK_ADMIN_DIR": f"{folder}/admin"}
        command = [sys.executable, "-m", "rock_env.cli", "admin", "start", "--port", "0"]
        with open(f"{folder}/log", "wb") as log:
            admin = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            url, deadline = Path(folder, "admin", "url"), time.monotonic() + 60
            while not url.exists():
                if admin.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the admin does not start: {Path(folder, 'log').read_text()}")
                time.sleep(0.05)
            with Client(url.read_text().strip(), Path(folder, "admin", "admin.key").read_text().strip()) as client:
                yield client
        finally:
            admin.terminate()
            admin.wait(60)


def measure_rest(results: Results, repeats: int) -> None:
    """The same over REST: admin and worker are processes of their own."""
    with rest_client() as client:
        client.start().stop()
        for _ in range(repeats):
            with results.time("REST: start (10 files)"):
                box = client.start(SandboxSpec(files=TEN_FILES))
            session = box.session()
            with results.time("REST: session: first command"):
                session.run("true")
            for _ in range(20):
                with results.time("REST: session: true (builtin)"):
                    session.run("true")
            with results.time("REST: execute: true"):
                box.execute(["true"])
            with results.time("REST: write_file (1 KiB)"):
                box.write_file("written", b"x" * 1024)
            with results.time("REST: fork"):
                forks = client.fork(box.id)
            for one in (*forks, box):
                with results.time("REST: stop"):
                    one.stop()
        with ThreadPoolExecutor(16) as pool:
            for _ in range(max(2, repeats // 10)):
                with results.time("REST: 16 concurrent starts (all)"):
                    boxes = list(pool.map(lambda _: client.start(SandboxSpec(files=TEN_FILES)), range(16)))
                with results.time("REST: 16 concurrent first commands (all)"):
                    list(pool.map(lambda box: box.session().run("true"), boxes))
                list(pool.map(lambda box: box.stop(), boxes))


def cpu_per(action: Callable[[], None], repeats: int) -> float:
    """CPU milliseconds of one `action`, in the supervisor and the sandboxes."""
    before = supervisor_cpu_seconds()
    for _ in range(repeats):
        action()
    time.sleep(0.2)  # the last processes are reaped
    return 1e3 * (supervisor_cpu_seconds() - before) / repeats


def start_and_stop() -> None:
    Sandbox.start(SandboxSpec(files=TEN_FILES)).stop()


def start_run_and_stop() -> None:
    with Sandbox.start(SandboxSpec(files=TEN_FILES)) as box:
        box.session().run("true")


def show(rows: dict[str, dict[str, float]], cpu: dict[str, float]) -> None:
    console = Console()
    table = Table(title=f"Sandboxes on {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f})")
    for name in ("operation", "median ms", "p95 ms", "n"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['median_ms']:.2f}", f"{row['p95_ms']:.2f}", str(row["n"]))
    for name, value in cpu.items():
        table.add_row(f"CPU: {name}", f"{value:.1f}", "", "")
    console.print(table)


def measure_fleet(count: int, nodes: int, output: Path | None) -> None:
    import fleet  # a file beside this one; needs Ray

    found: dict[str, float] = {}

    async def measure() -> None:
        async for part in fleet.measure(count, nodes):
            found.update(part)
            for name, value in part.items():
                print(f"{name}: {fleet.text(value)}", flush=True)

    asyncio.run(measure())
    fleet.show(found, nodes)
    if output is not None:
        output.write_text(json.dumps({"nodes": nodes, **found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--live", type=int, default=200)
    parser.add_argument("--docker-repeats", type=int, default=20, help="0: leave Docker out")
    parser.add_argument("--swerex", help="a Python interpreter that has swe-rex")
    parser.add_argument("--rlrock", help="a Python interpreter that has rl-rock[rocklet]")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--simulated", type=int, help="simulated sandboxes, over Ray; measures nothing else")
    parser.add_argument("--nodes", type=int, default=10, help="simulated nodes, at least 2")
    arguments = parser.parse_args()
    if arguments.simulated:
        measure_fleet(arguments.simulated, arguments.nodes, arguments.json)
        return
    results = Results()
    with results.time("supervisor start"):
        doctor()
    start_run_and_stop()
    measure_operations(results, arguments.repeats)
    measure_concurrency(results, max(2, arguments.repeats // 10))
    measure_rest(results, arguments.repeats)
    each = measure_live(results, arguments.live)
    print(f"a live sandbox with a session takes {each:.2f} MB of memory")
    if arguments.swerex:
        measure_peer(results.named("SWE-ReX: "), arguments.swerex, "swerex_peer.py", arguments.repeats)
    if arguments.rlrock:
        measure_peer(results.named("rl-rock: "), arguments.rlrock, "rlrock_peer.py", arguments.repeats)
    if arguments.docker_repeats:
        measure_docker(results, arguments.docker_repeats)
    cpu = {
        "start + stop": cpu_per(start_and_stop, arguments.repeats),
        "start + first command + stop": cpu_per(start_run_and_stop, arguments.repeats),
    }
    show(results.rows(), cpu)
    if arguments.json:
        found = {"operations": results.rows(), "cpu_ms": cpu, "live_mb": each}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A bounded soak of the whole system, run by hand: random operations, random faults, exact results, no leaks.

python tests/rock_env/soak.py [--minutes 20] [--seed 1] [--threads 4]

An admin with two workers serves several tenants, each a thread with a seeded generator (soak_model.py); meanwhile the
admin, workers, supervisors and sandboxes are killed. Afterwards nothing may be left, and no result may be wrong: the
exit status is 0 then, else 1. The network is loopback alone: an HTTP server of this process, at most 300 requests a
tenant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "admin"))
from admin_harness import AdminProcess
from rich.console import Console
from rich.table import Table
from soak_model import Fault, Faults, Tenant
from test_admin_faults import descendants, is_gone, stat
from waiting import wait_until

from rock_env import RockError, verify_audit_log
from rock_env.supervisor import cgroups
from rock_env.supervisor.process import ticks_now

_RECOVERY_SECONDS = 240.0
_STOP_SECONDS = 300.0


class Echo(BaseHTTPRequestHandler):
    """Answers a GET with its path."""

    def do_GET(self) -> None:
        data = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Watcher(threading.Thread):
    """Keeps in mind every process that workers ever had, with their network namespaces, and every supervisor's name."""

    def __init__(self, admin: AdminProcess) -> None:
        super().__init__(name="watcher", daemon=True)
        self.admin = admin
        self.processes: dict[int, str] = {}
        self.namespaces: dict[str, int] = {}  # and when each was last ours, in clock ticks: numbers are used again
        self.marks: set[str] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            self.look()

    def look(self) -> None:
        for lock in self.admin.directory.glob("workers/*/lock"):
            with contextlib.suppress(OSError, ValueError):
                worker = int(lock.read_text())
                if b"worker_main" not in Path(f"/proc/{worker}/cmdline").read_bytes():
                    continue
                for child in children(worker):
                    self.marks.add(f"-{child}-")
                found = descendants(worker)
                for pid in found:
                    with contextlib.suppress(OSError):
                        self.namespaces[os.readlink(f"/proc/{pid}/ns/net")] = ticks_now()
                self.processes |= found

    def left(self, folder: str) -> list[str]:
        """What there still is of all that."""
        ours = os.readlink("/proc/self/ns/net")
        left = [f"process {pid}" for pid, start in self.processes.items() if not is_gone({pid: start})]
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                space = os.readlink(process / "ns/net") if process.name.isdigit() else ours
                fields = stat(int(process.name)) if space != ours and space in self.namespaces else None
                if fields and int(fields[19]) <= self.namespaces[space]:
                    left.append(f"network namespace {space} of process {process.name}")
        left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if folder in line]
        for directory in cgroups.Hierarchies.detect().directories():
            names = [p for p in Path(directory).iterdir() if p.name.startswith("rock-")]
            left += [f"control group {p}" for p in names if any(mark in p.name for mark in self.marks)]
        state = Path(folder, "state")
        left += [f"folder {p}" for base in state.glob("rock-*") for p in base.iterdir()]
        return left


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Saboteur:
    """Kills, and waits until all workers are up again."""

    def __init__(self, admin: AdminProcess, seed: int) -> None:
        self.admin = admin
        self.random = random.Random(f"{seed}-faults")
        self.faults = Faults()
        self.failures: list[str] = []
        self._root = admin.client()

    def run(self, deadline: float) -> None:
        while time.monotonic() < deadline - 20:
            time.sleep(self.random.uniform(5, 20))
            kind = self.random.choice((self.worker, self.admins, self.supervisor, self.supervisor, self.sandbox))
            name = self.random.choice(("w1", "w2"))
            fault = Fault(kind.__name__, "" if kind == self.admins else name)
            self.faults.log.append(fault)
            try:
                kind(name)
            except (ProcessLookupError, ValueError):  # it is just being replaced
                pass
            except AssertionError as error:
                self.failures.append(f"{fault.kind} {name}: {error}")
                return
            if not self.recovered():
                self.failures.append(f"after {fault.kind} of {name}: not all workers are up")
            fault.over = time.monotonic()

    def recovered(self) -> bool:
        deadline = time.monotonic() + _RECOVERY_SECONDS
        time.sleep(1.0)  # a killed worker is not missed at once
        while time.monotonic() < deadline:
            with contextlib.suppress(RockError):
                if all(row["is_up"] for row in self._root.get("/v1/workers")):
                    return True
            time.sleep(0.2)
        return False

    def worker(self, name: str) -> None:
        pid = self.admin.worker_pid(name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: stat(pid) is None, 60)

    def admins(self, name: str) -> None:
        self.admin.kill()
        time.sleep(self.random.uniform(0, 3))
        self.admin.start()

    def supervisor(self, name: str) -> None:
        for keeper in children(self.admin.worker_pid(name)):
            for supervisor in children(keeper):
                os.kill(supervisor, signal.SIGKILL)

    def sandbox(self, name: str) -> None:
        """The first process of one of its sandboxes."""
        found = descendants(self.admin.worker_pid(name))
        firsts = []
        for pid in sorted(found):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes() == b"cat\0":
                    firsts.append(pid)
        if firsts:
            os.kill(self.random.choice(firsts), signal.SIGKILL)


def clean_up(tenants: list[Tenant]) -> list[str]:
    """End what requests that were cut off have left; what cannot be ended."""
    problems = []
    for tenant in tenants:
        try:
            for state in ("pending", "starting", "running", "stopping"):
                for row in tenant.client.get("/v1/sandboxes", state=state):
                    tenant.client.request("DELETE", f"/v1/sandboxes/{row['id']}")
            for row in tenant.client.get("/v1/snapshots"):
                tenant.client.request("DELETE", f"/v1/snapshots/{row['id']}")
        except RockError as error:
            problems.append(f"tenant {tenant.number} cannot be cleaned up: {type(error).__name__}: {error}")
    return problems


def check_record(admin: AdminProcess) -> list[str]:
    """Rows that have not ended, and audit logs that are not intact."""
    database = sqlite3.connect(admin.directory / "admin.db")
    problems = [
        f"row {row}" for row in database.execute("select id, state, reason from sandboxes where ended_at is null")
    ]
    problems += [f"snapshot {row}" for row in database.execute("select id, worker from snapshots where state='ready'")]
    database.close()
    for log in admin.directory.parent.glob("audit/*.jsonl"):
        chain = verify_audit_log(log)
        if not chain.ok:
            problems.append(f"audit log {log.name}: {chain.problem}")
    return problems


def show(tenants: list[Tenant], saboteur: Saboteur, problems: list[str]) -> None:
    console = Console()
    counts: Counter[str] = sum((tenant.counts for tenant in tenants), Counter())
    table = Table(title="operations")
    outcomes = ("right", "cut off by a fault", "lost with its worker", "WRONG")
    for column in ("operation", *outcomes):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for name in sorted({key.partition(": ")[0] for key in counts}):
        table.add_row(name, *(str(counts[f"{name}: {outcome}"]) for outcome in outcomes))
    table.add_row("all", *(str(sum(n for k, n in counts.items() if k.endswith(f": {o}"))) for o in outcomes))
    console.print(table)
    kinds = Counter(fault.kind for fault in saboteur.faults.log)
    console.print("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    console.print(f"slowest operation: {max((tenant.slowest for tenant in tenants), default=0):.1f} s")
    for problem in problems:
        console.print(f"PROBLEM: {problem}", markup=False, soft_wrap=True)
    console.print("zero leaks, zero wrong results" if not problems else f"{len(problems)} problems")


def soak(minutes: float, seed: int, threads: int, folder: str) -> list[str]:
    os.chmod(folder, 0o711)
    os.mkdir(f"{folder}/state", 0o711)
    server = ThreadingHTTPServer(("127.0.0.2", 0), Echo)
    threading.Thread(target=server.serve_forever, name="echo", daemon=True).start()
    env = {"ROCK_STATE_DIR": f"{folder}/state", "ROCK_AUDIT_DIR": f"{folder}/audit"}
    admin = AdminProcess(f"{folder}/admin", env=env, workers=2, worker_seconds=30.0, orphan_seconds=60.0).start()
    admin.settings["port"] = int(admin.url.rpartition(":")[2])  # the same after a restart
    watcher = Watcher(admin)
    watcher.start()
    problems: list[str] = []
    try:
        saboteur = Saboteur(admin, seed)
        port = server.server_address[1]
        tenants = [
            Tenant(n, seed, admin.new_tenant(f"tenant{n}", max_sandboxes=16), saboteur.faults, port)
            for n in range(threads)
        ]
        deadline = time.monotonic() + 60 * minutes
        workers = [threading.Thread(target=tenant.run, args=(deadline,), daemon=True) for tenant in tenants]
        for thread in workers:
            thread.start()
        saboteur.run(deadline)
        for tenant, thread in zip(tenants, workers, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()) + _STOP_SECONDS)
            if thread.is_alive():
                problems.append(f"tenant {tenant.number} hangs")
        problems += clean_up(tenants)
        watcher.look()
    finally:
        watcher.done.set()
        watcher.join()
        admin.stop()
        server.shutdown()
    if admin.process.returncode != 0:
        problems.append(f"the admin's exit status is {admin.process.returncode}")
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not watcher.left(folder), 60)
    problems += [f"left over: {each}" for each in watcher.left(folder)]
    problems += check_record(admin) + saboteur.failures
    problems += [f"WRONG: tenant {tenant.number}: {text}" for tenant in tenants for text in tenant.wrong]
    show(tenants, saboteur, problems)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="copy the admin's and workers' logs there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rock-soak-", dir="/tmp") as folder:
        problems = soak(arguments.minutes, arguments.seed, arguments.threads, folder)
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            for log in (Path(folder, "admin.log"), *Path(folder).glob("admin/workers/*/log")):
                (arguments.keep / log.relative_to(folder).as_posix().replace("/", "-")).write_bytes(log.read_bytes())
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

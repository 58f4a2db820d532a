"""Compare the record with the workers, again and again: what has ended is noted, what nobody knows of is ended, what
has gone with its worker is declared lost, and a worker that has died is replaced.

This is also how an admin that was killed finds its sandboxes again: its first round runs before it answers anyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path

from rock_env.admin.control import REQUEST_SECONDS, ControlPlane, Record
from rock_env.admin.hosts import Host, LocalWorker, WorkerProcess
from rock_env.admin.models import State
from rock_env.admin.ray_workers import RayFleet, RayProcess
from rock_env.errors import BackendUnavailable, NotReady, RequestTimeout, RockError

log = logging.getLogger("rock.admin")
_LIST_SECONDS = 10.0
_DEADLINE_GRACE_SECONDS = 5.0


class Reconciler:
    """One loop for each worker.

    Args:
      seconds: between two rounds.
      worker_seconds: how long a worker may be silent before it (if it is ours) is killed, and its sandboxes are lost.
      fleet: of workers that come and go with their nodes.
    """

    def __init__(
        self, control: ControlPlane, seconds: float, worker_seconds: float, fleet: RayFleet | None = None
    ) -> None:
        self._control = control
        self._seconds = seconds
        self._worker_seconds = worker_seconds
        self._fleet = fleet
        self._tasks: dict[str, asyncio.Task] = {}  # by worker; "": of the fleet

    async def load(self) -> None:
        """Bring the admin's memory up from the database. What was still waiting for a place has no files any more."""
        control, db = self._control, self._control.database
        control.tenants = {tenant.name: tenant for tenant in await control.db(db.tenants)}
        for key in await control.db(db.keys):
            control.keyring.add(key)
        control.snapshots = {row.id: row for row in await control.db(db.ready_snapshots)}
        for row in await control.db(db.live_sandboxes):
            record = Record(row)
            control.enter(record)
            host = control.scheduler.hosts.get(row.worker or "")
            if host is not None:
                host.used += 1
            if record.state is State.PENDING:
                await control.move(record, State.FAILED, "the admin ended before it was placed: ask again")
            elif host is None:
                await control.move(record, State.LOST, f"worker {row.worker} is not among this admin's")

    async def start(self) -> None:
        """The first round with every worker, then the loops."""
        hosts = list(self._control.scheduler.hosts.values())
        rounds = await asyncio.gather(*(self.round(host) for host in hosts), return_exceptions=True)
        for host, outcome in zip(hosts, rounds, strict=True):
            if isinstance(outcome, BaseException):
                log.error("worker %s: %s", host.name, outcome)
        self._tasks = {host.name: asyncio.create_task(self._loop(host)) for host in hosts}
        if self._fleet is not None:
            self._tasks[""] = asyncio.create_task(self._follow(self._fleet))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, fleet: RayFleet) -> None:
        """Take in workers of new nodes, and let go of those whose node has gone."""
        ours = {host.name for host in self._control.scheduler.hosts.values() if isinstance(host.process, RayProcess)}
        while True:
            await asyncio.sleep(self._seconds)
            try:
                nodes = await fleet.nodes()
                for name in nodes.keys() - ours:
                    host = self._control.scheduler.hosts[name] = fleet.host(name, nodes[name])
                    self._tasks[name] = asyncio.create_task(self._loop(host))
                    host.wake.set()
                    ours.add(name)
                for name in ours - nodes.keys():
                    if await self._let_go(self._control.scheduler.hosts[name]):
                        ours.remove(name)
            except Exception:  # e.g. the cluster's head is away: the next round may do better
                log.exception("the nodes of the cluster are not known")

    async def _let_go(self, host: Host) -> bool:
        """Whether nothing is left of a worker whose node has gone."""
        task = self._tasks.pop(host.name, None)
        if task is not None:
            log.warning("worker %s: its node has gone", host.name)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        host.incarnation = host.pid = None
        host.link.close()
        await self._lose(host, "its node has gone")
        if self._of(host):
            return False  # one is still coming up, and about to fail
        del self._control.scheduler.hosts[host.name]
        return True

    async def _loop(self, host: Host) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await host.wake.wait()
            host.wake.clear()
            try:
                await self.round(host)
            except RockError as error:
                log.warning("worker %s: %s", host.name, error)
            except Exception:  # e.g. the database is away: the next round may do better
                log.exception("worker %s: the round failed", host.name)
            self._control.keyring.purge()

    # -- one worker
    async def round(self, host: Host) -> None:
        # Only what was there before the worker answers may be missed in the answer.
        before = {r.id: r.state for r in self._of(host) if not r.is_coming_up}
        known = set(self._control.live)
        snapshots = {row.id for row in self._control.snapshots.values() if row.worker == host.name}
        known |= snapshots | set(self._control.transient)  # those that are dropped meanwhile, too
        try:
            reply, _ = await host.link.call("list", _LIST_SECONDS)
        except (BackendUnavailable, RequestTimeout) as error:
            await self._on_silence(host, str(error))
            return
        host.silent_since = None
        if reply["incarnation"] != host.incarnation:
            await self._adopt(host, reply)
        await self._compare(host, before, known, reply["sandboxes"])
        await self._compare_snapshots(host, snapshots, known, reply["snapshots"])
        self._control.scheduler.serve()

    def _of(self, host: Host) -> list[Record]:
        return [record for record in self._control.live.values() if record.row.worker == host.name]

    async def _adopt(self, host: Host, hello: dict) -> None:
        """Another process answers in this worker's name than before (or the first one does)."""
        log.info("worker %s: pid %d, incarnation %s", host.name, hello["pid"], hello["incarnation"])
        host.incarnation, host.pid = hello["incarnation"], hello["pid"]
        await self._lose(host, "its worker has been replaced")

    async def _lose(self, host: Host, reason: str) -> None:
        """Whatever is not of the current incarnation is gone."""
        for record in self._of(host):
            if record.row.incarnation != host.incarnation and not record.is_coming_up:
                await self._control.move(record, State.LOST, reason)
        for row in list(self._control.snapshots.values()):
            if row.worker == host.name and row.incarnation != host.incarnation:
                await self._control.drop_snapshot(row, "lost")

    async def _compare(self, host: Host, before: dict[str, State], known: set[str], found: dict[str, dict]) -> None:
        control = self._control
        noted = []
        for id, state in before.items():
            record = control.live.get(id)
            if record is None or record.state is not state:
                continue  # it has moved on meanwhile
            entry = found.get(id)
            if entry is None:
                await control.move(record, State.LOST, "its worker does not have it")
            elif entry["state"] == "ended":  # by a stop, whose reason the record has, or by itself
                reason = record.row.reason if state is State.STOPPING else entry["reason"]
                await control.move(record, State.STOPPED, reason)
            elif state is State.STOPPING:
                await control.finish_stop(record)
            elif entry["state"] == "running":
                await self._found_running(record)
        for id, entry in found.items():
            if id in control.live:
                continue
            if entry["state"] == "running" and id in known:
                continue  # it was ended since the worker was asked
            if entry["state"] == "running":
                log.warning("worker %s: ending sandbox %s, which the record does not have", host.name, id)
                with contextlib.suppress(NotReady):
                    await host.link.call("stop", REQUEST_SECONDS, id=id)
            if entry["state"] != "starting":
                noted.append(id)
        if noted:
            await host.link.call("forget", REQUEST_SECONDS, ids=noted)

    async def _found_running(self, record: Record) -> None:
        if record.state is State.STARTING:  # an earlier admin's request has come through
            where, _ = await self._control.scheduler.hosts[record.row.worker or ""].link.call(
                "where", REQUEST_SECONDS, id=record.id
            )
            known = {"audit_log": where["log"], "audit_name": where["name"]}
            await self._control.move(record, State.RUNNING, "found again after the admin's end", **known)
        if time.time() > record.row.deadline + _DEADLINE_GRACE_SECONDS:
            await self._control.stop(record, "it is past its deadline")

    async def _compare_snapshots(self, host: Host, before: set[str], known: set[str], found: list[str]) -> None:
        control = self._control
        for id in before - set(found):
            if id in control.snapshots:
                await control.drop_snapshot(control.snapshots[id], "lost")
        for id in found:
            if id not in control.snapshots and id not in control.transient and id not in known:
                log.warning("worker %s: dropping snapshot %s, which the record does not have", host.name, id)
                await host.link.call("drop_snapshot", REQUEST_SECONDS, snapshot=id)

    async def _on_silence(self, host: Host, why: str) -> None:
        now = time.monotonic()
        if host.silent_since is None:
            host.silent_since = now
            log.warning("%s", why)
        is_dead = host.process is not None and await host.process.is_dead()
        if not is_dead and now - host.silent_since < self._worker_seconds:
            return
        if host.process is not None and not is_dead:
            log.error("worker %s: silent for %g s, killing it", host.name, self._worker_seconds)
            await host.process.kill()
        host.incarnation = host.pid = None
        host.link.close()
        await self._lose(host, "its worker has ended" if is_dead else "its worker was silent for too long")
        if host.process is not None:
            await self._replace(host, host.process)

    async def _replace(self, host: Host, process: WorkerProcess) -> None:
        hello = await process.bring_up(host.link)
        host.silent_since = None
        await self._adopt(host, hello)
        self._control.scheduler.serve()


def local_hosts(directory: Path, count: int, capacity: int, orphan_seconds: float) -> list[Host]:
    """The `count` workers of this admin, and any others that an earlier one has left alive (which get nothing new)."""
    names = [f"w{number + 1}" for number in range(count)]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    hosts = []
    for name in [*names, *sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name not in names)]:
        local = LocalWorker(directory / name, orphan_seconds)
        if name in names or local.pid is not None:
            hosts.append(Host(name, local.link(), capacity if name in names else 0, local))
    return hosts

"""Workers on Ray: an actor on each node of a cluster holds a `Worker`, and requests travel as actor calls.

The control plane is the same as over sockets: `RayFleet` says which nodes there are, `RayProcess` starts a node's
worker and knows whether it lives, `RayLink` reaches it. Actors are detached: they outlive the admin, which finds them
again by name in a Ray namespace of its own.

Calls are as safe as the cluster: whoever can join it can run programs as its user anyway (see docs/security.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rock_env.admin.hosts import Host, WorkerLink, write_private
from rock_env.admin.worker import Reply, Worker
from rock_env.backend import close_backends
from rock_env.errors import BackendUnavailable, RequestTimeout, RockError, SpecError, from_wire

_SPAWN_SECONDS = 60.0
_KILL_SECONDS = 10.0
_MAX_CALLS = 512  # at once to one worker, long polls included; the others wait their turn
_NAME_DIGITS = 16  # of a node's id, in its worker's name


class WorkerActor:
    """What a node's actor is made of: a worker. Ray makes its calls in threads; an asyncio actor takes twice the CPU.

    `prepare` is called first, in the actor's process: e.g. to register a backend.
    """

    def __init__(self, name: str, orphan_seconds: float, prepare: Callable[[], None] | None) -> None:
        _usual_priority()
        if prepare is not None:
            prepare()
        done = threading.Event()
        self._worker = Worker(name, orphan_seconds, done.set)
        threading.Thread(target=self._worker.run, name="reaper", daemon=True).start()
        threading.Thread(target=_end_after, args=(done,), name="end", daemon=True).start()

    def handle(self, header: dict, blob: bytes) -> Reply:
        return self._worker.handle(header, blob)


def _usual_priority() -> None:
    """Ray runs its workers at niceness 15, which ours and all its sandboxes would have; as root it can be undone."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, int(thread), 0)


def _end_after(done: threading.Event) -> None:
    """The orderly end of a worker. Ray would not run the interpreter's exit handlers, which end sandboxes."""
    done.wait()
    close_backends()
    os._exit(0)


class RayLink:
    """The admin's end of a worker on Ray; as rock_env.admin.link.Link."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name = name
        self._namespace = namespace
        self._actor: Any = None

    async def call(self, op: str, seconds: float, blob: bytes = b"", /, **arguments: object) -> Reply:
        """Send one request and wait for its reply, at most `seconds`. Raises as Link.call."""
        import ray

        try:
            async with asyncio.timeout(seconds):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(find_actor, self.name, self._namespace)
                reference = self._actor.handle.remote({"op": op, **arguments}, blob)
                reply = await asyncio.wrap_future(reference.future())
        except TimeoutError as error:
            raise RequestTimeout(f"worker {self.name}: no answer to {op} within {seconds:g} s") from error
        except ray.exceptions.RayError as error:
            self.close()
            why = str(error).strip().partition("\n")[0]
            raise BackendUnavailable(f"worker {self.name} cannot be reached: {why}") from error
        if "error" in reply[0]:
            raise from_wire(reply[0]["error"])
        return reply

    def close(self) -> None:
        """Forget the actor; another may have taken its name."""
        self._actor = None


def find_actor(name: str, namespace: str) -> Any:
    """The living actor of a worker. Raises BackendUnavailable when there is none."""
    import ray

    try:
        return ray.get_actor(name, namespace)
    except ValueError as error:
        raise BackendUnavailable(f"worker {name} cannot be reached: it has ended") from error


class RayProcess:
    """The worker of one node; as rock_env.admin.hosts.LocalWorker."""

    def __init__(
        self, name: str, node: str, namespace: str, orphan_seconds: float, prepare: Callable[[], None] | None
    ) -> None:
        self.name = name
        self.node = node
        self._namespace = namespace
        self._arguments = (name, orphan_seconds, prepare)

    async def is_dead(self) -> bool:
        """Whether the cluster knows it to have ended; while it is only out of reach, it may be alive."""
        try:
            await asyncio.to_thread(find_actor, self.name, self._namespace)
        except BackendUnavailable:
            return True
        return False

    def _spawn(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "name": self.name,
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": 0,
            "max_concurrency": _MAX_CALLS,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(self.node, soft=False),
        }
        ray.remote(WorkerActor).options(**options).remote(*self._arguments)

    async def bring_up(self, link: WorkerLink) -> dict:
        """Find the living worker, or start one, and wait until it answers."""
        deadline = time.monotonic() + _SPAWN_SECONDS
        if await self.is_dead():
            await asyncio.to_thread(self._spawn)
        while True:
            try:
                return (await link.call("hello", max(0.1, deadline - time.monotonic())))[0]
            except RockError as error:
                if time.monotonic() > deadline or await self.is_dead():
                    raise BackendUnavailable(f"worker {self.name} does not start: {error}") from error
            await asyncio.sleep(0.1)

    async def kill(self) -> None:
        """As by SIGKILL, and wait for the end; its sandboxes go with it."""
        import ray

        with contextlib.suppress(BackendUnavailable):
            actor = await asyncio.to_thread(find_actor, self.name, self._namespace)
            await asyncio.to_thread(ray.kill, actor, no_restart=True)
        await self.wait_end(_KILL_SECONDS)

    async def wait_end(self, seconds: float) -> bool:
        """Whether it has ended, after at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not await self.is_dead():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True


class RayFleet:
    """The workers of a Ray cluster, one a node, as nodes come and go.

    Args:
      address: of a cluster that runs (`ray start --head`), as for `ray.init`.
      directory: the admin's; keeps the name of its namespace, so that an admin finds its own workers again.
      capacity, orphan_seconds: of each worker. `prepare`: see WorkerActor.
    """

    def __init__(
        self,
        address: str,
        directory: Path,
        capacity: int,
        orphan_seconds: float,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise SpecError("ray: expected the extra `ray` to be installed (pip install 'rome-agents[ray]')") from error
        self._address = address
        self._name = directory / "ray-namespace"
        self._namespace = ""
        self._capacity = capacity
        self._orphan_seconds = orphan_seconds
        self._prepare = prepare

    async def connect(self) -> None:
        """Join the cluster. Raises BackendUnavailable when there is none."""
        if not self._name.exists():
            write_private(self._name, f"rock-{secrets.token_hex(8)}\n")
        self._namespace = self._name.read_text().strip()
        await asyncio.to_thread(self._connect)
        if threading.current_thread() is threading.main_thread():  # Ray's own handler aborts at a second SIGTERM
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def _connect(self) -> None:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if ray.is_initialized():
            return
        try:
            ray.init(address=self._address, namespace=self._namespace, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BackendUnavailable(f"ray: no cluster at {self._address!r} ({error})") from error

    async def nodes(self) -> dict[str, str]:
        """{name of its worker: id} of each node that lives."""
        import ray

        found = await asyncio.to_thread(ray.nodes)
        return {f"ray-{node['NodeID'][:_NAME_DIGITS]}": node["NodeID"] for node in found if node["Alive"]}

    def host(self, name: str, node: str) -> Host:
        """The host of a node; its worker may not run yet."""
        process = RayProcess(name, node, self._namespace, self._orphan_seconds, self._prepare)
        return Host(name, RayLink(name, self._namespace), self._capacity, process)

    async def close(self) -> None:
        """Leave the cluster. Workers are not ended by this."""
        import ray

        await asyncio.to_thread(ray.shutdown)

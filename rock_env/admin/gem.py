"""Environments that live in the admin, for its tenants. Their sandboxes are sandboxes like any other: admitted, placed
on workers, on record, and the tenant's. What blocks runs in threads; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rock_env.admin.auth import Principal
from rock_env.admin.control import IDLE_SECONDS, QUEUE_SECONDS, REQUEST_SECONDS, START_SECONDS, ControlPlane
from rock_env.admin.control import StartRequest as Start
from rock_env.admin.hub_routes import HubStore
from rock_env.calls import WireCalls
from rock_env.errors import EnvFailed, EnvNotFound, QuotaExceeded, RequestTimeout, ResetNeeded, RockError, SpecError
from rock_env.gem import MultiAgentEnv, Place, check_one_agent, is_task, load, make_task
from rock_env.gem.envs import Sharing
from rock_env.gem.registered import make_served
from rock_env.sandbox import Sandbox
from rock_env.spec import SandboxSpec

T = TypeVar("T")
log = logging.getLogger("rock.admin.gem")
_THREADS = 512  # steps that run at the same time; each waits for a command in a sandbox
_SLACK_SECONDS = 30.0
_STOP_SECONDS = 30.0
_TICK_SECONDS = 0.5


class ControlBackend(WireCalls):
    """What an episode needs of rock_env.backend.Backend, by way of the control plane. Called from threads."""

    name = "admin"

    def __init__(self, control: ControlPlane, who: Principal, name: str, idle_seconds: float) -> None:
        self._control, self._who, self._name, self._idle_seconds = control, who, name, idle_seconds
        self._loop = asyncio.get_running_loop()

    def _wait(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise RequestTimeout(f"the admin's control plane did not answer within {seconds:g} s") from error

    def start(self, spec: SandboxSpec, *, snapshot: None = None) -> Sandbox:
        """As Sandbox.start. It may live as long as the tenant's sandboxes may: idle environments are closed anyway."""
        spec = replace(spec, limits=replace(spec.limits, lifetime_seconds=None))
        request = Start(spec, name=self._name, idle_seconds=self._idle_seconds)

        async def begin() -> str:
            record = await self._control.start(self._who, request)
            await self._control.settled(record, QUEUE_SECONDS + START_SECONDS)
            if record.failure is not None:
                raise record.failure
            return record.id

        return Sandbox(self, self._wait(begin(), QUEUE_SECONDS + START_SECONDS + _SLACK_SECONDS), spec)

    def _call(
        self, handle: str, op: str, seconds: float = REQUEST_SECONDS, blob: bytes = b"", /, **arguments: object
    ) -> tuple[dict, bytes]:
        async def ask() -> tuple[dict, bytes]:
            record = await self._control.find(self._who, handle, "exec")
            return await self._control.call(record, "list_files" if op == "list" else op, seconds, blob, **arguments)

        return self._wait(ask(), seconds + _SLACK_SECONDS)

    def destroy(self, sandbox: str) -> None:
        async def stop() -> None:
            record = await self._control.find(self._who, sandbox, "manage")
            await self._control.stop(record, "its environment was closed")

        self._wait(stop(), REQUEST_SECONDS + _SLACK_SECONDS)


@dataclass
class LiveEnv:
    """An environment of a tenant. `locks`: one for each agent, as its steps run one after another."""

    id: str
    tenant: str
    env_id: str
    env: Any
    agents: tuple[str, ...] | None
    sandboxes: int
    idle_seconds: float
    locks: dict[str | None, asyncio.Lock]
    in_flight: int = 0
    last_used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Wanted:
    """What a tenant asks to make; see rock_env.gem.make."""

    env_id: str
    agents: tuple[str, ...] | None
    sandboxes: Sharing
    options: dict[str, object]
    idle_seconds: float | None


class Environments:
    """Every live environment of this admin. They are in its memory only: they end with it."""

    def __init__(self, control: ControlPlane, hub: HubStore) -> None:
        self._control = control
        self._hub = hub
        self._live: dict[str, LiveEnv] = {}
        self._making: dict[str, int] = {}  # tenant -> sandboxes of environments that are being made
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="gem")
        self._reaper: asyncio.Task | None = None

    def start(self) -> None:
        self._reaper = asyncio.create_task(self._reap())

    async def stop(self) -> None:
        """Close them all. Steps that are under way fail."""
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        closing = [asyncio.create_task(self._end(live)) for live in list(self._live.values())]
        if closing:
            await asyncio.wait(closing, timeout=_STOP_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- what tenants ask
    async def make(self, who: Principal, wanted: Wanted) -> LiveEnv:
        """Make an environment; its sandboxes start when it is reset.

        Raises:
          SpecError, EntryNotFound, EntryCorrupt: see rock_env.gem.make.
          QuotaExceeded: the tenant's environments could not all have their sandboxes.
        """
        who.require_key()
        needed = len(wanted.agents) if wanted.agents is not None and wanted.sandboxes == "isolated" else 1
        self._admit(who.tenant, needed)
        self._making[who.tenant] = self._making.get(who.tenant, 0) + needed
        try:
            idle = IDLE_SECONDS if wanted.idle_seconds is None else wanted.idle_seconds
            backend = ControlBackend(self._control, who, f"gem {wanted.env_id}"[:128], idle)
            env = await self._in_thread(lambda: self._build(who, wanted, backend))
            agents = env.agents if isinstance(env, MultiAgentEnv) else None
            locks = {agent: asyncio.Lock() for agent in agents or (None,)}
            id = secrets.token_hex(8)
            live = LiveEnv(id, who.tenant, wanted.env_id, env, agents, needed, idle, locks)
            self._live[id] = live
        finally:
            self._making[who.tenant] -= needed
        return live

    def _admit(self, tenant: str, needed: int) -> None:
        quota = self._control.tenants[tenant].max_sandboxes
        used = sum(live.sandboxes for live in self._live.values() if live.tenant == tenant)
        total = used + self._making.get(tenant, 0) + needed
        if quota is not None and total > quota:
            message = f"environments: the tenant's quota is {quota} sandboxes, this would make {total}"
            raise QuotaExceeded(message)

    def _build(self, who: Principal, wanted: Wanted, backend: ControlBackend) -> Any:
        options = dict(wanted.options)
        if not is_task(wanted.env_id):
            check_one_agent(wanted.env_id, wanted.agents)
            return make_served(wanted.env_id, backend.start, options)
        place = Place(backend.start, options.pop("backend", None), remote=True)
        task = load(wanted.env_id, self._hub.of(who))
        return make_task(task, wanted.agents, wanted.sandboxes, options, place)

    async def reset(self, who: Principal, id: str, seed: int | None) -> tuple[Any, Any]:
        """Gymnasium's options are not for tenants: one of them may be a path on this machine."""
        live = self._find(who, id)
        return await self._use(live, list(live.locks), lambda: live.env.reset(seed=seed))

    async def step(self, who: Principal, id: str, action: str, agent: str | None) -> tuple:
        live = self._find(who, id)
        if agent not in live.locks:
            expected = "one of " + ", ".join(live.agents) if live.agents else "none, as there is one only"
            raise SpecError(f"agent: expected {expected}, got {agent!r}")
        arguments = (action,) if agent is None else (action, agent)
        return await self._use(live, [agent], lambda: live.env.step(*arguments))

    async def close(self, who: Principal, id: str) -> None:
        await self._end(self._find(who, id))

    def _find(self, who: Principal, id: str) -> LiveEnv:
        who.require_key()
        live = self._live.get(id)
        if live is None or not (who.is_admin or live.tenant == who.tenant):
            raise EnvNotFound(f"no environment {id}: it was closed, was idle for too long, or went with its admin")
        return live

    # -- how it is done
    async def _use(self, live: LiveEnv, agents: list[str | None], function: Callable[[], T]) -> T:
        """Run a method of an environment; once begun it is finished, whatever becomes of the caller."""
        return await asyncio.shield(asyncio.ensure_future(self._use_locked(live, agents, function)))

    async def _use_locked(self, live: LiveEnv, agents: list[str | None], function: Callable[[], T]) -> T:
        live.in_flight += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                for agent in agents:
                    await stack.enter_async_context(live.locks[agent])
                if self._live.get(live.id) is not live:
                    raise EnvNotFound(f"environment {live.id} was closed meanwhile")
                return await self._in_thread(function, live.env_id)
        finally:
            live.in_flight -= 1
            live.last_used = time.monotonic()
            if self._live.get(live.id) is not live:  # closed meanwhile: so is what a reset has started since
                await self._end(live)

    async def _in_thread(self, function: Callable[[], T], env_id: str = "env_id") -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        except RockError:
            raise
        except Exception as error:  # of an environment that is not ours: what it failed of, if that is typed
            if isinstance(error.__cause__, RockError):
                raise error.__cause__ from error
            if type(error).__name__ == "ResetNeeded":
                raise ResetNeeded(str(error)) from error
            raise EnvFailed(f"{env_id}: {type(error).__name__}: {str(error)[:500]}") from error

    async def _end(self, live: LiveEnv) -> None:
        """Close an environment, whoever waits for a step of it."""
        self._live.pop(live.id, None)
        with contextlib.suppress(RockError):
            await self._in_thread(live.env.close, live.env_id)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.monotonic()
            idle = [e for e in self._live.values() if not e.in_flight and now - e.last_used > e.idle_seconds]
            for live in idle:
                log.info("environment %s of %s was idle for %g s", live.id, live.tenant, live.idle_seconds)
            await asyncio.gather(*(self._end(live) for live in idle))

"""Environments that live at a `rock` admin: the same methods, results and errors as in process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import gymnasium

from rock_env.errors import EnvNotFound
from rock_env.gem.envs import check_reset
from rock_env.gem.episode import MAX_SECONDS, Step
from rock_env.gem.text import AnyText
from rock_env.remote import Client

_RESET_SECONDS = 300.0  # several sandboxes may have to wait for room
_STEP_SECONDS = 2 * MAX_SECONDS  # a command, and then the tests


def make_remote(
    client: Client, env_id: str, agents: Sequence[str] | None, sandboxes: str, options: dict[str, object]
) -> RemoteEnv | RemoteMultiAgentEnv:
    """See rock_env.gem.make."""
    idle = {name: options.pop(name) for name in ("idle_seconds",) if name in options}
    body = {"env_id": env_id, "options": options, **idle}
    if agents is None:
        return RemoteEnv(_Calls(client, client.post("/v1/gem/make", body)["id"]))
    made = client.post("/v1/gem/make", {**body, "agents": list(agents), "sandboxes": sandboxes})
    return RemoteMultiAgentEnv(_Calls(client, made["id"]), tuple(made["agents"]), made["sandboxes"])


class _Calls:
    """The four requests about one environment."""

    def __init__(self, client: Client, id: str) -> None:
        self.id = id
        self._client = client

    def reset(self, seed: int | None) -> tuple[Any, dict[str, Any]]:
        reply = self._client.post("/v1/gem/reset", {"id": self.id, "seed": seed}, _RESET_SECONDS)
        return reply["observation"], reply["info"]

    def step(self, action: str, agent: str | None) -> Step:
        body = {"id": self.id, "action": action, "agent": agent}
        return Step(**self._client.post("/v1/gem/step", body, _STEP_SECONDS))

    def close(self) -> None:
        with suppress(EnvNotFound):  # closed already
            self._client.request("POST", "/v1/gem/close", json={"id": self.id})


class RemoteEnv(gymnasium.Env[str, str]):
    """One agent's environment; see rock_env.gem.envs.TaskEnv. EnvNotFound: it was closed, or idle for too long."""

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's name and type)

    def __init__(self, calls: _Calls) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.id = calls.id
        self._calls = calls

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        seed = check_reset(seed, options)
        super().reset(seed=seed)
        return self._calls.reset(seed)

    def step(self, action: str) -> Step:
        return self._calls.step(action, None)

    def close(self) -> None:
        self._calls.close()


class RemoteMultiAgentEnv:
    """Several agents' environment; see rock_env.gem.envs.MultiAgentEnv."""

    def __init__(self, calls: _Calls, agents: tuple[str, ...], sandboxes: str) -> None:
        self.id, self.agents, self.sandboxes = calls.id, agents, sandboxes
        self._calls = calls

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        return self._calls.reset(check_reset(seed, options))

    def step(self, action: str, agent: str) -> Step:
        return self._calls.step(action, agent)

    def close(self) -> None:
        self._calls.close()

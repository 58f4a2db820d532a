"""The GEM API: environments by id, for one agent or several, in this process or at a `rock` admin: the same results.

env = make("fix-log@1.0")                      a task of the hub
observation, info = env.reset(seed=7)
observation, reward, terminated, truncated, info = env.step("grep -c ERROR app.log")
env.step(STOP)                                 the tests enter, and judge
env.close()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import gymnasium

from rock_env.errors import SpecError
from rock_env.gem.envs import MultiAgentEnv, Sharing, TaskEnv
from rock_env.gem.episode import STOP, Place, Settings, Step
from rock_env.gem.registered import make_registered
from rock_env.gem.text import AnyText
from rock_env.harbor import HarborFolder, parse_task
from rock_env.hub import Hub, LocalHub

if TYPE_CHECKING:
    from rock_env.gem.remote import RemoteEnv, RemoteMultiAgentEnv
    from rock_env.remote import Client

PLACE_OPTIONS = ("backend", "images")


def make(
    env_id: str,
    *,
    hub: Hub | None = None,
    client: Client | None = None,
    agents: Sequence[str] | None = None,
    sandboxes: Sharing = "isolated",
    **options: object,
) -> gymnasium.Env | MultiAgentEnv | RemoteEnv | RemoteMultiAgentEnv:
    """An environment: a task of the hub ("[hub://][OWNER/]NAME@VERSION", or by digest), or registered with Gymnasium.

    Args:
      hub: where tasks are looked for; by default the user's folder.
      client: the environment lives at this client's admin, in sandboxes and with a hub of the admin's.
      agents: names of several agents; then it is a MultiAgentEnv, whose `sandboxes` are shared or isolated.
      options: of a task, the fields of Settings, `backend` and `images` (see rock_env.harbor.sandbox_spec); of others,
        what they take. At an admin also `idle_seconds`, after which a forgotten environment is closed.

    Raises:
      SpecError: no such id, or an option that it does not take.
      EntryNotFound, EntryCorrupt: see Hub.fetch.
    """
    if client is not None:
        from rock_env.gem.remote import make_remote

        return make_remote(client, env_id, agents, sandboxes, options)
    if not is_task(env_id):
        check_one_agent(env_id, agents)
        return make_registered(env_id, **options)
    place = Place(**{name: options.pop(name) for name in PLACE_OPTIONS if name in options})
    return make_task(load(env_id, hub or LocalHub()), agents, sandboxes, options, place)


def is_task(env_id: object) -> bool:
    """Whether an id names an entry of the hub."""
    return isinstance(env_id, str) and "@" in env_id


def check_one_agent(env_id: str, agents: Sequence[str] | None) -> None:
    if agents is not None:
        raise SpecError(f"agents: {env_id} is for one agent; expected None, got {agents!r}")


def load(env_id: str, hub: Hub) -> HarborFolder:
    """The task of a hub's entry."""
    entry, tree = hub.fetch(env_id)
    if entry.kind != "task":
        raise SpecError(f"env_id: {entry.reference} is an {entry.kind} without instruction and tests: expected a task")
    return parse_task(tree, entry.name)


def make_task(
    task: HarborFolder, agents: Sequence[str] | None, sandboxes: Sharing, options: dict[str, object], place: Place
) -> TaskEnv | MultiAgentEnv:
    """An environment of a task. Raises SpecError for options that are none of Settings."""
    for name in options:
        if name not in Settings.__dataclass_fields__:
            known = ", ".join((*Settings.__dataclass_fields__, *PLACE_OPTIONS))
            raise SpecError(f"options: a task takes {known}, got {name!r}")
    settings = Settings(**options)
    if agents is None:
        return TaskEnv(task, settings, place)
    return MultiAgentEnv(task, agents, sandboxes, settings, place)


__all__ = [
    "STOP",
    "AnyText",
    "MultiAgentEnv",
    "Place",
    "Settings",
    "Step",
    "TaskEnv",
    "make",
]

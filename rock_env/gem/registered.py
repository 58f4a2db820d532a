"""Environments registered with Gymnasium that an id alone makes: which module registers them, and what may be chosen.

Modules are named by strings: nothing here imports what it does not need.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import gymnasium

from rock_env.errors import SpecError
from rock_env.sandbox import Sandbox

_MODULES = {"rome": "rome.envs"}  # namespace -> what to import for it


# What tenants of an admin may make -> the options that are theirs to choose. Such an environment takes what starts its
# sandboxes as an argument `start`.
SERVED = {
    "rome/Terminal-v0": {"families", "horizons", "max_chunks", "max_observation_chars", "command_seconds", "backend"}
}


def make_registered(env_id: str, **options: object) -> gymnasium.Env:
    """gymnasium.make, after its namespace's module was imported.

    Raises:
      SpecError: no such id, or options that it does not take.
    """
    if not isinstance(env_id, str):
        raise SpecError(f"env_id: expected text, got {env_id!r}")
    namespace, slash, _ = env_id.partition("/")
    module = _MODULES.get(namespace) if slash else None
    try:
        if module is not None:
            importlib.import_module(module)
        return gymnasium.make(env_id, **options)
    except ImportError as error:
        raise SpecError(f"env_id: {env_id!r} needs {module or 'a module'}, which is not installed ({error})") from error
    except gymnasium.error.Error as error:
        raise SpecError(f"env_id: expected NAME@VERSION of the hub, or an id that Gymnasium knows: {error}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{env_id}: {error}") from error


def make_served(env_id: str, start: Callable[..., Sandbox], options: dict[str, object]) -> gymnasium.Env:
    """An environment for a tenant. Raises SpecError for an id or an option that is not theirs to choose."""
    known = SERVED.get(env_id)
    if known is None:
        raise SpecError(f"env_id: expected NAME@VERSION of the hub, or one of {', '.join(SERVED)}, got {env_id!r}")
    for name in options:
        if name not in known:
            raise SpecError(f"options: {env_id} takes {', '.join(sorted(known))}, got {name!r}")
    return make_registered(env_id, start=start, disable_env_checker=True, **options)

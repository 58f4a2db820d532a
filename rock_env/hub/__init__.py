"""EnvHub: environments and Harbor tasks as versions that never change, pinned by the digest of their content.

LocalHub().push("tasks/fix-log", "fix-log@1.0")
hub.start("fix-log@1.0")                        a sandbox with the environment (its tests stay outside)
rock_env.gem.make("fix-log@1.0")                the task as a Gymnasium environment
"""

from __future__ import annotations

from collections.abc import Mapping

from rock_env.harbor import parse_environment, sandbox_spec
from rock_env.hub.base import SCHEME, Entry, Hub, Reference
from rock_env.hub.local import LocalHub, default_folder
from rock_env.sandbox import Sandbox
from rock_env.spec import SandboxSpec

COMMAND_SECONDS = 10.0


def spec(
    reference: str | Reference,
    hub: Hub | None = None,
    *,
    command_seconds: float = COMMAND_SECONDS,
    backend: str | None = None,
    images: Mapping[str, str] | None = None,
    remote: bool = False,
) -> SandboxSpec:
    """The sandbox that an entry describes: the files of its environment/, and what its task.toml asks for.

    Args:
      hub: where to look; by default the user's folder (see default_folder).
      command_seconds, backend, images, remote: see rock_env.harbor.sandbox_spec.

    Raises:
      EntryNotFound, EntryCorrupt: see Hub.fetch.
      SpecError, BackendUnavailable: it asks for what is not here.
    """
    _, tree = (hub or LocalHub()).fetch(reference)
    return sandbox_spec(parse_environment(tree), command_seconds, backend, images=images, remote=remote)


def start(reference: str | Reference, hub: Hub | None = None, **options: object) -> Sandbox:
    """Start a sandbox from an entry. Arguments and errors: see `spec` and Sandbox.start."""
    return Sandbox.start(spec(reference, hub, **options))


__all__ = ["COMMAND_SECONDS", "SCHEME", "Entry", "Hub", "LocalHub", "Reference", "default_folder", "spec", "start"]

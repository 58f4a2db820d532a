"""What the console script `rock` calls: the command line, or what to install for it."""

from __future__ import annotations

import sys

from rock_env.errors import RockError


def main() -> None:
    """Run `rock`. Its parts are in the extra `rock`."""
    try:
        from rock_env.cli import main as run
    except (ImportError, RockError) as error:
        sys.exit(f"rock: the command needs the extra `rock`: pip install 'rome-agents[rock]' ({error})")
    run()

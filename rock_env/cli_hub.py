"""`rock hub …`: environments and tasks, by version."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rock_env.hub import Entry, Hub, LocalHub, Reference

hub_app = typer.Typer(
    no_args_is_help=True,
    help="Environments and tasks, by version: of the admin, or in the folder $ROCK_HUB.",
)
Ref = Annotated[str, typer.Argument(help="[OWNER/]NAME@VERSION or [OWNER/]NAME@sha256:DIGEST.")]


def find_hub() -> Hub:
    """The folder $ROCK_HUB if that is set, else the hub of the admin that there is, else the user's folder."""
    if os.environ.get("ROCK_HUB"):
        return LocalHub()
    from rock_env.cli import find_admin

    client = find_admin()
    if client is None:
        return LocalHub()
    from rock_env.hub.remote import RemoteHub

    return RemoteHub(client)


@hub_app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="With task.toml, environment/ and, of a task, its other parts.")],
    reference: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    public: Annotated[bool, typer.Option("--public", help="Other tenants see it too.")] = False,
) -> None:
    """Publish a folder as a version, which never changes; prints what it is pinned by."""
    entry = find_hub().push(folder, reference, public=public)
    print(f"{entry.name}@{entry.digest}")


@hub_app.command()
def pull(
    reference: Ref,
    folder: Annotated[Path | None, typer.Argument(help="New or empty; by default the entry's name.")] = None,
) -> None:
    """Write an entry's files to a folder, after their digests were verified."""
    entry = find_hub().pull(reference, folder if folder is not None else Path(Reference.parse(reference).name))
    print(f"{entry.reference} {entry.digest}")


@hub_app.command("list")
def list_entries() -> None:
    """List one's own entries, and public ones."""
    _print(find_hub().list())


@hub_app.command()
def search(words: Annotated[list[str], typer.Argument(help="All of which occur in name or description.")]) -> None:
    """Find entries."""
    _print(find_hub().search(" ".join(words)))


@hub_app.command()
def delete(reference: Ref) -> None:
    """Remove a version. Its name stays taken."""
    print(find_hub().delete(reference).reference)


def _print(entries: list[Entry]) -> None:
    from rock_env.cli import print_table

    table = Table("reference", "kind", "public", "bytes", "pushed", "digest", "description", box=None)
    for entry in entries:
        pushed = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.created_at))
        public = "yes" if entry.public else ""
        table.add_row(entry.reference, entry.kind, public, str(entry.size), pushed, entry.digest, entry.description)
    print_table(table)

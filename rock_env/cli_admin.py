"""`rock admin …` and `rock worker`: running the control plane, and looking after its tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rock_env.errors import SpecError

admin_app = typer.Typer(no_args_is_help=True, help="The control plane, and its tenants.")
Name = Annotated[str, typer.Argument(help="The tenant's name.")]


@admin_app.command()
def start(
    host: Annotated[str, typer.Option(help="Where to listen; other than loopback only with TLS.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any.")] = 7600,
    directory: Annotated[Path | None, typer.Option(help="Its own; default $ROCK_ADMIN_DIR.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes on this machine; default 1, with --ray 0.")
    ] = None,
    capacity: Annotated[int, typer.Option(help="Sandboxes on each worker.")] = 1000,
    join: Annotated[list[str], typer.Option(help="NAME=ADDRESS=SECRET_FILE of a worker started elsewhere.")] = [],  # noqa: B006
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster (HOST:PORT, auto): a worker on each of its nodes.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(envvar="ROCK_DATABASE", help="SQLAlchemy URL; default SQLite.")
    ] = None,
    image: Annotated[
        list[str], typer.Option(help="NAME=PATH that tenants may use (NAME=: no image); may be repeated.")
    ] = [],  # noqa: B006
    model: Annotated[
        list[str], typer.Option(help="NAME=URL[=KEY_FILE] of a model server on loopback that tenants may use.")
    ] = [],  # noqa: B006
    backend: Annotated[list[str], typer.Option(help="Backends that tenants may use.")] = ["bubblewrap"],  # noqa: B006
    certificate: Annotated[Path | None, typer.Option(help="TLS: PEM file.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="TLS: PEM file.")] = None,
) -> None:
    """Run an admin until it is told to end (SIGINT, SIGTERM), which ends its sandboxes.

    Killed with SIGKILL, it leaves them running, and finds them again at its next start.
    """
    from rock_env.admin.server import AdminConfig, default_directory, serve

    joined = []
    for text in join:
        parts = text.split("=")
        if len(parts) != 3:
            raise SpecError(f"--join: expected NAME=ADDRESS=SECRET_FILE, got {text!r}")
        joined.append((parts[0], parts[1], parts[2]))
    images = {}
    for text in image:
        name, separator, path = text.partition("=")
        if not separator:
            raise SpecError(f"--image: expected NAME=PATH, got {text!r}")
        images[name] = path
    models = {}
    for text in model:
        name, separator, rest = text.partition("=")
        url, _, key_file = rest.partition("=")
        if not separator:
            raise SpecError(f"--model: expected NAME=URL or NAME=URL=KEY_FILE, got {text!r}")
        models[name] = (url, _read_key(key_file) if key_file else "")
    config = AdminConfig(
        directory or default_directory(),
        host=host,
        port=port,
        workers=(1 if ray is None else 0) if workers is None else workers,
        capacity=capacity,
        joined=tuple(joined),
        ray=ray,
        database=database,
        images=images,
        backends=tuple(backend),
        models=models,
        certificate=certificate,
        private_key=private_key,
    )
    serve(config)


def _read_key(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise SpecError(f"--model: the key file {path} cannot be read: {error}") from error


def _client():
    from rock_env.cli import admin_client

    return admin_client()


@admin_app.command()
def tenant(
    name: Name,
    max_sandboxes: Annotated[int | None, typer.Option()] = 64,
    max_memory_bytes: Annotated[int | None, typer.Option()] = None,
    max_cpus: Annotated[float | None, typer.Option()] = None,
    max_snapshots: Annotated[int | None, typer.Option()] = 64,
    max_lifetime_seconds: Annotated[float, typer.Option()] = 86400.0,
) -> None:
    """Add a tenant, or replace its quotas."""
    quotas = {
        "max_sandboxes": max_sandboxes,
        "max_memory_bytes": max_memory_bytes,
        "max_cpus": max_cpus,
        "max_snapshots": max_snapshots,
        "max_lifetime_seconds": max_lifetime_seconds,
    }
    client = _client()
    if name in {row["name"] for row in client.get("/v1/tenants")}:
        client.request("PUT", f"/v1/tenants/{name}", json=quotas)
    else:
        client.post("/v1/tenants", {"name": name, **quotas})


@admin_app.command()
def key(
    name: Name,
    label: Annotated[str, typer.Option(help="To know it by.")] = "",
    seconds: Annotated[float | None, typer.Option(help="How long it is valid.")] = None,
) -> None:
    """Make an API key for a tenant; prints it, this once."""
    print(_client().post(f"/v1/tenants/{name}/keys", {"label": label, "seconds": seconds})["key"])


@admin_app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The 16 characters between the underscores of a key or token.")],
) -> None:
    """Make a key or a token invalid, now."""
    _client().request("DELETE", f"/v1/keys/{id}")


@admin_app.command()
def tenants() -> None:
    """List tenants, their quotas and how many sandboxes they have."""
    _print_rows(_client().get("/v1/tenants"))


@admin_app.command()
def workers() -> None:
    """List workers, and how full they are."""
    _print_rows(_client().get("/v1/workers"))


def _print_rows(rows: list[dict]) -> None:
    from rich.table import Table

    from rock_env.cli import print_table

    table = Table(*(rows[0] if rows else ("none",)), box=None)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    print_table(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def worker(
    address: Annotated[str, typer.Option(help="unix:/PATH or tcp:127.0.0.1:PORT.")],
    secret_file: Annotated[Path, typer.Option(help="At least 32 bytes, mode 0600; the admin needs the same.")],
    name: Annotated[str, typer.Option(help="As the admin calls it.")] = "worker",
) -> None:
    """Run a worker for an admin to join (`rock admin start --join`), until it is told to end or has been left alone."""
    from rock_env.admin.worker_main import ORPHAN_SECONDS, serve

    serve(name, address, str(secret_file), None, ORPHAN_SECONDS)

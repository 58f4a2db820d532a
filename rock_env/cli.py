"""The `rock` command. Which sandboxes it speaks of: those of the admin at $ROCK_URL (with $ROCK_API_KEY), else of the
admin of this machine ($ROCK_ADMIN_DIR), else, for `run` and `shell`, of this process alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from rock_env import Job, Limits, Sandbox, SandboxSpec, doctor, hub, terminal, verify_audit_log
from rock_env.backend import DEFAULT_BACKEND
from rock_env.cli_admin import admin_app, worker
from rock_env.cli_hub import find_hub, hub_app
from rock_env.errors import BackendUnavailable, RockError, SpecError
from rock_env.remote import Client

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sandboxes that an agent can't get out of: run, look into, copy, snapshot, and serve them.",
)
audit_app = typer.Typer(no_args_is_help=True, help="The hash-chained audit logs.")
app.add_typer(admin_app, name="admin")
app.add_typer(audit_app, name="audit")
app.add_typer(hub_app, name="hub")
app.command()(worker)
_COMMAND = {"allow_interspersed_args": False}
_FAULT = 125  # the exit code when it was not the command that failed

Id = Annotated[str, typer.Argument(help="The sandbox's id.")]
Words = Annotated[list[str], typer.Argument(help="The command; options after its first word are its own.")]
Seconds = Annotated[float | None, typer.Option("--timeout", help="Seconds for a command.")]
Image = Annotated[
    str | None,
    typer.Option(help="An image of the admin; without one, a root file system directory; or hub://NAME@VERSION."),
]
Env = Annotated[list[str], typer.Option("--env", "-e", help="NAME=VALUE; may be repeated.")]
Limit = Annotated[list[str], typer.Option("--limit", "-l", help="NAME=NUMBER (or none) of rock_env.Limits.")]


def find_admin() -> Client | None:
    """A client of the admin that the environment, or this machine's admin directory, names."""
    if os.environ.get("ROCK_URL"):
        return Client(ca_file=os.environ.get("ROCK_CA_FILE"))
    from rock_env.admin.server import default_directory

    directory = default_directory()
    try:
        url, key = ((directory / name).read_text().strip() for name in ("url", "admin.key"))
    except OSError:
        return None
    return Client(url, key, ca_file=os.environ.get("ROCK_CA_FILE"))


def admin_client() -> Client:
    client = find_admin()
    if client is None:
        raise BackendUnavailable("no admin: set ROCK_URL and ROCK_API_KEY, or start one here with `rock admin start`")
    return client


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise SpecError(f"{option}: expected NAME=VALUE, got {text!r}")
    return dict(text.split("=", 1) for text in given)


def make_spec(image: str | None, env: list[str], limits: list[str], timeout: float | None) -> SandboxSpec:
    """A spec of command line options."""
    known = {field.name for field in fields(Limits)}
    values: dict[str, float | int | None] = {}
    for name, text in _pairs("--limit", limits).items():
        if name not in known:
            raise SpecError(f"--limit: expected one of {', '.join(sorted(known))}, got {name!r}")
        try:
            values[name] = None if text == "none" else float(text) if "." in text else int(text)
        except ValueError as error:
            raise SpecError(f"--limit {name}: expected a number or none, got {text!r}") from error
    if timeout is not None:
        values["command_seconds"] = timeout
    if image is None or not image.startswith(hub.SCHEME):
        return SandboxSpec(image=image, env=_pairs("--env", env), limits=Limits(**values))
    spec = hub.spec(image, find_hub(), remote=find_admin() is not None)
    return replace(spec, env={**spec.env, **_pairs("--env", env)}, limits=replace(spec.limits, **values))


@contextmanager
def _new_sandbox(spec: SandboxSpec) -> Iterator[Sandbox]:
    client = find_admin()
    with client.start(spec) if client else Sandbox.start(spec) as sandbox:
        yield sandbox


def _words(words: list[str]) -> list[str]:
    words = words[1:] if words[0] == "--" else words
    if not words:
        raise SpecError("command: expected at least one word")
    return words


def _show(output: str) -> None:
    sys.stdout.write(output)
    sys.stdout.flush()


class _RunCommand(TyperCommand):
    """Keeps what was typed: an image comes first in `run IMAGE -- COMMAND`, but not in `run -- COMMAND -- MORE`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)


# -- commands in sandboxes
@app.command(cls=_RunCommand, context_settings=_COMMAND)
def run(
    context: typer.Context,
    words: Words,
    image: Image = None,
    env: Env = [],  # noqa: B006  typer copies it
    limit: Limit = [],  # noqa: B006
    timeout: Seconds = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running in the background.")] = False,
) -> None:
    """Run a command in a new sandbox, and end that with it; exits as the command does.

    `rock run [IMAGE] -- COMMAND`: see --image. With --detach (which needs an admin) the sandbox stays, its id is
    printed, and output goes to run.log inside.
    """
    is_command = context.obj[-len(words) - 1 : -len(words)] == ["--"]
    if not is_command and (words[1:2] == ["--"] or words[0].startswith(hub.SCHEME)):
        if image is not None:
            raise SpecError(f"--image: expected it alone, or {words[0]} as the first word")
        image, *words = words
        if not words:
            raise SpecError("command: expected one after the image")
    spec, words = make_spec(image, env, limit, timeout), _words(words)
    if detach:
        sandbox = admin_client().start(spec)
        sandbox.session("run").run(f"{shlex.join(words)} >run.log 2>&1 &")
        print(sandbox.id)
        return
    with _new_sandbox(spec) as sandbox:
        result = sandbox.execute(words)
    _show(result.output)
    raise typer.Exit(result.exit_code)


@app.command("exec", context_settings=_COMMAND)
def execute(
    id: Id,
    words: Words,
    session: Annotated[str | None, typer.Option(help="Run as shell text in this session, which remembers.")] = None,
    timeout: Seconds = None,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Show output as it comes.")] = False,
    interactive: Annotated[bool, typer.Option("--stdin", "-i", help="Pass our standard input on; streams.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running; prints the job's id.")] = False,
) -> None:
    """Run a command in a sandbox that is there already; exits as the command does.

    With --stream, Ctrl-C interrupts the command, and a second one kills it.
    """
    sandbox, words = admin_client().sandbox(id), _words(words)
    if session is not None and (stream or interactive or detach):
        raise SpecError("--session: expected neither --stream, --stdin nor --detach with it")
    if detach:
        print(sandbox.start_job(words, timeout).id)
        return
    if stream or interactive:
        job = sandbox.start_job(words, timeout, stdin=interactive)
        raise typer.Exit(terminal.follow(job, sys.stdin.fileno() if interactive else None))
    if session is not None:
        result = sandbox.session(session).run(" ".join(words), timeout)
    else:
        result = sandbox.execute(words, timeout)
    _show(result.output)
    raise typer.Exit(result.exit_code)


@app.command()
def shell(
    id: Annotated[
        str | None, typer.Argument(help="A sandbox; without one, a new one that ends with the shell.")
    ] = None,
    image: Image = None,
) -> None:
    """A shell in a sandbox, in a terminal of its own if this is one; exits as the shell does."""
    if id is not None:
        raise typer.Exit(_converse(admin_client().sandbox(id)))
    with _new_sandbox(make_spec(image, [], [], None)) as sandbox:
        code = _converse(sandbox)
    raise typer.Exit(code)


def _converse(sandbox: Sandbox) -> int:
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        return terminal.follow(sandbox.start_job(["bash", "--norc", "--noprofile"], stdin=True), fd)
    env = {"TERM": os.environ.get("TERM", "xterm"), "PS1": "\\w $ "}
    size = terminal.window_size(fd)
    job = sandbox.start_job(["bash", "--norc", "--noprofile", "-i"], env=env, terminal=size)
    return terminal.attach(job, fd)


@app.command()
def forward(
    id: Id,
    port: Annotated[int, typer.Argument(help="The port inside.")],
    local: Annotated[int, typer.Option("--local", "-L", help="Where to listen on 127.0.0.1; 0: any.")] = 0,
) -> None:
    """Reach a port inside a sandbox from this machine, until Ctrl-C; the sandbox gets no route by this."""
    with admin_client().sandbox(id).forward(port, local) as forwarded:
        print(f"127.0.0.1:{forwarded.local_port} -> {id}:{port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


@app.command()
def cp(source: str, target: str) -> None:
    """Copy a file or directory from or to a sandbox; `rock cp out.txt ID:/tmp/out.txt`.

    A target that ends in "/" is the directory to copy into; else it is the path of the copy. What leads out of a copied
    directory (links elsewhere, devices) is left out, and named.
    """
    from_id, _, from_path = source.rpartition(":")
    to_id, _, to_path = target.rpartition(":")
    if bool(from_id) == bool(to_id):
        raise SpecError(f"cp: expected ID:PATH on one side, and a local path on the other, got {source} {target}")
    sandbox = admin_client().sandbox(from_id or to_id)
    if to_id:
        sandbox.upload(source, _into(to_path, source))
        return
    for name in sandbox.download(from_path, _into(target, from_path)):
        print(f"rock: left out: {name}", file=sys.stderr)


def _into(target: str, source: str) -> str:
    """The path of the copy."""
    return target + os.path.basename(source.rstrip("/")) if target.endswith("/") else target


# -- sandboxes
@app.command()
def ps(
    all_states: Annotated[bool, typer.Option("--all", "-a", help="Also those that have ended.")] = False,
    all_tenants: Annotated[bool, typer.Option(help="For admins.")] = False,
) -> None:
    """List sandboxes, the newest first."""
    rows = admin_client().get("/v1/sandboxes", all_tenants=all_tenants, limit=1000)
    table = Table("id", "tenant", "name", "state", "worker", "age s", "left s", "reason", box=None)
    now = time.time()
    for row in rows:
        if not all_states and row["ended_at"] is not None:
            continue
        left = "" if row["ended_at"] else f"{max(0.0, row['deadline'] - now):.0f}"
        age = f"{now - row['created_at']:.0f}"
        cells = (row["id"], row["tenant"], row["name"], row["state"], row["worker"] or "", age, left, row["reason"])
        table.add_row(*cells)
    print_table(table)


@app.command()
def logs(
    id: Id,
    job: Annotated[str | None, typer.Argument(help="A job (`rock jobs`): show its output instead.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended; exits as it does.")] = False,
) -> None:
    """What has become of a sandbox, and what it tried: its states, and its records in the audit log."""
    client = admin_client()
    if job is not None:
        _show_job(client.sandbox(id).job(job), follow)
        return
    lines = [(row["at"], row["state"], row["reason"]) for row in client.get(f"/v1/sandboxes/{id}/history")]
    report = client.audit(id)
    hidden = ("n", "time", "event", "sandbox", "previous")
    for record in report["records"]:
        details = " ".join(f"{k}={v}" for k, v in record.items() if k not in hidden and v not in (None, {}, ""))
        lines.append((record["time"], record["event"], details))
    for at, what, details in sorted(lines):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
        print(f"{stamp}.{int(at % 1 * 1000):03d}Z {what} {details}".rstrip())
    if report["chain"] and not report["chain"]["ok"]:
        raise RockError(f"the audit log has been tampered with: {report['chain']['problem']}")


def _show_job(job: Job, follow: bool) -> None:
    if follow:
        raise typer.Exit(terminal.show(job))
    seq, output = 0, job.read()
    while output.next > seq:
        for piece in output.pieces:
            terminal.show_piece(piece)
        seq = output.next
        output = job.read(seq)


@app.command()
def jobs(id: Id) -> None:
    """List the jobs of a sandbox: commands that `rock exec --detach`, `--stream` or `rock shell` started."""
    table = Table("job", "state", "exit", "seconds", "output", "command", box=None)
    for row in admin_client().sandbox(id).jobs():
        code = "" if row.exit_code is None else str(row.exit_code)
        table.add_row(row.id, row.state, code, f"{row.seconds:.0f}", str(row.output_bytes), row.command)
    print_table(table)


@app.command()
def kill(
    id: Id,
    job: str,
    number: Annotated[int, typer.Option("--signal", "-s", help="Its number.")] = signal.SIGTERM,
) -> None:
    """Send a signal to a job's process group; 9 goes to everything that it started."""
    if not admin_client().sandbox(id).job(job).signal(number):
        raise SpecError(f"job: {job} has ended already")


@app.command()
def snapshot(id: Id) -> None:
    """Keep a sandbox's files as they are now; prints the snapshot's id."""
    print(admin_client().post(f"/v1/sandboxes/{id}/snapshot", {})["id"])


@app.command()
def fork(id: Id, n: Annotated[int, typer.Option("-n", help="How many.")] = 1) -> None:
    """Start copies that continue from a sandbox's files and idle sessions; prints their ids."""
    for each in admin_client().fork(id, n):
        print(each.id)


@app.command()
def restore(snapshot: str) -> None:
    """Start a sandbox from a snapshot; prints its id."""
    print(admin_client().post("/v1/sandboxes", {"snapshot": snapshot})["id"])


@app.command()
def stop(ids: Annotated[list[str], typer.Argument(help="Sandboxes.")]) -> None:
    """End sandboxes."""
    client = admin_client()
    for id in ids:
        client.request("DELETE", f"/v1/sandboxes/{id}")


@app.command()
def token(
    id: Id,
    scope: Annotated[list[str], typer.Option(help="read, exec, files or manage; may be repeated.")] = ["read", "exec"],  # noqa: B006
    seconds: Annotated[float | None, typer.Option(help="How long; at most as long as the sandbox lives.")] = None,
) -> None:
    """Make a token for one sandbox; prints it."""
    print(admin_client().post(f"/v1/sandboxes/{id}/tokens", {"scopes": scope, "seconds": seconds})["token"])


# -- this machine
@audit_app.command()
def verify(
    what: Annotated[str, typer.Argument(help="An audit log, or the id of a sandbox of the admin.")],
    head: Annotated[str | None, typer.Option(help="SHA-256 of a record that must be in the log.")] = None,
) -> None:
    """Check a log's hash chain and its end. Exit code: 0 intact, 1 tampered with, 125 unreadable."""
    if os.path.exists(what) or "/" in what or "." in what:
        try:
            verdict = vars(verify_audit_log(what, head))
        except OSError as error:
            raise BackendUnavailable(f"{what}: {error.strerror}") from error
    else:
        verdict = admin_client().audit(what)["chain"]
        if verdict is None:
            raise BackendUnavailable(f"sandbox {what} never started: it has no records")
    if not verdict["ok"]:
        print(f"{what}: {verdict['problem']}", file=sys.stderr)
        raise typer.Exit(1)
    state = "closed" if verdict["closed"] else "not closed (its writer runs, or was killed)"
    print(f"{what}: intact, {verdict['records']} records, {state}, head {verdict['head']}")


@app.command("doctor")
def show_doctor(
    backend: Annotated[str, typer.Option(help="bubblewrap or docker.")] = DEFAULT_BACKEND,
) -> None:
    """What this machine can enforce. Exit code 1 when no sandbox can start."""
    report = doctor(backend)
    has_ray = importlib.util.find_spec("ray") is not None
    report["ray"] = {"ok": has_ray, "how": "workers on a cluster: rock admin start --ray; the extra `ray`"}
    table = Table("item", "", "how", box=None)
    for name, row in report.items():
        table.add_row(name, "yes" if row["ok"] else "NO", row["how"])
    print_table(table)
    raise typer.Exit(0 if report["backend"]["ok"] else 1)


def print_table(table: Table) -> None:
    """To a terminal in its width; else with whole lines, for other programs."""
    Console(width=None if sys.stdout.isatty() else 400, highlight=False).print(table)


def main() -> None:
    """Entry point. What is not a command's own failure exits with 125."""
    try:
        app()
    except RockError as error:
        print(f"rock: {error}", file=sys.stderr)
        sys.exit(_FAULT)


if __name__ == "__main__":
    main()

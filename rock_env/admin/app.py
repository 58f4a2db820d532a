"""The admin's REST API. Routes only translate: what they do is in control.py."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response

from rock_env.admin import archive, schema
from rock_env.admin.auth import ADMIN_TENANT, Principal, new_key
from rock_env.admin.compat import GEM_PREFIX, SANDBOX_PREFIX, create_peer_app, peer_gem_routes
from rock_env.admin.control import REQUEST_SECONDS, START_SECONDS, ControlPlane, Record
from rock_env.admin.gem import Environments
from rock_env.admin.gem_routes import gem_routes
from rock_env.admin.http import Gate, Json, install_errors, principal
from rock_env.admin.hub_routes import HubStore, hub_routes
from rock_env.admin.models import State, Tenant
from rock_env.admin.streams import connection_routes, job_routes, model_routes
from rock_env.errors import Forbidden, NotReady, SandboxNotFound, SpecError
from rock_env.sandbox import argv_of
from rock_env.spec import FileEntry, check_env, check_path

_SLACK_SECONDS = 30.0  # beyond a command's own deadline
_MAX_FILE_BYTES = 512 << 20
Who = Annotated[Principal, Depends(principal)]
SandboxId = Annotated[str, Path(pattern=schema.ID_PATTERN)]
SnapshotId = Annotated[str, Path(pattern=schema.ID_PATTERN)]
FilePath = Annotated[str, Query(min_length=1)]
_ERRORS = {code: {"model": schema.ErrorOut} for code in (401, 403, 404, 409, 410, 413, 422, 424, 429, 502, 503, 504)}


def create_app(control: ControlPlane, hub: HubStore, environments: Environments) -> FastAPI:
    """The application. Nothing is answered without a credential but GET /health."""
    app = FastAPI(title="ROCK admin", version="1", openapi_url=None, docs_url=None, redoc_url=None)
    install_errors(app)

    @app.get("/health")
    async def health() -> Response:
        return Json({"status": "ok"})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Json(app.openapi())

    groups = (
        sandbox_routes,
        command_routes,
        job_routes,
        connection_routes,
        model_routes,
        file_routes,
        copy_routes,
        credential_routes,
        admin_routes,
    )
    for routes in groups:
        router = APIRouter(prefix="/v1", responses=_ERRORS)
        routes(router, control)
        app.include_router(router)
    router = APIRouter(prefix="/v1", responses=_ERRORS)
    hub_routes(router, hub)
    gem_routes(router, environments)
    app.include_router(router)
    router = APIRouter(prefix=GEM_PREFIX, responses=_ERRORS)
    peer_gem_routes(router, environments)
    app.include_router(router)
    app.mount(SANDBOX_PREFIX, create_peer_app(control))
    app.add_middleware(Gate, keyring=control.keyring)
    return app


def sandbox_routes(router: APIRouter, control: ControlPlane) -> None:
    @router.post("/sandboxes", status_code=201, response_model=schema.SandboxOut)
    async def start(body: schema.StartBody, who: Who) -> Response:
        record = await control.start(who, body.request())
        if not body.wait:
            return Json(schema.sandbox_out(record.row), 202)
        await control.settled(record, body.queue_seconds + START_SECONDS)
        if record.failure is not None:
            raise record.failure
        return Json(schema.sandbox_out(record.row), 201)

    @router.get("/sandboxes")
    async def list_sandboxes(
        who: Who,
        state: State | None = None,
        all_tenants: bool = False,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        who.require_key()
        if all_tenants:
            who.require_admin()
        tenant = None if all_tenants else who.tenant
        rows = await control.db(control.database.sandboxes, tenant, state, limit)
        return Json([schema.sandbox_out(row) for row in rows])

    @router.get("/sandboxes/{id}", response_model=schema.SandboxOut)
    async def status(
        id: SandboxId, who: Who, wait_seconds: Annotated[float, Query(ge=0, le=60, allow_inf_nan=False)] = 0.0
    ) -> Response:
        """The state; with `wait_seconds`, of a sandbox that is coming up, once it has come up or failed."""
        record = await control.find(who, id, "read")
        await control.settled(record, wait_seconds)
        return Json(schema.sandbox_out(record.row))

    @router.get("/sandboxes/{id}/history")
    async def history(id: SandboxId, who: Who) -> Response:
        """Every state that it has been in, and why."""
        await control.find(who, id, "read")
        return Json([schema.transition_out(row) for row in await control.db(control.database.history, id)])

    @router.delete("/sandboxes/{id}", response_model=schema.SandboxOut)
    async def stop(id: SandboxId, who: Who) -> Response:
        """Idempotent."""
        record = await control.find(who, id, "manage")
        await control.stop(record, f"stopped by key {who.key}")
        return Json(schema.sandbox_out(record.row))

    @router.get("/sandboxes/{id}/stats")
    async def stats(id: SandboxId, who: Who) -> Response:
        reply, _ = await control.call(await control.find(who, id, "read"), "stats", REQUEST_SECONDS)
        return Json(reply)

    @router.get("/sandboxes/{id}/audit")
    async def audit(id: SandboxId, who: Who) -> Response:
        """Its audit records, also after its end, and whether the log that holds them is intact."""
        return Json(await control.audit(await control.find(who, id, "read")))

    @router.put("/sandboxes/{id}/network")
    async def network(id: SandboxId, body: schema.NetworkBody, who: Who) -> Response:
        """Change what it may reach, now. A sandbox's token may not: it would open its own cage."""
        who.require_key()
        record, policy = await control.find(who, id, "manage"), body.policy()
        await control.call(record, "network", REQUEST_SECONDS, policy=policy.to_wire())
        record.row.spec = {**record.row.spec, "network": policy.to_wire()}
        await control.db(control.database.set_spec, id, record.row.spec)
        return Json(schema.sandbox_out(record.row))


def command_routes(router: APIRouter, control: ControlPlane) -> None:
    def seconds(record: Record, timeout: float | None) -> float:
        return record.limits.command_seconds if timeout is None else timeout

    @router.post("/sandboxes/{id}/execute", response_model=schema.CommandOut)
    async def execute(id: SandboxId, body: schema.ExecuteBody, who: Who) -> Response:
        record = await control.find(who, id, "exec")
        limit = seconds(record, body.timeout)
        arguments = {
            "argv": argv_of(body.command),
            "seconds": limit,
            "cwd": None if body.cwd is None else check_path("cwd", body.cwd),
            "env": check_env("env", body.env),
            "output_bytes": record.limits.output_bytes,
        }
        reply, _ = await control.call(record, "execute", limit + _SLACK_SECONDS, **arguments)
        return Json(reply)

    @router.post("/sandboxes/{id}/run", response_model=schema.CommandOut)
    async def run(id: SandboxId, body: schema.RunBody, who: Who) -> Response:
        """Run shell text in a session; directory, variables and functions last from one command to the next."""
        record = await control.find(who, id, "exec")
        if "\0" in body.command:
            raise SpecError("command: expected text without NUL")
        limit = seconds(record, body.timeout)
        data = body.command.encode("utf-8", "surrogateescape")
        arguments = {"session": body.session, "seconds": limit, "output_bytes": record.limits.output_bytes}
        reply, _ = await control.call(record, "run", limit + _SLACK_SECONDS, data, **arguments)
        return Json(reply)

    @router.get("/sandboxes/{id}/env")
    async def environment(id: SandboxId, who: Who) -> Response:
        """The environment of its spec. Its worker tells: the admin keeps none."""
        reply, _ = await control.call(await control.find(who, id, "exec"), "spec", REQUEST_SECONDS)
        return Json(reply["spec"]["env"])

    @router.post("/sandboxes/{id}/kill", status_code=204, response_class=Response)
    async def kill(id: SandboxId, who: Who) -> Response:
        """End every process inside; files stay."""
        await control.call(await control.find(who, id, "exec"), "kill_all", REQUEST_SECONDS)
        return Response(status_code=204)


def file_routes(router: APIRouter, control: ControlPlane) -> None:
    @router.get("/sandboxes/{id}/files", response_class=Response)
    async def read(
        id: SandboxId,
        path: FilePath,
        who: Who,
        max_bytes: Annotated[int, Query(ge=0, le=_MAX_FILE_BYTES)] = 64 << 20,
    ) -> Response:
        """A file's bytes."""
        record = await control.find(who, id, "files")
        arguments = {"path": check_path("path", path), "max_bytes": max_bytes}
        _, blob = await control.call(record, "read", REQUEST_SECONDS, **arguments)
        return Response(blob, media_type="application/octet-stream")

    @router.put("/sandboxes/{id}/files", status_code=204, response_class=Response)
    async def write(
        id: SandboxId,
        path: FilePath,
        request: Request,
        who: Who,
        mode: Annotated[int | None, Query(ge=0, le=0o777)] = None,
    ) -> Response:
        """The body becomes the file, atomically; missing directories are made."""
        record = await control.find(who, id, "files")
        if check_path("path", path).endswith("/"):
            raise SpecError(f"path: expected a file name, got {path!r}")
        await control.put(record, {path: FileEntry(await request.body(), mode)}, {})
        return Response(status_code=204)

    @router.get("/sandboxes/{id}/list")
    async def list_files(id: SandboxId, who: Who, path: FilePath = ".", recursive: bool = False) -> Response:
        record = await control.find(who, id, "files")
        arguments = {"path": check_path("path", path), "recursive": recursive}
        reply, _ = await control.call(record, "list_files", REQUEST_SECONDS, **arguments)
        return Json(reply["entries"])

    @router.get("/sandboxes/{id}/archive", response_class=Response)
    async def download(id: SandboxId, path: FilePath, who: Who) -> Response:
        """A file or directory as a tar archive."""
        record = await control.find(who, id, "files")
        arguments = {"path": check_path("path", path), "max_bytes": _MAX_FILE_BYTES}
        _, blob = await control.call(record, "archive", REQUEST_SECONDS, **arguments)
        return Response(blob, media_type="application/x-tar")

    @router.put("/sandboxes/{id}/archive", status_code=204, response_class=Response)
    async def upload(id: SandboxId, request: Request, who: Who, path: FilePath = ".") -> Response:
        """Unpack the body, a tar archive of files, directories and symbolic links, below `path`."""
        record = await control.find(who, id, "files")
        below = "" if path == "." else check_path("path", path)
        await control.put(record, *archive.unpack(await request.body(), below))
        return Response(status_code=204)


def copy_routes(router: APIRouter, control: ControlPlane) -> None:
    @router.post("/sandboxes/{id}/snapshot", status_code=201)
    async def snapshot(id: SandboxId, who: Who) -> Response:
        row = await control.snapshot(await control.find(who, id, "manage"))
        return Json(schema.snapshot_out(row), 201)

    @router.post("/sandboxes/{id}/fork", status_code=201)
    async def fork(id: SandboxId, body: schema.ForkBody, who: Who) -> Response:
        record = await control.find(who, id, "manage")
        forks = await control.fork(who, record, body.n)
        return Json([schema.sandbox_out(each.row) for each in forks], 201)

    @router.get("/snapshots")
    async def list_snapshots(who: Who) -> Response:
        who.require_key()
        return Json([schema.snapshot_out(row) for row in control.snapshots.values() if row.tenant == who.tenant])

    @router.delete("/snapshots/{id}", status_code=204, response_class=Response)
    async def delete(id: SnapshotId, who: Who) -> Response:
        who.require_key()
        await control.drop_snapshot(control.snapshot_of(who, id))
        return Response(status_code=204)


def credential_routes(router: APIRouter, control: ControlPlane) -> None:
    @router.get("/whoami")
    async def whoami(who: Who) -> Response:
        return Json({**asdict(who), "scopes": sorted(who.scopes)})

    @router.post("/sandboxes/{id}/tokens", status_code=201)
    async def token(id: SandboxId, body: schema.TokenBody, who: Who) -> Response:
        """A token for this sandbox alone, at most until its deadline. It is shown only here."""
        who.require_key()
        record = await control.find(who, id, "manage")
        if record.state.is_terminal:
            raise NotReady(f"sandbox {id} has ended: it needs no tokens")
        left = max(0.001, record.row.deadline - time.time())
        seconds = left if body.seconds is None else min(left, body.seconds)
        key, credential = new_key(
            record.row.tenant, body.label, sandbox=id, scopes=tuple(dict.fromkeys(body.scopes)), seconds=seconds
        )
        key.expires_at = min(key.expires_at or 0.0, record.row.deadline)
        await control.db(control.database.add_key, key)
        control.keyring.add(key)
        shown = {"id": key.id, "sandbox": id, "scopes": key.scopes.split(), "expires_at": key.expires_at}
        return Json({**shown, "token": credential}, 201)

    @router.delete("/keys/{id}", status_code=204, response_class=Response)
    async def revoke(id: Annotated[str, Path(pattern=schema.ID_PATTERN)], who: Who) -> Response:
        """Revoke a key or a token of one's own tenant (an admin: of any)."""
        who.require_key()
        key = control.keyring.get(id)
        if key is None or not (who.is_admin or key.tenant == who.tenant):
            raise SandboxNotFound(f"no key {id}")
        if key.is_admin and key.id == who.key:
            raise Forbidden("an admin's key cannot revoke itself")
        await control.db(control.database.revoke, id)
        control.keyring.drop(id)
        return Response(status_code=204)


def admin_routes(router: APIRouter, control: ControlPlane) -> None:
    def tenant_of(name: str) -> Tenant:
        if name not in control.tenants:
            raise SandboxNotFound(f"no tenant {name!r}")
        return control.tenants[name]

    def tenant_out(tenant: Tenant) -> dict:
        quota = {name: getattr(tenant, name) for name in schema.QuotaBody.model_fields}
        live = control.usage[tenant.name].sandboxes
        return {"name": tenant.name, **quota, "sandboxes": live, "created_at": tenant.created_at}

    async def put(tenant: Tenant, *, new: bool) -> Response:
        await control.db(control.database.put_tenant, tenant, new=new)
        control.tenants[tenant.name] = tenant
        return Json(tenant_out(tenant), 201 if new else 200)

    @router.get("/tenants")
    async def list_tenants(who: Who) -> Response:
        who.require_admin()
        return Json([tenant_out(tenant) for tenant in control.tenants.values()])

    @router.post("/tenants", status_code=201)
    async def add_tenant(body: schema.TenantBody, who: Who) -> Response:
        who.require_admin()
        return await put(Tenant(**body.model_dump(), created_at=time.time()), new=True)

    @router.put("/tenants/{name}")
    async def set_quotas(name: str, body: schema.QuotaBody, who: Who) -> Response:
        """Replace a tenant's quotas. Sandboxes that run already go on."""
        who.require_admin()
        return await put(Tenant(name=name, created_at=tenant_of(name).created_at, **body.model_dump()), new=False)

    @router.post("/tenants/{name}/keys", status_code=201)
    async def add_key(name: str, body: schema.KeyBody, who: Who) -> Response:
        """An API key for a tenant. It is shown only here."""
        who.require_admin()
        is_admin = tenant_of(name).name == ADMIN_TENANT
        key, credential = new_key(name, body.label, is_admin=is_admin, seconds=body.seconds)
        await control.db(control.database.add_key, key)
        control.keyring.add(key)
        return Json({"id": key.id, "tenant": name, "expires_at": key.expires_at, "key": credential}, 201)

    @router.get("/workers")
    async def workers(who: Who) -> Response:
        who.require_admin()
        hosts = control.scheduler.hosts.values()
        shown = ("name", "is_up", "used", "capacity", "pid")
        return Json([{name: getattr(host, name) for name in shown} for host in hosts])

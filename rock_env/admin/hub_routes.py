"""The hub's routes: /v1/hub/entries. Every tenant is an owner; it sees its own entries and public ones."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi import Path as InPath
from pydantic import BaseModel

from rock_env.admin.auth import Principal
from rock_env.admin.http import Json, principal
from rock_env.hub.base import DIGEST, NAME, VERSION, Reference
from rock_env.hub.local import LocalHub
from rock_env.hub.wire import pack, unpack

Who = Annotated[Principal, Depends(principal)]
Name = Annotated[str, InPath(pattern=f"^{NAME}$")]
Version = Annotated[str, InPath(pattern=f"^{VERSION}$")]
Which = Annotated[str, InPath(pattern=f"^({DIGEST}|{VERSION})$", description="A version, or sha256:DIGEST.")]
Owner = Annotated[str | None, Query(pattern=f"^{NAME}$", description="Whose; by default one's own.")]


class EntryOut(BaseModel):
    """See rock_env.hub.Entry; `manifest` is base64 of what the digest is of."""

    owner: str
    name: str
    version: str
    digest: str
    kind: str
    description: str
    public: bool
    size: int
    files: int
    created_at: float
    manifest: str | None = None


@dataclass(frozen=True)
class HubStore:
    """An admin's hub: one folder for all its tenants, each of which may keep `max_bytes`."""

    folder: Path
    max_bytes: int | None

    def of(self, who: Principal) -> LocalHub:
        """As a tenant sees it. Raises Forbidden for a sandbox's token."""
        who.require_key()
        return LocalHub(self.folder, who.tenant, max_bytes=self.max_bytes, is_operator=who.is_admin)


def hub_routes(router: APIRouter, store: HubStore) -> None:
    def reference(name: str, which: str, owner: str | None) -> Reference:
        return Reference.parse(f"{f'{owner}/' if owner else ''}{name}@{which}")

    @router.get("/hub/entries", response_model=list[EntryOut])
    async def search(who: Who, query: Annotated[str, Query(max_length=1024)] = "") -> Response:
        """Entries in which every word of `query` occurs."""
        return Json([asdict(entry) for entry in await asyncio.to_thread(store.of(who).search, query)])

    @router.put("/hub/entries/{name}/{version}", response_model=EntryOut)
    async def push(name: Name, version: Version, request: Request, who: Who, public: bool = False) -> Response:
        """Publish the body, a tar archive of the files of a task or an environment. A version never changes."""
        mine, data = store.of(who), await request.body()
        entry = await asyncio.to_thread(lambda: mine.publish(unpack(data), name, version, public=public))
        return Json(asdict(entry))

    @router.get("/hub/entries/{name}/{which}", response_model=EntryOut)
    async def get(name: Name, which: Which, who: Who, owner: Owner = None) -> Response:
        entry, manifest = await asyncio.to_thread(store.of(who).get, reference(name, which, owner))
        return Json({**asdict(entry), "manifest": base64.b64encode(manifest).decode()})

    @router.get("/hub/entries/{name}/{which}/archive", response_class=Response)
    async def pull(name: Name, which: Which, who: Who, owner: Owner = None) -> Response:
        """The files as a tar archive, after their digests have been verified."""
        data = await asyncio.to_thread(lambda: pack(store.of(who).fetch(reference(name, which, owner))[1]))
        return Response(data, media_type="application/x-tar")

    @router.delete("/hub/entries/{name}/{which}", response_model=EntryOut)
    async def delete(name: Name, which: Which, who: Who, owner: Owner = None) -> Response:
        """Its name stays taken."""
        return Json(asdict(await asyncio.to_thread(store.of(who).delete, reference(name, which, owner))))

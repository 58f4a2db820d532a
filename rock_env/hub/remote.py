"""The hub of a `rock` admin, over REST. What arrives is verified here again, against its digests."""

from __future__ import annotations

import base64
from dataclasses import fields
from urllib.parse import quote

from rock_env.errors import EntryCorrupt
from rock_env.harbor import Tree
from rock_env.hub.base import Entry, Hub, Reference
from rock_env.hub.tree import check_file, decode_manifest
from rock_env.hub.wire import pack, unpack
from rock_env.remote import Client


class RemoteHub(Hub):
    """See Hub. The owner is the tenant of the client's key."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def publish(self, tree: Tree, name: str, version: str, *, public: bool = False) -> Entry:
        at = _at(Reference.parse(f"{name}@{version}"))
        reply = self._client.request("PUT", at, params={"public": public}, content=pack(tree))
        return _entry(reply.json())

    def fetch(self, reference: str | Reference) -> tuple[Entry, Tree]:
        wanted = Reference.parse(reference)
        reply = self._client.get(_at(wanted), **_owner(wanted))
        manifest = base64.b64decode(reply.pop("manifest"))
        entry, shown = _entry(reply), str(wanted)
        if wanted.digest not in (None, entry.digest):
            raise EntryCorrupt(f"hub entry {shown}: expected {wanted.digest}, got {entry.digest}")
        expected = decode_manifest(manifest, entry.digest, shown)
        # By digest: the content that was just described, whatever becomes of the version meanwhile.
        pinned = Reference(entry.name, digest=entry.digest, owner=entry.owner)
        data = self._client.request("GET", f"{_at(pinned)}/archive", params=_owner(pinned)).content
        tree = unpack(data)
        for each in expected:
            check_file(each, tree.get(each.path), shown)
        return entry, {each.path: tree[each.path] for each in expected}

    def search(self, query: str = "") -> list[Entry]:
        return [_entry(row) for row in self._client.get("/v1/hub/entries", query=query)]

    def delete(self, reference: str | Reference) -> Entry:
        wanted = Reference.parse(reference)
        return _entry(self._client.request("DELETE", _at(wanted), params=_owner(wanted)).json())


def _entry(row: dict) -> Entry:
    return Entry(**{field.name: row[field.name] for field in fields(Entry)})


def _at(reference: Reference) -> str:
    which = reference.version or reference.digest or ""
    return f"/v1/hub/entries/{quote(reference.name, safe='')}/{quote(which, safe='')}"


def _owner(reference: Reference) -> dict[str, str]:
    return {} if reference.owner is None else {"owner": reference.owner}

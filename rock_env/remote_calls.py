"""The requests of rock_env.jobs, rock_env.forward and rock_env.model_proxy, as an admin's REST API takes them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from rock_env.remote import Client

SLACK_SECONDS = 45.0  # beyond the time that a request takes by itself
Answer = tuple[dict, bytes]


class RemoteCalls:
    """`call(sandbox, op, seconds, blob, **arguments)` as rock_env.backend.Backend has it."""

    _client: Client

    def _at(self, sandbox: str, what: str = "") -> str:
        return f"/v1/sandboxes/{quote(sandbox, safe='')}{what}"

    def call(self, sandbox: str, op: str, seconds: float, blob: bytes = b"", /, **arguments: object) -> Answer:
        handler: Callable[..., Answer] = getattr(self, f"_{op}")
        return handler(sandbox, seconds + SLACK_SECONDS, blob, **arguments)

    def _job_at(self, sandbox: str, job: str, what: str = "") -> str:
        return self._at(sandbox, f"/jobs/{quote(job, safe='')}{what}")

    def _job_start(self, sandbox: str, limit: float, blob: bytes, *, job: str, **given: object) -> Answer:
        size = given["size"]
        body = {
            "id": job,
            "command": given["argv"],
            "timeout": given["seconds"],
            "terminal": {"rows": size[0], "columns": size[1]} if size is not None else None,
            **{name: given[name] for name in ("env", "cwd", "stdin", "buffer_bytes")},
        }
        return self._client.post(self._at(sandbox, "/jobs"), body, limit), b""

    def _job_list(self, sandbox: str, limit: float, blob: bytes) -> Answer:
        return {"jobs": self._client.get(self._at(sandbox, "/jobs"))}, b""

    def _job_status(self, sandbox: str, limit: float, blob: bytes, *, job: str, seconds: float) -> Answer:
        where = self._job_at(sandbox, job)
        return self._client.request("GET", where, limit, params={"wait_seconds": seconds}).json(), b""

    def _job_read(
        self, sandbox: str, limit: float, blob: bytes, *, job: str, seq: int, seconds: float, max_bytes: int
    ) -> Answer:
        params = {"seq": seq, "wait_seconds": seconds, "max_bytes": max_bytes}
        reply = self._client.request("GET", self._job_at(sandbox, job, "/output"), limit, params=params).json()
        data = b"".join(base64.b64decode(piece.get("data", "")) for piece in reply["pieces"])
        return {**reply, "pieces": [[p["seq"], p["stream"], p["size"]] for p in reply["pieces"]]}, data

    def _job_write(
        self, sandbox: str, limit: float, blob: bytes, *, job: str, at: int, close: bool, seconds: float
    ) -> Answer:
        params = {"at": at, "close": close, "wait_seconds": seconds}
        where = self._job_at(sandbox, job, "/stdin")
        return self._client.request("POST", where, limit, params=params, content=blob).json(), b""

    def _job_signal(self, sandbox: str, limit: float, blob: bytes, *, job: str, number: int) -> Answer:
        return self._client.post(self._job_at(sandbox, job, "/signal"), {"signal": number}, limit), b""

    def _job_resize(self, sandbox: str, limit: float, blob: bytes, *, job: str, size: list[int]) -> Answer:
        body = {"rows": size[0], "columns": size[1]}
        self._client.request("PUT", self._job_at(sandbox, job, "/terminal"), limit, json=body)
        return {}, b""

    # -- forwarded connections
    def _forward_at(self, sandbox: str, connection: str, what: str = "") -> str:
        return self._at(sandbox, f"/connections/{quote(connection, safe='')}{what}")

    def _forward_open(self, sandbox: str, limit: float, blob: bytes, *, connection: str, port: int) -> Answer:
        self._client.request("PUT", self._forward_at(sandbox, connection), limit, json={"port": port})
        return {}, b""

    def _forward_read(
        self, sandbox: str, limit: float, blob: bytes, *, connection: str, seq: int, seconds: float, max_bytes: int
    ) -> Answer:
        params = {"seq": seq, "wait_seconds": seconds, "max_bytes": max_bytes}
        reply = self._client.request("GET", self._forward_at(sandbox, connection, "/data"), limit, params=params)
        return {"next": seq + len(reply.content), "is_end": reply.headers["Rock-End"] == "true"}, reply.content

    def _forward_write(
        self, sandbox: str, limit: float, blob: bytes, *, connection: str, at: int, close: bool, seconds: float
    ) -> Answer:
        params = {"at": at, "close": close, "wait_seconds": seconds}
        where = self._forward_at(sandbox, connection, "/data")
        return self._client.request("POST", where, limit, params=params, content=blob).json(), b""

    def _forward_close(self, sandbox: str, limit: float, blob: bytes, *, connection: str) -> Answer:
        self._client.request("DELETE", self._forward_at(sandbox, connection), limit)
        return {}, b""

    # -- the agent's model
    def _model_status(self, sandbox: str, limit: float, blob: bytes) -> Answer:
        return self._client.get(self._at(sandbox, "/model")), b""

    def _model_next(self, sandbox: str, limit: float, blob: bytes, *, seconds: float) -> Answer:
        params = {"wait_seconds": seconds}
        reply = self._client.request("POST", self._at(sandbox, "/model/next"), limit, params=params).json()
        if reply["request"] is None:
            return reply, b""
        return reply, json.dumps(reply["request"].pop("body")).encode()

    def _model_answer(self, sandbox: str, limit: float, blob: bytes, *, request: str, **given: object) -> Answer:
        where = self._at(sandbox, f"/model/{quote(request, safe='')}/answer")
        return self._client.post(where, {**given, "body": json.loads(blob)}, limit), b""

"""Sandboxes of a `rock` admin, over REST. A backend like any other, so that `Sandbox` is the same local and remote."""

from __future__ import annotations

import base64
import contextlib
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from rock_env.admin import archive
from rock_env.errors import BackendUnavailable, Forbidden, RequestTimeout, RockError, SandboxDead, SpecError, from_wire
from rock_env.model_proxy.settings import ModelProxy
from rock_env.network import NetworkPolicy
from rock_env.remote_calls import SLACK_SECONDS, RemoteCalls
from rock_env.sandbox import Sandbox, Snapshot
from rock_env.spec import CommandResult, FileEntry, FileInfo, Limits, SandboxSpec, SandboxStats

try:
    import httpx
except ImportError as missing:
    raise BackendUnavailable("remote sandboxes need the extra `rock`: pip install 'rome-agents[rock]'") from missing

_CONNECT_SECONDS = 10.0
_REQUEST_SECONDS = 120.0
_START_SECONDS = 180.0
_READ_WAIT_SECONDS = 30.0


class Client:
    """A connection to an admin. Thread-safe; `close` it, or use it as a context manager, to free its sockets.

    Args:
      url, token: by default $ROCK_URL and $ROCK_API_KEY.
      ca_file: certificates to trust instead of the system's, e.g. the admin's own.
    """

    def __init__(self, url: str | None = None, token: str | None = None, *, ca_file: str | Path | None = None) -> None:
        self.url = (url or os.environ.get("ROCK_URL", "")).rstrip("/")
        token = token or os.environ.get("ROCK_API_KEY", "")
        if not self.url.startswith(("http://", "https://")):
            raise SpecError(f"url: expected http:// or https://, or ROCK_URL to be set, got {self.url!r}")
        if not token or not token.isascii():
            raise SpecError("token: expected one, or ROCK_API_KEY to be set")
        verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            verify=verify,
            limits=limits,
            trust_env=False,  # the admin is not reached through the proxies that programs use
        )
        self.backend = RemoteBackend(self)

    # -- requests
    def request(self, method: str, path: str, seconds: float = _REQUEST_SECONDS, **arguments: object) -> httpx.Response:
        """One request. Raises the error that the admin reports; BackendUnavailable, RequestTimeout for its silence."""
        timeout = httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
        try:
            response = self._http.request(method, path, timeout=timeout, **arguments)
        except httpx.TimeoutException as error:
            raise RequestTimeout(f"{self.url}: no answer to {method} {path} within {seconds:g} s") from error
        except UnicodeEncodeError as error:
            raise SpecError(f"{method} {path}: expected text that is UTF-8, got {error.object!r}") from error
        except httpx.HTTPError as error:
            raise BackendUnavailable(f"{self.url} cannot be reached: {error}") from error
        except RuntimeError as error:  # a thread of a forwarded connection, say, outlives the client by a moment
            if not self._http.is_closed:
                raise
            raise BackendUnavailable(f"{self.url}: this client has been closed") from error
        if response.is_success:
            return response
        try:
            reported = response.json()["error"]
            raise from_wire({name: str(reported.get(name, "")) for name in ("code", "message", "errno")})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RockError):
                raise
            message = f"{self.url}: expected an admin's answer, got status {response.status_code}"
            raise BackendUnavailable(message) from error

    def get(self, path: str, /, **params: object):
        return self.request("GET", path, params=params).json()

    def post(self, path: str, body: dict, seconds: float = _REQUEST_SECONDS):
        return self.request("POST", path, seconds, json=body).json()

    # -- sandboxes
    def start(
        self,
        spec: SandboxSpec | None = None,
        *,
        snapshot: Snapshot | None = None,
        name: str = "",
        idle_seconds: float | None = None,
        queue_seconds: float | None = None,
    ) -> Sandbox:
        """Start a sandbox and wait until it runs.

        Args:
          idle_seconds: after which, if nothing was asked of it and nothing runs in it, it is ended.
          queue_seconds: how long to wait for room.
        """
        extra = {"name": name, "idle_seconds": idle_seconds, "queue_seconds": queue_seconds}
        given = {key: value for key, value in extra.items() if value is not None}
        if spec is None and snapshot is None:
            spec = SandboxSpec()
        body = {"spec": spec_to_json(spec) if spec is not None else None, **given}
        body["snapshot"] = snapshot.id if snapshot is not None else None
        reply = self.post("/v1/sandboxes", {**body, "wait": True}, _START_SECONDS + (queue_seconds or 0))
        return Sandbox(self.backend, reply["id"], spec) if spec is not None else self._present(reply)

    def begin(self, spec: SandboxSpec | None = None, **extra: object) -> str:
        """Start a sandbox without waiting. Returns its id, for `wait`."""
        return self.post("/v1/sandboxes", {"spec": spec_to_json(spec or SandboxSpec()), **extra, "wait": False})["id"]

    def wait(self, id: str, seconds: float) -> Sandbox:
        """The sandbox, once it runs. Raises RequestTimeout, or SandboxDead when it could not start."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            row = self.get(f"/v1/sandboxes/{id}", wait_seconds=max(0.0, min(_READ_WAIT_SECONDS, left)))
            if row["state"] == "running":
                return self._present(row)
            if row["state"] not in ("pending", "starting"):
                raise SandboxDead(f"sandbox {id} is {row['state']}: {row['reason']}")
            if left <= 0:
                raise RequestTimeout(f"sandbox {id} is still {row['state']} after {seconds:g} s")

    def sandbox(self, id: str) -> Sandbox:
        """A sandbox that is there already. Raises SandboxDead when it has ended."""
        row = self.get(f"/v1/sandboxes/{id}")
        if row["ended_at"] is not None:
            raise SandboxDead(f"sandbox {id} has ended ({row['state']}): {row['reason']}")
        return self._present(row)

    def _present(self, row: dict) -> Sandbox:
        spec = spec_from_json(row["spec"])
        with contextlib.suppress(Forbidden):  # a token that may not look inside
            spec = replace(spec, env=self.get(f"/v1/sandboxes/{row['id']}/env"))
        return Sandbox(self.backend, row["id"], spec)

    def audit(self, id: str) -> dict:
        """{"records": the audit records of a sandbox, "chain": whether the log that holds them is intact}."""
        return self.get(f"/v1/sandboxes/{id}/audit")

    def fork(self, id: str, n: int = 1) -> list[Sandbox]:
        """`n` copies of a sandbox, in one request."""
        rows = self.post(f"/v1/sandboxes/{id}/fork", {"n": n}, _START_SECONDS)
        return [self._present(row) for row in rows]

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spec_to_json(spec: SandboxSpec) -> dict:
    """A spec as the REST API takes it."""
    if spec.readonly_binds:
        raise SpecError("readonly_binds: a remote sandbox has no access to files of a host; expected none")
    files = {path: _file_to_json(e if isinstance(e, FileEntry) else FileEntry(e)) for path, e in spec.files.items()}
    return {
        "image": spec.image,
        "files": files,
        "workdir": spec.workdir,
        "env": dict(spec.env),
        "limits": spec.limits.to_wire(),
        "network": _policy_to_json(spec.network),
        "backend": spec.backend,
        "model_proxy": _model_to_json(spec.model_proxy) if spec.model_proxy is not None else None,
    }


def spec_from_json(body: dict) -> SandboxSpec:
    """The spec that an admin tells of: without files and environment, which it does not keep."""
    rules = [(rule["host"], rule["port"], rule["protocol"]) for rule in body["network"]["allow"]]
    limits, network = Limits(**body["limits"]), NetworkPolicy.from_wire(rules)
    given = {name: body[name] for name in ("image", "workdir", "backend")}
    model = ModelProxy.from_wire(body["model_proxy"]) if body.get("model_proxy") else None
    return SandboxSpec(**given, limits=limits, network=network, model_proxy=model)


def _model_to_json(model: ModelProxy) -> dict:
    if model.mode == "replay" or model.record is not None or model.api_key or model.url.startswith("http"):
        raise SpecError(
            "model_proxy: over REST expected the mode pull, or push with the name of an admin's model as url"
        )
    body = {name: value for name, value in model.to_wire().items() if name not in ("record", "replay", "api_key")}
    return {**body, "models": list(model.models)}


def _file_to_json(entry: FileEntry) -> dict:
    return {"content": base64.b64encode(entry.data).decode(), "encoding": "base64", "mode": entry.mode}


def _policy_to_json(policy: NetworkPolicy) -> dict:
    return {"allow": [{"host": r.host, "port": r.port, "protocol": r.protocol} for r in policy.allow]}


class RemoteBackend(RemoteCalls):
    """See rock_env.backend.Backend: each method is one request. What can be enforced is for the admin to say."""

    name = "remote"

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def capabilities(self) -> frozenset[str]:
        """What a remote sandbox may be asked for; what its worker cannot enforce, that refuses."""
        offered = {"memory", "pids", "cpus", "disk", "network_closed", "network_allowlist", "audit", "seccomp"}
        return frozenset(
            offered | {"session", "snapshot", "fork", "stats", "jobs", "terminal", "forward", "model_proxy"}
        )

    def create(self, spec: SandboxSpec, snapshot: str | None = None) -> str:
        body = {"spec": spec_to_json(spec), "snapshot": snapshot, "wait": True}
        return self._client.post("/v1/sandboxes", body, _START_SECONDS)["id"]

    def execute(
        self, sandbox: str, argv: list[str], seconds: float, cwd: str | None, env: Mapping[str, str], output_bytes: int
    ) -> CommandResult:
        body = {"command": argv, "timeout": seconds, "cwd": cwd, "env": dict(env)}
        return CommandResult(**self._client.post(self._at(sandbox, "/execute"), body, seconds + SLACK_SECONDS))

    def run(self, sandbox: str, session: str, command: str, seconds: float, output_bytes: int) -> CommandResult:
        body = {"command": command, "session": session, "timeout": seconds}
        return CommandResult(**self._client.post(self._at(sandbox, "/run"), body, seconds + SLACK_SECONDS))

    def put(self, sandbox: str, files: Mapping[str, FileEntry], links: Mapping[str, str]) -> None:
        self._client.request("PUT", self._at(sandbox, "/archive"), content=archive.pack(files, links))

    def read(self, sandbox: str, path: str, max_bytes: int) -> bytes:
        params = {"path": path, "max_bytes": max_bytes}
        return self._client.request("GET", self._at(sandbox, "/files"), params=params).content

    def list(self, sandbox: str, path: str, recursive: bool) -> list[FileInfo]:
        entries = self._client.get(self._at(sandbox, "/list"), path=path, recursive=recursive)
        return [FileInfo(**entry) for entry in entries]

    def snapshot(self, sandbox: str) -> str:
        return self._client.post(self._at(sandbox, "/snapshot"), {})["id"]

    def drop_snapshot(self, snapshot: str) -> None:
        try:
            self._client.request("DELETE", f"/v1/snapshots/{quote(snapshot, safe='')}")
        except RockError as error:
            if error.code != "not_found":
                raise

    def set_network_policy(self, sandbox: str, policy: NetworkPolicy) -> None:
        self._client.request("PUT", self._at(sandbox, "/network"), json=_policy_to_json(policy))

    @property
    def audit_log(self) -> str:
        raise NotImplementedError("an admin gives out a sandbox's own records only: see Client.audit")

    def kill_all(self, sandbox: str) -> None:
        self._client.request("POST", self._at(sandbox, "/kill"))

    def stats(self, sandbox: str) -> SandboxStats:
        return SandboxStats(**self._client.get(self._at(sandbox, "/stats")))

    def is_alive(self, sandbox: str) -> bool:
        return self._client.get(self._at(sandbox))["state"] == "running"

    def destroy(self, sandbox: str) -> None:
        self._client.request("DELETE", self._at(sandbox))

    def doctor(self) -> dict[str, dict]:
        try:
            self._client.get("/v1/whoami")
            return {"backend": {"ok": True, "how": f"a rock admin at {self._client.url}"}}
        except RockError as error:
            return {"backend": {"ok": False, "how": str(error)}}

    def close(self) -> None:
        self._client.close()

"""Who is asking, and for what. Credentials are random; only their SHA-256 is kept.

An API key belongs to a tenant and may do everything with what is the tenant's; an admin's key may do everything. A
token is for one sandbox and names what it may do there. Nothing but GET /health is answered without one of them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from dataclasses import dataclass

from rock_env.admin.models import Key
from rock_env.errors import Forbidden, SandboxNotFound, SpecError, Unauthorized

SCOPES = ("read", "exec", "files", "manage")
ADMIN_TENANT = "admin"
_CREDENTIAL = re.compile(r"(r[kt])_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Principal:
    """Whoever sent a request. `sandbox` None: not limited to one."""

    key: str
    tenant: str
    is_admin: bool
    sandbox: str | None
    scopes: frozenset[str]

    def require_key(self) -> None:
        """Raises Forbidden for a sandbox's token."""
        if self.sandbox is not None:
            raise Forbidden(f"this token is for sandbox {self.sandbox} only; an API key is needed")

    def require_admin(self) -> None:
        if not self.is_admin:
            raise Forbidden("an admin's API key is needed")

    def require(self, tenant: str, sandbox: str, scope: str) -> None:
        """Raises SandboxNotFound for what is another tenant's (its existence is no one else's business), Forbidden for
        another sandbox than a token's, or a scope that it lacks."""
        if not self.is_admin and tenant != self.tenant:
            raise SandboxNotFound(f"no sandbox {sandbox}")
        if self.sandbox is not None and self.sandbox != sandbox:
            raise Forbidden(f"this token is for sandbox {self.sandbox}, not for {sandbox}")
        if scope not in self.scopes:
            raise Forbidden(f"this token does not have the scope {scope!r}")


def new_key(
    tenant: str,
    label: str,
    *,
    is_admin: bool = False,
    sandbox: str | None = None,
    scopes: tuple[str, ...] = SCOPES,
    seconds: float | None = None,
) -> tuple[Key, str]:
    """(the row to keep, the credential to hand out once)."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise SpecError(f"scopes: expected some of {', '.join(SCOPES)}, got {', '.join(unknown) or 'none'}")
    id, secret, now = secrets.token_hex(8), secrets.token_urlsafe(32), time.time()
    row = Key(
        id=id,
        tenant=tenant,
        digest=_digest(secret),
        label=label,
        is_admin=is_admin,
        sandbox=sandbox,
        scopes=" ".join(scopes),
        created_at=now,
        expires_at=None if seconds is None else now + seconds,
        revoked_at=None,
    )
    return row, f"{'rk' if sandbox is None else 'rt'}_{id}_{secret}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keyring:
    """The valid credentials, in memory."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}

    def add(self, key: Key) -> None:
        self._keys[key.id] = key

    def get(self, id: str) -> Key | None:
        return self._keys.get(id)

    def of(self, tenant: str) -> list[Key]:
        return [key for key in self._keys.values() if key.tenant == tenant]

    def drop(self, id: str) -> None:
        self._keys.pop(id, None)

    def purge(self) -> None:
        """Drop what has expired."""
        now = time.time()
        for key in [k for k in self._keys.values() if k.expires_at is not None and k.expires_at <= now]:
            del self._keys[key.id]

    def identify(self, authorization: str | None) -> Principal:
        """The principal of an Authorization header. Raises Unauthorized."""
        scheme, _, credential = (authorization or "").partition(" ")
        match = _CREDENTIAL.fullmatch(credential.strip())
        if scheme.lower() != "bearer" or match is None:
            raise Unauthorized("expected the header Authorization: Bearer KEY-OR-TOKEN")
        key = self._keys.get(match[2])
        known = key.digest if key is not None else _digest("")
        if not hmac.compare_digest(known, _digest(match[3])) or key is None:
            raise Unauthorized("this key or token is unknown, or was revoked")
        if (match[1] == "rt") != (key.sandbox is not None):
            raise Unauthorized("this key or token is unknown, or was revoked")
        if key.expires_at is not None and key.expires_at <= time.time():
            self.drop(key.id)
            raise Unauthorized("this key or token has expired")
        return Principal(key.id, key.tenant, key.is_admin, key.sandbox, frozenset(key.scopes.split()))


class Redact(logging.Filter):
    """Takes credentials out of log records, should one ever get there (in a URL, say)."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if _CREDENTIAL.search(text):
            record.msg, record.args = _CREDENTIAL.sub(r"\1_\2_***", text), ()
        return True

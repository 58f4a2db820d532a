"""The tables, and which states a sandbox may go through. Every row that is somebody's carries its tenant."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class State(StrEnum):
    """A sandbox's state. Terminal ones: stopped (asked for, idle, past its deadline, or died), failed (never ran), lost
    (its worker has gone, and it with that)."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.STARTING, State.STOPPED, State.FAILED}),
    State.STARTING: frozenset({State.RUNNING, State.STOPPING, State.STOPPED, State.FAILED, State.LOST}),
    State.RUNNING: frozenset({State.STOPPING, State.STOPPED, State.LOST}),
    State.STOPPING: frozenset({State.STOPPED, State.LOST}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
    State.LOST: frozenset(),
}


class Base(DeclarativeBase):
    pass


class Tenant(Base):
    """Who may use how much. None: no bound."""

    __tablename__ = "tenants"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    max_sandboxes: Mapped[int | None] = mapped_column(Integer)
    max_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_cpus: Mapped[float | None] = mapped_column(Float)
    max_snapshots: Mapped[int | None] = mapped_column(Integer)
    max_lifetime_seconds: Mapped[float] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float)


class Key(Base):
    """A credential, of which only a hash is kept: an API key of a tenant, or a token for one of its sandboxes."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    digest: Mapped[str] = mapped_column(String(64))
    label: Mapped[str] = mapped_column(String(128))
    is_admin: Mapped[bool]
    sandbox: Mapped[str | None] = mapped_column(String(32), index=True)
    scopes: Mapped[str] = mapped_column(String(128))  # separated by spaces
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)


class SandboxRow(Base):
    """A sandbox, from the request on; rows stay after its end. `spec` has neither files nor the environment."""

    __tablename__ = "sandboxes"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    key: Mapped[str] = mapped_column(String(32))  # which credential started it
    name: Mapped[str] = mapped_column(String(128))
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str] = mapped_column(String(1024))
    spec: Mapped[dict] = mapped_column(JSON)
    idle_seconds: Mapped[float] = mapped_column(Float)
    worker: Mapped[str | None] = mapped_column(String(64))
    incarnation: Mapped[str | None] = mapped_column(String(32))
    audit_log: Mapped[str | None] = mapped_column(String(1024))
    audit_name: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[float] = mapped_column(Float)
    deadline: Mapped[float] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)


class Transition(Base):
    """The history of a sandbox: one row for each change of its state."""

    __tablename__ = "transitions"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    sandbox: Mapped[str] = mapped_column(ForeignKey("sandboxes.id"))
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(String(1024))
    at: Mapped[float] = mapped_column(Float)
    __table_args__ = (Index("transitions_by_sandbox", "sandbox", "id"),)


class SnapshotRow(Base):
    """A snapshot: it lives on the worker that took it. States: ready, lost, deleted."""

    __tablename__ = "snapshots"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    sandbox: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16), index=True)
    spec: Mapped[dict] = mapped_column(JSON)
    worker: Mapped[str] = mapped_column(String(64))
    incarnation: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[float] = mapped_column(Float)


class SnapshotTag(Base):
    """A name that a tenant gave to a snapshot, to start from it as from an image."""

    __tablename__ = "snapshot_tags"
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(512), primary_key=True)
    snapshot: Mapped[str] = mapped_column(ForeignKey("snapshots.id"))

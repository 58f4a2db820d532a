"""The admin's memory that outlives it. Synchronous; the control plane calls it in one thread of its own.

SQLite (write-ahead log) survives a `kill -9` without loss. A crash of the machine may lose the last moments' rows, but
then the sandboxes that they tell of are gone as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import Engine, create_engine, event, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from rock_env.admin.models import (
    TRANSITIONS,
    Base,
    Key,
    SandboxRow,
    SnapshotRow,
    SnapshotTag,
    State,
    Tenant,
    Transition,
)
from rock_env.errors import BackendUnavailable, NotReady, SandboxNotFound, SpecError

REASON_CHARACTERS = 1024


class WrongState(NotReady):
    """A sandbox is not in the state that a change of it starts from."""


def open_engine(url: str) -> Engine:
    """An engine with the tables in place. Raises SpecError for a URL, BackendUnavailable for a server."""
    try:
        parsed = make_url(url)
        arguments = {"check_same_thread": False} if parsed.get_backend_name() == "sqlite" else {}
        engine = create_engine(parsed, connect_args=arguments, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise SpecError(f"database: expected a SQLAlchemy URL whose driver is installed ({error})") from error
    if parsed.get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection, record) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    try:
        Base.metadata.create_all(engine)
    except OperationalError as error:
        raise BackendUnavailable(f"database {parsed.render_as_string(hide_password=True)}: {error.orig}") from error
    return engine


class Database:
    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)

    def close(self) -> None:
        self.engine.dispose()

    def _session(self) -> Session:
        return Session(self.engine, expire_on_commit=False)

    # -- tenants and credentials
    def tenants(self) -> Sequence[Tenant]:
        with self._session() as session:
            return session.scalars(select(Tenant).order_by(Tenant.name)).all()

    def put_tenant(self, tenant: Tenant, *, new: bool) -> None:
        with self._session() as session:
            try:
                if new:
                    session.add(tenant)
                else:
                    session.merge(tenant)
                session.commit()
            except IntegrityError as error:
                raise SpecError(f"tenant {tenant.name!r} exists already") from error

    def keys(self) -> Sequence[Key]:
        """Every credential that has been neither revoked nor expired."""
        with self._session() as session:
            valid = (Key.expires_at.is_(None)) | (Key.expires_at > time.time())
            return session.scalars(select(Key).where(Key.revoked_at.is_(None), valid)).all()

    def add_key(self, key: Key) -> None:
        with self._session() as session:
            session.add(key)
            session.commit()

    def revoke(self, key: str) -> None:
        with self._session() as session:
            session.execute(update(Key).where(Key.id == key).values(revoked_at=time.time()))
            session.commit()

    # -- sandboxes
    def add_sandbox(self, row: SandboxRow) -> None:
        with self._session() as session:
            session.add(row)
            session.flush()
            session.execute(insert(Transition).values(**_transition(row.id, row.tenant, State(row.state), "")))
            session.commit()

    def move(self, id: str, old: State, new: State, reason: str, **values: object) -> None:
        """Change a sandbox's state, and write that into its history, in one transaction.

        Raises:
          WrongState: the change is not one of TRANSITIONS, or the sandbox is not in state `old`.
        """
        if new not in TRANSITIONS[old]:
            raise WrongState(f"sandbox {id}: {old} does not become {new}")
        reason = reason[:REASON_CHARACTERS]
        if new.is_terminal:
            values["ended_at"] = time.time()
        with self._session() as session:
            change = update(SandboxRow).where(SandboxRow.id == id, SandboxRow.state == old)
            found = session.execute(change.values(state=new, reason=reason, **values).returning(SandboxRow.tenant))
            tenant = found.scalar()
            if tenant is None:
                raise WrongState(f"sandbox {id} is not {old}")
            session.execute(insert(Transition).values(**_transition(id, tenant, new, reason)))
            session.commit()

    def set_spec(self, id: str, spec: dict) -> None:
        with self._session() as session:
            session.execute(update(SandboxRow).where(SandboxRow.id == id).values(spec=spec))
            session.commit()

    def sandbox(self, id: str) -> SandboxRow:
        with self._session() as session:
            row = session.get(SandboxRow, id)
        if row is None:
            raise SandboxNotFound(f"no sandbox {id}")
        return row

    def live_sandboxes(self) -> Sequence[SandboxRow]:
        live = [state for state in State if not state.is_terminal]
        with self._session() as session:
            return session.scalars(select(SandboxRow).where(SandboxRow.state.in_(live))).all()

    def sandboxes(self, tenant: str | None, state: State | None, limit: int) -> Sequence[SandboxRow]:
        """The newest `limit`, newest first; of one tenant, or of all."""
        query = select(SandboxRow).order_by(SandboxRow.created_at.desc()).limit(limit)
        if tenant is not None:
            query = query.where(SandboxRow.tenant == tenant)
        if state is not None:
            query = query.where(SandboxRow.state == state)
        with self._session() as session:
            return session.scalars(query).all()

    def history(self, id: str) -> Sequence[Transition]:
        with self._session() as session:
            return session.scalars(select(Transition).where(Transition.sandbox == id).order_by(Transition.id)).all()

    # -- snapshots
    def add_snapshot(self, row: SnapshotRow) -> None:
        with self._session() as session:
            session.add(row)
            session.commit()

    def ready_snapshots(self) -> Sequence[SnapshotRow]:
        with self._session() as session:
            return session.scalars(select(SnapshotRow).where(SnapshotRow.state == "ready")).all()

    def end_snapshot(self, id: str, state: str) -> None:
        with self._session() as session:
            session.execute(update(SnapshotRow).where(SnapshotRow.id == id).values(state=state))
            session.commit()

    def tag_snapshot(self, tenant: str, tag: str, snapshot: str) -> str | None:
        """Name a snapshot. Returns the one that had this name before."""
        with self._session() as session:
            row = session.get(SnapshotTag, (tenant, tag))
            before = row.snapshot if row is not None else None
            session.merge(SnapshotTag(tenant=tenant, tag=tag, snapshot=snapshot))
            session.commit()
        return before

    def tagged_snapshot(self, tenant: str, tag: str) -> str | None:
        with self._session() as session:
            row = session.get(SnapshotTag, (tenant, tag))
        return row.snapshot if row is not None else None

    def last_tag(self, sandbox: str) -> tuple[str, SnapshotRow] | None:
        """The newest named snapshot of a sandbox, and its name."""
        query = select(SnapshotTag.tag, SnapshotRow).join(SnapshotRow, SnapshotRow.id == SnapshotTag.snapshot)
        query = query.where(SnapshotRow.sandbox == sandbox).order_by(SnapshotRow.created_at.desc()).limit(1)
        with self._session() as session:
            row = session.execute(query).first()
        return (row[0], row[1]) if row is not None else None


def _transition(sandbox: str, tenant: str, state: State, reason: str) -> dict:
    return {"sandbox": sandbox, "tenant": tenant, "state": state, "reason": reason, "at": time.time()}

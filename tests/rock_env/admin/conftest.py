"""Admins that tests share, and those that a test starts for itself."""

import pytest
from admin_harness import AdminProcess


@pytest.fixture(scope="session")
def start_admin(tmp_path_factory):
    """`start_admin(**settings)` starts an admin in a directory of its own; all are stopped at the end."""
    started = []

    def start(env=None, **settings):
        folder = tmp_path_factory.mktemp("rock")
        audit = {"ROCK_AUDIT_DIR": str(folder / "audit")}
        started.append(AdminProcess(folder / "admin", env={**audit, **(env or {})}, **settings))
        return started[-1].start()

    yield start
    for admin in started:
        admin.stop()


@pytest.fixture(scope="session")
def admin(start_admin):
    """An admin that the tests share; each makes tenants of its own."""
    return start_admin()

"""For all tests: sandboxes write their audit logs where pytest keeps temporary files, not where users' logs are."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _audit_directory(tmp_path_factory):
    os.environ.setdefault("ROCK_AUDIT_DIR", str(tmp_path_factory.mktemp("audit")))

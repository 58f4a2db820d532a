"""For all tests: audit logs lie where pytest keeps temporary files, and Docker is a daemon of the tests' own."""

import os
import warnings

import pytest


@pytest.fixture(scope="session", autouse=True)
def _audit_directory(tmp_path_factory):
    os.environ.setdefault("ROCK_AUDIT_DIR", str(tmp_path_factory.mktemp("audit")))


@pytest.fixture(scope="session")
def docker_daemon(_audit_directory):
    """A running daemon, with the backend "docker" connected to it."""
    import docker_daemon

    from rock_env import get_backend, register_backend
    from rock_env.docker.backend import DockerBackend

    reason = docker_daemon.missing()
    if reason:
        warnings.warn(f"NOT TESTED: the Docker backend: {reason}", stacklevel=1)
        pytest.skip(reason)
    daemon = docker_daemon.DockerDaemon()
    daemon.start()
    try:
        register_backend("docker", lambda: DockerBackend(daemon.url))
        yield daemon
        get_backend("docker").close()
    finally:
        register_backend("docker", DockerBackend)
        daemon.stop()

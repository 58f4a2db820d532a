"""For all tests: XLA compiles fast and only once, audit logs lie where pytest keeps temporary files, and Docker is a
daemon of the tests' own."""

import os
import shutil
import tempfile
import warnings

import pytest

# Tests compile much and compute little, and often what another one has compiled, in this process or in one that it
# starts: without LLVM's dear passes, and with XLA's cache on disk, in a folder of this session. Set before anything
# imports JAX; inherited by the workers of xdist and by every child. (test_ipa_train.py compiles as users do.)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rome-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files that hold the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker of xdist begins one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure():
    if _COMPILED:
        shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _audit_directory(tmp_path_factory):
    os.environ.setdefault("ROCK_AUDIT_DIR", str(tmp_path_factory.mktemp("audit")))


@pytest.fixture(scope="session")
def sandbox_machine():
    """What `doctor` says of this machine, which can run sandboxes: without that, the test is skipped."""
    from rock_env import doctor

    report = doctor()
    if not report["backend"]["ok"]:
        pytest.skip(report["backend"]["how"])
    return report


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

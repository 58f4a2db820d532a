"""Every test of this folder runs over each backend, with what that one declares in `capabilities`."""

import pytest

from rock_env import Limits, Sandbox, SandboxSpec, get_backend


@pytest.fixture(scope="module", params=["bubblewrap", "docker"])
def kind(request):
    """A backend's name; that backend works."""
    if request.param == "docker":
        request.getfixturevalue("docker_daemon")
    return request.param


@pytest.fixture(scope="module")
def backend(kind):
    return get_backend(kind)


@pytest.fixture(scope="module")
def start(kind):
    """start(limits={...}, **fields of SandboxSpec): a sandbox, to be stopped by the caller."""

    def make(limits=None, **fields):
        return Sandbox.start(SandboxSpec(backend=kind, limits=Limits(**(limits or {})), **fields))

    return make


@pytest.fixture(scope="module")
def box(start):
    """A sandbox shared by the tests of a module; each test keeps to names of its own."""
    with start(files={"hello.txt": "hello\n"}, env={"EXTRA": "1"}) as sandbox:
        yield sandbox


@pytest.fixture
def fresh(start):
    with start() as sandbox:
        yield sandbox

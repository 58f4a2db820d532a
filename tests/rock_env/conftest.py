"""Shared sandboxes: real ones, one per test module where tests do not disturb each other."""

import pytest

from rock_env import Sandbox, SandboxSpec

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session", autouse=True)
def _machine(sandbox_machine):
    """Without sandboxes there is nothing to test here."""


@pytest.fixture(scope="module")
def box():
    """A sandbox shared by the tests of a module; each test keeps to names of its own."""
    with Sandbox.start(SandboxSpec(files={"hello.txt": "hello\n"})) as sandbox:
        yield sandbox


@pytest.fixture
def fresh():
    with Sandbox.start() as sandbox:
        yield sandbox

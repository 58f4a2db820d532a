"""TerminalEnv with the sandboxes of an admin that is away for a moment, or for good."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_terminal import ALWAYS_ZERO, call, play

from rock_env import BackendUnavailable
from rock_env.remote import Client
from rome.envs import EnvFailure, TerminalEnv
from rome.trajectory import Status

sys.path.insert(0, str(Path(__file__).parents[1] / "rock_env" / "admin"))
from admin_harness import AdminProcess

SECONDS = 240.0


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[AdminProcess]:
    started = AdminProcess(tmp_path / "admin", env={"ROCK_AUDIT_DIR": str(tmp_path / "audit")}).start()
    started.settings["port"] = int(started.url.rpartition(":")[2])  # the same after a restart
    yield started
    started.stop()


def test_an_admin_that_is_away_is_a_passing_failure_and_one_that_has_gone_ends_the_run(admin: AdminProcess) -> None:
    client = admin.client()
    env, other = (TerminalEnv(start=client.start, away_seconds=seconds) for seconds in (SECONDS, 1.0))
    for each in (env, other):
        each.reset(options={"task": ALWAYS_ZERO})
    admin.kill()
    with pytest.raises(EnvFailure) as caught:
        env.step(call("ls"))
    assert caught.value.status is Status.INFRA_FAILURE
    back = threading.Timer(2.0, admin.start)
    back.start()
    assert play(env, ALWAYS_ZERO, [None])[0] == 0.0  # the reset waits
    back.join()
    assert play(other, ALWAYS_ZERO, [None])[0] == 0.0

    other.reset(options={"task": ALWAYS_ZERO})
    admin.kill()
    with pytest.raises(EnvFailure):
        other.step(call("ls"))
    again = TerminalEnv(start=client.start, away_seconds=1.0)  # as each episode has one: the time is of all together
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"the limit is 1: .* cannot be reached"):
        while time.monotonic() - began < SECONDS:
            with pytest.raises(EnvFailure):
                again.reset(options={"task": ALWAYS_ZERO})


def test_an_admin_that_never_was_there_ends_the_run_at_once() -> None:
    with Client("http://127.0.0.1:9", "rk_nobody") as client:  # the port of discard: nobody listens
        env = TerminalEnv(start=client.start)
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            env.reset(options={"task": ALWAYS_ZERO})

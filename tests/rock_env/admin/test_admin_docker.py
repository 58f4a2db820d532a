"""An admin whose workers run Docker sandboxes, on a daemon of the tests' own."""

import os
import signal

import docker
import pytest
from test_rock_cli import Rock
from waiting import wait_until

from rock_env import BackendUnavailable, SandboxDead, SandboxSpec

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def admin(docker_daemon, start_admin):
    return start_admin(env={"DOCKER_HOST": docker_daemon.url}, backends=["docker"])


@pytest.fixture(scope="module")
def engine(docker_daemon):
    client = docker.DockerClient(docker_daemon.url)
    yield client
    client.close()


def containers(engine):
    return {container.id for container in engine.containers.list(all=True)}


def test_doctor_tells_of_it(engine):
    table = Rock()("doctor", "--backend", "docker")
    assert f"Docker Engine {engine.version()['Version']}" in table
    assert "read-only root" in table


def test_a_spec_without_a_backend_gets_the_admins(admin, engine):
    before = containers(engine)
    with admin.client().start(SandboxSpec(files={"a.txt": "hello\n"})) as box:
        assert box.execute("cat a.txt; exit 3").exit_code == 3
        assert box.execute("cat a.txt").output == "hello\n"
        job = box.start_job("for i in 1 2 3; do echo $i; done; exit 5")
        assert b"".join(piece.data for piece in job.stream()) == b"1\n2\n3\n"
        assert job.status().exit_code == 5
        assert len(containers(engine) - before) == 1
        (row,) = [row for row in admin.client().get("/v1/sandboxes") if row["id"] == box.id]
        assert row["spec"]["backend"] == "docker"
        audit = admin.client().audit(box.id)
        assert audit["records"]
        assert audit["chain"]["ok"]
    wait_until(lambda: containers(engine) == before)


def test_what_a_killed_worker_leaves_is_swept_and_named(admin, engine):
    before = containers(engine)
    box = admin.client().start(SandboxSpec())
    assert containers(engine) - before
    os.kill(admin.worker_pid(), signal.SIGKILL)

    def is_dead():
        try:
            box.execute("true")
        except BackendUnavailable:  # the worker is being replaced
            return False
        except SandboxDead:
            return True
        return False

    wait_until(is_dead)
    wait_until(lambda: containers(engine) == before)
    with admin.client().start(SandboxSpec()) as again:
        assert again.execute("echo again").output == "again\n"

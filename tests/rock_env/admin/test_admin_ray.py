"""Workers on a Ray cluster of several (simulated) nodes, one of which dies: real sandboxes, one control plane."""

from itertools import chain

import pytest
from test_admin_faults import descendants, is_gone
from waiting import wait_until

from rock_env import SandboxDead

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAIT = 240.0
# A dead node is noticed in seconds, and not in half a minute.
_HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and one more node, which run as processes of this machine."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("ROCK_AUDIT_DIR", str(tmp_path_factory.mktemp("audit")))
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH}
    started = Cluster(initialize_head=True, head_node_args=head)
    started.add_node(num_cpus=0)
    yield started
    started.shutdown()
    patch.undo()


def start_on_each(user, workers, count=2):
    """{worker: its sandboxes}, as many on each."""
    found = {}
    for _ in range(count * workers):
        box = user.start(idle_seconds=600, queue_seconds=WAIT)
        found.setdefault(user.get(f"/v1/sandboxes/{box.id}")["worker"], []).append(box)
    assert [len(boxes) for boxes in found.values()] == [count] * workers, found
    return found


def test_a_node_dies_and_the_others_go_on(start_admin, cluster):
    admin = start_admin(workers=0, ray=cluster.address, worker_seconds=20.0)
    user = admin.new_tenant("spread")
    rows = lambda: {row["name"]: row for row in admin.client().get("/v1/workers")}  # noqa: E731
    is_up = lambda count: [row["is_up"] for row in rows().values()] == [True] * count  # noqa: E731
    wait_until(lambda: is_up(2), WAIT)

    late = cluster.add_node(num_cpus=0)  # a node that joins gets a worker
    wait_until(lambda: is_up(3), WAIT)
    boxes = start_on_each(user, 3)
    for one in chain(*boxes.values()):
        one.session().run("cd /tmp; V=kept; (setsid sleep 300 &)")
    pids = {name: row["pid"] for name, row in rows().items()}
    processes = {name: descendants(pid) for name, pid in pids.items()}
    assert all(len(each) > 5 for each in processes.values())

    admin.kill()  # its workers outlive it
    admin.start()
    user = admin.client(user.token)
    assert {name: row["pid"] for name, row in rows().items()} == pids

    dead = f"ray-{late.node_id[:16]}"
    user.sandbox(boxes[dead][0].id).snapshot()
    cluster.remove_node(late, allow_graceful=False)
    wait_until(lambda: dead not in rows(), WAIT)
    for box in boxes.pop(dead):
        assert user.get(f"/v1/sandboxes/{box.id}")["state"] == "lost"
        with pytest.raises(SandboxDead, match="lost"):
            user.sandbox(box.id)
    assert user.get("/v1/snapshots") == []
    wait_until(lambda: is_gone(processes[dead]), WAIT)

    for box in chain(*boxes.values()):
        assert user.sandbox(box.id).session().run("echo $V $PWD").output == "kept /tmp\n"
    again = start_on_each(user, 2)
    assert set(again) == set(boxes)
    for box in chain(*again.values()):
        assert box.execute("echo new").output == "new\n"

    admin.stop()  # in order: nothing is left on any node
    for each in processes.values():
        wait_until(lambda each=each: is_gone(each), WAIT)
    assert admin.process.returncode == 0

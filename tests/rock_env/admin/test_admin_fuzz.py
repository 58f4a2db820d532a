"""Requests that nobody would write, of the OpenAPI document's kind and otherwise: no answer is a 500."""

import pytest
from hub_tasks import write_task

from rock_env import gem
from rock_env.admin.compat import SANDBOX_PREFIX
from rock_env.hub.remote import RemoteHub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_EXAMPLES = 25  # for each operation


def test_no_generated_request_gets_a_500(admin, tmp_path):
    """Bounded, and against loopback. Sandboxes that a request starts count against a small quota."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    user = admin.new_tenant("fuzz", max_sandboxes=6, max_snapshots=2)
    box = user.start()
    RemoteHub(user).push(write_task(tmp_path / "task"), "fuzz@1")
    env = gem.make("fuzz@1", client=user)
    headers = {"Authorization": f"Bearer {user.token}"}
    with admin.http() as http:
        documents = {prefix: http.get(f"{prefix}/openapi.json").json() for prefix in ("", SANDBOX_PREFIX)}
    statuses = {}

    def attack(operation, prefix):
        """A test of one operation, for hypothesis to run."""

        def send(case):
            if "id" in case.path_parameters and "/sandboxes/" in operation.path:
                case.path_parameters["id"] = box.id  # beyond the first check
            if (operation.method.upper(), operation.path) == ("DELETE", "/v1/sandboxes/{id}"):
                case.path_parameters["id"] = "0" * 16
            if operation.path.startswith("/v1/hub/entries/") and operation.method.upper() == "GET":
                case.path_parameters.update(name="fuzz", which="1")
                case.query = {name: value for name, value in (case.query or {}).items() if name != "owner"}
            verb = operation.path.rpartition("/")[2]
            if "/gem/" in operation.path and verb in ("reset", "step") and isinstance(case.body, dict):
                case.body["sandbox_id" if "/apis/" in operation.path else "id"] = env.id
            if operation.path.endswith("/gem/make") and isinstance(case.body, dict):
                case.body["env_id"] = "fuzz@1"
            if isinstance(case.body, dict):
                case.body.update({name: 0.2 for name in ("timeout", "queue_seconds") if name in case.body})
            if prefix:
                for given in (case.body, case.query, case.path_parameters):
                    if isinstance(given, dict) and "sandbox_id" in given:
                        given["sandbox_id"] = "0" * 16 if verb in ("stop", "delete") else box.id
            response = case.call(base_url=admin.url + prefix, headers=headers, timeout=60)
            statuses.setdefault(response.status_code, []).append(operation.path)
            assert response.status_code not in range(500, 503), (operation.path, case, response.text)

        return settings(
            max_examples=_EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=operation.as_strategy())(send))

    for prefix, document in documents.items():
        for result in schemathesis.openapi.from_dict(document).get_all_operations():
            attack(result.ok(), prefix)()
    assert sum(len(paths) for paths in statuses.values()) > 300
    assert {200, 422} <= set(statuses)
    assert "/execute" in statuses[200]  # of the peer's API
    assert user.sandbox(box.id).execute("echo well").output == "well\n"

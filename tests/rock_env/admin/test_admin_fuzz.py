"""Requests that nobody would write, of the OpenAPI document's kind and otherwise: no answer is a 500."""

import pytest
from hub_tasks import write_task

from rock_env import gem
from rock_env.admin.compat import SANDBOX_PREFIX
from rock_env.hub.remote import RemoteHub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_EXAMPLES, _EXAMPLES_WITHOUT_BODY = 25, 10  # for each operation
_NOT_AS_DOCUMENTED = 8  # of those that have a body


def test_no_generated_request_gets_a_500(admin, tmp_path):
    """Bounded, and against loopback. Sandboxes that a request starts count against a small quota."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    user = admin.new_tenant("fuzz", max_sandboxes=6, max_snapshots=2)
    box = user.start()
    RemoteHub(user).push(write_task(tmp_path / "task"), "fuzz@1")
    env = gem.make("fuzz@1", client=user)
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {user.token}"
    documents = {p: session.get(f"{admin.url}{p}/openapi.json", timeout=60).json() for p in ("", SANDBOX_PREFIX)}
    statuses, modes = {}, schemathesis.GenerationMode

    def fixed(operation, prefix):
        """Parameters that every request of an operation has: what leads beyond the first check."""
        method, path, values = operation.method.upper(), operation.path, {}
        if "/sandboxes/{id}" in path:
            values["path_parameters"] = {"id": "0" * 16 if method == "DELETE" and path.endswith("{id}") else box.id}
        if path.startswith("/v1/hub/entries/") and method == "GET":
            values["path_parameters"] = {"name": "fuzz", "which": "1"}
        if prefix and method == "GET" and "{" not in path:
            values["query"] = {"sandbox_id": box.id}
        return values

    def attack(operation, prefix, mode, examples):
        """A test of one operation, for hypothesis to run."""
        verb = operation.path.rpartition("/")[2]

        def send(case):
            if operation.path.startswith("/v1/hub/entries/") and operation.method.upper() == "GET":
                case.query = {name: value for name, value in (case.query or {}).items() if name != "owner"}
            if isinstance(case.body, dict):
                if "/gem/" in operation.path and verb in ("reset", "step"):
                    case.body["sandbox_id" if "/apis/" in operation.path else "id"] = env.id
                if operation.path.endswith("/gem/make"):
                    case.body["env_id"] = "fuzz@1"
                case.body.update({name: 0.2 for name in ("timeout", "queue_seconds") if name in case.body})
            for values in (case.body, case.path_parameters) if prefix else ():
                if isinstance(values, dict) and "sandbox_id" in values:
                    values["sandbox_id"] = "0" * 16 if verb in ("stop", "delete") else box.id
            response = case.call(base_url=admin.url + prefix, session=session, timeout=60)
            statuses.setdefault(response.status_code, []).append(operation.path)
            assert response.status_code not in range(500, 503), (operation.path, case, response.text)

        return settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=operation.as_strategy(generation_mode=mode, **fixed(operation, prefix)))(send))

    for prefix, document in documents.items():
        for result in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = result.ok()
            attack(operation, prefix, modes.POSITIVE, _EXAMPLES if operation.body else _EXAMPLES_WITHOUT_BODY)()
            if operation.body:
                attack(operation, prefix, modes.NEGATIVE, _NOT_AS_DOCUMENTED)()
    assert sum(len(paths) for paths in statuses.values()) > 300
    assert {200, 422} <= set(statuses)
    assert "/execute" in statuses[200]  # of the peer's API
    session.close()
    assert user.sandbox(box.id).execute("echo well").output == "well\n"

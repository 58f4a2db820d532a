"""Who may do what: keys, tokens, tenants, quotas, TLS; and that secrets stay out of logs and of the database."""

import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rock_env import (
    BackendUnavailable,
    Forbidden,
    Limits,
    NetworkPolicy,
    NoCapacity,
    QuotaExceeded,
    Sandbox,
    SandboxNotFound,
    SandboxSpec,
    SpecError,
    Unauthorized,
)
from rock_env.admin.server import AdminConfig, serve

SMALL = SandboxSpec(limits=Limits(memory_bytes=32 << 20, cpus=0.5))


@pytest.fixture(scope="module")
def alice(admin):
    return admin.new_tenant("alice")


@pytest.fixture(scope="module")
def bob(admin):
    return admin.new_tenant("bob")


@pytest.fixture(scope="module")
def box(alice):
    with alice.start(SMALL) as sandbox:
        yield sandbox


def _routes(admin):
    """Every (method, path) of the OpenAPI document, with ids that do not exist."""
    with admin.http() as http:
        document = http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            known = path.replace("{id}", "0" * 16).replace("{name}", "nobody")
            yield (
                method.upper(),
                known.replace("{job}", "j").replace("{request}", "00000000-1").replace("{connection}", "f" * 16),
            )


def test_nothing_but_health_is_answered_without_a_credential(admin):
    routes = [
        *_routes(admin),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nothing"),
        ("PUT", "/v1/../health/"),
    ]
    assert len(routes) > 25
    real = "_".join(admin.key.split("_")[:2])
    bad = [
        {},
        *({"Authorization": value} for value in (f"Bearer {real}_{'A' * 43}", "Basic eDp5", "Bearer", "bearer x")),
    ]
    with httpx.Client(base_url=admin.url, trust_env=False) as http:
        for method, path in routes:
            for headers in bad if path.endswith("sandboxes") else bad[:2]:
                response = http.request(method, path, headers=headers, params={"token": admin.key})
                expected = 200 if (method, path) == ("GET", "/health") else 401
                assert response.status_code == expected, (method, path, headers)
        assert http.get("/v1/sandboxes").headers["www-authenticate"] == "Bearer"


_COMMAND = {"command": "true"}
_BODIES = {
    "run": _COMMAND, "execute": _COMMAND, "/jobs": _COMMAND, "signal": {"signal": 15},
    "terminal": {"rows": 1, "columns": 1}, "answer": {"lease": "0" * 16, "body": {}},
    "f" * 16: {"port": 80},
}  # fmt: skip


def test_what_is_another_tenants_does_not_exist(admin, alice, bob, box):
    paths = [(m, p.replace("0" * 16, box.id)) for m, p in _routes(admin) if "/sandboxes/0" in p]
    assert len(paths) > 12
    with admin.http(bob.token) as http:
        for method, path in paths:
            body = next((body for end, body in _BODIES.items() if path.endswith(end)), {})
            response = http.request(method, path, json=body, params={"path": "x", "seq": 0, "at": 0})
            assert response.status_code == 404, (method, path, response.text)
            assert response.json()["error"]["code"] == "not_found"
    with box.snapshot() as snapshot:
        with pytest.raises(SandboxNotFound):
            bob.start(snapshot=snapshot)
        with pytest.raises(SandboxNotFound):
            bob.request("DELETE", f"/v1/snapshots/{snapshot.id}")
        assert bob.get("/v1/snapshots") == bob.get("/v1/sandboxes") == []
        with pytest.raises(Forbidden):
            bob.get("/v1/sandboxes", all_tenants=True)
    assert box.is_alive
    assert {row["tenant"] for row in admin.client().get("/v1/sandboxes", all_tenants=True)} >= {"alice"}


def test_administration_is_for_admins(admin, alice):
    with admin.http(alice.token) as http:
        assert http.get("/v1/tenants").status_code == 403
        assert http.post("/v1/tenants", json={"name": "mallory"}).status_code == 403
        assert http.put("/v1/tenants/alice", json={"max_sandboxes": 10**6}).status_code == 403
        assert http.post("/v1/tenants/admin/keys", json={}).status_code == 403
        assert http.get("/v1/workers").status_code == 403


def test_a_token_is_for_one_sandbox_and_for_what_it_says(admin, alice, box):
    other = alice.start(SMALL)

    def token(**body):
        return alice.post(f"/v1/sandboxes/{box.id}/tokens", body)["token"]

    all_scopes = admin.client(token())
    assert all_scopes.sandbox(box.id).execute("echo hi").output == "hi\n"
    with pytest.raises(Forbidden, match="not for"):
        all_scopes.sandbox(other.id)
    for refused in (
        lambda: all_scopes.start(SMALL),
        lambda: all_scopes.get("/v1/sandboxes"),
        lambda: all_scopes.post(f"/v1/sandboxes/{box.id}/tokens", {}),
        lambda: all_scopes.sandbox(box.id).set_network_policy(NetworkPolicy()),
        lambda: all_scopes.fork(box.id),
        lambda: all_scopes.get("/v1/snapshots"),
        lambda: all_scopes.request("DELETE", "/v1/keys/" + "0" * 16),
    ):
        with pytest.raises(Forbidden):
            refused()
    reader = Sandbox.connect(admin.url, token(scopes=["read"]), id=box.id)
    assert reader.stats().pids > 0
    for refused in (
        lambda: reader.execute("true"),
        lambda: reader.session().run("true"),
        lambda: reader.read_file("x"),
        lambda: reader.write_file("x", "x"),
        lambda: reader.snapshot(),
        lambda: reader.kill_all(),
        lambda: reader.stop(),
    ):
        with pytest.raises(Forbidden, match="scope"):
            refused()
    files = Sandbox.connect(admin.url, token(scopes=["files", "read"]), id=box.id)
    files.write_file("by-token", "x")
    with pytest.raises(Forbidden):
        files.execute("true")
    other.stop()


def test_expired_and_revoked_credentials_are_refused_at_once(admin, alice, box):
    short = alice.post(f"/v1/sandboxes/{box.id}/tokens", {"seconds": 3.0})
    client = admin.client(short["token"])
    assert client.sandbox(box.id).is_alive
    time.sleep(3.1)
    with pytest.raises(Unauthorized, match=r"expired|unknown"):
        client.sandbox(box.id)
    long = alice.post(f"/v1/sandboxes/{box.id}/tokens", {"seconds": 10**6})
    assert long["expires_at"] <= alice.get(f"/v1/sandboxes/{box.id}")["deadline"]
    client = admin.client(long["token"])
    assert client.sandbox(box.id).is_alive
    with pytest.raises(SandboxNotFound):
        admin.new_tenant("eve").request("DELETE", f"/v1/keys/{long['id']}")
    alice.request("DELETE", f"/v1/keys/{long['id']}")
    with pytest.raises(Unauthorized):
        client.sandbox(box.id)
    with admin.http(short["token"].replace("rt_", "rk_")) as http:
        assert http.get("/v1/whoami").status_code == 401


def test_quotas_bound_a_tenant(admin):
    quota = {"max_sandboxes": 3, "max_memory_bytes": 100 << 20, "max_cpus": 1.5, "max_snapshots": 1}
    user = admin.new_tenant("quota", **quota, max_lifetime_seconds=50)
    with pytest.raises(QuotaExceeded, match="lifetime"):
        user.start(SandboxSpec(limits=Limits(memory_bytes=32 << 20, lifetime_seconds=51)))
    base = {"memory_bytes": 32 << 20, "cpus": 0.5, "lifetime_seconds": None}
    with pytest.raises(SpecError, match="memory_bytes"):
        user.start(SandboxSpec(limits=Limits(**{**base, "memory_bytes": None})))
    with pytest.raises(QuotaExceeded, match="memory_bytes"):
        user.start(SandboxSpec(limits=Limits(**{**base, "memory_bytes": 101 << 20})))
    with pytest.raises(QuotaExceeded, match="cpus"):
        user.start(SandboxSpec(limits=Limits(**{**base, "cpus": 2.0})))
    spec = SandboxSpec(limits=Limits(**base))

    def attempt(_):
        try:
            return user.start(spec)
        except QuotaExceeded:
            return None

    with ThreadPoolExecutor(8) as pool:  # at the same moment: not one too many
        boxes = [box for box in pool.map(attempt, range(8)) if box is not None]
    assert len(boxes) == 3
    row = user.get(f"/v1/sandboxes/{boxes[0].id}")
    assert row["deadline"] - row["created_at"] == pytest.approx(50)
    with boxes[0].snapshot(), pytest.raises(QuotaExceeded, match="snapshots"):
        boxes[1].snapshot()
    with pytest.raises(QuotaExceeded):
        user.fork(boxes[0].id)
    boxes[0].stop()
    assert len(user.fork(boxes[1].id)) == 1
    with pytest.raises(QuotaExceeded):
        user.fork(boxes[1].id, 2)
    admin.client().request("PUT", "/v1/tenants/quota", json={"max_sandboxes": 4})
    user.start(spec).stop()
    for row in user.get("/v1/sandboxes", state="running"):
        user.request("DELETE", f"/v1/sandboxes/{row['id']}")
    assert {t["name"]: t["sandboxes"] for t in admin.client().get("/v1/tenants")}["quota"] == 0


def test_when_workers_are_full_requests_wait_in_turn(start_admin):
    admin = start_admin(capacity=1)
    one, two = admin.new_tenant("one"), admin.new_tenant("two")
    first = one.start(SMALL)
    with pytest.raises(NoCapacity, match="any worker"):
        two.start(SMALL, queue_seconds=0.2)
    assert two.get("/v1/sandboxes")[0]["state"] == "failed"
    waiting = [one.begin(SMALL) for _ in range(2)] + [two.begin(SMALL)]
    gone = one.begin(SMALL)
    one.request("DELETE", f"/v1/sandboxes/{gone}")  # given up while it waits
    assert [r["state"] for r in one.get(f"/v1/sandboxes/{gone}/history")] == ["pending", "stopped"]
    order = []
    first.stop()
    clients = dict(zip(waiting, (one, one, two), strict=True))
    for _ in waiting:
        running = None
        while running is None:
            running = next((i for i, c in clients.items() if c.get(f"/v1/sandboxes/{i}")["state"] == "running"), None)
        order.append(waiting.index(running))
        clients.pop(running).request("DELETE", f"/v1/sandboxes/{running}") if running in clients else None
    assert order == [0, 2, 1]  # the second tenant does not wait for all of the first one's
    admin.stop()


def test_secrets_stay_out_of_logs_and_database(start_admin):
    admin = start_admin()
    user = admin.new_tenant("careful")
    spec = SandboxSpec(env={"API": "env-hush-1"}, files={"f": "file-hush-2"})
    with user.start(spec) as box:
        token = user.post(f"/v1/sandboxes/{box.id}/tokens", {})["token"]
        box.execute("echo command-hush-3", env={"X": "env-hush-4"})
        box.session().run("export PASSWORD=command-hush-5")
        box.write_file("f", "file-hush-6")
        with admin.http(token) as http:
            assert http.get(f"/v1/sandboxes/{box.id}/{token}").status_code == 404  # pasted into a URL by mistake
            http.post("/v1/sandboxes", json={"spec": {"env": {"A": ["body-hush-7"]}}})
    admin.stop()
    secrets = [admin.key, user.token, token, "hush-"]
    places = [admin.log, *admin.directory.glob("workers/*/log"), *admin.directory.glob("admin.db*")]
    assert len(places) >= 3
    for place in places:
        content = place.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, place
            assert secret.split("_", 2)[-1].encode() not in content, place
    assert b"POST /v1/sandboxes 201" in admin.log.read_bytes()
    assert (admin.directory / "admin.key").stat().st_mode & 0o777 == 0o600
    assert admin.directory.stat().st_mode & 0o777 == 0o700


def test_tls(start_admin, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=rock", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    admin = start_admin(certificate=str(certificate), private_key=str(key))
    assert admin.url.startswith("https://")
    with Sandbox.connect(admin.url, admin.key, spec=SMALL, ca_file=certificate) as box:
        assert box.execute("echo over TLS").output == "over TLS\n"
    with pytest.raises(BackendUnavailable, match=r"certificate|CERTIFICATE"):
        admin.client().get("/v1/whoami")
    port = int(admin.url.rpartition(":")[2])
    with pytest.raises(BackendUnavailable):
        httpx_url = f"http://127.0.0.1:{port}"
        Sandbox.connect(httpx_url, admin.key, spec=SMALL)
    context = ssl.create_default_context(cafile=certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw, server_hostname="127.0.0.1")
    admin.stop()


def test_an_admin_refuses_what_is_not_safe(tmp_path, admin):
    with pytest.raises(SpecError, match="loopback"):
        AdminConfig(tmp_path, host="0.0.0.0")
    with pytest.raises(SpecError, match="TLS"):
        AdminConfig(tmp_path, certificate=tmp_path / "c")
    with pytest.raises(SpecError, match="host"):
        AdminConfig(tmp_path, host="example.org")

    def refusal(directory, **settings):
        with pytest.raises((SpecError, BackendUnavailable)) as refused:
            serve(AdminConfig(directory, port=0, **settings))
        return f"{type(refused.value).__name__}: {refused.value}"

    assert "another admin uses it" in refusal(admin.directory)
    assert "SpecError: database" in refusal(tmp_path / "a", database="nonsense://x")
    hidden = refusal(tmp_path / "b", database="postgresql+psycopg://u:hush@127.0.0.1:9/x")
    assert "hush" not in hidden
    assert "BackendUnavailable" in hidden

"""An agent's model over REST: taken, answered, forwarded to the admin's models; a trainer that is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_harness import (
    KEY,
    SECONDS,
    ModelServer,
    answers_of,
    ask,
    chat,
    chunk,
    completion,
    messages,
    take,
    text_of,
)

from rock_env import Forbidden, LeaseLost, ModelProxy, SandboxSpec, SpecError

_TRAINER = """
import sys
from rock_env.remote import Client
request = Client(sys.argv[1], sys.argv[2]).sandbox(sys.argv[3]).model.next(30)
print(request.id, flush=True)
sys.stdin.read()
"""


def test_pull(admin):
    user = admin.new_tenant("model")
    with user.start(SandboxSpec(model_proxy=ModelProxy(models=("a",)))) as box:
        assert user.sandbox(box.id).spec.model_proxy == ModelProxy(models=("a",))
        job = ask(box, chat("one"), chat("two", stream=True), messages("three"))
        first = take(box)
        with pytest.raises(SpecError, match="completion object"):
            first.answer({"choices": 3})
        first.answer(completion("uno"))
        second = take(box)
        second.send([chunk("d")])
        second.send([chunk("os"), chunk("", "stop")], done=True)
        take(box).fail("no", status=429)
        one, two, three = answers_of(job)
        assert json.loads(one["body"]) == completion("uno")
        assert text_of(two["body"]) == "dos"
        assert (three["status"], json.loads(three["body"])["type"]) == (429, "error")
        assert box.model.status() == {"waiting": 0, "leased": 0, "answered": 3}
        token = user.post(f"/v1/sandboxes/{box.id}/tokens", {"scopes": ["read", "files"]})["token"]
        with pytest.raises(Forbidden):
            admin.client(token).get(f"/v1/sandboxes/{box.id}/model")
        events = [record["event"] for record in user.audit(box.id)["records"]]
        assert events.count("model_request") == events.count("model_answer") == 3


def test_a_trainer_that_is_killed_loses_nothing(admin):
    user = admin.new_tenant("model-killed")
    with user.start(SandboxSpec(model_proxy=ModelProxy(lease_seconds=2.0))) as box:
        job = ask(box, chat("survive"))
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        command = [sys.executable, "-c", _TRAINER, admin.url, user.token, box.id]
        trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        taken = trainer.stdout.readline().strip()
        trainer.kill()
        trainer.wait(SECONDS)
        request = take(box)
        assert (request.id, request.attempt) == (taken, 2)
        request.answer(completion("by the second"))
        assert json.loads(answers_of(job)[0]["body"]) == completion("by the second")
        assert box.model.next(0) is None
        request.answer(completion("again"))
        request.lease = "0" * 16
        with pytest.raises(LeaseLost):
            request.answer(completion("not mine"))


def test_push_to_a_model_of_the_admin(start_admin):
    server = ModelServer()
    try:
        admin = start_admin(models={"rome": [server.url, KEY]})
        user = admin.new_tenant("pushing")
        with user.start(SandboxSpec(model_proxy=ModelProxy(mode="push", url="rome"))) as box:
            assert (
                json.loads(answers_of(ask(box, chat("x")))[0]["body"])["choices"][0]["message"]["content"] == "echo x"
            )
            (copy,) = user.fork(box.id)
            assert answers_of(ask(copy, chat("y")))[0]["status"] == 200
            assert {authorization for _, authorization, _ in server.seen} == {f"Bearer {KEY}"}
            shown = json.dumps(user.get(f"/v1/sandboxes/{box.id}"))
            assert '"url": "rome"' in shown
            for text in (shown, json.dumps(user.audit(box.id)), admin.log.read_text()):
                assert KEY not in text
            assert KEY.encode() not in (admin.directory / "admin.db").read_bytes()
        with pytest.raises(SpecError, match=r"one of the admin's models \(rome\)"):
            user.start(SandboxSpec(model_proxy=ModelProxy(mode="push", url="other")))
        for url in (server.url, "http://127.0.0.1:1/v1"):  # a tenant may not choose what the host connects to
            body = {"spec": {"model_proxy": {"mode": "push", "url": url}}}
            with pytest.raises(SpecError, match="url"):
                user.post("/v1/sandboxes", body)
        for extra in ({"record": "/tmp/x"}, {"api_key": "k"}, {"mode": "replay"}):
            with pytest.raises(SpecError):
                user.post("/v1/sandboxes", {"spec": {"model_proxy": extra}})
        with pytest.raises(SpecError, match="over REST expected"):
            user.start(SandboxSpec(model_proxy=ModelProxy(record="/tmp/x")))
    finally:
        server.close()

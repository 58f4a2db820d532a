"""The model endpoint inside a sandbox: pull, push, replay, faults, what is on record, what stays outside."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from model_harness import (
    KEY,
    SECONDS,
    ModelServer,
    answers_of,
    ask,
    chat,
    chunk,
    completion,
    events,
    messages,
    take,
    text_of,
)
from waiting import wait_until

from rock_env import (
    BackendUnavailable,
    FileEntry,
    LeaseLost,
    LimitNotEnforceable,
    ModelProxy,
    NetworkPolicy,
    NetworkRule,
    Sandbox,
    SandboxDead,
    SandboxSpec,
    SpecError,
    get_backend,
)
from rock_env.audit import read_audit_log, verify_audit_log


def start(**settings):
    return Sandbox.start(SandboxSpec(model_proxy=ModelProxy(**settings)))


@pytest.fixture(scope="module")
def box():
    with start() as sandbox:
        yield sandbox


def records_of(box):
    name = box.id.rpartition(":")[2]
    return [r for r in read_audit_log(get_backend("bubblewrap").audit_log) if r.get("sandbox") == name]


# -- pull
def test_whole_answers_in_both_shapes(box):
    text = {"path": "/v1/completions", "body": {"model": "m", "prompt": "2+2="}}
    job = ask(box, chat("one"), messages("two"), text)
    first, second = take(box), None
    assert (first.path, first.body, first.attempt, first.stream) == (chat()["path"], chat("one")["body"], 1, False)
    first.answer(completion("uno"))
    second = take(box)
    assert (second.path, second.body["messages"]) == (chat()["path"], [{"role": "user", "content": "two"}])
    second.answer(completion("dos", finish_reason="length"))
    third = take(box)
    assert (third.path, third.body) == ("/v1/completions", text["body"])
    third.answer({"id": "t", "choices": [{"index": 0, "text": "4", "finish_reason": "stop"}]})
    one, two, three = answers_of(job)
    assert json.loads(one["body"]) == completion("uno")
    message = json.loads(two["body"])
    assert (message["type"], message["content"]) == ("message", [{"type": "text", "text": "dos"}])
    assert (message["stop_reason"], message["usage"]) == ("max_tokens", {"input_tokens": 3, "output_tokens": 2})
    assert json.loads(three["body"])["choices"][0]["text"] == "4"
    assert box.model.next(0) is None


@pytest.mark.parametrize("in_pieces", [False, True])
def test_streams_in_both_shapes(box, in_pieces):
    job = ask(box, chat("one", stream=True), messages("two", stream=True))
    for _ in range(2):
        request = take(box)
        assert request.stream
        if in_pieces:
            request.send([chunk("Hel")])
            request.send([chunk("lo"), chunk("", "stop")], done=True)
        else:
            request.answer(completion("Hello"))
    openai, anthropic = answers_of(job)
    assert text_of(openai["body"]) == "Hello"
    found = events(anthropic["body"])
    assert [name for name, _ in found if name != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"
    ]  # fmt: skip
    assert "".join(e["delta"]["text"] for name, e in found if name == "content_block_delta") == "Hello"
    assert all(name == event["type"] for name, event in found)
    assert found[-2][1]["delta"]["stop_reason"] == "end_turn"


def test_pieces_arrive_before_the_answer_is_complete(box):
    job = ask(box, chat(stream=True))
    request = take(box)
    request.send([chunk("first")])
    reader = "import http.client,json,os,sys\nc=http.client.HTTPConnection('127.0.0.1',8011,timeout=90)\n"
    reader += "c.request('POST','/v1/chat/completions',sys.argv[1])\nr=c.getresponse()\n"
    reader += "print(r.readline().decode().strip(),flush=True)\nprint(r.read().decode())"
    direct = box.start_job(["python3", "-c", reader, json.dumps(chat(stream=True)["body"])])
    slow = take(box)
    slow.send([chunk("early")])
    deadline, seen = time.monotonic() + SECONDS, b""
    while b"early" not in seen:
        assert time.monotonic() < deadline
        seen = b"".join(piece.data for piece in direct.read(0, 1).pieces)
    assert direct.status().is_running
    slow.send([chunk("", "stop")], done=True)
    assert direct.wait(SECONDS).exit_code == 0
    request.send([], done=True)
    assert text_of(answers_of(job)[0]["body"]) == "first"


def test_eight_at_once_get_their_own_answers(box):
    job = ask(box, *(chat(f"question {n}", stream=n % 2 == 0) for n in range(8)), together=True)
    taken = [take(box) for _ in range(8)]
    assert box.model.status()["leased"] == 8
    for request in reversed(taken):
        request.answer(completion(f"answer to {request.body['messages'][0]['content']}"))
    for number, answer in enumerate(answers_of(job)):
        body = answer["body"]
        text = text_of(body) if number % 2 == 0 else json.loads(body)["choices"][0]["message"]["content"]
        assert text == f"answer to question {number}"


def test_answers_come_in_order_on_a_connection(box):
    program = (
        "import json,socket,sys\n"
        "s=socket.create_connection(('127.0.0.1',8011))\n"
        "for n in range(3):\n"
        " b=json.dumps({'model':'m','messages':[{'role':'user','content':str(n)}]})\n"
        " h=f'POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: {len(b)}\\r\\n\\r\\n'\n"
        " s.sendall((h+b).encode())\n"
        "s.settimeout(90)\nd=b''\n"
        "while d.count(b'HTTP/1.1 200')<3 or not d.endswith(b'}'): d+=s.recv(65536)\n"
        "print([line[-3:] for line in d.decode().split('said ')[1:] for line in [line[:1]]])"
    )
    job = box.start_job(["python3", "-c", program], timeout=SECONDS)
    for _ in range(3):
        request = take(box)
        request.answer(completion("said " + request.body["messages"][0]["content"]))
    assert b"".join(piece.data for piece in job.stream()) == b"['0', '1', '2']\n"


def test_tools_of_both_shapes(box):
    tool = {"name": "run", "description": "d", "input_schema": {"type": "object"}}
    history = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "ok"}, {"type": "tool_use", "id": "t1", "name": "run", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "is_error": True,
             "content": [{"type": "text", "text": "out"}]},
            {"type": "text", "text": "next"}]},
    ]  # fmt: skip
    body = {"model": "m", "max_tokens": 5, "system": "be brief", "messages": history, "tools": [tool]}
    body |= {"tool_choice": {"type": "any"}, "stop_sequences": ["X"], "temperature": 0.5}
    job = ask(box, {"path": "/v1/messages", "body": body}, {"path": "/v1/messages", "body": {**body, "stream": True}})
    call = {"id": "t2", "type": "function", "function": {"name": "run", "arguments": '{"b": 2}'}}
    for _ in range(2):
        request = take(box)
        assert request.body["messages"] == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "ok", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "run", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "Error: out"},
            {"role": "user", "content": "next"},
        ]  # fmt: skip
        function = {"name": "run", "description": "d", "parameters": {"type": "object"}}
        assert request.body["tools"] == [{"type": "function", "function": function}]
        assert (request.body["tool_choice"], request.body["stop"], request.body["max_tokens"]) == ("required", ["X"], 5)
        answer = completion(None, finish_reason="tool_calls")
        answer["choices"][0]["message"] = {"role": "assistant", "content": "calling", "tool_calls": [call]}
        request.answer(answer)
    whole, stream = answers_of(job)
    message = json.loads(whole["body"])
    use = {"type": "tool_use", "id": "t2", "name": "run", "input": {"b": 2}}
    assert message["content"] == [{"type": "text", "text": "calling"}, use]
    assert message["stop_reason"] == "tool_use"
    found = events(stream["body"])
    starts = [event["content_block"] for name, event in found if name == "content_block_start"]
    assert starts == [{"type": "text", "text": ""}, {**use, "input": {}}]
    deltas = [event["delta"] for name, event in found if name == "content_block_delta"]
    assert deltas[-1] == {"type": "input_json_delta", "partial_json": '{"b": 2}'}
    assert [event["index"] for name, event in found if name == "content_block_stop"] == [0, 1]


@pytest.mark.parametrize(
    ("request_", "status", "code", "message"),
    [
        ({"path": "/v1/chat/completions", "body": "{"}, 400, "invalid_json", "body: expected JSON"),
        ({"path": "/v1/chat/completions", "body": '{"model": NaN}'}, 400, "invalid_json", "body: expected JSON"),
        ({"path": "/v1/chat/completions", "body": {"model": "m"}}, 400, "invalid_request", "messages: expected"),
        ({"path": "/v1/chat/completions", "body": {"messages": [1]}}, 400, "invalid_request", "model: expected"),
        ({"path": "/v1/completions", "body": {"model": "m"}}, 400, "invalid_request", "prompt: expected"),
        ({"path": "/v1/embeddings", "body": {}}, 404, "unknown_url", "expected one of"),
        ({"path": "/v1/chat/completions", "method": "PUT", "body": {}}, 405, "method_not_allowed", "expected POST"),
        (messages(thinking={"type": "enabled"}), 400, "not_supported", "thinking: not supported"),
        (messages(max_tokens=0), 400, "invalid_request", "max_tokens: expected an integer >= 1"),
        (
            {"path": "/v1/messages", "body": {"model": "m", "max_tokens": 1, "messages": [
                {"role": "user", "content": [{"type": "image", "source": {}}]}]}},
            400, "not_supported", "messages.0.content.0.type 'image': not supported",
        ),
        ({"path": "/v1/messages/count_tokens", "body": {}}, 404, "unknown_url", "expected one of"),
    ],
)  # fmt: skip
def test_refusals_have_the_shape_of_their_api(box, request_, status, code, message):
    answer = answers_of(ask(box, request_))[0]
    assert answer["status"] == status, answer
    body = json.loads(answer["body"])
    assert body["error"]["code"] == code
    assert message in body["error"]["message"]
    assert (body.get("type") == "error") == request_["path"].startswith("/v1/messages")
    assert box.model.next(0) is None


def test_models_are_listed(box):
    with start(models=("a", "b")) as named:
        get = {"path": "/v1/models", "method": "GET", "body": ""}
        other = {**get, "headers": {"anthropic-version": "2023-06-01"}}
        openai, anthropic, one, none = answers_of(
            ask(named, get, other, {**get, "path": "/v1/models/b"}, {**get, "path": "/v1/models/c"})
        )
        assert [row["id"] for row in json.loads(openai["body"])["data"]] == ["a", "b"]
        assert [row["type"] for row in json.loads(anthropic["body"])["data"]] == ["model", "model"]
        assert json.loads(one["body"])["id"] == "b"
        assert none["status"] == 404


# -- faults
def test_a_request_comes_back_and_is_answered_exactly_once():
    with start(lease_seconds=1.0) as box:
        job = ask(box, chat("who?"))
        slow = take(box)
        quick = take(box)  # waits for the end of the lease
        assert (quick.id, quick.attempt) == (slow.id, 2)
        with pytest.raises(LeaseLost, match="no longer yours"):
            slow.answer(completion("slow"))
        with pytest.raises(LeaseLost):
            slow.fail("slow")
        with pytest.raises(SpecError, match="completion object with choices"):
            quick.answer({"choices": []})
        quick.answer(completion("quick"))
        quick.answer(completion("again"))  # as after a lost reply: nothing changes
        assert json.loads(answers_of(job)[0]["body"]) == completion("quick")
        assert box.model.status() == {"waiting": 0, "leased": 0, "answered": 1}
        with pytest.raises(LeaseLost):
            slow.answer(completion("late"))


def test_an_expired_lease_that_nobody_took_over_may_still_answer():
    with start(lease_seconds=0.3) as box:
        job = ask(box, chat())
        request = take(box)
        time.sleep(1)
        assert box.model.status()["waiting"] == 1
        request.answer(completion("late"))
        assert json.loads(answers_of(job)[0]["body"]) == completion("late")
        assert box.model.next(0) is None


def test_a_stream_that_stops_in_the_middle_ends_with_an_error_and_is_not_mixed():
    with start(lease_seconds=1.0) as box:
        job = ask(box, chat(stream=True), messages(stream=True))
        for _ in range(2):
            take(box).send([chunk("half")])  # and no more
        openai, anthropic = answers_of(job)
        assert events(openai["body"])[0][1]["choices"][0]["delta"]["content"] == "half"
        assert events(openai["body"])[-1][1]["error"]["code"] == "answer_broken_off"
        assert events(anthropic["body"])[-1][1]["error"]["code"] == "answer_broken_off"
        assert box.model.next(0) is None


def test_a_request_ends_at_its_deadline_with_a_504():
    with start(request_seconds=1.0) as box:
        job = ask(box, chat(), messages(), chat(stream=True), together=True)
        taken = [take(box) for _ in range(3)]
        next(request for request in taken if request.stream).send([chunk("begun")])
        first, second, third = answers_of(job)
        assert (first["status"], json.loads(first["body"])["error"]["type"]) == (504, "timeout_error")
        assert json.loads(first["body"])["error"]["code"] == "model_timeout"
        assert (second["status"], json.loads(second["body"])["error"]["type"]) == (504, "timeout_error")
        assert events(third["body"])[-1][1]["error"]["code"] == "model_timeout"
        with pytest.raises(LeaseLost):
            taken[0].answer(completion("late"))


def test_errors_of_the_trainer_reach_the_agent(box):
    job = ask(box, chat(), messages())
    take(box).fail("busy", status=429, code="slow_down")
    take(box).fail("busy", status=429)
    openai, anthropic = answers_of(job)
    assert (openai["status"], json.loads(openai["body"])["error"]["code"]) == (429, "slow_down")
    assert (anthropic["status"], json.loads(anthropic["body"])["error"]["type"]) == (429, "rate_limit_error")


def test_an_agent_that_leaves_takes_its_request_with_it(box):
    job = ask(box, chat("leaving"))
    request = take(box)
    job.kill()
    wait_until(lambda: not box.model.status()["leased"], SECONDS)
    with pytest.raises(LeaseLost):
        request.answer(completion("to nobody"))
    assert records_of(box)[-1]["status"] == 499


def test_a_sandbox_that_is_stopped_in_the_middle():
    box = start()
    ask(box, chat())
    request = take(box)
    threading.Timer(0.5, box.stop).start()
    with pytest.raises(SandboxDead):
        while True:
            assert box.model.next(30) is None
    with pytest.raises(SandboxDead):
        request.answer(completion("late"))


def test_the_process_of_the_endpoints_is_replaced():
    with start() as box:
        pid = _model_process()
        job = ask(box, chat("lost"))
        take(box)
        os.kill(pid, signal.SIGKILL)
        assert answers_of(job)[0]["status"] == 0
        deadline = time.monotonic() + SECONDS
        while True:
            again = ask(box, chat("again"))
            with contextlib.suppress(BackendUnavailable):  # it is being replaced
                request = box.model.next(2)
                if request is not None:
                    break
            assert time.monotonic() < deadline
            again.kill()
        request.answer(completion("back"))
        assert json.loads(answers_of(again)[0]["body"]) == completion("back")
        log = list(read_audit_log(get_backend("bubblewrap").audit_log))
        assert any(r["event"] == "model_proxy_ended" for r in log)
        assert verify_audit_log(get_backend("bubblewrap").audit_log).ok


def _model_process():
    keeper = get_backend("bubblewrap").supervisor().keeper_pid
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{name}/comm").read_text() == "rock-model\n" and keeper in _ancestors(int(name)):
                return int(name)
        except OSError:
            continue
    raise AssertionError("no such process")


def _ancestors(pid):
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def test_bodies_are_bounded():
    with start(max_body_bytes=10_000) as box:
        fits, large = chat("x" * 9000), chat("x" * 10_000)
        chunked = "import http.client\nc=http.client.HTTPConnection('127.0.0.1',8011,timeout=90)\n"
        chunked += (
            "c.request('POST','/v1/messages',iter([b'x'*5000]*3),{'Transfer-Encoding':'chunked'},encode_chunked=True)\n"
        )
        chunked += "r=c.getresponse(); print(r.status, r.read().decode())"
        job = ask(box, large, messages("x" * 10_000), fits)
        take(box).answer(completion("fits"))
        openai, anthropic, fine = answers_of(job)
        assert (openai["status"], json.loads(openai["body"])["error"]["code"]) == (413, "request_too_large")
        assert (anthropic["status"], json.loads(anthropic["body"])["error"]["type"]) == (413, "request_too_large")
        assert fine["status"] == 200
        assert box.execute(["python3", "-c", chunked]).output.startswith("413 ")
        assert box.model.next(0) is None
        many = ask(box, *(chat("x" * 9000) for _ in range(6)), together=True)
        taken = [take(box) for _ in range(4)]
        refused = {"event": "model_refused", "code": "too_much_at_once"}
        wait_until(lambda: sum(refused.items() <= record.items() for record in records_of(box)) >= 2, SECONDS)
        for request in taken:
            request.answer(completion("fits"))
        assert sorted(answer["status"] for answer in answers_of(many)) == [200] * 4 + [429] * 2


# -- push
@pytest.fixture(scope="module")
def server():
    server = ModelServer()
    yield server
    server.close()


def test_push_in_both_shapes(server):
    with start(mode="push", url=server.url, api_key=KEY) as box:
        job = ask(box, chat("a"), chat("b c", stream=True), messages("d"), messages("e f", stream=True), together=True)
        one, two, three, four = answers_of(job)
        assert json.loads(one["body"])["choices"][0]["message"]["content"] == "echo a"
        assert text_of(two["body"]) == "b c "
        assert json.loads(three["body"])["content"] == [{"type": "text", "text": "echo d"}]
        deltas = [e["delta"]["text"] for name, e in events(four["body"]) if name == "content_block_delta"]
        assert deltas == ["e ", "f "]
        get = {"path": "/v1/models", "method": "GET", "body": ""}
        failed, broken, listed = answers_of(ask(box, chat("fail"), chat("break"), get))
        assert (failed["status"], json.loads(failed["body"])["error"]["message"]) == (400, "bad key ***")
        assert (broken["status"], json.loads(broken["body"])["error"]["code"]) == (502, "model_unreachable")
        assert [row["id"] for row in json.loads(listed["body"])["data"]] == ["served"]
        assert {authorization for _, authorization, _ in server.seen} == {f"Bearer {KEY}"}
        with pytest.raises(SpecError, match="expected pull"):
            box.model.next(0)


def test_push_hangs_up_when_the_agent_does(server):
    with start(mode="push", url=server.url) as box:
        server.hung_up.clear()
        before = len(server.seen)
        job = ask(box, chat("forever", stream=True))
        wait_until(lambda: len(server.seen) > before)
        job.kill()
        assert server.hung_up.wait(SECONDS)


def test_push_to_nobody():
    with start(mode="push", url="http://127.0.0.1:9/v1") as box:
        answer = answers_of(ask(box, messages()))[0]
        assert (answer["status"], json.loads(answer["body"])["error"]["type"]) == (502, "api_error")


def test_the_key_is_nowhere_in_the_sandbox(server):
    with start(mode="push", url=server.url, api_key=KEY) as box:
        seen = answers_of(ask(box, chat("a"), chat("fail")))
        assert KEY not in json.dumps(seen)
        session = box.session()
        for command in (
            "env; export -p; declare -p",
            "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/status 2>/dev/null | tr '\\0' '\\n'",
            "cat /proc/net/unix /proc/self/mountinfo; ls -lR /proc/[0-9]*/fd 2>/dev/null",
        ):
            output = session.run(command, timeout=SECONDS).output
            assert KEY not in output
            assert "very-secret" not in output
        # The command does not say what it looks for, lest it finds itself.
        search = "grep -rslF --exclude-dir={sys,usr,proc} $(printf 'sk-very-%s' secret-4f1d) /"
        assert session.run(search, timeout=SECONDS).output == ""
        box.write_file("planted", KEY)
        assert session.run(search, timeout=SECONDS).output == "/app/planted\n"
        assert session.run("echo $OPENAI_API_KEY $ANTHROPIC_API_KEY $OPENAI_BASE_URL $ANTHROPIC_BASE_URL").output == (
            "sandbox sandbox http://127.0.0.1:8011/v1 http://127.0.0.1:8011\n"
        )
        assert KEY not in repr(box.spec)


# -- record and replay
def test_record_and_replay(tmp_path):
    tape = tmp_path / "tape.jsonl"
    asked = [chat("a"), chat("b", stream=True), messages("c"), messages("d", stream=True), chat("a")]
    with start(record=str(tape)) as box:
        job = ask(box, *asked)
        for number in range(5):
            request = take(box)
            if number == 1:
                request.send([chunk("piece "), chunk("meal")])
                request.send([chunk("", "stop")], done=True)
            else:
                request.answer(completion(f"answer {number}"))
        recorded = answers_of(job)
        failed = ask(box, chat("failed"))
        take(box).fail("no")
        assert answers_of(failed)[0]["status"] == 500
    lines = [json.loads(line) for line in tape.read_text().splitlines()]
    assert [line["request"]["messages"][0]["content"] for line in lines] == ["a", "b", "c", "d", "a"]
    assert tape.stat().st_mode & 0o777 == 0o600
    with tape.open("a") as file:
        file.write('{"torn by a cra')
    with start(mode="replay", replay=str(tape)) as box:
        again = answers_of(ask(box, *asked))
        strip = lambda answers: [_without_names(answer["body"]) for answer in answers]  # noqa: E731
        assert strip(again) == strip(recorded)
        last = answers_of(ask(box, chat("a"), chat("other"), messages("other")))
        assert json.loads(last[0]["body"]) == completion("answer 4")
        assert (last[1]["status"], json.loads(last[1]["body"])["error"]["code"]) == (404, "replay_miss")
        assert json.loads(last[2]["body"])["type"] == "error"
    tape.write_text('{"no": "recording"}\n')
    with pytest.raises(SpecError, match="replay: line 1 is not one of a recording"):
        start(mode="replay", replay=str(tape))
    with pytest.raises(SpecError, match=r"model_proxy\.replay: .*No such file"):
        start(mode="replay", replay=str(tmp_path / "none"))


def _without_names(body):
    """Without ids and times that are made for each answer."""
    return re.sub(r'"(msg_[0-9a-f]{8}-\d+)"|"created":\d+', "", body)


# -- the policy, the record
def test_it_is_off_by_default():
    with Sandbox.start() as box:
        assert "OPENAI" not in box.execute("env").output
        assert box.execute("exec 3<>/dev/tcp/127.0.0.1/8011").exit_code == 1
        with pytest.raises(SpecError, match="model_proxy: expected one"):
            box.model.next(0)


def test_every_request_is_on_record_without_what_it_says(server):
    with start(mode="push", url=server.url, api_key=KEY) as box:
        secret = "the-content-of-a-question"
        answers_of(ask(box, chat(secret), messages(secret, stream=True), {"path": "/v1/x", "body": secret}))
        found = [(r["event"], r) for r in records_of(box) if r["event"].startswith("model")]
        assert [event for event, _ in found] == [
            "model_proxy", "model_request", "model_answer", "model_request", "model_answer", "model_refused"
        ]  # fmt: skip
        asked, answered = found[1][1], found[2][1]
        size = len(json.dumps(chat(secret)["body"]))
        assert (asked["method"], asked["path"], asked["model"], asked["stream"], asked["bytes"]) == (
            "POST", "/v1/chat/completions", "m", False, size
        )  # fmt: skip
        assert (answered["request"], answered["status"]) == (asked["request"], 200)
        assert answered["bytes"] > 100
        failed = answers_of(ask(box, chat("fail")))[0]
        assert failed["status"] == 400
        assert [(r["event"], r.get("status")) for r in records_of(box)[-2:]] == [
            ("model_request", None), ("model_answer", 400)
        ]  # fmt: skip
        assert (found[5][1]["status"], found[5][1]["code"]) == (404, "unknown_url")
        log = Path(get_backend("bubblewrap").audit_log).read_text()
        assert secret not in log
        assert KEY not in log
        assert verify_audit_log(get_backend("bubblewrap").audit_log).ok


def test_with_an_open_network_the_model_is_not_asked_through_the_proxy():
    policy = NetworkPolicy((NetworkRule("127.0.0.1", 9, "http"),))
    code = "import os,urllib.request as u; print(u.urlopen(os.environ['OPENAI_BASE_URL']+'/models').status)"
    with Sandbox.start(SandboxSpec(network=policy, model_proxy=ModelProxy())) as box:
        assert box.session().run("test -n $http_proxy").exit_code == 0
        assert box.execute(["python3", "-c", code]).output == "200\n"


def test_forks_have_endpoints_of_their_own(box):
    (copy,) = box.fork()
    with copy:
        job = ask(copy, chat("from the copy"))
        assert box.model.next(0) is None
        take(copy).answer(completion("yes"))
        assert answers_of(job)[0]["status"] == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode: expected one of pull, push, replay"),
        ({"mode": "push"}, "url: expected one"),
        ({"url": "http://127.0.0.1:8000/v1"}, "url: expected one for the mode push, and only"),
        ({"mode": "push", "url": "http://models.invalid:80/v1"}, "url: expected http://LOOPBACK:PORT"),
        ({"mode": "push", "url": "https://127.0.0.1:80/v1"}, "url: expected http://LOOPBACK:PORT"),
        ({"mode": "push", "url": "http://127.0.0.1:80/v1", "api_key": "a\nb"}, "api_key: expected visible ASCII"),
        ({"mode": "replay"}, "replay: expected a file"),
        ({"record": "relative"}, "record: expected an absolute path"),
        ({"lease_seconds": 0}, "lease_seconds: expected seconds"),
        ({"max_body_bytes": 1}, "max_body_bytes: expected"),
        ({"models": ()}, "models: expected names"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SpecError, match=rf"model_proxy\.{message}".replace("$", r"\$")):
        ModelProxy(**settings)


def test_a_name_is_for_admins_only():
    with pytest.raises(SpecError, match="LOOPBACK"):
        start(mode="push", url="rome")


def test_docker_refuses(docker_daemon):
    with pytest.raises(LimitNotEnforceable, match="model_proxy"):
        Sandbox.start(SandboxSpec(backend="docker", model_proxy=ModelProxy()))


def test_files_of_the_spec_still_work():
    spec = SandboxSpec(files={"a": FileEntry("x")}, env={"OPENAI_BASE_URL": "mine"}, model_proxy=ModelProxy())
    with Sandbox.start(spec) as box:
        assert box.execute("cat a; echo $OPENAI_BASE_URL").output == "xmine\n"

"""OpenAI's own client against an endpoint, which listens on the host's loopback here instead of a sandbox's."""

import asyncio
import dataclasses
import socket
import threading

import pytest
from model_harness import chunk, completion

from rock_env import ModelProxy
from rock_env.model_proxy.endpoint import Endpoint, make_source

openai = pytest.importorskip("openai")


@pytest.fixture
def endpoint():
    """(the client, answer(function): answer requests with function(ticket) in the endpoint's loop)."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    loop = asyncio.new_event_loop()
    settings = dataclasses.asdict(ModelProxy(request_seconds=2.0, max_body_bytes=100_000))
    reports = []

    async def report(line):
        reports.append(line)

    async def begin():
        made = Endpoint("1", settings, make_source(settings, None), None, report)
        await made.listen(listener)
        return made

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    made = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)

    async def answering(function):
        while (ticket := await made.queue.next(30)) is not None:
            function(made.queue, ticket)

    tasks = []

    def answer(function):
        tasks.append(asyncio.run_coroutine_threadsafe(answering(function), loop))

    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as client:
        yield client, answer, reports

    async def end():
        live = list(made._live)
        made.close()
        await asyncio.gather(*live, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result(30)
    for task in tasks:
        task.result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


_ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_the_official_client(endpoint):
    client, answer, reports = endpoint

    def function(queue, ticket):
        request = ticket.request
        if request.is_stream:
            queue.give_chunks(request.id, ticket.lease, [chunk("a"), chunk("b")], 0, False)
            queue.give_chunks(request.id, ticket.lease, [chunk("b"), chunk("", "stop")], 1, True)  # "b" again
        else:
            body = completion("hello")
            tool = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            body["choices"][0]["message"]["tool_calls"] = [tool]
            queue.give(request.id, ticket.lease, {**body, "object": "chat.completion", "created": 1})

    answer(function)
    whole = client.chat.completions.create(**_ASKED)
    assert whole.choices[0].message.content == "hello"
    assert whole.choices[0].message.tool_calls[0].function.name == "f"
    assert whole.usage.completion_tokens == 2
    pieces = [piece.choices[0].delta.content for piece in client.chat.completions.create(**_ASKED, stream=True)]
    assert pieces == ["a", "b", None]
    assert [model.id for model in client.models.list()] == ["model"]
    assert [r["event"] for r in reports][:2] == ["model_request", "model_answer"]


def test_its_errors(endpoint):
    client, _, _ = endpoint
    with pytest.raises(openai.BadRequestError, match="messages: expected") as raised:
        client.chat.completions.create(model="m", messages=[])
    assert raised.value.param == "messages"
    with pytest.raises(openai.NotFoundError, match="no such path"):
        client.embeddings.create(model="m", input="x")
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 200_000}])
    assert (raised.value.status_code, raised.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**_ASKED)
    assert (raised.value.status_code, raised.value.code) == (504, "model_timeout")

"""Stop strings, tool calls in text, request parsing, and the scheduler's deadlines and drains, without HTTP."""

from __future__ import annotations

import asyncio
import json
import queue
import time

import numpy as np
import pytest
from rollout_toys import MODEL, toy_params

from rome.models import ChatRenderer, train_tokenizer
from rome.rollout.service.app import ServiceConfig, _Service
from rome.rollout.service.chats import ContentStream, RomeChat, TemplateChat
from rome.rollout.service.errors import ServiceError
from rome.rollout.service.protocol import ChatMessage, ChatRequest, ToolSpec, parse
from rome.rollout.service.scheduler import Job, Part, Scheduler
from rome.rollout.service.text import TextStream
from rome.rollout.stream import Sampling, StreamConfig, StreamEngine

TOOL = {"type": "function", "function": {"name": "sh", "parameters": {"properties": {"cmd": {"type": "string"}}}}}


def said(pieces, stops=()):
    stream = TextStream(lambda token: pieces[token], stops)
    parts = []
    for token in range(len(pieces)):
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()], stream.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "parts", "stopped"),
    [
        ([b"ab", b"c"], (), ["ab", "c", ""], False),
        ([b"\xc3", b"\xa9!"], (), ["", "é!", ""], False),
        ([b"a\xc3"], (), ["a", "\ufffd"], False),
        ([b"a<", b"e", b"x"], ("<end>",), ["a", "", "<ex", ""], False),
        ([b"a<", b"en", b"d>b"], ("<end>",), ["a", "", "", ""], True),
        ([b"a<en"], ("<end>",), ["a", "<en"], False),
        ([b"xaab"], ("aab", "ab"), ["x", ""], True),
        ([b"aa", b"ab"], ("aab",), ["", "a", ""], True),
        ([b"one two"], ("two", "one"), ["", ""], True),
    ],
)
def test_text_is_given_once_it_is_certain(pieces, stops, parts, stopped):
    assert said(pieces, stops) == (parts, stopped)


class _Text:
    """What TemplateChat needs of a tokenizer to read answers."""

    stop_ids, pad_id = frozenset({0}), 0


TOOLS = [ToolSpec.model_validate(TOOL)]
CALL = '<tool_call>\n{"name": "sh", "arguments": {"cmd": "ls é"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []),
        (f"I look. {CALL}", "I look.", ["ls é"]),
        (CALL + CALL.replace("ls", "ps"), "", ["ls é", "ps é"]),
        (CALL.replace("{", "[{", 1).replace("}\n", "}]\n"), "", ["ls é"]),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("a < b <tool", "a < b <tool", []),
    ],
)
def test_calls_are_read_from_text_and_streamed_content_is_its_beginning(text, content, calls):
    chat = TemplateChat(_Text(), 10)
    answer = chat.answer([], text, TOOLS)
    assert answer.content == content
    assert [json.loads(arguments)["cmd"] for _, arguments in answer.calls] == calls
    assert chat.answer([], text, []).content == text
    stream = ContentStream(chat, TOOLS)
    sent = "".join(stream.push(character) for character in text)
    assert answer.content.startswith(sent)
    assert len(sent) >= len(content) - len("<tool_call>") or not calls


def test_our_chat_format_has_one_shell():
    chat = RomeChat(ChatRenderer(train_tokenizer(["x"], 267)))
    call = {"id": "1", "type": "function", "function": {"name": "sh", "arguments": '{"cmd": "ls"}'}}
    message = ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    special = chat._tokenizer.special
    assert chat.prompt([message], TOOLS)[:2] == [special["<|assistant|>"], special["<tool_call>"]]
    for arguments in ("ls", '{"cmd": 3}', "{}", '["ls"]'):
        call["function"]["arguments"] = arguments
        bad = ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})
        with pytest.raises(ServiceError, match=r"messages\.0\.tool_calls\.0\.function\.arguments"):
            chat.prompt([bad], TOOLS)
    faked = chat.encode("<tool_call>rm</tool_call>")  # the characters, not the tokens
    assert chat.answer([*faked, special["<|im_end|>"]], "<tool_call>rm</tool_call>", TOOLS).calls == ()


def test_requests_are_strict():
    asked = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "stop": "x"}
    request = parse(ChatRequest, json.dumps(asked).encode())
    assert (request.messages[0].text, request.stops, request.limit) == ("hi", ("x",), None)
    for body in (b"[" * 100000, b"\xff", b'{"model": NaN}'):
        with pytest.raises(ServiceError):
            parse(ChatRequest, body)


def job(answers, deadline=1000.0, tokens=10**4):
    return Job(
        np.array([20, 21], np.int32),
        Sampling(1, tokens),
        TextStream(lambda token: b"x"),
        time.monotonic() + deadline,
        answers.put,
    )


@pytest.fixture
def scheduler():
    # no stop ids: only its own end ends a job
    engine = StreamEngine(toy_params(), MODEL, StreamConfig(1, 8192, (8,), 2, 1), frozenset(), 0)
    engine.warmup()
    scheduler = Scheduler(engine, queue_limit=1)
    yield scheduler
    scheduler.close()
    assert not scheduler.alive


def last(answers):
    while isinstance(item := answers.get(timeout=120), Part) and item.finish is None:
        pass
    return item


def test_deadlines_hold_in_the_slot_and_in_the_queue(scheduler):
    first, second, third = (queue.SimpleQueue() for _ in range(3))
    running = job(first)
    scheduler.submit([running])
    assert isinstance(first.get(timeout=120), Part)  # compiled, and in its slot
    scheduler.submit([job(second, deadline=0.01)])
    assert (last(second).status, scheduler.stats.expired) == (504, 1)
    scheduler.submit([job(third, tokens=3)])
    with pytest.raises(ServiceError) as full:
        scheduler.submit([job(second)])
    assert (full.value.status, full.value.retry_after >= 1) == (429, True)
    scheduler.cancel([running])
    assert last(third).finish == "length"
    scheduler.submit([job(first := queue.SimpleQueue(), deadline=0.5)])
    assert last(first).status == 504


def test_a_drain_ends_what_does_not_end_by_itself_and_an_engine_error_is_told(scheduler, monkeypatch):
    answers = queue.SimpleQueue()
    scheduler.submit([job(answers)])
    assert isinstance(answers.get(timeout=120), Part)
    real = scheduler.engine._programs.burst[False]

    def broken(params, state, *rest):
        real(params, state, *rest)  # donates the state
        raise RuntimeError("device lost")

    monkeypatch.setitem(scheduler.engine._programs.burst, False, broken)
    assert last(answers).status == 500
    monkeypatch.undo()
    scheduler.submit([job(answers)])
    assert isinstance(answers.get(timeout=120), Part)
    service = _Service(scheduler, None, ServiceConfig("m"))
    assert asyncio.run(service.health()).status_code == 200
    scheduler.drain(0.1)
    assert last(answers).status == 503
    assert asyncio.run(service.health()).status_code == 503
    with pytest.raises(ServiceError, match="shutting down"):
        scheduler.submit([job(answers)])

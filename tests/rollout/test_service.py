"""`rome serve` as a process, talked to with OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
import time
import urllib.error
import urllib.request

import jax
import jsonschema
import numpy as np
import openai
import pytest
from served_models import KEY, random_model, scripted_run, served

from rome.models import PretrainedTokenizer, forward

LENGTH = 448
SHELL = {
    "type": "function",
    "function": {
        "name": "bash",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
HELLO = [{"role": "user", "content": "hello"}]


def client_of(address: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "tiny-random"
    config, params = random_model(folder)
    with served(folder, "--slots=3", f"--max-length={LENGTH}") as (address, _):
        yield address, config, params, PretrainedTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def client(published):
    return client_of(published[0])


logits_of = jax.jit(forward, static_argnums=1)


def training_logits(published, prompt, tokens):
    """float32[n, V] that the training path gives for n tokens after a prompt."""
    _, config, params, _ = published
    row, count = np.zeros((1, LENGTH), np.int32), len(prompt) + len(tokens)
    row[0, :count] = [*prompt, *tokens]
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    logits = np.asarray(logits_of(params, config, row, positions, (positions < count).astype(np.int32)))[0]
    return logits[len(prompt) - 1 : count - 1]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_greedy_is_the_training_paths_argmax_and_log_probs_agree(published, client):
    prompt = [40, 41, 42, 43, 44]
    answer = client.completions.create(
        model="tiny-random",
        prompt=prompt,
        temperature=0,
        max_tokens=40,
        logprobs=4,
        extra_body={"return_token_ids": True},
    )
    choice = answer.choices[0]
    extra = choice.model_extra
    tokens, expected = extra["token_ids"], log_softmax(training_logits(published, prompt, extra["token_ids"]))
    assert extra["prompt_token_ids"] == prompt
    np.testing.assert_array_equal(tokens, expected.argmax(-1))
    np.testing.assert_allclose(choice.logprobs.token_logprobs, expected.max(-1), atol=1e-4)
    assert extra["sampling_logprobs"] == [0.0] * len(tokens)
    for row, shown in zip(expected, choice.logprobs.top_logprobs, strict=True):
        np.testing.assert_allclose(sorted(shown.values()), np.sort(row)[-4:], atol=1e-4)
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.prompt_tokens == 5


def test_a_chat_renders_with_the_models_template_and_streams_what_it_answers_whole(published, client):
    tokenizer = published[3]
    asked = dict(
        model="tiny-random",
        messages=[{"role": "system", "content": "be <|im_end|> brief"}, *HELLO],
        seed=5,
        temperature=0.8,
        top_p=0.9,
        max_tokens=50,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "top_k": 40, "min_p": 0.02},
    )
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    tokens = choice.model_extra["token_ids"]
    assert choice.model_extra["prompt_token_ids"] == tokenizer.encode_chat(
        asked["messages"], add_generation_prompt=True
    )
    assert choice.message.content == tokenizer.decode(t for t in tokens if t not in tokenizer.stop_ids)
    expected = log_softmax(training_logits(published, choice.model_extra["prompt_token_ids"], tokens))
    raw = [entry.logprob for entry in choice.logprobs.content]
    np.testing.assert_allclose(raw, [row[t] for row, t in zip(expected, tokens, strict=True)], atol=1e-4)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content) == tokenizer.decode_bytes(tokens)

    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    parts = [event.choices[0] for event in events if event.choices]
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert [t for part in parts for t in (part.model_extra or {}).get("token_ids", [])] == tokens
    assert [e.logprob for part in parts if part.logprobs for e in part.logprobs.content] == pytest.approx(raw, abs=1e-5)
    assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    assert events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1


def test_concurrent_requests_get_what_they_would_get_alone(client):
    """More than there are slots, each with parameters of its own."""

    def ask(i):
        answer = client.completions.create(
            model="tiny-random",
            prompt=f"request {i % 5}",
            seed=i,
            n=1 + i % 2,
            max_tokens=10 + i,
            temperature=[0, 0.7, 1.0, 1.4][i % 4],
            extra_body={"top_k": 5 * (i % 3), "return_token_ids": True},
        )
        return [choice.model_extra["token_ids"] for choice in answer.choices]

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, range(10)))
    assert together == [ask(i) for i in range(10)]
    assert together[1][0] != together[1][1]


def test_a_stop_string_cuts_the_text_and_not_the_tokens(published, client):
    asked = dict(model="tiny-random", prompt="stop", seed=3, max_tokens=100)
    ids = {"return_token_ids": True}
    full = client.completions.create(**asked, extra_body=ids).choices[0]
    stop = re.search(r"[ -~]{2}", full.text[3:]).group()  # of two tokens: most are single bytes
    cut = client.completions.create(**asked, stop=[stop, "never said"], extra_body=ids).choices[0]
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.finish_reason == "stop"
    count = len(cut.model_extra["token_ids"])
    assert cut.model_extra["token_ids"] == full.model_extra["token_ids"][:count]
    decode = published[3].decode
    assert stop in decode(full.model_extra["token_ids"][:count])
    assert stop not in decode(full.model_extra["token_ids"][: count - 1])
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == cut.text


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["a", "bb"]},
        "days": {"$ref": "#/$defs/days"},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "kind", "days", "flags"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 0, "maximum": 30}},
}
TWO = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "at": {"enum": ["am", "pm"]}},
    "required": ["n", "at"],
    "additionalProperties": False,
}
BOOK = {"type": "function", "function": {"name": "book", "parameters": TWO, "strict": True}}


def as_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_an_answer_follows_its_schema_and_has_the_log_probs_of_what_was_left_to_draw_from(published, client):
    """The model is random: what it says by itself is no JSON."""
    pytest.importorskip("llguidance")
    asked = dict(model="tiny-random", messages=HELLO, seed=4, n=2, logprobs=True, temperature=1.3)
    ids = {"return_token_ids": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # constrained and free answers in one batch
        constrained = dict(asked, response_format=as_format(SCHEMA), extra_body=ids)
        strict = pool.submit(client.chat.completions.create, **constrained)
        free = client.chat.completions.create(**asked, max_tokens=60, extra_body=ids)
        strict = strict.result(120)
    for choice in free.choices:
        with pytest.raises(ValueError):
            json.loads(choice.message.content)
    for choice in strict.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
        tokens, prompt = choice.model_extra["token_ids"], choice.model_extra["prompt_token_ids"]
        expected = log_softmax(training_logits(published, prompt, tokens))
        raw = np.array([row[token] for row, token in zip(expected, tokens, strict=True)])
        np.testing.assert_allclose([entry.logprob for entry in choice.logprobs.content], raw, atol=1e-4)
        sampling = np.array(choice.model_extra["sampling_logprobs"])
        assert sampling[0] == 0  # nothing but the brace is allowed there
        assert (sampling <= 0).all() and (sampling > raw + 1).sum() > 5
    assert strict.choices[0].message.content != strict.choices[1].message.content
    streamed = client.chat.completions.create(**constrained, stream=True)
    text = [""] * 2
    for event in streamed:
        for choice in event.choices:
            text[choice.index] += choice.delta.content or ""
    assert text == [choice.message.content for choice in strict.choices]
    alone = client.chat.completions.create(**asked, max_tokens=60, extra_body=ids)
    assert [c.message.content for c in alone.choices] == [c.message.content for c in free.choices]


def test_any_json_object_is_one_if_it_ends_in_time(client):
    pytest.importorskip("llguidance")
    ends = client.chat.completions.create(
        model="tiny-random", messages=HELLO, seed=1, max_tokens=300, response_format={"type": "json_object"}
    ).choices[0]
    assert ends.message.content.startswith("{")
    if ends.finish_reason == "stop":
        assert isinstance(json.loads(ends.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_forced_call_is_one_and_its_arguments_follow_the_tools_schema(client, choice):
    pytest.importorskip("llguidance")
    asked = dict(model="tiny-random", messages=HELLO, seed=2, tools=[BOOK], tool_choice=choice)
    answer = client.chat.completions.create(**asked).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, call.function.name) == ("tool_calls", "book")
    jsonschema.validate(json.loads(call.function.arguments), TWO)
    assert not answer.message.content
    parts = [event.choices[0] for event in client.chat.completions.create(**asked, stream=True)]
    assert [p.delta.tool_calls[0].function.arguments for p in parts if p.delta.tool_calls] == [call.function.arguments]
    with pytest.raises(openai.BadRequestError, match=r"tools\.0\.function\.strict"):
        client.chat.completions.create(**asked | {"tool_choice": "auto"})


@pytest.mark.parametrize(
    "schema", [{"type": "banana"}, {"$ref": "#/nowhere"}, {"not": {"type": "string"}}, {"enum": []}]
)
def test_a_schema_that_cannot_be_followed_is_refused(client, schema):
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError, match="response_format: expected a JSON schema") as refused:
        client.chat.completions.create(model="tiny-random", messages=HELLO, response_format=as_format(schema))
    assert (refused.value.param, refused.value.code) == ("response_format", "invalid_schema")
    loose = {"x-guidance": {"lenient": True}, "not": {"type": "string"}}  # the library's own switch is not the client's
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="tiny-random", messages=HELLO, response_format=as_format(loose))


def prefilled(address: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        text = response.read().decode()
    return float(re.search(r'^rome_engine_tokens_total{kind="prefilled"} (\S+)$', text, re.MULTILINE).group(1))


def test_a_growing_conversation_and_the_choices_of_a_prompt_are_prefilled_once(published, client):
    address, ids = published[0], {"return_token_ids": True}
    messages = [{"role": "user", "content": "tell me about the sea, and take your time"}]
    before = prefilled(address)
    asked = dict(model="tiny-random", seed=9, max_tokens=12, temperature=0.0)
    first = client.chat.completions.create(**asked, messages=messages, n=3, extra_body=ids)
    prompt = first.choices[0].model_extra["prompt_token_ids"]
    # the first choice needs all of it; its siblings what is not shared: the last token, whose logits they start from
    shared = prefilled(address) - before
    assert shared <= len(prompt) + 2
    kept = [*prompt, *first.choices[0].model_extra["token_ids"]]
    middle = prefilled(address)
    more = [*kept, 60, 61, 62]
    client.completions.create(model="tiny-random", prompt=more, max_tokens=2)
    # what was sampled last was never processed; the three new ones were not there
    assert prefilled(address) - middle == 4


def post(address, path, body, key=KEY):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


CHAT = {"model": "tiny-random", "messages": HELLO}
BAD = [
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -1}, 400, "top_k"),
    ({"min_p": 1}, 400, "min_p"),
    ({"n": 0}, 400, "n"),
    ({"seed": 1.5}, 400, "seed"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**6}, 400, "max_tokens"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"stream_options": {}}, 400, "stream_options"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "json_object"}, "tools": [SHELL]}, 400, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, 400, "tools.0.function.strict"),
    ({"tools": [SHELL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, 400, "tool_choice"),
    ({"temprature": 1}, 400, "temprature"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "w" * 3000}]}, 400, "messages"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"model": "other"}, 404, "model"),
]


@pytest.mark.parametrize(("change", "status", "field"), BAD, ids=[f"{i}-{field}" for i, (*_, field) in enumerate(BAD)])
def test_bad_input_gets_an_error_that_names_the_field(published, change, status, field):
    found, body = post(published[0], "/v1/chat/completions", CHAT | change)
    assert (found, body["error"]["param"]) == (status, field)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert field in body["error"]["message"]


def test_other_bad_requests(published, client):
    address = published[0]
    for open_to_all in ("/health", "/metrics"):
        with urllib.request.urlopen(f"{address}{open_to_all}", timeout=60) as response:
            assert response.status == 200
    assert post(address, "/v1/chat/completions", b"{")[1]["error"]["param"] == "body"
    assert post(address, "/v1/chat/completions", [1])[1]["error"]["param"] == "body"
    assert post(address, "/v1/chat/completions", CHAT, key="guess")[0] == 401
    assert post(address, "/v1/nothing", {})[0] == 404
    for prompt in ([], [10**6], "", [-1]):
        assert post(address, "/v1/completions", {"model": "tiny-random", "prompt": prompt})[1]["error"]["param"] == (
            "prompt"
        )
    with pytest.raises(openai.AuthenticationError):
        client_of(address, "guess").models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    assert [model.id for model in client.models.list()] == ["tiny-random"]
    assert client.models.retrieve("tiny-random").id == "tiny-random"


def test_a_run_directory_calls_tools_fills_up_frees_and_ends_gracefully(tmp_path):
    tokenizer = scripted_run(tmp_path / "run")
    options = ("--slots=2", "--queue-limit=1", "--max-length=32768", "--drain-seconds=1", "--name=agent")
    with served(tmp_path / "run", *options) as (address, process):
        client = client_of(address)
        check_tool_calls(client, tokenizer)
        endless = dict(model="agent", prompt="a", temperature=0, stream=True)
        streams = [client.completions.create(**endless) for _ in range(2)]
        assert all(next(iter(stream)).choices[0].text[0] == "b" for stream in streams)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.completions.create, **{**endless, "max_tokens": 3, "stream": False})
            assert metric(address, "rome_queue_length", 1)
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(**endless)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            streams[0].close()  # the client leaves: its slot goes to the one that waits
            assert waiting.result(60).choices[0].text == "bab"
        assert metric(address, 'rome_sequences_total{end="cancelled"}', 1)
        assert metric(address, "rome_running", 1)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in streams[1]:
                pass
        assert process.wait(60) == 0
        assert time.monotonic() - started < 30


def check_tool_calls(client, tokenizer):
    asked = dict(model="agent", messages=HELLO, temperature=0)
    choice = client.chat.completions.create(**asked, tools=[SHELL]).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("bash", {"command": "ls"})
    parts = [event.choices[0] for event in client.chat.completions.create(**asked, tools=[SHELL], stream=True)]
    assert [p.delta.tool_calls[0].function.arguments for p in parts if p.delta.tool_calls] == ['{"command": "ls"}']
    assert parts[-1].finish_reason == "tool_calls"
    assert client.chat.completions.create(**asked).choices[0].message.content == "<tool_call>ls</tool_call>"
    # the call and its answer go back, and are exactly what was sampled
    answered = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "x"}]
    second = client.chat.completions.create(
        **{**asked, "messages": answered}, tools=[SHELL], extra_body={"return_token_ids": True}
    )
    special, encode = tokenizer.special, tokenizer.encode
    assert second.choices[0].model_extra["prompt_token_ids"] == [
        *(special["<|user|>"], *encode("hello"), special["<|im_end|>"], special["<|assistant|>"]),
        *(special["<tool_call>"], *encode("ls"), special["</tool_call>"]),
        *(special["<|tool|>"], *encode("x"), special["<|im_end|>"], special["<|assistant|>"]),
    ]
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**asked, tools=[SHELL, SHELL])


def metric(address: str, name: str, expected: float, seconds: float = 30) -> bool:
    """Whether a metric takes the value within some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
            found = re.search(rf"^{re.escape(name)} (\S+)$", response.read().decode(), re.MULTILINE)
        if found and float(found.group(1)) == expected:
            return True
        time.sleep(0.1)
    return False

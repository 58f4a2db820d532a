"""Small models on disk, in both layouts, and `rome serve` as a process on loopback."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rome.models import ModelConfig, Tokenizer, init_params, train_tokenizer
from rome.models.weights import save_pretrained
from rome.training.checkpoint import Checkpointer
from rome.training.config import dump_config
from rome.training.settings import load_settings
from rome.training.state import OptimizerConfig, init_state, make_optimizer

ROOT = Path(__file__).parents[2]
KEY = "secret-of-the-tests"
TEMPLATE = (
    "{%- for tool in tools or [] %}{{ '<|im_start|>tool ' + (tool | tojson) + '<|im_end|>' }}{%- endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{%- endfor %}{{ '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{%- endif %}"
)


def random_model(folder: Path) -> tuple[ModelConfig, Any]:
    """A Hugging Face folder of a small random model, sharp enough that its log-probs say something."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["some words"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = ModelConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        tie_embeddings=False,
        max_position_embeddings=512,
    )
    params = init_params(config, jax.random.key(1))
    params["lm_head"] = params["lm_head"] * 4
    save_pretrained(folder, params, config)
    bpe.save(str(folder / "tokenizer.json"))
    described = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return config, params


def scripted_run(folder: Path) -> Tokenizer:
    """A run directory whose policy says what the last token tells it to: a shell call after the assistant's header,
    and "ab" for ever after an "a"."""
    config = runpy.run_path(str(ROOT / "configs" / "rome_tiny.py"))["get_config"]()
    config.induction = False
    config.model.update(hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16)
    config.model.update(tie_embeddings=False, qk_norm_init=1.0)
    folder.mkdir()
    dump_config(config, folder / "config.json")
    tokenizer = train_tokenizer(["x"], 267)
    tokenizer.save(folder / "tokenizer")
    model = load_settings(config).model_config(tokenizer.vocab_size)
    params = init_params(model, jax.random.key(0))
    for name in ("wo", "down"):  # the layer adds nothing: what the last token is decides
        params["layers"][name] = jnp.zeros_like(params["layers"][name])
    special, letter = tokenizer.special, lambda text: tokenizer.encode(text)[0]
    script = [special["<|assistant|>"], special["<tool_call>"], letter("l"), letter("s"), special["</tool_call>"]]
    follows = [*itertools.pairwise(script), (letter("a"), letter("b")), (letter("b"), letter("a"))]
    unit = params["embedding"] / jnp.linalg.norm(params["embedding"], axis=-1, keepdims=True)
    head = jnp.zeros_like(params["lm_head"])
    for before, after in follows:
        head = head.at[:, after].set(10 * unit[before])
    params["lm_head"] = head
    state = init_state(params, make_optimizer(OptimizerConfig(learning_rate=1e-3), 10))
    checkpointer = Checkpointer(folder / "checkpoints")
    checkpointer.save(3, state, {"stage": "ipa", "step": 3})
    checkpointer.close()
    return tokenizer


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(base address, process) of `rome serve` on a free port of loopback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ROME_API_KEYS": f"another,{KEY}"}
    command = [sys.executable, "-m", "rome", "serve", "--model", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        first = lines.get(timeout=600)
        address = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert address, f"the server said {first!r}"
        yield address.group(), process
    finally:
        process.kill()
        process.wait(30)
        reader.join(30)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put("")

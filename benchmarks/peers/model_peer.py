"""One side of `benchmarks/model.py`, in a process of its own: does the same work each time a line comes in.

    python benchmarks/peers/model_peer.py PEER TASK FOLDER

Prints a JSON line when it is ready, and one for every line that it reads: seconds of processor time and what came out
(a loss, or tokens), for the sides to be compared; at the end of its input, its memory.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, LENGTH = 4, 256
LEARNING_RATE, BETAS, EPSILON, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 1.0
NEW = 64
TURNS, CHUNK, OBSERVATION = 8, 16, 48  # of `turns`: a conversation, tokens of a chunk and of what is answered

Work = Callable[[], Any]


def tokens_of(folder: Path) -> Any:
    """int32[ROWS, LENGTH]: random, the same for all sides."""
    import numpy as np

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(0, vocab, (ROWS, LENGTH)).astype(np.int32)


def prompt_of(folder: Path) -> list[int]:
    return json.loads((folder / "prompt.json").read_text())


# --- ours ------------------------------------------------------------------------------------------------------------


def ours_train(folder: Path) -> Work:
    from dataclasses import replace

    import numpy as np

    from rome.models.weights import load_pretrained
    from rome.training.memory import dispatch_synchronously, keep_freed_memory
    from rome.training.state import OptimizerConfig, init_state, make_optimizer
    from rome.training.steps import SupervisedBatch, make_supervised_step

    keep_freed_memory()
    dispatch_synchronously()
    config, params = load_pretrained(folder, head_chunk=256)
    # unrolled layers are a tenth faster, and hold a copy of each layer's weights: too much memory with experts
    config = replace(config, scan_layers=config.is_moe)
    optimizer = make_optimizer(OptimizerConfig(LEARNING_RATE, max_grad_norm=MAX_NORM), 1)
    state = init_state(params, optimizer)
    del params  # donated by the first step
    step = make_supervised_step(config, optimizer)
    tokens = tokens_of(folder)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    chunks = np.where(positions == 0, -1, 0).astype(np.int32)  # nothing predicts the first token
    batch = SupervisedBatch(tokens, positions, np.ones_like(tokens), chunks, np.ones((ROWS, 1), bool))

    def work() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["train/loss"])

    return work


def ours_logprob(folder: Path) -> Work:
    import jax
    import numpy as np

    from rome.models import token_log_probs
    from rome.models.weights import load_pretrained
    from rome.training.memory import AheadOfTime, keep_freed_memory

    keep_freed_memory()
    config, params = load_pretrained(folder, scan_layers=False)
    tokens = tokens_of(folder)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    score = AheadOfTime(jax.jit(lambda params, *inputs: token_log_probs(params, config, *inputs)[0]))

    def work() -> float:
        return float(np.asarray(score(params, tokens, positions, np.ones_like(tokens)))[:, 1:].mean())

    return work


def ours_decode(folder: Path, rows: int, precision: str = "model") -> Work:
    import numpy as np

    from rome.models.weights import load_pretrained
    from rome.rollout import DecodeEngine, EngineConfig
    from rome.training.memory import keep_freed_memory

    keep_freed_memory()
    config, params = load_pretrained(folder)
    prompt = np.array(prompt_of(folder), np.int32)
    size = len(prompt)
    settings = EngineConfig(
        slots=rows,
        cohorts=1,
        max_length=size + NEW,
        extend_buckets=(size,),
        prompt_rows=1,  # all rows have the same prompt
        max_chunk_tokens=NEW,
        temperature=0.0,
        precision=precision,
    )
    never = frozenset([config.vocab_size - 1])  # a token that the model does not say
    engine = DecodeEngine(params, config, settings, never, 0)
    del params  # the engine has a copy
    engine.warmup()

    def work() -> list[int]:
        for slot in range(rows):
            engine.insert(slot, slot)
        sampled = engine.generate(0, dict.fromkeys(range(rows), prompt))
        for slot in range(rows):
            engine.free(slot)
        assert all(len(chunk.tokens) == NEW for chunk in sampled.values())
        return sampled[0].tokens.tolist()

    return work


def ours_turns(folder: Path) -> Work:
    import numpy as np

    from rome.models.weights import load_pretrained
    from rome.rollout import DecodeEngine, EngineConfig
    from rome.training.memory import keep_freed_memory

    keep_freed_memory()
    config, params = load_pretrained(folder)
    prompt = prompt_of(folder)
    room = len(prompt) + TURNS * (CHUNK + OBSERVATION)
    settings = EngineConfig(1, 1, room, (OBSERVATION + 1,), max_chunk_tokens=CHUNK, temperature=0.0)
    engine = DecodeEngine(params, config, settings, frozenset([config.vocab_size - 1]), 0)
    del params  # the engine has a copy
    engine.warmup()

    def say_next(history: list[int]) -> list[int]:
        if len(history) == len(prompt):
            engine.free(0)
            engine.insert(0, 0)
        delta = np.array(history[len(engine.processed(0)) :], np.int32)
        return engine.generate(0, {0: delta})[0].tokens.tolist()

    return conversation(prompt, say_next)


def conversation(prompt: list[int], say_next: Callable[[list[int]], list[int]]) -> Work:
    """TURNS times a chunk and an observation, which is the same for all sides. Gives seconds and tokens by turn."""

    def work() -> dict[str, Any]:
        history, seconds, lengths, said = list(prompt), [], [], []
        for turn in range(TURNS):
            before = time.process_time()
            chunk = say_next(history)
            seconds.append(time.process_time() - before)
            lengths.append(len(history))
            said += chunk
            history += chunk + [(17 * turn + 5 * place) % 4000 + 1000 for place in range(OBSERVATION)]
        return {"seconds": seconds, "lengths": lengths, "tokens": said}

    return work


# --- Hugging Face transformers ----------------------------------------------------------------------------------------


def _torch_model(folder: Path, experts: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)
    options = {} if experts == "default" else {"experts_implementation": experts}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)


def hf_train(folder: Path, experts: str = "default") -> Work:
    import torch

    model = _torch_model(folder, experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0)
    tokens = torch.tensor(tokens_of(folder)).long()

    def work() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    return work


def hf_logprob(folder: Path, experts: str = "default") -> Work:
    import torch

    model = _torch_model(folder, experts).eval()
    tokens = torch.tensor(tokens_of(folder)).long()

    @torch.no_grad()
    def work() -> float:
        logits = model(input_ids=tokens).logits[:, :-1]
        chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return float((chosen - logits.logsumexp(-1)).mean())

    return work


def hf_decode(folder: Path, rows: int) -> Work:
    import torch

    model = _torch_model(folder, "default").eval()
    prompt = torch.tensor([prompt_of(folder)] * rows)

    def work() -> list[int]:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, prompt.shape[1] :].tolist()

    return work


def hf_turns(folder: Path) -> Work:
    """The whole history anew every turn, as a client of a stateless API without a prefix cache has it."""
    import torch

    model = _torch_model(folder, "default").eval()

    def say_next(history: list[int]) -> list[int]:
        rows = torch.tensor([history])
        mask, options = torch.ones_like(rows), {"do_sample": False, "pad_token_id": 0}
        out = model.generate(rows, attention_mask=mask, max_new_tokens=CHUNK, min_new_tokens=CHUNK, **options)
        return out[0, len(history) :].tolist()

    return conversation(prompt_of(folder), say_next)


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_decode(file: Path, rows: int) -> Work:
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256 * rows, rows, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    prompt = prompt_of(file.parent)
    request = {"prompt": prompt, "max_tokens": NEW, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}

    pool = ThreadPoolExecutor(rows)  # its server batches what is asked at the same time

    def work() -> list[int]:
        answer, *_ = pool.map(server.handle_completions, [request | {"n_probs": 1}] * rows)
        return [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]

    return work


# --- the loop ---------------------------------------------------------------------------------------------------------


def build(peer: str, task: str, folder: Path) -> Work:
    """``task``: train, logprob, turns, or decode with a number of rows (decode8)."""
    if task == "turns":
        return {"ours": ours_turns, "hf": hf_turns}[peer](folder)
    if task.startswith("decode"):
        rows = int(task.removeprefix("decode"))
        if peer in ("llama-f32", "llama-q4"):
            return llama_decode(folder / ("f32.gguf" if peer == "llama-f32" else "q4_1.gguf"), rows)
        if peer.startswith("ours-"):
            return ours_decode(folder, rows, peer.removeprefix("ours-"))
        return {"ours": ours_decode, "hf": hf_decode}[peer](folder, rows)
    if peer.startswith("hf-"):
        return {"train": hf_train, "logprob": hf_logprob}[task](folder, peer.removeprefix("hf-"))
    if peer == "tunix":
        from tunix_peer import logprob, train

        return {"train": train, "logprob": logprob}[task](folder, tokens_of(folder))
    makers = {"ours": (ours_train, ours_logprob), "hf": (hf_train, hf_logprob)}
    return makers[peer][task == "logprob"](folder)


LIBRARIES = {
    "ours": ("rome.training.steps", "rome.models.weights"),
    "hf": ("torch", "transformers.models.qwen3.modeling_qwen3"),
    "tunix": ("tunix_peer",),
    "llama": ("xllamacpp",),
}


def import_libraries(peer: str) -> None:
    """What the memory of a side is counted from."""
    for name in LIBRARIES[peer.partition("-")[0]]:
        importlib.import_module(name)


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def peak_mb() -> float:
    """The most resident memory so far. (getrusage would count what the parent had when it forked.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main(peer: str, task: str, folder: str) -> None:
    import_libraries(peer)
    before = peak_mb()
    work = build(peer, task, Path(folder))
    first = work()  # compiles, or warms caches
    say(first=first)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        value = work()
        say(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall, value=value)
    say(peak_mb=peak_mb(), own_mb=peak_mb() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])

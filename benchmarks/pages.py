"""The training engine's KV cache in rows beside one in pages: memory, and processor time of a turn.

    python benchmarks/pages.py [tiny] [smollm2] [--rounds=N]

One process, one core; the engines take turns, so that a busy machine slows all alike. The same random weights, groups
of 8 samples that share a prompt, chunks of 16 greedy tokens answered by 15 tokens each; the tokens of all engines are
compared. `tiny` is the policy of `configs/rome_tiny.py` with 32 slots, `smollm2` has the sizes of SmolLM2-135M with 8.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, field

import jax
import numpy as np

from rome.models import ModelConfig, init_params
from rome.rollout import DecodeEngine, EngineConfig
from rome.training.memory import keep_freed_memory

GROUP, CHUNK, OBSERVATION, TURNS = 8, 16, 15, 3
TINY = ModelConfig(1024, 128, 4, 4, 2, 32, 384, rope_theta=1e4, qk_norm_init=1.5, scan_layers=False)
SMOLLM2 = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, qk_norm=False)
# model, slots, max_length, tokens of a prompt (short and long histories), page sizes
CASES = {
    "tiny": (TINY, 32, 512, (32, 256, 384), (16, 64)),
    "smollm2": (SMOLLM2, 8, 1024, (256, 864), (64,)),
}


@dataclass
class Side:
    """An engine, and what its turns took: the first one, with the prompt, and those after it."""

    engine: DecodeEngine
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    peak: float = 0.0  # megabytes of the cache in use at most
    said: list[int] = field(default_factory=list)

    @property
    def megabytes(self) -> float:
        """Of the cache, and where prompts are prefilled."""
        states = [*self.engine._states.values(), self.engine._prompts]
        return sum(leaf.nbytes for leaf in jax.tree.leaves([state.cache for state in states])) / 1e6


def play(sides: dict[str, Side], prompts: list[np.ndarray]) -> None:
    """One conversation of every slot with every engine, turn by turn."""
    slots = range(len(prompts) * GROUP)
    for side in sides.values():
        for slot in slots:
            side.engine.free(slot)
        side.engine.stats.pages_peak, side.said = 0, []
        for slot in slots:
            side.engine.insert(slot, slot)
    history = {name: {slot: prompts[slot // GROUP] for slot in slots} for name in sides}
    answer = np.arange(OBSERVATION, dtype=np.int32) + 7
    for turn in range(1 + TURNS):
        for name, side in sides.items():
            fed = {slot: tokens[len(side.engine.processed(slot)) :] for slot, tokens in history[name].items()}
            started = time.process_time()
            sampled = side.engine.generate(0, fed)
            (side.later if turn else side.first).append(time.process_time() - started)
            for slot, chunk in sampled.items():
                history[name][slot] = np.concatenate([history[name][slot], chunk.tokens, answer])
                side.said += chunk.tokens.tolist()
    for side in sides.values():
        paging = side.engine.config.paging
        share = 1.0 if paging is None else side.engine.stats.pages_peak / paging.pages
        side.peak = share * side.megabytes


def measure(cases: list[str], rounds: int) -> None:
    """One table for each case."""
    keep_freed_memory()
    for case in cases:
        model, slots, max_length, lengths, sizes = CASES[case]
        params, sides = init_params(model, jax.random.key(0)), {}
        for size in (0, *sizes):
            settings = EngineConfig(
                slots,
                1,
                max_length,
                (OBSERVATION + 1,),
                prompt_rows=slots // GROUP,
                max_chunk_tokens=CHUNK,
                temperature=0.0,
                page_size=size,
            )
            never = frozenset([model.vocab_size - 1])  # not sampled, as the number of tokens shows
            side = Side(DecodeEngine(params, model, settings, never, 0))
            side.engine.warmup()
            sides[f"pages of {size}" if size else "rows"] = side
        print(f"\n### {case}, {slots} slots of {max_length}\n", flush=True)
        print(
            "| prompt | cache | MB | of which used | first turn, CPU s | a later turn | ÷ rows | tokens as with rows |"
        )
        print("|---|---|---|---|---|---|---|---|")
        rows = sides["rows"]
        for length in lengths:
            rng = np.random.default_rng(length)
            prompts = [rng.integers(2, 1000, length).astype(np.int32) for _ in range(slots // GROUP)]
            for side in sides.values():
                side.first, side.later = [], []
            for _ in range(rounds):
                play(sides, prompts)
            for name, side in sides.items():
                ratios = [mine / theirs for mine, theirs in zip(side.later, rows.later, strict=True)]
                spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                same = sum(a == b for a, b in zip(side.said, rows.said, strict=True))
                first, later = statistics.median(side.first), statistics.median(side.later)
                print(
                    f"| {length} | {name} | {side.megabytes:.1f} | {side.peak:.1f} | {first:.3f} | {later:.3f} "
                    f"| {spread} | {same} of {len(rows.said)} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"expected some of {[*CASES]}, found {sorted(unknown)}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    measure(arguments.cases, arguments.rounds)


if __name__ == "__main__":
    main()

"""A made-up run directory in the real formats, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rome.trajectory import Chunk, Observation, Status, Task, Trajectory, save_trajectories

FAMILIES = ("copy_file", "find_text", "fix_config", "count_lines")
HORIZONS = (2, 3, 4, 6)


def metrics_records(rng: np.random.Generator, ipa_steps: int) -> list[dict]:
    """Records of a whole run: cpt, sft with evaluations, IPA with evaluations."""
    records, clock = [], 1.75e9

    def add(step: int, stage: str, seconds: float, **metrics: float) -> None:
        nonlocal clock
        clock += seconds
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        records.append({"step": step, "stage": stage, "time": clock, **named})

    def evaluate(step: int, stage: str, level: float) -> None:
        rates = {f"eval/success/{name}": min(1.0, level * (0.7 + 0.2 * i)) for i, name in enumerate(FAMILIES)}
        rates |= {f"eval/success_h/{h}": float(np.clip(level * (1.5 - 0.2 * i), 0, 1)) for i, h in enumerate(HORIZONS)}
        add(step, stage, 8.0, eval__success=level, eval__success_low=level - 0.06, eval__success_high=level + 0.06)
        records[-1] |= {**rates, "eval/episodes": 256.0, "eval/chunks_mean": 4.2}

    for step in range(1, 101, 5):
        add(step, "cpt", 0.8, train__loss=6.0 * 0.97**step + 0.8, train__grad_norm=1 + float(rng.random()))
    for step in range(1, 401, 10):
        add(step, "sft", 1.0, train__loss=2.2 * 0.992**step + 0.2, train__grad_norm=0.5 + float(rng.random()) / 3)
    evaluate(0, "eval", 0.24)
    for step in range(1, ipa_steps + 1):
        level = 0.24 + 0.55 * (1 - np.exp(-step / 60))
        noise = float(rng.normal())
        add(
            step,
            "ipa",
            2.5,
            train__success=float(np.clip(level + 0.07 * noise, 0, 1)),
            train__loss=-0.1 - 0.02 * noise,
            train__return_mean=level * 0.9,
            train__grad_norm=0.4 + 0.1 * abs(noise),
            ratio__chunk_mean=1 + 0.004 * noise,
            ratio__chunk_max=1.2 + 0.05 * abs(noise),
            ratio__clipped_fraction=0.06 + 0.02 * abs(noise),
            mask__chunk_dropped=0.001 * abs(noise),
            mismatch__chunk_mean=1 + 0.001 * noise,
            buffer__staleness_mean=0.8,
            buffer__dropped_stale=float(rng.integers(0, 3)),
            rollout__tokens_per_second=5200 + 300 * noise,
            rollout__chunks_mean=4 + 0.1 * noise,
            time__rollout=1.6 + 0.1 * noise,
            time__train=0.7,
            time__verify=0.15,
            time__step=2.5,
            custom__something=noise,
        )
        if step % 20 == 0 or step == ipa_steps:
            evaluate(step, "eval", float(level))
    return records


def trajectory(rng: np.random.Generator, index: int, step: int, succeeds: bool, text: str = "") -> Trajectory:
    """One episode of a few commands; `text` is put into every place where an agent's text can appear."""
    family = FAMILIES[index % len(FAMILIES)]
    horizon = HORIZONS[index % len(HORIZONS)]
    instruction = f"Find the line with the word 'harvest' under notes/ and write its number to /app/answer.txt. {text}"
    commands = ["ls notes", "grep -rn harvest notes", "cut -d: -f2 hits.txt", "cat notes/b.txt", "echo 7 > answer.txt"]
    texts = [f"<tool_call>{command}{text}</tool_call>" for command in commands[:horizon]] + [
        "The answer is written.<|im_end|>"
    ]
    chunks = []
    for k, chunk_text in enumerate(texts):
        tokens = np.frombuffer(chunk_text.encode(), np.uint8).astype(np.int32)
        logp = -rng.exponential(0.25, len(tokens)).astype(np.float32)
        logp[rng.integers(0, len(tokens))] = -3.5
        chunks.append(
            Chunk(f"{step}-{index}-{k}", tokens, logp, np.full(len(tokens), step, np.int32), chunk_text, error=k == 2)
        )
    outputs = [
        "a.txt\nb.txt\nc.txt",
        "notes/b.txt:7:the harvest begins",
        "7",
        "\n".join(f"{i} a line" for i in range(40)),
        "",
    ]
    observations = [Observation(np.arange(9, dtype=np.int32), outputs[k % 5] + text) for k in range(len(chunks) - 1)]
    broken = not succeeds and index % 7 == 6
    return Trajectory(
        id=f"t{step}-{index}",
        group_id=f"g{index // 4}",
        task=Task(f"{family}-{horizon}-{index}", instruction, family, index, horizon),
        seed=index,
        prompt=Observation(np.arange(30, dtype=np.int32), f"<|user|>{instruction}<|im_end|><|assistant|>"),
        chunks=tuple(chunks),
        observations=tuple(observations),
        final_reward=None if broken else float(succeeds),
        status=Status.INFRA_FAILURE if broken else Status.COMPLETED,
        start_version=step - 1,
        prefix_chunks=1 if index == 3 else 0,
        error=f"sandbox died {text}" if broken else "",
        timings={"generate": 0.41, "environment": 0.12, "verify": 0.05},
    )


def notes(rng: np.random.Generator, item: Trajectory) -> dict:
    """What the IPA step says of a trajectory: the sidecar's entry."""
    count = len(item.chunks)
    final = 1.0 if item.succeeded else -0.5
    return {
        "returns": [final * 0.8 ** (count - 1 - k) for k in range(count)],
        "ratio": np.exp(rng.normal(0, 0.1, count)).tolist(),
        "mismatch": np.exp(rng.normal(0, 0.01, count)).tolist(),
        "kept": [bool(k != 1 or item.succeeded) for k in range(count)],
        "positive": item.succeeded,
    }


def write_run(directory: Path, *, ipa_steps: int = 120, text: str = "", seed: int = 0) -> Path:
    """Writes config.json, metrics.jsonl, three files of trajectories with sidecars, and result.json."""
    rng = np.random.default_rng(seed)
    (directory / "trajectories").mkdir(parents=True)
    config = {
        "seed": 0,
        "workdir": str(directory.name),
        "model": {"hidden_size": 128, "num_layers": 4, "num_heads": 4},
        "ipa": {
            "gamma": 0.95,
            "ratio_level": "chunk",
            "mask_level": "chunk",
            "mismatch_upper": 5.0,
            "mismatch_lower": None,
        },
        "rollout": {"groups": 12, "group_size": 4, "temperature": 1.0, "families": list(FAMILIES), "note": text},
    }
    (directory / "config.json").write_text(json.dumps(config))
    records = metrics_records(rng, ipa_steps)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in (1, ipa_steps // 2, ipa_steps):
        items = [trajectory(rng, i, step, bool(rng.random() < 0.2 + 0.6 * step / ipa_steps), text) for i in range(24)]
        path = directory / "trajectories" / f"step_{step:06d}.msgpack"
        save_trajectories(path, items)
        path.with_suffix(".json").write_text(json.dumps({item.id: notes(rng, item) for item in items}))
    final = {name: value for name, value in records[-1].items() if name.startswith("eval/success")}
    table = {
        "success": final["eval/success"],
        "low": final["eval/success_low"],
        "high": final["eval/success_high"],
        "episodes": 256,
        "tasks": 64,
        "chunks_mean": 4.2,
        "by_family": {},
        "by_horizon": {},
        "cells": {f: {str(h): float(rng.uniform(0.3, 1)) for h in HORIZONS} for f in FAMILIES},
    }
    (directory / "result.json").write_text(
        json.dumps({"warm_start": {**table, "success": 0.24, "low": 0.18, "high": 0.3}, "final": table})
    )
    return directory

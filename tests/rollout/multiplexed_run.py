"""An engine that moves between 8 and 4 fake devices, in a process of its own (the number of devices is fixed when JAX
starts). `python multiplexed_run.py FILE` writes what `test_multiplex.py` asserts on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rollout_toys import MODEL, VOCAB, Journal, ToyEnv, ToyRenderer, toy_task

from rome.models import ModelConfig, init_params
from rome.models.sharding import MeshConfig, make_mesh
from rome.rollout import (
    BackgroundRollouts,
    DecodeEngine,
    EngineConfig,
    GroupRequest,
    RolloutConfig,
    RolloutRunner,
    SampleBuffer,
)
from rome.training.compilations import count_compilations
from rome.trajectory import Trajectory

DENSE = dataclasses.replace(MODEL, num_heads=4, num_kv_heads=2)
MOE = dataclasses.replace(
    DENSE, num_experts=4, num_experts_per_token=2, moe_intermediate_size=16, intermediate_size=0, moe_dispatch="sparse"
)
WIDE, NARROW = 0, 1
SPLITS = {
    "data": (DENSE, MeshConfig(data=8), MeshConfig(data=4)),
    "data × tensor": (DENSE, MeshConfig(data=4, tensor=2), MeshConfig(data=2, tensor=2)),
    "expert": (MOE, MeshConfig(data=4, expert=2), MeshConfig(data=2, expert=2)),
}
TURNS = 6


@functools.cache
def params_of(model: ModelConfig, seed: int = 0) -> Any:
    """On the host: XLA's CPU client, whose devices share one pool of threads, can lock up where one thread dispatches
    dozens of small operations on a device while another has all devices meet."""
    params = init_params(model, jax.random.key(seed))
    params["lm_head"] *= 3  # sharper: what is drawn depends on what is cached
    return jax.device_get(params)


def make_engine(model: ModelConfig, meshes: Any, **changes: Any) -> DecodeEngine:
    settings = {
        "slots": 16,
        "cohorts": 2,
        "max_length": 96,
        "prompt_rows": 8,
        "extend_buckets": (16,),
        "max_chunk_tokens": 8,
        "record_experts": model.is_moe,
        **changes,
    }
    engine = DecodeEngine(params_of(model), model, EngineConfig(**settings), ToyRenderer.stop_ids, 0, meshes=meshes)
    engine.warmup()
    return engine


def meshes_of(wide: MeshConfig, narrow: MeshConfig) -> tuple[Any, Any]:
    return make_mesh(wide), make_mesh(narrow, jax.devices()[8 - narrow.size :])


def devices_of(tree: Any) -> set[int]:
    return {device.id for leaf in jax.tree.leaves(tree) for device in leaf.sharding.device_set}


def play(engine: DecodeEngine, moves: bool, update_at: int | None = None) -> dict[str, Any]:
    """Six turns of every slot, with a move before each but the first; new weights in one of them."""
    rng = np.random.default_rng(0)
    tokens = {slot: rng.integers(15, VOCAB, 4 + slot % 5).astype(np.int32) for slot in range(engine.config.slots)}
    for slot in tokens:
        engine.insert(slot, 7919 * slot + 13)
    said: dict[int, list] = {slot: [] for slot in tokens}
    lay, weights = [], params_of(engine.model_config, seed=1)
    with count_compilations() as compiled:
        for turn in range(TURNS):
            if moves and turn:
                engine.move_to(NARROW if engine.placement == WIDE else WIDE)
            if turn == update_at:
                engine.update_params(weights, 5)
            lay.append((devices_of(engine._weights[0]), devices_of(engine._states)))
            for cohort in range(engine.config.cohorts):
                slots = engine.cohort_slots(cohort)
                deltas = {slot: tokens[slot][len(engine.processed(slot)) :] for slot in slots}
                for slot, chunk in engine.generate(cohort, deltas).items():
                    said[slot].append((chunk.tokens, chunk.behavior_logp, chunk.raw_logp, chunk.versions))
                    tokens[slot] = np.concatenate([tokens[slot], chunk.tokens, [20, 21]]).astype(np.int32)
    experts = {slot: engine.routed_experts(slot) for slot in tokens} if engine.config.record_experts else {}
    stats = dataclasses.asdict(engine.stats)
    return {"said": said, "lay": lay, "stats": stats, "experts": experts, "compiled": compiled.count}


def split(name: str) -> dict[str, Any]:
    model, wide, narrow = SPLITS[name]
    meshes = meshes_of(wide, narrow)
    update = 3 if name == "data" else None  # while narrow
    return {
        "stayed": play(make_engine(model, meshes[:1]), moves=False, update_at=update),
        "moved": play(make_engine(model, meshes), moves=True, update_at=update),
    }


def endless(size: int) -> Iterator[GroupRequest]:
    for index in itertools.count():
        yield GroupRequest(toy_task(f"t{index}"), f"g{index}", size, index)


def free_running(steps: int) -> dict[str, Any]:
    """Rollouts that never pause, and a trainer's part: take a batch, shrink, publish, expand."""
    engine = make_engine(DENSE, meshes_of(*SPLITS["data"][1:]))
    runner = RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal(jitter=0.01)), RolloutConfig(env_threads=16))
    buffer, batches, turns = SampleBuffer(1.0, 4), [], {WIDE: 0, NARROW: 0}
    weights = [params_of(DENSE, seed) for seed in range(2)]
    with runner, BackgroundRollouts(runner, buffer, endless(4)):
        buffer.get_batch(1, 0, timeout=200)  # every path was taken once
        with count_compilations() as compiled:
            for step in range(steps):
                batches.append((step, buffer.get_batch(4, step, timeout=200)))
                before = engine.stats.turns
                engine.move_to(NARROW)
                in_flight = int(engine._occupied.sum())
                turned = engine.stats.turns
                turns[WIDE] += turned - before
                _wait_for_turns(engine, turned + 2)  # the others decode while these would train
                turns[NARROW] += engine.stats.turns - turned
                engine.update_params(weights[step % 2], step + 1)
                lay = devices_of(engine._weights[0])
                engine.move_to(WIDE)
                assert lay == set(range(4, 8)), lay
                assert in_flight, "nothing was in flight when it moved"
    samples = [(step, _summary(t)) for step, batch in batches for group in batch for t in group]
    return {"samples": samples, "compiled": compiled.count, "moves": engine.stats.moves, "turns": turns}


def _wait_for_turns(engine: DecodeEngine, turns: int) -> None:
    for _ in range(20_000):
        if engine.stats.turns >= turns:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the narrow placement never decoded")


def _summary(t: Trajectory) -> dict[str, Any]:
    stamps = [int(v) for chunk in t.chunks for v in chunk.versions]
    return {"id": t.id, "start": t.start_version, "stamps": stamps, "status": t.status.value}


def hammered(moves: int) -> dict[str, Any]:
    """One thread decodes turn after turn without a pause; another moves and publishes as fast as it can."""
    engine = make_engine(DENSE, meshes_of(*SPLITS["data"][1:]), max_length=96, max_chunk_tokens=4)
    failures: list[BaseException] = []
    done, weights = threading.Event(), [params_of(DENSE, seed) for seed in range(2)]

    def decode() -> None:
        try:
            while not done.is_set():
                for slot in range(8):
                    engine.free(slot)
                    engine.insert(slot, slot)
                engine.generate(0, {slot: np.arange(15, 20 + slot, dtype=np.int32) for slot in range(8)})
        except BaseException as caught:
            failures.append(caught)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    for number in range(moves):
        engine.move_to((number + 1) % 2)
        engine.update_params(weights[number % 2], number + 1)
    done.set()
    thread.join(200)
    return {"failures": failures, "alive": thread.is_alive(), "moves": engine.stats.moves, "turns": engine.stats.turns}


def main(path: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    found = {"splits": {name: split(name) for name in SPLITS}, "free": free_running(6), "hammered": hammered(40)}
    Path(path).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

"""Runs on 8 fake devices, in a process of its own (the number of devices is fixed when JAX starts). `python
sharded_run.py FILE` writes what `test_sharding.py` asserts on."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from training_toys import DENSE, MOE, VOCAB, params_of

from rome.ipa import ObjectiveConfig, PolicyBatch, batch_totals
from rome.models import ModelConfig, param_specs
from rome.models.sharding import MeshConfig, batch_shardings, make_mesh, param_shardings
from rome.rollout import DecodeEngine, EngineConfig
from rome.training.checkpoint import Checkpointer
from rome.training.state import OptimizerConfig, init_state_on, make_optimizer
from rome.training.steps import PolicyStep

ROWS, TOKENS, CHUNKS = 8, 16, 5
# every axis is split in one of the two; a small head_chunk makes each device loop over parts of its logits
MODEL = dataclasses.replace(
    MOE,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    moe_dispatch="sparse",
    head_chunk=8,
    remat=True,
    router_aux_loss_coef=0.1,
    router_z_loss_coef=0.01,
)
MESHES = {
    "one device": MeshConfig(),
    "fsdp × expert × context": MeshConfig(fsdp=2, expert=2, context=2),
    "data × tensor": MeshConfig(data=4, tensor=2),
}
ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
OPTIMIZER = make_optimizer(ADAMW, 10)
OFFLOADED = make_optimizer(dataclasses.replace(ADAMW, memory="pinned_host"), 10)


def policy_batch() -> PolicyBatch:
    """Two segments and padding in every row, so that each shard of a row sees a border."""
    rng = np.random.default_rng(0)

    def rows(*parts: np.ndarray) -> np.ndarray:
        return np.tile(np.concatenate(parts), (ROWS, 1)).astype(np.int32)

    def noise() -> np.ndarray:
        return rng.normal(-3.8, 0.3, (ROWS, TOKENS)).astype(np.float32)

    return PolicyBatch(
        tokens=rng.integers(1, VOCAB, (ROWS, TOKENS)).astype(np.int32),
        positions=rows(np.arange(5), np.arange(9), [0, 0]),
        segment_ids=rows(np.full(5, 1), np.full(9, 2), [0, 0]),
        chunk_ids=rows([-1, -1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 3, 3, 3, -1, -1]),
        old_logp=noise(),
        behavior_logp=noise(),
        returns=rng.normal(size=(ROWS, CHUNKS)).astype(np.float32),
        positive=rng.random((ROWS, CHUNKS)) > 0.5,
        imitation=np.zeros((ROWS, CHUNKS), bool),
        experts=replayed_experts(rng),
    )


def replayed_experts(rng: np.random.Generator) -> np.ndarray:
    """Two different experts of each token and layer, recorded of two tokens in three."""
    first = rng.integers(MODEL.num_experts, size=(ROWS, TOKENS, MODEL.routed_layers, 1))
    other = (first + rng.integers(1, MODEL.num_experts, size=first.shape)) % MODEL.num_experts
    recorded = rng.random((ROWS, TOKENS, 1, 1)) < 2 / 3
    return np.where(recorded, np.concatenate([first, other], axis=-1), -1).astype(np.int16)


def train_step(model: ModelConfig, config: MeshConfig, optimizer: Any = OPTIMIZER) -> dict[str, Any]:
    """One policy step: loss, log-probs, gradients, and the state after the update."""
    mesh, params, batch = make_mesh(config), jax.tree.map(jax.numpy.array, params_of(model)), policy_batch()
    totals = batch_totals(batch, ObjectiveConfig())
    if mesh is not None:
        params = jax.device_put(params, param_shardings(param_specs(model), mesh))
        batch = jax.device_put(batch, batch_shardings(batch, mesh, TOKENS))
    step = PolicyStep(model, ObjectiveConfig(), optimizer, False, mesh=mesh)
    state = init_state_on(mesh, params, optimizer, model)
    gradients, (loss, _, logp) = step.accumulate(state.params, step.zeros(state.params), batch, totals)
    found = jax.device_get({"loss": loss, "logp": logp, "gradients": gradients})
    before = jax.tree.map(lambda leaf: str(leaf.sharding), state)
    state, norm = step.apply(state, gradients)
    after = jax.tree.map(lambda leaf: str(leaf.sharding), state)
    shares = {name: leaf.addressable_shards[0].data.size / leaf.size for name, leaf in state.params["layers"].items()}
    found |= {"norm": float(norm), "shares": shares, "moved": before != after, "memory": memory_kinds(state)}
    return found | {"state": state, "host_state": jax.device_get(state)}


def memory_kinds(state: Any) -> dict[str, set[str]]:
    """Where the arrays lie, counters apart."""
    parts = {"params": state.params, "moments": state.opt_state}
    return {
        name: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(part) if leaf.ndim} for name, part in parts.items()
    }


def restored_elsewhere(saved: Any, config: MeshConfig) -> Any:
    """The state after a round trip through a checkpoint onto another mesh, whose moments lie on the host."""
    mesh = make_mesh(config)
    template = init_state_on(mesh, jax.tree.map(jax.numpy.zeros_like, params_of(MODEL)), OFFLOADED, MODEL)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder))
        checkpointer.save(1, saved, {"stage": "ipa"})
        state, _, _ = checkpointer.restore(1, template)
        checkpointer.close()
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, template)
    return {"state": jax.device_get(state), "placed": all(jax.tree.leaves(same)), "memory": memory_kinds(state)}


def decode(config: MeshConfig, page_size: int = 0) -> dict[int, Any]:
    """Greedy chunks of four slots with prompts of their own."""
    mesh, params = make_mesh(config, jax.devices()[: config.size]), params_of(DENSE)
    model = dataclasses.replace(DENSE, num_heads=4, num_kv_heads=2)
    params = params_of(model)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(param_specs(model), mesh))
    settings = EngineConfig(
        slots=4,
        cohorts=1,
        max_length=24,
        extend_buckets=(8,),
        max_chunk_tokens=6,
        temperature=0,
        page_size=page_size,
    )
    engine = DecodeEngine(params, model, settings, frozenset({1}), 0, meshes=(mesh,))
    for slot in range(4):
        engine.insert(slot, seed=slot)
    rng = np.random.default_rng(0)
    first = engine.generate(0, {slot: rng.integers(2, VOCAB, 3 + slot).astype(np.int32) for slot in range(4)})
    second = engine.generate(0, {slot: np.array([first[slot].tokens[-1], 7], np.int32) for slot in range(3)})
    chunks = {**first, **{10 + slot: chunk for slot, chunk in second.items()}}
    return {
        "chunks": {slot: (c.tokens, c.behavior_logp, c.raw_logp) for slot, c in chunks.items()},
        "compilations": engine.compilations,
    }


def main(path: str) -> None:
    # the moments of one of the runs lie on the host: it is compared with the others
    optimizers = {"data × tensor": OFFLOADED}
    runs = {name: train_step(MODEL, config, optimizers.get(name, OPTIMIZER)) for name, config in MESHES.items()}
    saved = runs["fsdp × expert × context"]["state"]
    for run in runs.values():
        del run["state"]
    found = {
        "runs": runs,
        "restored": restored_elsewhere(saved, MESHES["data × tensor"]),
        "decoded": {
            "one": decode(MeshConfig()),
            "eight": decode(MeshConfig(data=4, tensor=2)),
            "two, in pages": decode(MeshConfig(tensor=2), page_size=5),
        },
    }
    Path(path).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

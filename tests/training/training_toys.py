"""Small models and random trajectories for the tests of the training room."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from rome.ipa import ObjectiveConfig
from rome.models import ModelConfig, init_params
from rome.training.policy import PolicySettings, PolicyTrainer
from rome.training.state import OptimizerConfig, TrainState, init_state, make_optimizer
from rome.trajectory import Chunk, Observation, Status, Task, Trajectory

VOCAB = 48
DENSE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
    rope_theta=1e4,
)
SHALLOW = dataclasses.replace(DENSE, num_layers=1, scan_layers=False)  # compiles in half the time
MOE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=0,
    num_experts=4,
    num_experts_per_token=2,
    moe_intermediate_size=16,
    tie_embeddings=False,
)
SHALLOW_MOE = dataclasses.replace(MOE, num_layers=1, scan_layers=False)


@functools.cache
def params_of(model: ModelConfig, seed: int = 0) -> Any:
    return init_params(model, jax.random.key(seed))


def tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(1, VOCAB, count, dtype=np.int32)


def trajectory(
    rng: np.random.Generator, name: str, reward: float, chunks: int, group: str = "", **changes: Any
) -> Trajectory:
    """Random tokens: a prompt, chunks of 1..6 tokens, observations of 0..4 tokens (none after the last chunk)."""
    parts = []
    for k in range(chunks):
        size = int(rng.integers(1, 7))
        behavior = rng.normal(-3.8, 0.4, size).astype(np.float32)  # about log 1/48, as the untrained model has it
        parts.append(Chunk(f"{name}/{k}", tokens(rng, size), behavior, np.zeros(size, np.int32)))
    observations = tuple(Observation(tokens(rng, int(rng.integers(0, 5)))) for _ in range(chunks - 1))
    fields = {
        "id": name,
        "group_id": group or name,
        "task": Task(id=group or name, instruction="", family="toy", horizon=chunks),
        "seed": 0,
        "prompt": Observation(tokens(rng, int(rng.integers(1, 6)))),
        "chunks": tuple(parts),
        "observations": observations,
        "final_reward": reward,
        "status": Status.COMPLETED,
        "start_version": 0,
    }
    return Trajectory(**{**fields, **changes})


def trajectories(seed: int, count: int = 8, rewards: tuple[float, ...] = (1.0, 0.0)) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    return [trajectory(rng, f"t{i}", rewards[i % len(rewards)], 1 + i % 4, group=f"g{i // 4}") for i in range(count)]


def settings(**changes: Any) -> PolicySettings:
    plain = OptimizerConfig(learning_rate=1e-2)
    values = {"steps": 4, "groups": 2, "group_size": 4, "row_length": 48, "max_chunks": 8, "micro_rows": 2}
    return PolicySettings(**{**values, "optimizer": plain, **changes})


@functools.cache
def _trainer(model: ModelConfig, objective: ObjectiveConfig, chosen: PolicySettings) -> PolicyTrainer:
    return PolicyTrainer(model, objective, make_optimizer(chosen.optimizer, 100), chosen)


def trainer(model: ModelConfig, objective: ObjectiveConfig, chosen: PolicySettings) -> tuple[PolicyTrainer, TrainState]:
    """A trainer (kept for whoever asks for the same again: it compiles for seconds) and a fresh state, whose
    parameters are copies: steps donate theirs."""
    params = jax.tree.map(jax.numpy.array, params_of(model))
    return _trainer(model, objective, chosen), init_state(params, make_optimizer(chosen.optimizer, 100))


def distance(a: Any, b: Any) -> float:
    """The largest absolute difference of two pytrees."""
    gaps = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))), a, b)
    return max(jax.tree.leaves(gaps))

"""The train state and its optimizer: plain pytrees, optax underneath."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Params = Any


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under global-norm clipping. `schedule`: constant or cosine (to 10 % of the peak) after a linear warm-up.

    `learning_rate` is the peak; `warmup_steps` counts optimizer updates. Weight decay applies to matrices only.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule: expected 'constant' or 'cosine', found {self.schedule!r}")


def _decayed(params: Params) -> Params:
    """True for matrices, False for norm scales (layers are stacked, so the rank alone does not tell)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


@struct.dataclass
class TrainState:
    """`step` int32[] optimizer updates so far in this stage; `params` and `opt_state` as optax keeps them."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """clip by global norm → Adam → decoupled weight decay on matrices → schedule over `total_steps` updates."""
    if config.schedule == "cosine":
        schedule: optax.Schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if config.warmup_steps else config.learning_rate,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=max(total_steps, config.warmup_steps + 1),
            end_value=0.1 * config.learning_rate,
        )
    else:
        schedule = optax.warmup_constant_schedule(
            init_value=0.0 if config.warmup_steps else config.learning_rate,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
        )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state at update 0 around `params`."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

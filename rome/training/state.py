"""The train state and its optimizer: plain pytrees, optax underneath."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import struct

Params = Any


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices of the layers with Adam for the rest, under global-norm clipping.

    `schedule`: constant or cosine (to 10 % of the peak) after a linear warm-up of `warmup_steps` updates.
    `learning_rate` is the peak; `adam_learning_rate` is Adam's part under Muon (Jordan 2024; updates scaled to AdamW's
    root mean square as in Liu et al. 2025, arXiv 2502.16982). Weight decay leaves norm scales alone.
    """

    learning_rate: float
    name: str = "adamw"
    adam_learning_rate: float | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name: expected 'adamw' or 'muon', found {self.name!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule: expected 'constant' or 'cosine', found {self.schedule!r}")
        if (self.adam_learning_rate is not None) != (self.name == "muon"):
            raise ValueError("optimizer.adam_learning_rate: expected a number for 'muon' and None for 'adamw'")
        ranges = {
            "learning_rate": (0.0, math.inf),
            "adam_learning_rate": (0.0, math.inf),
            "warmup_steps": (0, math.inf),
            "beta1": (0.0, 1.0),
            "beta2": (0.0, 1.0),
            "epsilon": (0.0, math.inf),
            "weight_decay": (0.0, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value < high:
                raise ValueError(f"optimizer.{name}: expected a number in [{low:g}, {high:g}), found {value!r}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm: expected a number above 0, found {self.max_grad_norm!r}")


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """clip by global norm → AdamW or Muon → schedule over `total_steps` updates."""
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            _schedule(config, config.learning_rate, total_steps),
            adam_learning_rate=_schedule(config, config.adam_learning_rate, total_steps),
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    else:
        optimizer = optax.adamw(
            _schedule(config, config.learning_rate, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)


def _schedule(config: OptimizerConfig, peak: float, total_steps: int) -> optax.Schedule:
    start = 0.0 if config.warmup_steps else peak
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(start, peak, config.warmup_steps)
    decay_steps = max(total_steps, config.warmup_steps + 1)
    return optax.warmup_cosine_decay_schedule(start, peak, config.warmup_steps, decay_steps, 0.1 * peak)


def _decayed(params: Params) -> Params:
    """True for matrices, False for norm scales and biases (layers are stacked, so the rank alone does not tell)."""

    def is_matrix(path: tuple, _: jax.Array) -> bool:
        return not path[-1].key.endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _matrices(params: Params) -> Params:
    """How each weight is a matrix, (axes in, axes out); leading axes (layers, experts) are batched. None: Adam."""
    shapes = {"wq": (-3, (-2, -1)), "wk": (-3, (-2, -1)), "wv": (-3, (-2, -1)), "wo": ((-3, -2), -1)}
    shapes |= {name: (-2, -1) for name in ("gate", "up", "down")}

    def numbers(path: tuple, leaf: jax.Array) -> Any:
        axes = shapes.get(path[-1].key)
        if axes is None:
            return None
        into, out = (tuple(a % leaf.ndim for a in ((x,) if isinstance(x, int) else x)) for x in axes)
        return optax.contrib.MuonDimensionNumbers(into, out)

    return jax.tree_util.tree_map_with_path(numbers, params)


@struct.dataclass
class TrainState:
    """`step` int32[] optimizer updates so far in this stage; `params` and `opt_state` as optax keeps them."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state at update 0 around `params`."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

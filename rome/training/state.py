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
from jax.sharding import Mesh

from rome.models import ModelConfig
from rome.models.lora import specs_like, trained
from rome.models.sharding import ShardingError, param_shardings, replicated

Params = Any
HOST = "pinned_host"  # JAX's name of a device's memory on its host, for what is copied to and fro


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices of the layers with Adam for the rest, under global-norm clipping.

    `schedule`: constant or cosine (to 10 % of the peak) after a linear warm-up of `warmup_steps` updates.
    `learning_rate` is the peak; `adam_learning_rate` is Adam's part under Muon (Jordan 2024; updates scaled to AdamW's
    root mean square as in Liu et al. 2025, arXiv 2502.16982). Weight decay leaves norm scales alone.

    Moments are float32 whatever the parameters are. With `rounding` "stochastic", parameters must be bfloat16 and need
    no float32 masters: an update too small for their 8 bits survives in the mean.

    `memory`: where the moments lie between updates. "pinned_host" is the host's memory, from which an update fetches
    them; it computes the same.
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
    rounding: str = "nearest"
    memory: str = "device"

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name: expected 'adamw' or 'muon', found {self.name!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule: expected 'constant' or 'cosine', found {self.schedule!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"optimizer.rounding: expected 'nearest' or 'stochastic', found {self.rounding!r}")
        if self.memory not in ("device", HOST):
            raise ValueError(f"optimizer.memory: expected 'device' or {HOST!r}, found {self.memory!r}")
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
    """clip by global norm → AdamW or Muon, in float32 → schedule over `total_steps` updates → rounding."""
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
    chain = _in_float32(optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer))
    if config.rounding == "stochastic":
        chain = optax.chain(chain, round_stochastically())
    return chain if config.memory == "device" else offloaded(chain)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(gradients: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        return optimizer.update(cast(gradients), state, cast(params))

    return optax.GradientTransformation(lambda params: optimizer.init(cast(params)), update)


class Offloaded(optax.GradientTransformation):
    """An optimizer whose state, counters apart, lies in the host's memory between updates."""


def offloaded(optimizer: optax.GradientTransformation) -> Offloaded:
    """The same optimizer, whose arrays an update fetches from the host's memory and puts back."""

    def moved(state: optax.OptState, space: jax.memory.Space) -> optax.OptState:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state)

    def update(gradients: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(gradients, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return Offloaded(lambda params: moved(optimizer.init(params), jax.memory.Space.Host), update)


def require_memory(optimizer: optax.GradientTransformation, device: jax.Device) -> None:
    """Raises ShardingError if the optimizer's state is to lie in a memory that such a device does not have."""
    if not isinstance(optimizer, Offloaded):
        return
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ShardingError(
            f"optimizer.memory: expected 'device', for a device of kind {device.device_kind!r} has no {HOST!r}, "
            f"only {kinds}"
        )


def round_stochastically(seed: int = 0) -> optax.GradientTransformation:
    """Turns updates of bfloat16 parameters into such as lead to one of the two bfloat16 neighbours of the exact sum,
    each with the probability that makes the mean exact. The last of a chain.

    Raises ValueError for parameters of another dtype.
    """

    def init(params: Params) -> optax.ScaleByScheduleState:
        others = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)} - {"bfloat16"})
        if others:
            raise ValueError(f"optimizer.rounding: 'stochastic' expected bfloat16 parameters, found {others}")
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))

        def rounded(change: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
            old = param.astype(jnp.float32)
            return bfloat16_stochastically(old + change.astype(jnp.float32), key).astype(jnp.float32) - old

        return jax.tree.map(rounded, updates, params, keys), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def bfloat16_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 → bfloat16, up or down at random, exact in the mean (infinities and NaN stay).

    The lower 16 bits of a float32 are what bfloat16 lacks: 16 random bits, added, carry into the rest just as often.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    moved = jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)
    return moved.astype(jnp.bfloat16)


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


def params_shardings(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Where parameters lie, and their adapters if they have any."""
    return param_shardings(specs_like(params, config), mesh)


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, config: ModelConfig, mesh: Mesh
) -> TrainState:
    """Where a state lies, as a `TrainState` of shardings: what the optimizer keeps for a parameter is split as that is
    (and in the host's memory if it is `Offloaded`), the rest (counters) lies everywhere. `state` may be abstract."""
    whole, params = replicated(mesh), params_shardings(state.params, config, mesh)
    kind = HOST if isinstance(optimizer, Offloaded) else None
    kept = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if _is_masked(leaf) else sharding.with_memory_kind(kind),
        state.opt_state,
        trained(params),
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )
    return TrainState(step=whole, params=params, opt_state=kept)


def _is_masked(leaf: Any) -> bool:
    """A part of an optimizer keeps nothing for this parameter (Muon's for what is no matrix, Adam's for the rest)."""
    return isinstance(leaf, optax.MaskedNode)


def init_state_on(
    mesh: Mesh | None, params: Params, optimizer: optax.GradientTransformation, config: ModelConfig
) -> TrainState:
    """`init_state`, made where it will lie. Raises ShardingError if there is no such memory."""
    require_memory(optimizer, jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    if mesh is None:
        return init_state(params, optimizer)
    shardings = state_shardings(jax.eval_shape(lambda p: init_state(p, optimizer), params), optimizer, config, mesh)
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(params)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state at update 0 around `params`."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(trained(params)))

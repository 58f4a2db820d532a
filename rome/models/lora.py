"""Low-rank adapters (LoRA, Hu et al. 2021) on any weight matrix: W + (alpha / rank) A B, with A and B trained.

A layer adds its adapters to its weights just before it uses them, in float32. So every product of the model (attention,
experts behind any dispatch, embedding, output) serves unchanged, merged and unmerged weights give the same numbers, and
on a mesh the sum is made where each share of the weights lies, without traffic. What LoRA saves is the memory of
gradients and optimizer state, and rollouts use merged weights at no cost. What it does not save is the product that
gives the gradient of W, from which those of A and B follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rome.models.config import ConfigError, ModelConfig
from rome.models.params import Params, ParamSpec, draw_params, param_specs

# How many of a weight's last dimensions are inputs and outputs; those before (layers, experts) are separate matrices.
MATRICES = {
    "wq": (1, 2),
    "wk": (1, 2),
    "wv": (1, 2),
    "wo": (2, 1),
    **dict.fromkeys(("router", "gate", "up", "down", "embedding", "lm_head"), (1, 1)),
}


@dataclass(frozen=True)
class LoraConfig:
    """``targets``: names of weights (``wq wk wv wo router gate up down embedding lm_head``); ``rank`` 0: no adapters.

    Raises:
        ConfigError: a field is out of range.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"LoraConfig.rank: expected 0 (no adapters) or more, got {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"LoraConfig.alpha: expected a positive number, got {self.alpha!r}")
        unknown = sorted(set(self.targets) - set(MATRICES))
        if unknown or not self.targets:
            raise ConfigError(f"LoraConfig.targets: expected some of {[*MATRICES]}, got {unknown or self.targets!r}")


@struct.dataclass
class Adapted:
    """Frozen ``base`` parameters and the ``adapters`` on them: per stack (``layers``, or ``top``), per weight, A
    [..., in, R] and B [..., R, out]. A pytree; ``scale`` is alpha / rank."""

    base: Params
    adapters: Params
    scale: float = struct.field(pytree_node=False)


def adapter_specs(config: ModelConfig, lora: LoraConfig) -> Params:
    """Declares A (normal, standard deviation in^-1/2) and B (zero: an untrained adapter changes nothing), in float32.

    Raises:
        ConfigError: the model has no weight of a target's name.
    """
    specs = param_specs(config)
    stacks = {name: leaf for name, leaf in specs.items() if isinstance(leaf, dict)}
    stacks["top"] = {name: leaf for name, leaf in specs.items() if not isinstance(leaf, dict)}
    missing = [name for name in lora.targets if not any(name in stack for stack in stacks.values())]
    if missing:
        raise ConfigError(f"LoraConfig.targets: expected weights that the model has, got {missing}")
    adapters = {
        stack: {name: _pair(name, weights[name], lora.rank) for name in lora.targets if name in weights}
        for stack, weights in stacks.items()
    }
    return {stack: pairs for stack, pairs in adapters.items() if pairs}


def _pair(name: str, weight: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    inputs, outputs = MATRICES[name]
    lead = len(weight.shape) - inputs - outputs
    shape, axes = weight.shape, weight.axes
    fan_in = math.prod(shape[lead : lead + inputs])
    return {
        "a": ParamSpec((*shape[: lead + inputs], rank), (*axes[: lead + inputs], "rank"), 0.0, fan_in**-0.5),
        "b": ParamSpec((*shape[:lead], rank, *shape[lead + inputs :]), (*axes[:lead], "rank", *axes[lead + inputs :])),
    }


def adapt(params: Params, config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapted:
    """`params` with fresh adapters."""
    return Adapted(params, draw_params(adapter_specs(config, lora), key), lora.alpha / lora.rank)


def merge(params: Params | Adapted) -> Params:
    """Plain parameters, in the base's dtype: for rollouts, for export. Plain parameters stay as they are."""
    if not isinstance(params, Adapted):
        return params
    attached = attach(params)
    return {name: add_adapters(leaf) if isinstance(leaf, dict) else leaf for name, leaf in attached.items()}


def attach(params: Params | Adapted) -> Params:
    """What `rome.models.forward` and its like take: each layer carries its adapters, which `add_adapters` adds."""
    if not isinstance(params, Adapted):
        return params
    base, attached = jax.lax.stop_gradient(params.base), {}
    for name, leaf in base.items():
        if isinstance(leaf, dict):
            pairs = params.adapters.get(name, {})
            attached[name] = leaf | {f"{target}.lora": _scaled(pair, params.scale) for target, pair in pairs.items()}
        else:
            pair = params.adapters.get("top", {}).get(name)
            attached[name] = leaf if pair is None else _add(name, leaf, _scaled(pair, params.scale))
    return attached


def add_adapters(layer: Params) -> Params:
    """The weights of one layer (or of a stack) with the adapters that `attach` gave it added."""
    plain = {name: leaf for name, leaf in layer.items() if not name.endswith(".lora")}
    if len(plain) == len(layer):
        return layer
    return {name: _add(name, w, layer[f"{name}.lora"]) if f"{name}.lora" in layer else w for name, w in plain.items()}


def _scaled(pair: dict[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    return {"a": scale * pair["a"], "b": pair["b"]}


def _add(name: str, weight: jax.Array, pair: dict[str, jax.Array]) -> jax.Array:
    inputs, outputs = MATRICES[name]
    lead, rank = weight.ndim - inputs - outputs, pair["a"].shape[-1]
    a = pair["a"].reshape(*weight.shape[:lead], -1, rank)
    b = pair["b"].reshape(*weight.shape[:lead], rank, -1)
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(weight.shape)
    return (weight.astype(jnp.float32) + delta).astype(weight.dtype)


def trained(params: Params | Adapted) -> Any:
    """The part of the parameters that gets gradients."""
    return params.adapters if isinstance(params, Adapted) else params


def with_trained(params: Params | Adapted, part: Any) -> Any:
    """The parameters with that part replaced."""
    return params.replace(adapters=part) if isinstance(params, Adapted) else part


def specs_like(params: Params | Adapted, config: ModelConfig) -> Any:
    """The declarations of parameters, with those of their adapters if they have any."""
    specs = param_specs(config)
    if not isinstance(params, Adapted):
        return specs
    pairs = {name: pair["a"].shape[-1] for stack in params.adapters.values() for name, pair in stack.items()}
    lora = LoraConfig(rank=next(iter(pairs.values())), targets=tuple(pairs))
    return Adapted(specs, adapter_specs(config, lora), params.scale)

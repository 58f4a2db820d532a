"""New weights for what rolls out, when training moves nothing but low-rank adapters.

The base never travels twice: a receiver (a Ray host, or this process's engine on devices of its own) has it since its
start, and merges each update's adapters into it where it lies. An engine on the trainer's own device borrows the
trainer's base instead of keeping one. What is sampled from are plain merged weights either way, so decoding costs
nothing extra, and they are bit for bit those that merging before the journey gives.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rome.models import ModelConfig, param_specs
from rome.models.lora import Adapted, merge, specs_like
from rome.models.params import Params
from rome.models.sharding import Mesh, param_shardings
from rome.rollout.weights import EngineError


@struct.dataclass
class AdapterUpdate:
    """The `adapters` of an `Adapted` whose base the receiver has."""

    adapters: Params


def update_of(params: Params | Adapted) -> Params | AdapterUpdate:
    """What has to travel to a receiver that was started with weights of this kind."""
    return AdapterUpdate(params.adapters) if isinstance(params, Adapted) else params


def num_bytes(tree: Any) -> int:
    """Of all arrays of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def take_weights(engine: Any, merger: AdapterMerger | None, weights: Any, version: int) -> float:
    """Swaps an engine's weights for those of an update (whole, or what the merger takes), while it samples. Returns the
    seconds until they were there."""
    started = time.perf_counter()
    params = weights if merger is None else jax.block_until_ready(merger(weights))
    engine.update_params(params, version)
    return time.perf_counter() - started


class AdapterMerger:
    """Turns adapters into the weights that an engine samples from, in the model's dtype.

    Args:
      params: the weights at the start; a base that is kept is copied from them, in its own dtype.
      mesh: where the engine's weights lie; None is the default device.
      keeps_base: False borrows the base of every update, which must then be an `Adapted` on the default device.
    """

    def __init__(self, params: Adapted, config: ModelConfig, mesh: Mesh | None = None, keeps_base: bool = True) -> None:
        self._place: Any = jax.devices()[0] if mesh is None else param_shardings(specs_like(params, config), mesh)
        merged_at = None if mesh is None else param_shardings(param_specs(config), mesh)
        self._base = None
        if keeps_base:
            self._base = jax.device_put(params.base, self._at("base"), may_alias=False)

        def merged(base: Params, adapters: Params) -> Params:
            whole = merge(Adapted(base, adapters, params.scale))
            return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.dtype)), whole)

        self._merge = jax.jit(merged, out_shardings=merged_at)

    def __call__(self, weights: Adapted | AdapterUpdate) -> Params:
        """The merged weights. Raises EngineError for an update without a base, if there is none here."""
        if self._base is not None:
            return self._merge(self._base, jax.device_put(weights.adapters, self._at("adapters")))
        if not isinstance(weights, Adapted):
            raise EngineError("params: expected adapters with their base (this engine keeps none), found adapters")
        return self._merge(weights.base, weights.adapters)

    def _at(self, part: str) -> Any:
        return getattr(self._place, part, self._place)

"""How an engine takes a trainer's weights: checked, copied, and converted to the engine's own precision."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from rome.models import ModelConfig, param_specs, unstack_layers
from rome.models.quantized import quantize, quantized_specs
from rome.models.sharding import Mesh, param_shardings

PRECISIONS = ("model", "bfloat16", "int8")


class EngineError(ValueError):
    """A request or a config that the engine can't serve. Names the field and what was expected."""


def engine_model(model_config: ModelConfig, precision: str) -> tuple[ModelConfig, Any]:
    """What an engine of this precision runs, and the declarations of its weights.

    ``model``: as the trainer has them. ``bfloat16``: weights, activations and cache. ``int8``: the weights of
    projections and experts (`rome.models.quantized`); the rest stays. Layers are a list: a program that is given them
    stacked copies all of them, each time it is called, before it can decode.
    """
    if precision == "bfloat16":
        model_config = replace(model_config, dtype="bfloat16", param_dtype="bfloat16")
    specs = param_specs(model_config)
    return model_config, unstack_layers(quantized_specs(specs) if precision == "int8" else specs, model_config)


class Publisher:
    """Makes an engine's weights of a trainer's, which all have the shapes and dtypes of the first.

    Attributes:
      model_config: of the model that the engine runs, see `engine_model`.
    """

    def __init__(self, params: Any, model_config: ModelConfig, precision: str) -> None:
        self._expected, self._precision = _shapes(params), precision
        self.model_config, self._specs = engine_model(model_config, precision)

    def shardings(self, mesh: Mesh) -> Any:
        """Where the engine's weights lie on a mesh."""
        return param_shardings(self._specs, mesh)

    def own(self, params: Any, shardings: Any = None) -> Any:
        """The engine's own copy. Raises EngineError if shapes or dtypes are not those of the first weights."""
        if _shapes(params) != self._expected:
            raise EngineError("params: expected the shapes and dtypes that the engine was made with")
        own = _engine_weights(self.model_config, self._precision, params)
        return own if shardings is None else jax.device_put(own, shardings)


def check_version(version: int, current: int) -> None:
    """Raises EngineError unless the version grows."""
    if version <= current:
        raise EngineError(f"version: expected more than {current}, found {version}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _engine_weights(model_config: ModelConfig, precision: str, params: Any) -> Any:
    # jit gives back what it only passes on, uncopied; what is stacked is sliced below
    params = {name: leaf if isinstance(leaf, dict) else jnp.copy(leaf) for name, leaf in params.items()}
    if precision == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    elif precision == "int8":
        params = quantize(params)
    return unstack_layers(params, model_config)


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), params)

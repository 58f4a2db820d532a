"""How an engine takes a trainer's weights: checked, copied, and converted to the engine's own precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from rome.models import ModelConfig, param_specs
from rome.models.quantized import quantize, quantized_specs
from rome.models.sharding import Mesh, param_shardings

PRECISIONS = ("model", "bfloat16", "int8")


class EngineError(ValueError):
    """A request or a config that the engine can't serve. Names the field and what was expected."""


def engine_model(model_config: ModelConfig, precision: str) -> tuple[ModelConfig, Any]:
    """What an engine of this precision runs, and the declarations of its weights.

    ``model``: as the trainer has them. ``bfloat16``: weights, activations and cache. ``int8``: the weights of
    projections and experts (`rome.models.quantized`); the rest stays.
    """
    if precision == "bfloat16":
        model_config = replace(model_config, dtype="bfloat16", param_dtype="bfloat16")
    specs = param_specs(model_config)
    return model_config, quantized_specs(specs) if precision == "int8" else specs


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
        if self._precision != "model":
            params = _CONVERSIONS[self._precision](params)
        if shardings is not None:
            return jax.device_put(params, shardings, may_alias=False)
        return jax.tree.map(jnp.copy, params) if self._precision == "model" else params


def check_version(version: int, current: int) -> None:
    """Raises EngineError unless the version grows."""
    if version <= current:
        raise EngineError(f"version: expected more than {current}, found {version}")


@jax.jit
def _to_bfloat16(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.copy(leaf.astype(jnp.bfloat16)), params)


@jax.jit
def _to_int8(params: Any) -> Any:
    return quantize(jax.tree.map(jnp.copy, params))  # jit gives back what it only passes on, uncopied


_CONVERSIONS = {"bfloat16": _to_bfloat16, "int8": _to_int8}


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), params)

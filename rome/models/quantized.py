"""Weights in 8 bits for inference: symmetric, one step an output channel, rounded to nearest.

w ≈ code · step, with code in −127..127 and step = max |w| / 127 over the inputs of the output. The projections of
attention, of MLPs and of experts are quantised; embedding, output head, router, norms and biases stay.

The step multiplies what comes out of the product, so the product reads one byte a weight. XLA's CPU compiler has a fast
product of int8 by int8 but none of float32 by int8 (it writes all weights out as float32 first: eight times as slow as
float32 weights). So on CPU the activations go in as two int8 each, hi + lo / 254 in units of their row's
max |x| / 127, stacked as twice the rows: what they lose is below 2e-5 of the row's largest. Elsewhere the codes become
the activations' type inside the product, which is exact.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rome.models.config import ModelConfig
from rome.models.lora import MATRICES
from rome.models.params import Params, ParamSpec
from rome.models.sharding import is_sharded, platform

QUANTIZED = ("wq", "wk", "wv", "wo", "gate", "up", "down")
_STACKS = ("layers", "dense_layers")
_LO = 254.0  # steps of the low part in one of the high part


@flax.struct.dataclass
class Int8:
    """A weight: ``codes`` int8 in its shape, ``steps`` float32 in its shape without the inputs' dimensions."""

    codes: jax.Array
    steps: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def astype(self, dtype: Any) -> Int8:
        """Itself: a product has the type of what it is multiplied with."""
        return self

    def reshape(self, inputs: int, outputs: int) -> Int8:
        """As a matrix. −1 for one of the two is what is left."""
        codes = self.codes.reshape(inputs, outputs)
        return Int8(codes, self.steps.reshape(codes.shape[1]))

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x [..., in] @ self [in, out], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        product = _split_product(rows, self.codes) if platform() == "cpu" else _product(rows, self.codes)
        return (product * self.steps).astype(x.dtype).reshape(*x.shape[:-1], self.codes.shape[1])


@flax.struct.dataclass
class Int8Experts:
    """The same matrix of all experts of a layer. One expert's is an `Int8`; where all are wanted at once, as by
    `dense_dispatch`, they are dequantised."""

    codes: jax.Array  # int8[E, in, out]
    steps: jax.Array  # float32[E, out]
    dtype: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __getitem__(self, expert: jax.Array) -> Int8:
        return Int8(self.codes[expert], self.steps[expert])

    def __jax_array__(self) -> jax.Array:
        return (self.codes * self.steps[:, None]).astype(self.dtype)


def _product(x_NxD: jax.Array, codes_DxF: jax.Array) -> jax.Array:
    return jnp.matmul(x_NxD, codes_DxF.astype(x_NxD.dtype), preferred_element_type=jnp.float32)


def _split_product(x_NxD: jax.Array, codes_DxF: jax.Array) -> jax.Array:
    """The same from int8 products; see the module's docstring. At least two rows: XLA has no fast path for one."""
    x = x_NxD.astype(jnp.float32)
    unit_Nx1 = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny * _LO) / 127
    scaled = x / unit_Nx1
    hi = jnp.round(scaled)
    parts = jnp.concatenate([hi, jnp.round((scaled - hi) * _LO)]).astype(jnp.int8)
    hi, lo = jnp.split(jnp.matmul(parts, codes_DxF, preferred_element_type=jnp.int32).astype(jnp.float32), 2)
    return (hi + lo / _LO) * unit_Nx1


def expert_stack(weights: jax.Array | Int8, config: ModelConfig, dtype: Any) -> jax.Array | Int8Experts:
    """A layer's experts as `rome.models.moe` takes them. Where it needs arrays they are dequantised: on a mesh, whose
    island splits them, and for `jax.lax.ragged_dot`."""
    if not isinstance(weights, Int8):
        return weights
    stack = Int8Experts(weights.codes, weights.steps, dtype)
    arrays = is_sharded() or platform() == "tpu" or config.moe_dispatch == "ragged"
    return stack.__jax_array__() if arrays else stack


def quantize(params: Params) -> Params:
    """The parameters with their projections as `Int8`; all other leaves as they are."""
    return _for_projections(params, _quantize)


def quantized_specs(specs: Params) -> Params:
    """The declarations of what `quantize` gives."""
    return _for_projections(specs, quantized_spec)


def _for_projections(tree: Params, function: Any) -> Params:
    def stack(weights: Params) -> Params:
        return {name: function(name, leaf) if name in QUANTIZED else leaf for name, leaf in weights.items()}

    return {name: stack(leaf) if name in _STACKS else leaf for name, leaf in tree.items()}


def _inputs(name: str, rank: int) -> tuple[int, ...]:
    """The dimensions that a weight's product sums over."""
    inputs, outputs = MATRICES[name]
    return tuple(range(rank - inputs - outputs, rank - outputs))


def quantized_spec(name: str, spec: ParamSpec) -> Int8:
    """The declaration of one quantised weight."""
    summed = _inputs(name, len(spec.shape))
    kept = [axis for axis in range(len(spec.shape)) if axis not in summed]
    steps = ParamSpec(tuple(spec.shape[a] for a in kept), tuple(spec.axes[a] for a in kept))
    return Int8(ParamSpec(spec.shape, spec.axes, dtype="int8"), steps)


def _quantize(name: str, weight: jax.Array) -> Int8:
    summed = _inputs(name, weight.ndim)
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(axis=summed, keepdims=True)
    steps = jnp.where(largest > 0, largest, 1.0) / 127
    return Int8(jnp.round(weight / steps).astype(jnp.int8), steps.squeeze(summed))

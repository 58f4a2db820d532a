"""How parameters are called and laid out in checkpoints: one table, which every family here shares.

A checkpoint stores linear maps as [out, in] and one tensor a layer and expert; `param_specs` has [in..., out...] and
stacks of layers and experts. A `Slot` ties a tensor to its place in a leaf, and converts both ways without arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from rome.models.config import ModelConfig
from rome.models.params import ParamSpec, is_spec, layer_runs, param_specs

AS_IS, FLAT = "as_is", "flat"


class Row(NamedTuple):
    """The leaf, the tensor's name, and its layout: as it is, flattened, or a linear map from ``layout`` input axes."""

    leaf: str
    name: str
    layout: str | int


_TOP = (
    Row("embedding", "model.embed_tokens.weight", AS_IS),
    Row("final_norm", "model.norm.weight", AS_IS),
    Row("lm_head", "lm_head.weight", 1),
)
_LAYER = (
    Row("attention_norm", "input_layernorm.weight", AS_IS),
    Row("wq", "self_attn.q_proj.weight", 1),
    Row("wk", "self_attn.k_proj.weight", 1),
    Row("wv", "self_attn.v_proj.weight", 1),
    Row("wo", "self_attn.o_proj.weight", 2),
    Row("q_bias", "self_attn.q_proj.bias", FLAT),
    Row("k_bias", "self_attn.k_proj.bias", FLAT),
    Row("v_bias", "self_attn.v_proj.bias", FLAT),
    Row("o_bias", "self_attn.o_proj.bias", AS_IS),
    Row("q_norm", "self_attn.q_norm.weight", AS_IS),
    Row("k_norm", "self_attn.k_norm.weight", AS_IS),
    Row("mlp_norm", "post_attention_layernorm.weight", AS_IS),
)
_DENSE = (
    Row("gate", "mlp.gate_proj.weight", 1),
    Row("up", "mlp.up_proj.weight", 1),
    Row("down", "mlp.down_proj.weight", 1),
    Row("gate_bias", "mlp.gate_proj.bias", AS_IS),
    Row("up_bias", "mlp.up_proj.bias", AS_IS),
    Row("down_bias", "mlp.down_proj.bias", AS_IS),
)
_MOE = (
    Row("router", "mlp.gate.weight", 1),
    Row("gate", "mlp.experts.{expert}.gate_proj.weight", 1),
    Row("up", "mlp.experts.{expert}.up_proj.weight", 1),
    Row("down", "mlp.experts.{expert}.down_proj.weight", 1),
)


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint: its ``name`` there, and its place ``at`` (layer, expert) in a leaf whose other axes
    have the shape ``inner``."""

    name: str
    at: tuple[int, ...]
    inner: tuple[int, ...]
    layout: str | int

    @property
    def shape(self) -> tuple[int, ...]:
        """In the checkpoint."""
        if isinstance(self.layout, int):
            return math.prod(self.inner[self.layout :]), math.prod(self.inner[: self.layout])
        return (math.prod(self.inner),) if self.layout == FLAT else self.inner

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """A view of ``tensor`` with the shape ``inner``: indexing it reads only what is asked for."""
        if not isinstance(self.layout, int):
            return tensor.reshape(self.inner)
        outputs = len(self.inner) - self.layout
        axes = (*range(outputs, len(self.inner)), *range(outputs))
        return tensor.reshape(*self.inner[self.layout :], *self.inner[: self.layout]).transpose(axes)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `to_leaf`, in C order."""
        if not isinstance(self.layout, int):
            return np.ascontiguousarray(leaf).reshape(self.shape)
        axes = (*range(self.layout, len(self.inner)), *range(self.layout))
        return np.ascontiguousarray(leaf.transpose(axes)).reshape(self.shape)


def leaf_slots(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], ParamSpec, list[Slot]]]:
    """For each leaf of `param_specs`, in its order: its path, its declaration, and the tensors that fill it."""
    indices: dict[str, list[int]] = {"layers": [], "dense_layers": []}
    for run in layer_runs(config):
        first = sum(map(len, indices.values()))
        indices[run.stack] += range(first, first + run.stop - run.start)
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)
    for keys, spec in leaves:
        path = tuple(key.key for key in keys)
        if len(path) == 1:
            (row,) = (row for row in _TOP if row.leaf == path[0])
            yield path, spec, [Slot(row.name, (), spec.shape, row.layout)]
            continue
        stack, leaf = path
        mlp = _MOE if config.is_moe and stack == "layers" else _DENSE
        (row,) = (row for row in (*_LAYER, *mlp) if row.leaf == leaf)
        yield path, spec, list(_layer_slots(row, spec, indices[stack]))


def _layer_slots(row: Row, spec: ParamSpec, layers: list[int]) -> Iterator[Slot]:
    for position, layer in enumerate(layers):
        name = f"model.layers.{layer}.{row.name}"
        if "{expert}" not in name:
            yield Slot(name, (position,), spec.shape[1:], row.layout)
            continue
        for expert in range(spec.shape[1]):
            yield Slot(name.format(expert=expert), (position, expert), spec.shape[2:], row.layout)

"""Parameters: one declaration each gives shape, dtype, logical axes and initialiser. The rest is derived from it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rome.models.config import ModelConfig

Params = dict[str, Any]

_DRAW = 4096  # normal numbers drawn from one key


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``axes`` names its dimensions logically (``vocab``, ``embed``, ``heads``...) for sharding.

    It starts as ``mean`` + ``std`` * normal.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    mean: float = 0.0
    std: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Declares every parameter, as a pytree of `ParamSpec`. Layers are stacked on a leading axis ``layers``.

    Projections start normal with standard deviation fan_in^-1/2; those that write into the residual stream are scaled
    by a further (2 * num_layers)^-1/2, so that its variance at the end doesn't grow with depth (GPT-2).
    """
    c, depth = config, config.num_layers
    fan_in, residual = c.hidden_size**-0.5, (2 * depth) ** -0.5

    def normal(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> ParamSpec:
        return ParamSpec((depth, *shape), ("layers", *axes), 0.0, std, c.param_dtype)

    def gain(size: int, axis: str, value: float = 1.0) -> ParamSpec:
        return ParamSpec((depth, size), ("layers", axis), value, 0.0, c.param_dtype)

    d, h, k, hd = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    layers = {
        "attention_norm": gain(d, "embed"),
        "wq": normal((d, h, hd), ("embed", "heads", "head_dim"), fan_in),
        "wk": normal((d, k, hd), ("embed", "kv_heads", "head_dim"), fan_in),
        "wv": normal((d, k, hd), ("embed", "kv_heads", "head_dim"), fan_in),
        "wo": normal((h, hd, d), ("heads", "head_dim", "embed"), residual * (h * hd) ** -0.5),
        "mlp_norm": gain(d, "embed"),
    }
    if c.qk_norm:
        layers["q_norm"] = gain(hd, "head_dim", c.qk_norm_init)
        layers["k_norm"] = gain(hd, "head_dim", c.qk_norm_init)
    if c.is_moe:
        e, f = c.num_experts, c.moe_intermediate_size
        layers["router"] = normal((d, e), ("embed", "experts"), fan_in)
        layers["gate"] = normal((e, d, f), ("experts", "embed", "mlp"), fan_in)
        layers["up"] = normal((e, d, f), ("experts", "embed", "mlp"), fan_in)
        layers["down"] = normal((e, f, d), ("experts", "mlp", "embed"), residual * f**-0.5)
    else:
        f = c.intermediate_size
        layers["gate"] = normal((d, f), ("embed", "mlp"), fan_in)
        layers["up"] = normal((d, f), ("embed", "mlp"), fan_in)
        layers["down"] = normal((f, d), ("mlp", "embed"), residual * f**-0.5)

    specs: dict[str, Any] = {
        "embedding": ParamSpec((c.vocab_size, d), ("vocab", "embed"), 0.0, fan_in, c.param_dtype),
        "layers": layers,
        "final_norm": ParamSpec((d,), ("embed",), 1.0, 0.0, c.param_dtype),
    }
    if not c.tie_embeddings:
        specs["lm_head"] = ParamSpec((d, c.vocab_size), ("embed", "vocab"), 0.0, fan_in, c.param_dtype)
    return specs


def is_spec(value: object) -> bool:
    return isinstance(value, ParamSpec)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draws the parameters: a nested dict of arrays in ``config.param_dtype`` with the shapes of `param_specs`.

    Each parameter's key depends on its name alone, so adding one doesn't change how the others start.
    """
    specs, tree = jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)
    drawn = [
        (zlib.crc32(jax.tree_util.keystr(path).encode()), -(-spec.size // _DRAW)) for path, spec in specs if spec.std
    ]
    names = np.concatenate([np.full(blocks, name, np.uint32) for name, blocks in drawn])
    numbers = np.concatenate([np.arange(blocks, dtype=np.uint32) for _, blocks in drawn])

    def draw(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        name, number = block
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, name), number), (_DRAW,), jnp.float32)

    # One loop draws for all: a generator compiled for every shape would take about a second each.
    noise = jax.lax.map(draw, (names, numbers))
    arrays, start = [], 0
    for _, spec in specs:
        value = jnp.full(spec.shape, spec.mean, jnp.float32)
        if spec.std:
            blocks = -(-spec.size // _DRAW)
            flat = noise[start : start + blocks].reshape(-1)[: spec.size]
            value, start = value + spec.std * flat.reshape(spec.shape), start + blocks
        arrays.append(value.astype(spec.dtype))
    return jax.tree_util.tree_unflatten(tree, arrays)


def count_params(config: ModelConfig, *, active: bool = False) -> int:
    """Number of parameters, from shapes alone; ``active`` counts only the experts that one token uses."""
    total = 0
    for spec in jax.tree_util.tree_leaves(param_specs(config), is_leaf=is_spec):
        size = spec.size
        if active and "experts" in spec.axes and spec.axes[1] == "experts":
            size = size // config.num_experts * config.num_experts_per_token
        total += size
    return total

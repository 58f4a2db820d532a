"""Parameters: one declaration each gives shape, dtype, logical axes and initialiser. The rest is derived from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rome.models.config import ModelConfig

Params = dict[str, Any]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``axes`` names its dimensions logically (``vocab``, ``embed``, ``heads``...) for sharding."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


def _normal(std: float) -> Initializer:
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _constant(value: float) -> Initializer:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Declares every parameter, as a pytree of `ParamSpec`. Layers are stacked on a leading axis ``layers``.

    Projections start normal with standard deviation fan_in^-1/2; those that write into the residual stream are scaled
    by a further (2 * num_layers)^-1/2, so that its variance at the end doesn't grow with depth (GPT-2).
    """
    c, dt = config, config.param_dtype
    depth = c.num_layers
    fan_in = _normal(c.hidden_size**-0.5)
    residual = (2 * depth) ** -0.5

    def layer(shape: tuple[int, ...], axes: tuple[str, ...], initializer: Initializer) -> ParamSpec:
        return ParamSpec((depth, *shape), ("layers", *axes), initializer, dt)

    d, h, k, hd = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    layers = {
        "attention_norm": layer((d,), ("embed",), _constant(1.0)),
        "wq": layer((d, h, hd), ("embed", "heads", "head_dim"), fan_in),
        "wk": layer((d, k, hd), ("embed", "kv_heads", "head_dim"), fan_in),
        "wv": layer((d, k, hd), ("embed", "kv_heads", "head_dim"), fan_in),
        "wo": layer((h, hd, d), ("heads", "head_dim", "embed"), _normal(residual * (h * hd) ** -0.5)),
        "mlp_norm": layer((d,), ("embed",), _constant(1.0)),
    }
    if c.qk_norm:
        layers["q_norm"] = layer((hd,), ("head_dim",), _constant(c.qk_norm_init))
        layers["k_norm"] = layer((hd,), ("head_dim",), _constant(c.qk_norm_init))
    if c.is_moe:
        e, f = c.num_experts, c.moe_intermediate_size
        layers["router"] = layer((d, e), ("embed", "experts"), fan_in)
        layers["gate"] = layer((e, d, f), ("experts", "embed", "mlp"), fan_in)
        layers["up"] = layer((e, d, f), ("experts", "embed", "mlp"), fan_in)
        layers["down"] = layer((e, f, d), ("experts", "mlp", "embed"), _normal(residual * f**-0.5))
    else:
        f = c.intermediate_size
        layers["gate"] = layer((d, f), ("embed", "mlp"), fan_in)
        layers["up"] = layer((d, f), ("embed", "mlp"), fan_in)
        layers["down"] = layer((f, d), ("mlp", "embed"), _normal(residual * f**-0.5))

    specs: dict[str, Any] = {
        "embedding": ParamSpec((c.vocab_size, d), ("vocab", "embed"), fan_in, dt),
        "layers": layers,
        "final_norm": ParamSpec((d,), ("embed",), _constant(1.0), dt),
    }
    if not c.tie_embeddings:
        specs["lm_head"] = ParamSpec((d, c.vocab_size), ("embed", "vocab"), fan_in, dt)
    return specs


def is_spec(value: object) -> bool:
    return isinstance(value, ParamSpec)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draws the parameters: a nested dict of arrays in ``config.param_dtype`` with the shapes of `param_specs`.

    Each parameter's key depends on its name alone, so adding one doesn't change how the others start.
    """
    specs, tree = jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)
    arrays = []
    for path, spec in specs:
        name = jax.tree_util.keystr(path)
        seed = int.from_bytes(name.encode()[-16:].rjust(4, b"\0"), "big") % (2**31 - 1)
        arrays.append(spec.initializer(jax.random.fold_in(key, seed), spec.shape, jnp.dtype(spec.dtype)))
    return jax.tree_util.tree_unflatten(tree, arrays)


def count_params(config: ModelConfig, *, active: bool = False) -> int:
    """Number of parameters, from shapes alone; ``active`` counts only the experts that one token uses."""
    total = 0
    for spec in jax.tree_util.tree_leaves(param_specs(config), is_leaf=is_spec):
        size = math.prod(spec.shape)
        if active and "experts" in spec.axes and spec.axes[1] == "experts":
            size = size // config.num_experts * config.num_experts_per_token
        total += size
    return total

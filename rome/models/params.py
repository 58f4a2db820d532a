"""Parameters: one declaration each gives shape, dtype, logical axes and initialiser. The rest is derived from it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

    def __getitem__(self, row: int) -> ParamSpec:
        """The declaration of one row of a stack."""
        return replace(self, shape=self.shape[1:], axes=self.axes[1:])


class LayerRun(NamedTuple):
    """Consecutive layers alike: rows ``start:stop`` of the stack ``params[stack]``, seeing ``window`` tokens or all."""

    stack: str
    start: int
    stop: int
    window: int | None


def layer_runs(config: ModelConfig) -> tuple[LayerRun, ...]:
    """The layers in order, as few runs as possible: one, unless layers differ in their MLP or window."""
    runs: list[LayerRun] = []
    depth = {"layers": 0, "dense_layers": 0}
    for index in range(config.num_layers):
        stack = "dense_layers" if index in config.dense_layers else "layers"
        window = config.sliding_window if index in config.sliding_layers else None
        row = depth[stack]
        if runs and (runs[-1].stack, runs[-1].window) == (stack, window):
            runs[-1] = runs[-1]._replace(stop=row + 1)
        else:
            runs.append(LayerRun(stack, row, row + 1, window))
        depth[stack] += 1
    return tuple(runs)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Declares every parameter, as a pytree of `ParamSpec`. Layers are stacked on a leading axis ``layers``.

    All layers are in one stack, ``layers``, unless some layers of a mixture of experts are dense: these are in
    ``dense_layers``, in order (`layer_runs` tells which is where).

    Projections start normal with standard deviation fan_in^-1/2; those that write into the residual stream are scaled
    by a further (2 * num_layers)^-1/2, so that its variance at the end doesn't grow with depth (GPT-2).
    """
    c, d = config, config.hidden_size
    fan_in = d**-0.5
    specs: dict[str, Any] = {
        "embedding": ParamSpec((c.vocab_size, d), ("vocab", "embed"), 0.0, fan_in, c.param_dtype),
        "layers": _layer_specs(c, c.num_layers - len(c.dense_layers), c.is_moe),
        "final_norm": ParamSpec((d,), ("embed",), 1.0, 0.0, c.param_dtype),
    }
    if c.dense_layers:
        specs["dense_layers"] = _layer_specs(c, len(c.dense_layers), False)
    if not c.tie_embeddings:
        specs["lm_head"] = ParamSpec((d, c.vocab_size), ("embed", "vocab"), 0.0, fan_in, c.param_dtype)
    return specs


def _layer_specs(c: ModelConfig, depth: int, moe: bool) -> dict[str, ParamSpec]:
    """A stack of ``depth`` layers, with experts or with a dense MLP."""
    fan_in, residual = c.hidden_size**-0.5, (2 * c.num_layers) ** -0.5

    def normal(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> ParamSpec:
        return ParamSpec((depth, *shape), ("layers", *axes), 0.0, std, c.param_dtype)

    def constant(shape: tuple[int, ...], axes: tuple[str, ...], value: float) -> ParamSpec:
        return ParamSpec((depth, *shape), ("layers", *axes), value, 0.0, c.param_dtype)

    d, h, k, hd = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    specs = {
        "attention_norm": constant((d,), ("embed",), 1.0),
        "wq": normal((d, h, hd), ("embed", "heads", "head_dim"), fan_in),
        "wk": normal((d, k, hd), ("embed", "kv_heads", "head_dim"), fan_in),
        "wv": normal((d, k, hd), ("embed", "kv_heads", "head_dim"), fan_in),
        "wo": normal((h, hd, d), ("heads", "head_dim", "embed"), residual * (h * hd) ** -0.5),
        "mlp_norm": constant((d,), ("embed",), 1.0),
    }
    if c.qkv_bias:
        specs["q_bias"] = constant((h, hd), ("heads", "head_dim"), 0.0)
        specs["k_bias"] = constant((k, hd), ("kv_heads", "head_dim"), 0.0)
        specs["v_bias"] = constant((k, hd), ("kv_heads", "head_dim"), 0.0)
    if c.output_bias:
        specs["o_bias"] = constant((d,), ("embed",), 0.0)
    if c.qk_norm:
        specs["q_norm"] = constant((hd,), ("head_dim",), c.qk_norm_init)
        specs["k_norm"] = constant((hd,), ("head_dim",), c.qk_norm_init)
    if moe:
        e, f = c.num_experts, c.moe_intermediate_size
        specs["router"] = normal((d, e), ("embed", "experts"), fan_in)
        specs["gate"] = normal((e, d, f), ("experts", "embed", "mlp"), fan_in)
        specs["up"] = normal((e, d, f), ("experts", "embed", "mlp"), fan_in)
        specs["down"] = normal((e, f, d), ("experts", "mlp", "embed"), residual * f**-0.5)
        return specs
    f = c.intermediate_size
    specs["gate"] = normal((d, f), ("embed", "mlp"), fan_in)
    specs["up"] = normal((d, f), ("embed", "mlp"), fan_in)
    specs["down"] = normal((f, d), ("mlp", "embed"), residual * f**-0.5)
    if c.mlp_bias:
        specs["gate_bias"] = constant((f,), ("mlp",), 0.0)
        specs["up_bias"] = constant((f,), ("mlp",), 0.0)
        specs["down_bias"] = constant((d,), ("embed",), 0.0)
    return specs


def is_spec(value: object) -> bool:
    return isinstance(value, ParamSpec)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draws the parameters: a nested dict of arrays in ``config.param_dtype`` with the shapes of `param_specs`.

    Each parameter's key depends on its name alone, so adding one doesn't change how the others start.
    """
    return draw_params(param_specs(config), key)


def draw_params(specs: Any, key: jax.Array) -> Params:
    """Arrays for a pytree of `ParamSpec`, as `init_params` draws them."""
    specs, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
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

"""Where arrays lie on many devices: five mesh axes, one table of rules, and the few helpers that the model needs.

Parameters and activations name their dimensions logically (`ParamSpec.axes`); `RULES` says over which mesh axes a
dimension is split. Matrix products are left to XLA's partitioner, with constraints on what goes in and comes out. What
it would partition badly (attention kernels, expert dispatch, the log-prob head, the KV cache) runs as an `island`: a
function of one device's share with its collectives written out.

| mesh axis | splits | costs |
|---|---|---|
| data | rows | gradients are summed over it |
| fsdp | rows, and every parameter's ``embed`` dimension | a layer's weights are gathered before use (ZeRO-3) |
| expert | rows, and experts | in each MoE layer tokens are gathered and outputs scattered over it |
| context | tokens of a row | attention gathers keys and values over it |
| tensor | heads, feed-forward and vocabulary dimensions | two sums of activations a layer |

The mesh is an argument of what compiles a step (`PolicyStep`, `DecodeEngine`); inside, while jit traces, `on_mesh`
makes it JAX's current mesh, and without one every helper here does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rome.models.params import ParamSpec, is_spec

AXES = ("data", "fsdp", "expert", "context", "tensor")
Axes = tuple[str | None, ...]

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "embed": ("fsdp",),
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


class ShardingError(ValueError):
    """A mesh that the devices, the model or a batch can't have, or memory that a device lacks. Names what was expected
    and found."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; their product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise ShardingError(f"mesh.{name}: expected at least 1, found {getattr(self, name)!r}")

    @property
    def size(self) -> int:
        return math.prod(asdict(self).values())

    @property
    def row_shards(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return self.data * self.fsdp * self.expert


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh over `devices` (default: all), neighbours on an axis being neighbours on the wire.

    None for one device, unless `devices` is a single one that is not the default.

    Raises ShardingError if the number of devices is not the mesh's.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(getattr(config, name) for name in AXES)
    if config.size == 1 and (len(devices) > 1 or devices[0] == jax.devices()[0]):
        return None
    if config.size != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ShardingError(
            f"mesh: expected {config.size} devices ({shape}), found {len(devices)} of kind {devices[0].device_kind!r}"
        )
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)
    except NotImplementedError:  # the axes are no products of the torus's own: any order has to do
        return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def partition(axes: Axes, mesh: Mesh | None = None, drop: tuple[str, ...] = ()) -> PartitionSpec:
    """The rule of an array with these logical axes, on a mesh (default: the current one); those in `drop`, and None,
    are not split.

    It is in the form in which XLA gives shardings back (no axis of size 1, nothing after the last split dimension):
    arrays that went through a step must look to jit like those that it was compiled for.
    """
    sizes = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    parts = []
    for axis in axes:
        names = RULES.get(axis, ()) if axis and axis not in drop else ()
        parts.append(tuple(name for name in names if sizes.get(name, 2) > 1) or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def param_shardings(specs: Any, mesh: Mesh) -> Any:
    """A pytree of `NamedSharding` for a pytree of `ParamSpec`. Raises ShardingError where a split is not even."""

    def place(path: tuple, spec: ParamSpec) -> NamedSharding:
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            ways = math.prod(mesh.shape[name] for name in RULES.get(axis, ()))
            if size % ways:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ShardingError(
                    f"{name}: expected its axis {axis!r} to be a multiple of {ways} = mesh "
                    f"{' × '.join(RULES[axis])}, found {size}"
                )
        return NamedSharding(mesh, partition(spec.axes, mesh))

    return jax.tree_util.tree_map_with_path(place, specs, is_leaf=is_spec)


def batch_shardings(batch: Any, mesh: Mesh, tokens: int) -> Any:
    """Of a pytree of arrays [B, ...]: rows are split, and so is the second axis where it has `tokens` entries."""

    def place(leaf: Any) -> NamedSharding:
        sequence = leaf.ndim > 1 and leaf.shape[1] == tokens
        return NamedSharding(mesh, partition(("batch", "sequence") if sequence else ("batch",), mesh))

    return jax.tree.map(place, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


# -- inside a traced function ------------------------------------------------------------------------------------------


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """While a function is traced: what it calls is for this mesh. None: for one device."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def mesh_axis(*names: str) -> int:
    """Devices on these axes of the current mesh together; 1 without a mesh, and inside an island."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return 1
    return math.prod(mesh.shape[name] for name in names)


def platform() -> str:
    """What the traced function will run on, which need not be here: ``cpu``, ``gpu`` or ``tpu``."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_sharded() -> bool:
    """Whether there is a current mesh of more than one device (and this is not one device's share)."""
    return mesh_axis(*AXES) > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says how `x` is split, by logical axes."""
    return jax.lax.with_sharding_constraint(x, partition(axes)) if is_sharded() else x


def gather_weights(weights: jax.Array, axes: Axes) -> jax.Array:
    """The weights with their ``embed`` dimension whole; their gradient is summed straight into the split one."""
    if mesh_axis("fsdp") == 1:
        return weights
    split, whole = partition(axes), partition(axes, drop=("embed",))

    @jax.custom_vjp
    def gather(w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(w, whole)

    gather.defvjp(lambda w: (gather(w), None), lambda _, g: (jax.lax.with_sharding_constraint(g, split),))
    return gather(weights)


def all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """In an island: joins the devices' shares along `axis`; its gradient is summed and split again."""
    return jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def island(function: Callable[..., Any], in_axes: Sequence[Any], out_axes: Any) -> Callable[..., Any]:
    """`function` on one device's share of its arguments; `in_axes` and `out_axes` give their `PartitionSpec`s."""
    return jax.shard_map(function, in_specs=tuple(in_axes), out_specs=out_axes, check_vma=False)

"""What a run asks of the machine before it starts."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from rome.models import param_specs
from rome.models.params import is_spec
from rome.models.sharding import Mesh, ShardingError, make_mesh
from rome.training.settings import MeshSettings, RunSettings
from rome.training.state import Offloaded, init_state, make_optimizer, require_memory


class Meshes(NamedTuple):
    """Where a run trains, and where it may roll out: with multiplexing on all devices or on those not training."""

    train: Mesh | None
    rollout: tuple[Mesh | None, ...]


def make_meshes(settings: MeshSettings) -> Meshes:
    """Of the devices that are here. Raises ShardingError if they are not as many as needed."""
    if not settings.multiplex:
        return Meshes(make_mesh(settings.train), (make_mesh(settings.rollout),))
    wide, devices = make_mesh(settings.rollout), jax.devices()
    lent, kept = devices[: settings.train.size], devices[settings.train.size :]
    return Meshes(make_mesh(settings.train, lent), (wide, make_mesh(settings.narrow, kept)))


def require_devices(settings: RunSettings) -> None:
    """Raises ShardingError, which says how many devices a run needs and with how much memory, if they are not here or
    lack the memory that an optimizer is to use."""
    for stage in ("cpt", "sft", "ipa"):
        require_memory(make_optimizer(*settings.optimizer_of(stage)), jax.devices()[0])
    try:
        make_meshes(settings.mesh)
    except ShardingError as error:
        size = state_bytes(settings) / settings.mesh.train.size / 2**30
        raise ShardingError(
            f"{settings.name}: {error}; the train state alone takes {size:.1f} GiB of memory on each device "
            "(experiments/compile_check.py tells what a step takes)"
        ) from error


def state_bytes(settings: RunSettings) -> int:
    """Of the parameters, their gradients and the optimizer's state (if it lies there), on all devices together."""
    specs = param_specs(settings.model_config(settings.vocab_size))
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=is_spec)
    optimizer = make_optimizer(settings.rl.optimizer, 1)
    kept = params if isinstance(optimizer, Offloaded) else jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((kept, params)))

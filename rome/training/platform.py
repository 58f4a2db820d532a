"""What a run asks of the machine before it starts."""

from __future__ import annotations

import math

import jax

from rome.models import param_specs
from rome.models.params import is_spec
from rome.models.sharding import ShardingError, make_mesh
from rome.training.settings import RunSettings
from rome.training.state import init_state, make_optimizer


def require_devices(settings: RunSettings) -> None:
    """Raises ShardingError, which says how many devices a run needs and with how much memory, if they are not here."""
    try:
        for mesh in (settings.mesh.train, settings.mesh.rollout):
            make_mesh(mesh)
    except ShardingError as error:
        size = state_bytes(settings) / settings.mesh.train.size / 2**30
        raise ShardingError(
            f"{settings.name}: {error}; the train state alone takes {size:.1f} GiB of memory on each device "
            "(experiments/compile_check.py tells what a step takes)"
        ) from error


def state_bytes(settings: RunSettings) -> int:
    """Of the parameters, their gradients and the optimizer's state, on all devices together."""
    specs = param_specs(settings.model_config(settings.vocab_size))
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=is_spec)
    optimizer = make_optimizer(settings.rl.optimizer, 1)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, params)))

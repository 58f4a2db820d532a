"""The programs that a run compiles, from shapes alone: for compile checks, before there is a device or a parameter.

Each is the function that training calls (`PolicyStep`, the decode engine's), lowered with abstract arguments that carry
the run's shardings. Nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rome.ipa import PolicyBatch, Totals
from rome.models import ModelConfig, count_params, param_specs
from rome.models.lora import Adapted, adapter_specs, trained
from rome.models.paged import Paging
from rome.models.params import is_spec
from rome.models.sharding import batch_shardings, param_shardings, replicated
from rome.rollout.engine import compiled_functions
from rome.rollout.programs import DecodeState, empty_state, slot_shardings
from rome.rollout.weights import engine_model
from rome.training.settings import RunSettings
from rome.training.state import HOST, Offloaded, init_state, make_optimizer, require_memory, state_shardings
from rome.training.steps import PolicyStep


@dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: what it does.
      trace: gives `jax.stages.Traced`.
      arguments: bytes a device of its arguments, by kind.
      resident: bytes a device of what stays in memory beside them, by kind.
      host: bytes a device of what lies in its host's memory, by kind.
      tokens: of all rows, that one call processes (padding included).
      model_flops: multiplications and additions that the model needs for them, recomputation not counted.
    """

    name: str
    trace: Callable[[], Any]
    arguments: dict[str, int]
    resident: dict[str, int]
    tokens: int
    model_flops: float
    host: dict[str, int] = field(default_factory=dict)


def train_programs(settings: RunSettings, mesh: Mesh) -> list[Program]:
    """The micro-batch step (forward, loss, backward, accumulation), the optimizer's update, and the log-prob pass."""
    model = settings.model_config(settings.vocab_size)
    rows, length, chunks = settings.rl.micro_rows, settings.rl.row_length, settings.rl.max_chunks
    optimizer = make_optimizer(settings.rl.optimizer, settings.rl.steps)
    require_memory(optimizer, mesh.devices.flat[0])
    specs, lora = param_specs(model), settings.rl.lora
    if lora.rank:
        specs = Adapted(specs, adapter_specs(model, lora), lora.alpha / lora.rank)
    params = abstract_params(specs, mesh)
    sums = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), trained(params)
    )
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    state = _placed(state, state_shardings(state, optimizer, model, mesh))
    batch = _abstract_batch(rows, length, chunks, model if settings.rl.router_replay else None)
    batch = _placed(batch, batch_shardings(batch, mesh, length))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    step = PolicyStep(
        model, settings.ipa, optimizer, settings.rl.updates_per_batch == 1, settings.engine.temperature, mesh
    )
    held = {name: bytes_a_device(tree) for name, tree in (("parameters", params), ("optimizer", state.opt_state))}
    with_batch = {"parameters": held["parameters"], "batch": bytes_a_device(batch)}
    gradients = {"gradients": bytes_a_device(sums)}
    optimizer_stays = {"optimizer": held["optimizer"]}
    host = {"optimizer": bytes_a_device(state.opt_state, HOST)} if isinstance(optimizer, Offloaded) else {}
    forward = forward_flops(model, rows * length, rows * length, length / 2)
    return [
        Program(
            "train step",
            lambda: step.accumulate.trace(params, sums, batch, Totals(scalar, scalar), scalar),
            with_batch | gradients,
            optimizer_stays,
            rows * length,
            3 * forward,
            host,
        ),
        Program("update", lambda: step.apply.trace(state, sums), held | gradients, {}, 0, 0.0, host),
        Program(
            "log-probs",
            lambda: step.log_probs.trace(params, batch),
            with_batch,
            optimizer_stays,
            rows * length,
            forward,
            host,
        ),
    ]


def rollout_programs(settings: RunSettings, mesh: Mesh) -> list[Program]:
    """The largest append (prefill), and a chunk's decoding loop, of one cohort of slots."""
    model, engine = settings.model_config(settings.vocab_size), settings.engine
    model, specs = engine_model(replace(model, param_dtype=model.dtype), engine.precision)
    rows, bucket = engine.slots_per_cohort, engine.extend_buckets[-1]
    params = abstract_params(specs, mesh)

    def empty(rows: int, paging: Paging | None) -> DecodeState:
        state = jax.eval_shape(lambda: empty_state(model, rows, engine.max_length, engine.record_experts, paging))
        return _placed(state, slot_shardings(state, mesh))

    paging = engine.paging
    # prompts have no pages of their own
    prompts = empty(min(engine.prompt_rows, rows), paging and paging._replace(pages=0))
    state = empty(rows, paging)
    functions = compiled_functions(model, engine, mesh)

    def slots(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        leaf = jax.ShapeDtypeStruct((rows, *shape), dtype)
        return _placed(leaf, batch_shardings(leaf, mesh, 0))

    whole = replicated(mesh)
    heat = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    stops = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    idle = slots(dtype=jnp.bool_)
    arguments = {"parameters": bytes_a_device(params), "KV cache": bytes_a_device(state)}
    others = {"KV cache (others)": (engine.cohorts - 1) * arguments["KV cache"] + bytes_a_device(prompts)}
    size = engine.max_chunk_tokens
    return [
        Program(
            "prefill",
            lambda: functions.append.trace(params, state, slots(bucket), slots(), idle),
            arguments,
            others,
            rows * bucket,
            forward_flops(model, rows * bucket, rows, engine.max_length),
        ),
        Program(
            "decode",
            lambda: functions.decode.trace(params, state, slots(2, dtype=jnp.uint32), idle, heat, stops),
            arguments,
            others,
            rows * size,
            forward_flops(model, rows * size, rows * size, engine.max_length),
        ),
    ]


def forward_flops(model: ModelConfig, tokens: int, head_tokens: int, keys: float) -> float:
    """Of one forward pass: 2 a parameter that a token uses, and 4 a query-key pair and channel of every head.

    `head_tokens` of the `tokens` are turned into logits; a token sees `keys` tokens on average.
    """
    table = model.vocab_size * model.hidden_size
    body = count_params(model, active=True) - table * (1 if model.tie_embeddings else 2)
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * keys
    return float(tokens * (2 * body + attention) + 2 * table * head_tokens)


def abstract_params(specs: Any, mesh: Mesh) -> Any:
    """Parameters as `ShapeDtypeStruct`s on the mesh."""
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=is_spec)
    return _placed(shapes, param_shardings(specs, mesh))


def bytes_a_device(tree: Any, memory: str = "device") -> int:
    """Of abstract arrays with shardings, those in this memory: "device" or `HOST`."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        place = HOST if leaf.sharding.memory_kind == HOST else "device"  # (None: the device's own)
        return (place == memory) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _placed(tree: Any, shardings: Any) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def _abstract_batch(rows: int, length: int, chunks: int, replayed: ModelConfig | None) -> PolicyBatch:
    ids, logp = jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows, length), jnp.float32)
    table = jax.ShapeDtypeStruct((rows, chunks), jnp.float32)
    flags = jax.ShapeDtypeStruct((rows, chunks), jnp.bool_)
    experts = None
    if replayed is not None:
        visited = (rows, length, replayed.routed_layers, replayed.num_experts_per_token)
        experts = jax.ShapeDtypeStruct(visited, jnp.int16)
    return PolicyBatch(ids, ids, ids, ids, logp, logp, table, flags, flags, experts)

"""The device programs of the decode engines: append, share and decode, jitted over a state that is donated.

`DecodeEngine` decodes whole turns (training); `StreamEngine` in `stream.py` has programs of its own beside these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rome.models import KVCache, ModelConfig, extend, init_cache
from rome.models.cache import pick_rows
from rome.models.paged import PagedCache, Paging, init_paged_cache
from rome.models.sharding import Mesh, NamedSharding, on_mesh, partition
from rome.rollout.sampling import sample_tokens


class Finish(StrEnum):
    """Why a chunk ended."""

    STOP = "stop"  # a stop id: the normal end
    LENGTH = "length"  # max_chunk_tokens without a stop id
    CONTEXT = "context"  # the slot is full (max_length)


@flax.struct.dataclass
class DecodeState:
    """What a cohort's slots hold on the device: the cache, and the logits float32[B, V] of each slot's next token."""

    cache: KVCache | PagedCache
    logits: jax.Array


def empty_state(
    model_config: ModelConfig,
    rows: int,
    max_length: int,
    record_experts: bool = False,
    paging: Paging | None = None,
) -> DecodeState:
    """`rows` slots without tokens, with room for `max_length` each; with `paging` in pages, of which they have none."""
    if paging is None:
        cache = init_cache(model_config, rows, max_length, record_experts)
    else:
        cache = init_paged_cache(model_config, rows, max_length, paging, record_experts)
    return DecodeState(cache, jnp.zeros((rows, model_config.vocab_size), jnp.float32))


def slot_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Where a decode state lies: slots are split as rows are, heads and vocabulary over ``tensor``."""

    def place(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, partition(axes, mesh))

    return DecodeState(state.cache.shardings(place), place("batch", "vocab"))


def lend_pool(state: DecodeState, borrower: DecodeState) -> tuple[DecodeState, DecodeState]:
    """Both with the pool of pages at the second (see `PagedCache.lend`)."""
    without, with_pool = state.cache.lend(borrower.cache)
    return state.replace(cache=without), borrower.replace(cache=with_pool)


def with_table(state: DecodeState, table: np.ndarray) -> DecodeState:
    """The state of a paged cache, with another table. It is copied: a dispatched program may read it late."""
    return state.replace(cache=state.cache.replace(table=table.copy()))


class Compiled:
    """The jitted functions of one static configuration, and how often they were traced."""

    def __init__(self, mesh: Mesh | None, *statics: Any) -> None:
        self.traces = 0
        self._mesh = mesh
        self.append = self._jit(functools.partial(append, statics[0]), 1)
        self.share = self._jit(functools.partial(share, mesh), 0)
        self.decode = self._jit(functools.partial(_decode, *statics), 1)

    def _jit(self, function: Callable[..., Any], donated: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            self.traces += 1  # runs when jit traces, that is once a compiled shape
            with on_mesh(self._mesh):
                return function(*args)

        return jax.jit(traced, donate_argnums=donated)


# engines that differ in slots, buckets or temperature alone share what is compiled
compiled = functools.cache(Compiled)


def append(
    model_config: ModelConfig,
    params: Any,
    state: DecodeState,
    tokens: jax.Array,
    counts: jax.Array,
    fresh: jax.Array,
) -> DecodeState:
    """Appends counts[b] of tokens[B, S] to each row; `fresh` rows start from an empty cache."""
    logits, cache = extend(params, model_config, state.cache.reset(fresh), tokens, counts)
    return DecodeState(cache, jnp.where(counts[:, None] > 0, logits, state.logits))


def share(
    mesh: Mesh | None, state: DecodeState, prompts: DecodeState, source: jax.Array, *copies: jax.Array
) -> DecodeState:
    """Slot b starts from row source[b] of `prompts`, where source int32[B] is not −1; `copies`: of a paged cache, which
    pages are copied (`PagedCache.start_from`)."""
    cache = state.cache.start_from(prompts.cache, source, *copies)
    shared = DecodeState(cache, pick_rows(source, state.logits, prompts.logits))
    return shared if mesh is None else jax.lax.with_sharding_constraint(shared, slot_shardings(state, mesh))


def _decode(
    model_config: ModelConfig,
    max_length: int,
    size: int,
    top_k: int,
    top_p: float,
    min_p: float,
    params: Any,
    state: DecodeState,
    keys: jax.Array,
    active: jax.Array,
    temperature: jax.Array,
    stop_ids: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Samples one chunk of at most `size` tokens for each active slot.

    Returns the state, and int32[B, 3C + 2] for one copy to the host: tokens[C], bits of the float32 log-probs under the
    sampling distribution[C] and raw[C], the count, and the index of the `Finish`.
    """
    rows = active.shape[0]

    def sample(cache: KVCache, logits: jax.Array, live: jax.Array, step: jax.Array, out: jax.Array) -> Any:
        drawn, logp, raw = sample_tokens(logits, keys, cache.length, temperature, top_k, top_p, min_p)
        out = jax.lax.dynamic_update_slice(out, jnp.stack([drawn, bits(logp), bits(raw)])[None], (step, 0, 0))
        stopped = live & jnp.isin(drawn, stop_ids)
        # the token just drawn stands at position `length`; one more needs the position after it
        return out, drawn, stopped, live & ~stopped & (cache.length + 1 < max_length)

    def going(carry: Any) -> jax.Array:
        *_, live, step = carry
        return live.any() & (step < size)

    def body(carry: Any) -> Any:
        cache, out, count, stopped, drawn, live, step = carry
        logits, cache = extend(params, model_config, cache, drawn[:, None], live.astype(jnp.int32))
        out, drawn, now, still = sample(cache, logits, live, step, out)
        return cache, out, count + live, stopped | now, drawn, still, step + 1

    out = jnp.zeros((size, 3, rows), jnp.int32)
    out, drawn, stopped, live = sample(state.cache, state.logits, active, jnp.int32(0), out)
    carry = (state.cache, out, active.astype(jnp.int32), stopped, drawn, live, jnp.int32(1))
    cache, out, count, stopped, _, live, _ = jax.lax.while_loop(going, body, carry)
    finish = jnp.where(stopped, 0, jnp.where(live, 1, 2)).astype(jnp.int32)  # the order of Finish
    packed = out.transpose(2, 1, 0).reshape(rows, 3 * size)
    return DecodeState(cache, state.logits), jnp.concatenate([packed, count[:, None], finish[:, None]], axis=1)


@jax.jit
def row_of(experts: tuple[jax.Array, ...], where: jax.Array) -> jax.Array:
    """Of int16[B, max_length, k] a layer: int16[max_length, layers, k] of one row. Of pages int16[P, n, k] a layer: the
    same of those at `where` int32[C], in that order."""
    rows = [layer.at[where].get(mode="clip") for layer in experts]
    return jnp.stack([row.reshape(-1, row.shape[-1]) for row in rows], axis=1)


def bits(values: jax.Array) -> jax.Array:
    """float32 as the int32 of the same bits: tokens and log-probs in one array for the host."""
    return jax.lax.bitcast_convert_type(values, jnp.int32)

"""The parts of the model that run on one device's share, with their collectives written out (see `sharding`).

Each is the plain function where there is no mesh. With one, the same plain function runs on every device between a
gather and a scatter; the gradient of a gather is a sum that is split again, so nothing is ever summed twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rome.models import moe
from rome.models.attention import packed_attention
from rome.models.config import ModelConfig
from rome.models.logprobs import TokenScores, score_tokens
from rome.models.moe import Experts, Routing, route
from rome.models.sharding import RULES, ShardingError, all_gather, is_sharded, island, mesh_axis, partition


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """`packed_attention`, each device with its rows, heads and queries; keys and values are gathered over ``context``.

    A device's queries become the last ones of the row: what comes after them is rolled to the front and hidden behind
    a segment id that no token has, so that every kernel for "the last T of S tokens" serves.
    """
    if not is_sharded():
        return packed_attention(q, k, v, segment_ids, window, kernel=kernel)
    shards = mesh_axis("context")
    heads = partition(("batch", "kv_heads", None, "sequence"))
    keys, rows = partition(("batch", "kv_heads", "sequence")), partition(("batch", "sequence"))

    def share(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        if shards == 1:
            return packed_attention(q, k, v, segments, window, kernel=kernel)
        time = q.shape[3]
        future = (shards - 1 - jax.lax.axis_index("context")) * time
        k, v = (jnp.roll(all_gather(x, "context", axis=2), future, axis=2) for x in (k, v))
        of_keys = jnp.roll(all_gather(segments, "context", axis=1), future, axis=1)
        of_keys = jnp.where(jnp.arange(of_keys.shape[1]) < future, -1, of_keys)
        return packed_attention(q, k, v, segments, window, of_keys, kernel)

    return island(share, (heads, keys, keys, rows), heads)(q, k, v, segment_ids)


def routed_experts(
    x_BxTxD: jax.Array, router_DxE: jax.Array, config: ModelConfig, replayed_BxTxK: jax.Array | None = None
) -> Routing:
    """`route`, each device its own tokens."""
    if not is_sharded():
        return route(x_BxTxD, router_DxE, config, replayed_BxTxK)
    rows = partition(("batch", "sequence"))

    def share(x: jax.Array, router: jax.Array, replayed: jax.Array | None) -> Routing:
        return route(x, router, config, replayed)

    return island(share, (rows, partition(()), rows), Routing(rows, rows))(x_BxTxD, router_DxE, replayed_BxTxK)


def moe_mlp(x_BxTxD: jax.Array, routing: Routing, experts: Experts, config: ModelConfig) -> jax.Array:
    """Routed SwiGLU feed-forward: [B, T, D] -> [B, T, D].

    Over ``expert``, tokens are gathered, every device runs its own experts on them, and the outputs are summed and
    scattered. No token is dropped: a visit to another device's expert keeps its place in the static shape, with weight
    0. So the axis saves memory and its traffic (what counts when decoding), not multiplications.
    """
    if not is_sharded():
        return moe.moe_mlp(x_BxTxD, routing, experts, config)
    shards, tensor, fsdp = mesh_axis("expert"), mesh_axis("tensor"), mesh_axis("fsdp")
    rows, into = partition(("batch", "sequence")), partition(("experts", "embed", "mlp"))
    weights = Experts(into, into, partition(("experts", "mlp", "embed")))

    def share(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
        if fsdp > 1:
            gate, up = (all_gather(w, "fsdp", axis=1) for w in (experts.gate, experts.up))
            experts = Experts(gate, up, all_gather(experts.down, "fsdp", axis=2))
        y = _moe_share(x, routing, experts, config, shards)
        return jax.lax.psum(y, "tensor") if tensor > 1 else y

    return island(share, (rows, Routing(rows, rows), weights), rows)(x_BxTxD, routing, experts)


def _moe_share(x_BxTxD: jax.Array, routing: Routing, experts: Experts, config: ModelConfig, shards: int) -> jax.Array:
    if shards == 1:
        return moe.moe_mlp(x_BxTxD, routing, experts, config)
    x_BxTxD, routing = jax.tree.map(lambda part: all_gather(part, "expert", axis=0), (x_BxTxD, routing))
    held = experts.gate.shape[0]
    local = routing.experts - jax.lax.axis_index("expert") * held
    mine = (local >= 0) & (local < held)
    routing = Routing(local % held, jnp.where(mine, routing.weights, 0.0))
    y = moe.moe_mlp(x_BxTxD, routing, experts, config)
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)


def token_scores(
    hidden_BxTxD: jax.Array,
    weights: jax.Array,
    targets_BxT: jax.Array,
    temperature: float | jax.Array,
    *,
    tied: bool,
    chunk: int,
) -> TokenScores:
    """`score_tokens`; ``chunk`` counts one device's tokens, of which each has as many (``tensor`` splits them too).

    Raises ShardingError if the row length is not a multiple of context × tensor.
    """
    if not is_sharded():
        return score_tokens(hidden_BxTxD, weights, targets_BxT, temperature, tied=tied, chunk=chunk)
    ways, length = mesh_axis("context", "tensor"), targets_BxT.shape[1]
    if length % ways:
        raise ShardingError(f"row length: expected a multiple of {ways} = mesh context × tensor, found {length}")
    axes = ("vocab", "embed") if tied else ("embed", "vocab")
    tokens = jax.sharding.PartitionSpec(RULES["batch"], ("context", "tensor"))

    def share(hidden: jax.Array, weights: jax.Array, targets: jax.Array, temperature: jax.Array) -> TokenScores:
        for axis_name, axis in (("fsdp", "embed"), ("tensor", "vocab")):
            weights = all_gather(weights, axis_name, axis=axes.index(axis))
        return score_tokens(hidden, weights, targets, temperature, tied=tied, chunk=chunk)

    scalar = jax.sharding.PartitionSpec()
    split = island(share, (tokens, partition(axes), tokens, scalar), TokenScores(tokens, tokens, tokens))
    weights = weights.astype(hidden_BxTxD.dtype)  # cast before it travels
    return split(hidden_BxTxD, weights, targets_BxT, jnp.asarray(temperature, jnp.float32))

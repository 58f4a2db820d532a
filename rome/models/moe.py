"""Mixture of experts: routing, and the seam `dispatch(x, routing, experts)` behind which tokens reach their experts.

Three dispatches give the same output and gradients; `pick_dispatch` chooses:

| dispatch | what it multiplies | used |
|---|---|---|
| dense | every token with every expert | where that is fewer rows than sparse has: next to no tokens |
| sparse | blocks of visits, padded | otherwise, except on TPU |
| ragged | visits, by `jax.lax.ragged_dot` | on TPU, whose compiler lowers it to a kernel (not measured: none at hand) |

Time of a forward pass, and of forward and backward, relative to sparse (`benchmarks/moe_dispatch.py`; float32, one
core, JAX 0.10.2):

| tokens, D, F, E, K | dense | ragged |
|---|---|---|
| 2048, 128, 192, 8, 2 | 4.4, 8.2 | 5.1, 8.1 |
| 32, 128, 192, 8, 2 | 1.3, 1.4 | 1.8, 1.9 |
| 512, 256, 96, 64, 8 | 6.0, 5.6 | 28, 41 |
| 8, 256, 96, 64, 8 (as many rows as dense) | 2.3, 2.1 | 5.2, 3.9 |
| 512, 256, 96, 128, 8 | 9.0, 9.3 | 39, 62 |

Shape letters: N tokens, K experts a token, E experts, D hidden, F width of an expert, C blocks, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rome.models.config import ModelConfig
from rome.models.sharding import platform


class Routing(NamedTuple):
    """``experts`` i32[N, K]: chosen experts of each token, best first; ``weights`` f32[N, K]: how much each counts."""

    experts: jax.Array
    weights: jax.Array


class Experts(NamedTuple):
    """Weights of one layer's experts: ``gate`` and ``up`` [E, D, F], ``down`` [E, F, D]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


Dispatch = Callable[[jax.Array, Routing, Experts], jax.Array]


def route(x: jax.Array, router_DxE: jax.Array, config: ModelConfig, replayed: jax.Array | None = None) -> Routing:
    """Top-k of a float32 softmax over experts (Qwen3-MoE), renormalised to sum to one if ``norm_topk_prob``.

    Args:
        x: [..., D], what the layer's experts will see.
        router_DxE: the router's weights.
        config: the model's config.
        replayed: [..., K], any integer dtype: the experts that each token visits instead of its top-k (router replay:
            Ma et al. 2025, arXiv 2510.11370). Their weights are still this router's, and carry its gradient. A token
            whose first is negative has none recorded, and is routed as ever.
    """
    probs = jax.nn.softmax(_router_logits(x, router_DxE), axis=-1)
    weights, experts = jax.lax.top_k(probs, config.num_experts_per_token)
    if replayed is not None:
        experts = jnp.where(replayed[..., :1] >= 0, replayed.astype(experts.dtype), experts)
        # by comparison: the gradient of a gather would be a scatter, slow on CPU
        weights = jnp.where(_is_expert(experts, config), probs[..., None, :], 0.0).sum(axis=-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(experts, weights)


def _router_logits(x: jax.Array, router_DxE: jax.Array) -> jax.Array:
    return jnp.einsum("...d,de->...e", x, router_DxE.astype(x.dtype), preferred_element_type=jnp.float32)


def _is_expert(experts: jax.Array, config: ModelConfig) -> jax.Array:
    """One-hot bool[..., K, E]."""
    return experts[..., None] == jnp.arange(config.num_experts)


def router_loss(
    x: jax.Array, router_DxE: jax.Array, routing: Routing, counted: jax.Array, config: ModelConfig
) -> jax.Array:
    """One layer's weighted router losses over the tokens where bool[...] ``counted``, float32[]; 0 if there are none.

    Load balance (Fedus et al. 2021, Eq 4): E Σ_e f_e P_e, with f_e the share of visits that expert e gets and P_e its
    mean probability: 1 when balanced, E / K when K experts get everything. (Hugging Face's is K times that.) Router
    z-loss (Zoph et al. 2022, Eq 5): the mean of log²(sum exp logits).
    """
    logits = _router_logits(x, router_DxE)  # `route` has them too: the compiler computes them once
    tokens = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    axes = tuple(range(counted.ndim))

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(counted.reshape(*counted.shape, *[1] * (values.ndim - counted.ndim)), values, 0.0).sum(axes)

    visits_E = total(_is_expert(routing.experts, config).sum(axis=-2, dtype=jnp.float32)) / tokens
    probs_E = total(jax.nn.softmax(logits, axis=-1)) / tokens
    balance = config.num_experts / config.num_experts_per_token * (visits_E * probs_E).sum()
    z = total(jax.nn.logsumexp(logits, axis=-1) ** 2) / tokens
    return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z


def dense_dispatch(x_NxD: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Reference: every token visits every expert, and those not chosen get weight 0. [N, D] -> [N, D]."""
    num_experts = experts.gate.shape[0]
    chosen_NxKxE = jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32)
    weights_NxE = jnp.einsum("nk,nke->ne", routing.weights, chosen_NxKxE).astype(x_NxD.dtype)
    gate = jnp.einsum("nd,edf->enf", x_NxD, experts.gate)
    up = jnp.einsum("nd,edf->enf", x_NxD, experts.up)
    hidden_ExNxF = jax.nn.silu(gate) * up * weights_NxE.T[:, :, None]
    return jnp.einsum("enf,efd->nd", hidden_ExNxF, experts.down)


def sparse_dispatch(x_NxD: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Dropless: every token visits its chosen experts only. [N, D] -> [N, D], equal to `dense_dispatch` up to rounding.

    Visits are sorted by expert and each expert's are padded to whole blocks, so that one scan over a static number of
    blocks, each a small dense product with one expert's weights, covers any distribution of tokens over experts.
    """
    plan = _plan(routing.experts, experts.gate.shape[0], _block_size(routing.experts.size, experts.gate.shape[0]))
    return _run_plan(x_NxD, routing.weights, experts, plan)


class _Plan(NamedTuple):
    """Where visits go. ``slot`` i32[N, K]: row of each visit among the padded rows; ``visit`` i32[C, R]: the visit
    (n * K + k) in each row of each block, N * K in padding; ``expert`` i32[C]: the expert of each block."""

    slot: jax.Array
    visit: jax.Array
    expert: jax.Array


def _block_size(visits: int, num_experts: int) -> int:
    """A power of two near half of an expert's fair share: little padding, few blocks."""
    share = max(visits // (2 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), 8), 128)


def _num_blocks(visits: int, num_experts: int, block: int) -> int:
    """Enough for any routing: each expert leaves at most one block partly filled, and no block is empty."""
    return min(-(-visits // block) + num_experts, visits)


def _plan(experts_NxK: jax.Array, num_experts: int, block: int) -> _Plan:
    visits = experts_NxK.size
    num_blocks = _num_blocks(visits, num_experts, block)
    expert_of_visit = experts_NxK.reshape(-1)
    order = jnp.argsort(expert_of_visit, stable=True)
    counts = (expert_of_visit[:, None] == jnp.arange(num_experts)).sum(axis=0)
    blocks_until = jnp.cumsum(-(-counts // block))
    padding_before = block * (blocks_until - -(-counts // block)) - (jnp.cumsum(counts) - counts)
    row_of_sorted = jnp.arange(visits) + padding_before[expert_of_visit[order]]
    slot = jnp.zeros((visits,), jnp.int32).at[order].set(row_of_sorted, unique_indices=True)
    visit = jnp.full((num_blocks * block,), visits, jnp.int32).at[row_of_sorted].set(order, unique_indices=True)
    expert = (jnp.arange(num_blocks)[:, None] >= blocks_until).sum(axis=1)
    return _Plan(
        slot.reshape(experts_NxK.shape), visit.reshape(num_blocks, block), jnp.minimum(expert, num_experts - 1)
    )


@jax.custom_vjp
def _run_plan(x_NxD: jax.Array, weights_NxK: jax.Array, experts: Experts, plan: _Plan) -> jax.Array:
    return _run_plan_forward(x_NxD, weights_NxK, experts, plan)[0]


def _rows(values_NxD: jax.Array, plan: _Plan, visits_a_token: int) -> jax.Array:
    """Copies each token's row to its visits: [N, D] -> [C, R, D], zeros in padding."""
    return values_NxD.at[plan.visit // visits_a_token].get(mode="fill", fill_value=0)


def _gather_sum(rows_CxRxD: jax.Array, plan: _Plan) -> jax.Array:
    """Sums the visits of each token: [C, R, D] -> [N, D]."""
    return rows_CxRxD.reshape(-1, rows_CxRxD.shape[-1])[plan.slot].sum(axis=1)


def _run_plan_forward(x_NxD: jax.Array, weights_NxK: jax.Array, experts: Experts, plan: _Plan):
    weights_CxR = weights_NxK.reshape(-1).at[plan.visit].get(mode="fill", fill_value=0).astype(x_NxD.dtype)

    def step(_: None, block: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        x, weights, expert = block
        gate, up = x @ experts.gate[expert], x @ experts.up[expert]
        hidden = jax.nn.silu(gate) * up * weights[:, None]
        return None, (hidden @ experts.down[expert], gate, up)

    rows = _rows(x_NxD, plan, weights_NxK.shape[1])
    _, (out, gate, up) = jax.lax.scan(step, None, (rows, weights_CxR, plan.expert))
    return _gather_sum(out, plan), (x_NxD, weights_NxK, weights_CxR, experts, plan, gate, up)


def _run_plan_backward(residuals: tuple, d_y: jax.Array):
    x_NxD, weights_NxK, weights_CxR, experts, plan, gate, up = residuals
    top = weights_NxK.shape[1]

    def step(grads: Experts, block: tuple[jax.Array, ...]) -> tuple[Experts, tuple[jax.Array, jax.Array]]:
        x, d_out, weights, gate, up, expert = block
        sigmoid = jax.nn.sigmoid(gate)
        act = gate * sigmoid
        d_hidden = d_out @ experts.down[expert].T
        d_weights = (d_hidden * act * up).astype(jnp.float32).sum(axis=-1)
        d_up = d_hidden * act * weights[:, None]
        d_gate = d_hidden * up * weights[:, None] * (sigmoid + act * (1 - sigmoid))
        d_x = d_gate @ experts.gate[expert].T + d_up @ experts.up[expert].T
        update = Experts(x.T @ d_gate, x.T @ d_up, (act * up * weights[:, None]).T @ d_out)
        grads = jax.tree.map(lambda total, new: total.at[expert].add(new.astype(total.dtype)), grads, update)
        return grads, (d_x, d_weights)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
    blocks = (_rows(x_NxD, plan, top), _rows(d_y, plan, top), weights_CxR, gate, up, plan.expert)
    grads, (d_x, d_weights) = jax.lax.scan(step, zeros, blocks)
    grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, experts)
    return _gather_sum(d_x, plan), d_weights.reshape(-1)[plan.slot].astype(weights_NxK.dtype), grads, None


_run_plan.defvjp(_run_plan_forward, _run_plan_backward)


def ragged_dispatch(x_NxD: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Dropless without padding: visits sorted by expert, multiplied group by group. [N, D] -> [N, D]."""
    top, num_experts = routing.experts.shape[1], experts.gate.shape[0]
    expert_of_visit = routing.experts.reshape(-1)
    order = jnp.argsort(expert_of_visit, stable=True)
    visits = _Visits(order // top, jnp.argsort(order).reshape(routing.experts.shape))
    counts = (expert_of_visit[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    rows = _to_visits(x_NxD, visits)
    gate, up = (jax.lax.ragged_dot(rows, weights, counts) for weights in (experts.gate, experts.up))
    weights = routing.weights.reshape(-1)[order].astype(x_NxD.dtype)
    return _to_tokens(jax.lax.ragged_dot(jax.nn.silu(gate) * up * weights[:, None], experts.down, counts), visits)


class _Visits(NamedTuple):
    """``token`` i32[N K]: whose each sorted visit is; ``place`` i32[N, K]: where each token's visits stand."""

    token: jax.Array
    place: jax.Array


@jax.custom_vjp
def _to_visits(values_NxD: jax.Array, visits: _Visits) -> jax.Array:
    """Copies each token's row to its visits: [N, D] -> [N K, D]. Its transpose gathers, where autodiff scatters."""
    return values_NxD[visits.token]


@jax.custom_vjp
def _to_tokens(rows: jax.Array, visits: _Visits) -> jax.Array:
    """Sums the visits of each token: [N K, D] -> [N, D]."""
    return rows[visits.place].sum(axis=1)


_to_visits.defvjp(lambda x, v: (_to_visits(x, v), v), lambda v, d_rows: (_to_tokens(d_rows, v), None))
_to_tokens.defvjp(lambda x, v: (_to_tokens(x, v), v), lambda v, d_y: (_to_visits(d_y, v), None))

DISPATCHES: dict[str, Dispatch] = {"dense": dense_dispatch, "sparse": sparse_dispatch, "ragged": ragged_dispatch}


def pick_dispatch(config: ModelConfig, num_tokens: int) -> Dispatch:
    """The dispatch that ``config.moe_dispatch`` names; ``auto`` as in the table above."""
    if config.moe_dispatch != "auto":
        return DISPATCHES[config.moe_dispatch]
    visits = num_tokens * config.num_experts_per_token
    block = _block_size(visits, config.num_experts)
    rows = block * _num_blocks(visits, config.num_experts, block)
    if rows > num_tokens * config.num_experts:
        return dense_dispatch
    return ragged_dispatch if platform() == "tpu" else sparse_dispatch


def moe_mlp(x: jax.Array, routing: Routing, experts: Experts, config: ModelConfig) -> jax.Array:
    """Routed SwiGLU feed-forward: [..., D] -> [..., D], with a routing [..., K]."""
    x_NxD = x.reshape(-1, x.shape[-1])
    routing_NxK = Routing(*(part.reshape(x_NxD.shape[0], -1) for part in routing))
    return pick_dispatch(config, x_NxD.shape[0])(x_NxD, routing_NxK, experts).reshape(x.shape)

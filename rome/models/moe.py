"""Mixture of experts: routing, and the seam `dispatch(x, routing, experts)` behind which tokens reach their experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rome.models.config import ModelConfig


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


def route(x_NxD: jax.Array, router_DxE: jax.Array, config: ModelConfig) -> Routing:
    """Top-k of a float32 softmax over experts (Qwen3-MoE), renormalised to sum to one if ``norm_topk_prob``."""
    logits = jnp.einsum("nd,de->ne", x_NxD, router_DxE.astype(x_NxD.dtype), preferred_element_type=jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_experts_per_token)
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(experts, weights)


def dense_dispatch(x_NxD: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Reference: every token visits every expert, and those not chosen get weight 0. [N, D] -> [N, D]."""
    num_experts = experts.gate.shape[0]
    chosen_NxKxE = jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32)
    weights_NxE = jnp.einsum("nk,nke->ne", routing.weights, chosen_NxKxE).astype(x_NxD.dtype)
    gate = jnp.einsum("nd,edf->enf", x_NxD, experts.gate)
    up = jnp.einsum("nd,edf->enf", x_NxD, experts.up)
    hidden_ExNxF = jax.nn.silu(gate) * up * weights_NxE.T[:, :, None]
    return jnp.einsum("enf,efd->nd", hidden_ExNxF, experts.down)


def moe_mlp(x_NxD: jax.Array, router_DxE: jax.Array, experts: Experts, config: ModelConfig) -> jax.Array:
    """Routed SwiGLU feed-forward: [N, D] -> [N, D]."""
    return dense_dispatch(x_NxD, route(x_NxD, router_DxE, config), experts)

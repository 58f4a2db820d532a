"""The jitted steps: pure functions of a train state and a static-shape batch.

Gradients are accumulated over micro-batches of a fixed number of rows, so a batch of any size reuses one compiled
program; the loss's normaliser is the whole batch's, so the split changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rome.ipa import ObjectiveConfig, PolicyBatch, policy_loss, sft_loss
from rome.models import ModelConfig, SequenceScores, score_sequences
from rome.models.lora import attach, trained, with_trained
from rome.models.sharding import Mesh, on_mesh
from rome.training.memory import AheadOfTime
from rome.training.state import Params, TrainState, params_shardings, state_shardings

Metrics = dict[str, jax.Array]


class SupervisedBatch(NamedTuple):
    """`tokens, positions, segment_ids, chunk_ids` int32[B, T] (chunk −1: no loss); `chunk_mask` bool[B, C]: m_k."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    chunk_ids: jax.Array
    chunk_mask: jax.Array


def make_supervised_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> Callable[[TrainState, SupervisedBatch], tuple[TrainState, Metrics]]:
    """One update of the error-masked SFT objective (paper, Eq 1–2); continued pre-training uses it with one chunk.

    Returns `train/loss` (nats a trained token, plus the router losses that the config weighs) and `train/grad_norm`
    (before clipping), float32[].
    """

    def loss_fn(part: Params, params: Params, batch: SupervisedBatch) -> jax.Array:
        with on_mesh(mesh):
            params = attach(with_trained(params, part))
            scores = score_sequences(params, config, batch.tokens, batch.positions, batch.segment_ids)
        return sft_loss(scores.logp, batch.chunk_ids, batch.chunk_mask) + scores.router_loss

    def step(state: TrainState, batch: SupervisedBatch) -> tuple[TrainState, Metrics]:
        loss, gradients = jax.value_and_grad(loss_fn)(trained(state.params), state.params, batch)
        state, norm = _apply(state, gradients, config, optimizer, mesh)
        return state, {"train/loss": loss, "train/grad_norm": norm}

    return AheadOfTime(jax.jit(step, donate_argnums=0))


def _apply(
    state: TrainState,
    gradients: Params,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
) -> tuple[TrainState, jax.Array]:
    part = trained(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, part)
    params = with_trained(state.params, optax.apply_updates(part, updates))
    new = TrainState(state.step + 1, params, opt_state)
    if mesh is not None:  # the next step must find its state where this one did, or it would compile again
        new = jax.lax.with_sharding_constraint(new, state_shardings(new, optimizer, config, mesh))
    return new, optax.global_norm(gradients)


def _float32_zeros(leaf: jax.Array) -> jax.Array:
    """Gradients of micro-batches add up in float32, whatever the parameters are."""
    return jnp.zeros(leaf.shape, jnp.float32)


class PolicyStep:
    """One policy update in three jitted parts: `accumulate` micro-batches, then `apply`; `log_probs` gives π_old.

    With `on_policy` there is one update a batch, so π_old is π_θ at the point of differentiation: it is taken from the
    same forward pass, behind a stop_gradient, and the batch's `old_logp` is not read. `share` is the fraction of the
    update's tokens that this micro-batch has: it weighs the router losses, which are means over a micro-batch. With a
    `mesh`, parameters, states and batches are where `state_shardings` and `batch_shardings` put them.
    """

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig,
        optimizer: optax.GradientTransformation,
        on_policy: bool,
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        def log_probs(params: Params, batch: PolicyBatch) -> SequenceScores:
            inputs = (batch.tokens, batch.positions, batch.segment_ids, temperature, batch.experts)
            with on_mesh(mesh):
                return score_sequences(attach(params), config, *inputs)

        def loss_fn(
            part: Params, params: Params, batch: PolicyBatch, totals: Any, share: jax.Array | float
        ) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            logp, entropy, router_loss = log_probs(with_trained(params, part), batch)
            if on_policy:
                batch = batch.replace(old_logp=jax.lax.stop_gradient(logp))
            loss, metrics = policy_loss(logp, batch, objective, totals=totals)
            imitated = jnp.take_along_axis(batch.imitation, jnp.maximum(batch.chunk_ids, 0), axis=1)
            trained = (batch.chunk_ids >= 0) & ~imitated  # the entropy is of what was sampled
            metrics["entropy_sum"] = jnp.sum(jnp.where(trained, entropy, 0.0))
            if config.router_aux_loss_coef or config.router_z_loss_coef:
                metrics["train/router_loss"] = share * router_loss
            return loss + share * router_loss, (metrics, logp)

        def accumulate(
            params: Params, gradients: Params, batch: PolicyBatch, totals: Any, share: jax.Array | float = 1.0
        ) -> tuple[Params, Any]:
            differentiate = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, (metrics, logp)), new = differentiate(trained(params), params, batch, totals, share)
            total = jax.tree.map(jnp.add, gradients, new)
            return placed_like(params, total), (loss, metrics, logp)

        def placed_like(params: Params, gradients: Params) -> Params:
            if mesh is None:
                return gradients
            return jax.lax.with_sharding_constraint(gradients, trained(params_shardings(params, config, mesh)))

        def apply(state: TrainState, gradients: Params) -> tuple[TrainState, jax.Array]:
            return _apply(state, gradients, config, optimizer, mesh)

        self.accumulate = AheadOfTime(jax.jit(accumulate, donate_argnums=1))
        self.apply = AheadOfTime(jax.jit(apply, donate_argnums=0))
        self.log_probs = AheadOfTime(jax.jit(lambda params, batch: log_probs(params, batch)[0]))
        self.zeros = jax.jit(lambda params: placed_like(params, jax.tree.map(_float32_zeros, trained(params))))

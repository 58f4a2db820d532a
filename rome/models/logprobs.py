"""The log-prob head: log-prob, entropy and log-sum-exp of tokens without ever holding the logits of a whole batch.

Logits are made for a few tokens at a time, in float32, and thrown away; the backward pass makes them again and writes
down the gradient of softmax by hand, so that no array of vocabulary width outlives its chunk. The price is one more
matrix product (4 instead of 3). Gradients of the output weights add up in float32, whatever the parameters' dtype.

Measured: at vocabulary 151936, width 2048 and 16384 tokens, forward and backward need 1.7 GiB of temporary memory in
float32 and 3.8 in bfloat16 where the plain formula needs 56 and 57 (`memory_analysis()` of a CPU program; half the
tokens: 1.6 and 3.7 against 28 and 29). At the tiny model's 8 rows of 256, vocabulary 1024, a step takes 28 ms of one
core's time; autodiff of the same chunks 27, of the plain formula 60.

Shape letters: B rows, T tokens, D hidden, V vocabulary, C chunks, t tokens of a row in one chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenScores(NamedTuple):
    """float32[B, T] each, of softmax(logits / temperature): the target's log-prob, the entropy in nats, and
    log sum exp(logits / temperature)."""

    logp: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array


def score_tokens(
    hidden_BxTxD: jax.Array,
    weights: jax.Array,
    targets_BxT: jax.Array,
    temperature: float | jax.Array = 1.0,
    *,
    tied: bool,
    chunk: int,
) -> TokenScores:
    """Scores ``targets`` under the distribution softmax(hidden @ weights / temperature).

    Differentiable once, in the hidden states, the weights and the temperature.

    Args:
        hidden_BxTxD: final hidden states. Matrix products take their dtype and accumulate in float32.
        weights: the embedding [V, D] if ``tied``, else the output projection [D, V], in any float dtype.
        targets_BxT: int32, in 0..V-1.
        temperature: above 0.
        tied: which of the two layouts ``weights`` has.
        chunk: tokens, of all rows together, whose logits exist at a time; at least one of each row. A chunk takes every
            C-th token of every row, so that an axis sharded over devices stays sharded alike in each chunk.
    """
    batch, time, _ = hidden_BxTxD.shape
    chunks = -(-time // max(chunk // batch, 1))
    return _score(tied, chunks, hidden_BxTxD, weights, targets_BxT, jnp.asarray(temperature, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _score(
    tied: bool, chunks: int, hidden: jax.Array, weights: jax.Array, targets: jax.Array, temperature: jax.Array
) -> TokenScores:
    cast = weights.astype(hidden.dtype)

    def step(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, TokenScores]:
        hidden, targets = part
        scaled = _logits(tied, hidden, cast) / temperature
        total = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
        log_probs = scaled - total
        # compare and sum: a vocabulary sharded over devices needs no gather
        logp = jnp.where(_is_target(targets, scaled), log_probs, 0.0).sum(-1)
        return None, TokenScores(logp, -(jnp.exp(log_probs) * log_probs).sum(-1), total[..., 0])

    _, scores = _scan(step, None, (_split(hidden, chunks), _split(targets, chunks)))
    return TokenScores(*(_join(value, targets.shape[1]) for value in scores))


def _forward(
    tied: bool, chunks: int, hidden: jax.Array, weights: jax.Array, targets: jax.Array, temperature: jax.Array
) -> tuple[TokenScores, tuple]:
    scores = _score(tied, chunks, hidden, weights, targets, temperature)
    return scores, (hidden, weights, targets, temperature, scores)


def _backward(tied: bool, chunks: int, residuals: tuple, d_scores: TokenScores) -> tuple[jax.Array | None, ...]:
    """With z = logits / temperature and p = softmax(z):  d logp / dz = 1[target] - p,  d entropy / dz =
    -p (log p + entropy),  d logsumexp / dz = p."""
    hidden, weights, targets, temperature, scores = residuals
    cast = weights.astype(hidden.dtype)

    def step(sums: tuple[jax.Array, jax.Array], part: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        d_weights, d_temperature = sums
        hidden, targets, scores, d_scores = part
        scaled = _logits(tied, hidden, cast) / temperature
        d_logp, d_entropy, d_total = (value[..., None] for value in d_scores)
        log_probs = scaled - scores.logsumexp[..., None]
        slope = d_total - d_logp - d_entropy * (log_probs + scores.entropy[..., None])
        d_scaled = jnp.exp(log_probs) * slope + jnp.where(_is_target(targets, scaled), d_logp, 0.0)
        d_temperature -= (d_scaled * scaled).sum() / temperature
        d_logits = (d_scaled / temperature).astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd" if tied else "btv,dv->btd", d_logits, cast)
        # [D, V] whatever the layout: transposing the narrow factor is half the time on CPU
        d_weights += jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (d_weights, d_temperature), d_hidden

    d_weights = jnp.zeros(weights.shape[::-1] if tied else weights.shape, jnp.float32)
    zeros = d_weights, jnp.zeros((), jnp.float32)
    parts = jax.tree.map(partial(_split, chunks=chunks), (hidden, targets, scores, d_scores))
    (d_weights, d_temperature), d_hidden = _scan(step, zeros, parts)
    d_weights = (d_weights.T if tied else d_weights).astype(weights.dtype)
    return _join(d_hidden, hidden.shape[1]), d_weights, None, d_temperature


_score.defvjp(_forward, _backward)


def _logits(tied: bool, hidden: jax.Array, weights: jax.Array) -> jax.Array:
    equation = "btd,vd->btv" if tied else "btd,dv->btv"
    return jnp.einsum(equation, hidden, weights, preferred_element_type=jnp.float32)


def _is_target(targets: jax.Array, scaled: jax.Array) -> jax.Array:
    return jnp.arange(scaled.shape[-1]) == targets[..., None]


def _split(values: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [C, B, t, ...], zeros after the last token. Chunk c takes the tokens c, c + C, c + 2 C..."""
    batch, time = values.shape[:2]
    padded = jnp.pad(values, ((0, 0), (0, -time % chunks), *((0, 0),) * (values.ndim - 2)))
    return jnp.moveaxis(padded.reshape(batch, -1, chunks, *values.shape[2:]), 2, 0)


def _join(values: jax.Array, time: int) -> jax.Array:
    """The inverse of `_split`: [C, B, t, ...] -> [B, T, ...]."""
    joined = jnp.moveaxis(values, 0, 2)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :time]


def _scan(step, carry, parts):
    """`jax.lax.scan`, without the loop where there is one chunk."""
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, parts)
    carry, out = step(carry, jax.tree.map(lambda part: part[0], parts))
    return carry, jax.tree.map(lambda value: value[None], out)

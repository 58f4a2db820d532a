"""The transformer as pure functions over a pytree of parameters: packed training rows, logits and log-probs.

Shape letters: B rows (or slots), T tokens, S new tokens, D hidden, H query heads, K key/value heads, G = H // K query
heads a key/value head, h head_dim, V vocabulary, N tokens of all rows in one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rome.models.config import ConfigError, ModelConfig
from rome.models.islands import attention, moe_mlp, routed_experts, token_scores
from rome.models.lora import add_adapters
from rome.models.moe import Experts, router_loss
from rome.models.params import LayerRun, Params, layer_runs, param_specs
from rome.models.quantized import Int8, expert_stack, quantized_spec
from rome.models.rope import apply_rope, rope_tables
from rome.models.sharding import constrain, gather_weights, is_sharded

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last axis, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain.astype(jnp.float32)).astype(x.dtype)


def decoder_layer(
    x_BxTxD: jax.Array,
    layer: Params,
    config: ModelConfig,
    rope: tuple[jax.Array, jax.Array],
    attend: Attend,
    replayed_BxTxK: jax.Array | None = None,
    counted_BxT: jax.Array | None = None,
) -> tuple[jax.Array, Any, Routed]:
    """One pre-norm block. ``attend`` mixes tokens (over a packed row, or over a cache) and may return new state.

    It gets queries [B, K, G, T, h], keys and values [B, K, T, h], and gives mixed values in the shape of the queries.
    ``replayed_BxTxK`` and ``counted_BxT`` are for the router: see `route` and `router_loss`.
    """
    dtype, eps = x_BxTxD.dtype, config.rms_norm_eps
    layer = _gather_layer({name: w.astype(dtype) for name, w in add_adapters(layer).items()}, config)
    y = rms_norm(x_BxTxD, layer["attention_norm"], eps)
    q, k, v = (project_heads(y, layer[f"w{name}"], layer.get(f"{name}_bias")) for name in "qkv")
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], eps), rms_norm(k, layer["k_norm"], eps)
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    q = constrain(q, "batch", "heads", "sequence", None)
    k, v = (constrain(new, "batch", "kv_heads", "sequence", None) for new in (k, v))
    batch, _, time, head_dim = q.shape
    mixed, state = attend(q.reshape(batch, config.num_kv_heads, -1, time, head_dim), k, v)
    mixed_BxTxn = jnp.swapaxes(mixed.reshape(q.shape), 1, 2).reshape(batch, time, -1)
    x = x_BxTxD + _biased(linear(mixed_BxTxn, layer["wo"].reshape(-1, x_BxTxD.shape[-1])), layer.get("o_bias"))
    x = constrain(x, "batch", "sequence", None)
    y, routed = mlp(rms_norm(x, layer["mlp_norm"], eps), layer, config, replayed_BxTxK, counted_BxT)
    return constrain(x + y, "batch", "sequence", None), state, routed


def _gather_layer(layer: Params, config: ModelConfig) -> Params:
    """The layer's weights as its products need them on a mesh; experts stay split until their island gathers them."""
    if not is_sharded():
        return layer
    specs = param_specs(config)["layers" if "router" in layer or not config.is_moe else "dense_layers"]
    kept = ("gate", "up", "down") if "router" in layer else ()

    def gather(name: str, weights: jax.Array | Int8) -> jax.Array | Int8:
        spec = quantized_spec(name, specs[name]) if isinstance(weights, Int8) else specs[name]
        return jax.tree.map(lambda part, spec: gather_weights(part, spec.axes[1:]), weights, spec)

    return {name: w if name in kept else gather(name, w) for name, w in layer.items()}


def linear(x: jax.Array, weights: jax.Array | Int8) -> jax.Array:
    """x @ weights: [..., D] by [D, F]. On a mesh the gradient is left to autodiff: rows and tokens, when both are
    split, can't be made one axis. Quantised weights have none."""
    return x @ weights if is_sharded() or isinstance(weights, Int8) else _linear(x, weights)


@jax.custom_vjp
def _linear(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The gradient of the weights transposes the narrower of its two factors, where autodiff always transposes the
    gradient of the output: a fifth of a training step on CPU."""
    return x @ weights


def _linear_forward(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ weights, (x, weights)


def _linear_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weights = residuals
    x_NxD, d_y_NxF = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    if weights.shape[0] <= weights.shape[1]:
        d_weights = jnp.einsum("nd,nf->df", x_NxD, d_y_NxF)
    else:
        d_weights = jnp.einsum("nf,nd->fd", d_y_NxF, x_NxD).T
    return (d_y_NxF @ weights.T).reshape(x.shape), d_weights


_linear.defvjp(_linear_forward, _linear_backward)


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias


def project_heads(y_BxTxD: jax.Array, weights_DxHxh: jax.Array, bias_Hxh: jax.Array | None = None) -> jax.Array:
    """[B, T, D] -> [B, H, T, h]: one plain matrix product, whose small result is transposed rather than the weights."""
    width, heads, head_dim = weights_DxHxh.shape
    projected = linear(y_BxTxD, weights_DxHxh.reshape(width, heads * head_dim))
    return jnp.swapaxes(_biased(projected.reshape(*y_BxTxD.shape[:2], heads, head_dim), bias_Hxh), 1, 2)


class Routed(NamedTuple):
    """What a layer's router did: ``experts`` int32[B, T, K], None in a dense layer; ``loss`` float32[], None if off."""

    experts: jax.Array | None
    loss: jax.Array | None


def mlp(
    y_BxTxD: jax.Array,
    layer: Params,
    config: ModelConfig,
    replayed_BxTxK: jax.Array | None = None,
    counted_BxT: jax.Array | None = None,
) -> tuple[jax.Array, Routed]:
    """SwiGLU feed-forward, dense or (where the layer has a router) routed."""
    if "router" in layer:
        routing = routed_experts(y_BxTxD, layer["router"], config, replayed_BxTxK)
        loss = None
        if counted_BxT is not None and (config.router_aux_loss_coef or config.router_z_loss_coef):
            loss = router_loss(y_BxTxD, layer["router"], routing, counted_BxT, config)
        experts = Experts(*(expert_stack(layer[name], config, y_BxTxD.dtype) for name in ("gate", "up", "down")))
        return moe_mlp(y_BxTxD, routing, experts, config), Routed(routing.experts, loss)
    gate = _biased(linear(y_BxTxD, layer["gate"]), layer.get("gate_bias"))
    up = _biased(linear(y_BxTxD, layer["up"]), layer.get("up_bias"))
    return _biased(linear(jax.nn.silu(gate) * up, layer["down"]), layer.get("down_bias")), Routed(None, None)


def embed(params: Params, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    table = gather_weights(params["embedding"].astype(config.dtype), ("vocab", "embed"))
    return constrain(table[tokens], "batch", "sequence", None)


def unembed(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Logits float32[..., V] of final hidden states [..., D]."""
    weights = params["embedding"].T if config.tie_embeddings else params["lm_head"]
    return jnp.matmul(hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)


def hidden_states(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Final normalised hidden states [B, T, D] in ``config.dtype``. Arguments as in `forward`."""
    return _transform(params, config, tokens, positions, segment_ids, None)[0]


def _transform(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    experts_BxTxLxK: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, T, D], and the router losses float32[], averaged over the layers that have a router."""
    _check_replay(config, tokens, experts_BxTxLxK)
    rope = rope_tables(positions, config)
    x = embed(params, config, tokens)
    first, losses = 0, []
    for run in layer_runs(config):
        step, count = _layer_step(config, rope, segment_ids, run.window), run.stop - run.start
        replayed = None
        if experts_BxTxLxK is not None and run.stack == "layers":
            replayed = jnp.moveaxis(experts_BxTxLxK[:, :, run.start : run.stop], 2, 0)
        if config.scan_layers and isinstance(params["layers"], dict):
            x, loss = jax.lax.scan(step, x, (_run_params(params, run), replayed))
            losses.append(loss)
        else:
            for row in range(count):
                inputs = layer_params(params, config, first + row), None if replayed is None else replayed[row]
                x, loss = step(x, inputs)
                losses.append(loss)
        first += count
    total = sum((loss.sum() for loss in losses if loss is not None), jnp.float32(0))
    x = rms_norm(x, params["final_norm"], config.rms_norm_eps)
    return x, total / max(config.routed_layers, 1)


def _check_replay(config: ModelConfig, tokens: jax.Array, experts: jax.Array | None) -> None:
    if experts is None:
        return
    if not config.is_moe:
        raise ConfigError("replayed experts: expected None for a dense model")
    expected = (*tokens.shape, config.routed_layers, config.num_experts_per_token)
    if experts.shape != expected:
        raise ConfigError(f"replayed experts: expected shape {expected}, got {experts.shape}")


def _layer_step(
    config: ModelConfig, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array, window: int | None
) -> Callable[[jax.Array, tuple[Params, jax.Array | None]], tuple[jax.Array, jax.Array | None]]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention(q, k, v, segment_ids, window, config.attention_kernel), None

    def step(x: jax.Array, inputs: tuple[Params, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        layer, replayed = inputs
        x, _, routed = decoder_layer(x, layer, config, rope, attend, replayed, segment_ids != 0)
        return x, routed.loss

    return jax.checkpoint(step) if config.remat else step


def _run_params(params: Params, run: LayerRun) -> Params:
    stack = params[run.stack]
    if run.stop - run.start == stack["attention_norm"].shape[0]:
        return stack
    return jax.tree.map(lambda stacked: stacked[run.start : run.stop], stack)


def layer_params(params: Params, config: ModelConfig, index: int) -> Params:
    """Layer ``index`` of parameters whose layers are stacked, or already a list (`unstack_layers`)."""
    if not isinstance(params["layers"], dict):
        return params["layers"][index]
    is_dense = index in config.dense_layers
    before = sum(layer < index for layer in config.dense_layers)
    stack, row = ("dense_layers", before) if is_dense else ("layers", index - before)
    return jax.tree.map(lambda stacked: stacked[row], params[stack])


def unstack_layers(params: Params, config: ModelConfig) -> Params:
    """The same parameters, or declarations of them, with layers as a list. XLA's CPU backend doesn't hoist slices out
    of loops: with these, `extend` in a decoding loop copies no weights (a third of a step's time at 1M parameters)."""
    rest = {name: value for name, value in params.items() if name != "dense_layers"}
    return rest | {"layers": [layer_params(params, config, index) for index in range(config.num_layers)]}


def forward(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Logits float32[B, T, V] of the token after each.

    Args:
        params: from `init_params`.
        config: the model's config.
        tokens: int32[B, T].
        positions: int32[B, T], position of each token in its own segment (rotary angles only).
        segment_ids: int32[B, T]; tokens see only earlier ones of the same segment. 0 is padding: its logits are finite
            and mean nothing.
    """
    return unembed(params, config, hidden_states(params, config, tokens, positions, segment_ids))


class SequenceScores(NamedTuple):
    """``logp`` and ``entropy`` float32[B, T] as in `token_log_probs`; ``router_loss`` float32[], weighted, 0 if off."""

    logp: jax.Array
    entropy: jax.Array
    router_loss: jax.Array


def token_log_probs(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    temperature: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy float32[B, T] of the distribution that each token was drawn from.

    ``logp[b, t]`` is log softmax(logits / temperature) of ``tokens[b, t]`` given what precedes it in its segment, and
    ``entropy[b, t]`` the entropy (nats) of the same distribution. Both are 0 at the first token of a segment and on
    padding. At most ``config.head_chunk`` tokens' logits exist at a time, in the backward pass too.
    """
    return score_sequences(params, config, tokens, positions, segment_ids, temperature)[:2]


def score_sequences(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    temperature: float | jax.Array = 1.0,
    experts: jax.Array | None = None,
) -> SequenceScores:
    """`token_log_probs` with what a mixture of experts needs in training.

    ``experts`` int[B, T, L, K] are the experts to visit in the L layers that have a router (router replay, see
    `rome.models.moe.route`), negative where none were recorded. The router losses count the tokens of all segments.

    Raises:
        ConfigError: ``experts`` has another shape, or the model has none.
    """
    hidden, router_loss = _transform(params, config, tokens, positions, segment_ids, experts)
    # hidden t predicts token t + 1; the last one of a row predicts nothing
    targets = jnp.roll(tokens, -1, axis=1)
    tied = config.tie_embeddings
    weights = params["embedding" if tied else "lm_head"]
    scores = token_scores(hidden, weights, targets, temperature, tied=tied, chunk=config.head_chunk)
    follows = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)

    def align(values: jax.Array) -> jax.Array:
        return jnp.pad(jnp.where(follows, values[:, :-1], 0.0), ((0, 0), (1, 0)))

    return SequenceScores(align(scores.logp), align(scores.entropy), router_loss)

"""Google's Tunix as a side of `benchmarks/model.py`; it runs in a Python of its own (`pip install google-tunix`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from model_peer import BETAS, EPSILON, LEARNING_RATE, MAX_NORM
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors


def _model(folder: Path) -> Qwen3:
    raw = json.loads((folder / "config.json").read_text())
    experts = raw.get("num_experts")
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["moe_intermediate_size"] if experts else raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
        num_experts=experts,
        num_experts_per_tok=raw["num_experts_per_tok"] if experts else None,
    )
    return create_model_from_safe_tensors(str(folder), config, mode="original")


def _log_probs(model: Qwen3, tokens: jax.Array) -> jax.Array:
    """float32[B, T - 1]."""
    rows, length = tokens.shape
    positions = jnp.tile(jnp.arange(length), (rows, 1))
    mask = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (rows, 1, 1))
    logits, _ = model(tokens, positions, None, mask)
    return -optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def train(folder: Path, tokens: np.ndarray) -> Callable[[], Any]:
    model = _model(folder)
    rule = optax.adamw(LEARNING_RATE, *BETAS, EPSILON, weight_decay=0.0)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(MAX_NORM), rule), wrt=nnx.Param)

    @nnx.jit
    def step(model: Qwen3, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda model: -_log_probs(model, tokens).mean())(model)
        optimizer.update(model, gradients)
        return loss

    return lambda: float(step(model, optimizer, tokens))


def logprob(folder: Path, tokens: np.ndarray) -> Callable[[], Any]:
    model = _model(folder)
    score = nnx.jit(_log_probs)
    return lambda: float(np.asarray(score(model, tokens)).mean())

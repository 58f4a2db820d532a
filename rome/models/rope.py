"""Rotary position embeddings (Su et al. 2021), plain and stretched for long contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from rome.models.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """f32[h/2]: radians by which each rotary pair turns from one position to the next, theta^(-2i/h) when unscaled."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is None:
        return frequencies
    return frequencies * _slowdown(config.rope_scaling, config.rope_theta, half)


def rope_tables(positions_BxT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[B, T, h/2] of the rotary angles, times YaRN's attention factor where there is one."""
    angles = positions_BxT.astype(jnp.float32)[..., None] * rope_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return cos, sin
    factor = scaling.attention_factor
    factor = 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
    return factor * cos, factor * sin


def apply_rope(x_BxHxTxh: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + h/2) (the half-split convention of Llama and Qwen checkpoints)."""
    cos, sin = (table[:, None] for table in rope)
    first, second = jnp.split(x_BxHxTxh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxHxTxh.dtype)


def _slowdown(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    """f32[h/2]: what each frequency is multiplied by, from 1 / factor to 1.

    Linear: Chen et al. 2023; llama3: Llama 3.1's release; YaRN: Peng et al. 2023, section 3.2 ("NTK-by-parts").
    """
    pairs = np.arange(half, dtype=np.float64)
    slow = 1.0 / scaling.factor
    if scaling.kind == "linear":
        keep = np.zeros(half)
    elif scaling.kind == "llama3":
        turns = scaling.original_positions * theta ** (-pairs / half) / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        # the pair, a real number, that turns this often in the original context
        low, high = (
            half * math.log(scaling.original_positions / (2 * math.pi * turns)) / math.log(theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)  # upstream's bound is the head's width, not the pairs'
        keep = 1.0 - (pairs - low) / max(high - low, 1e-3)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep + (1.0 - keep) * slow).astype(np.float32)

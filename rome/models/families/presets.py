"""Published models by name. Sizes are those of their own config files; tests count their parameters."""

from __future__ import annotations

from typing import Any

from rome.models.config import ConfigError, ModelConfig, RopeScaling


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **rest: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"tie_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": 40960}
    return ModelConfig(151936, hidden, layers, heads, kv_heads, 128, inner, rms_norm_eps=1e-6, **(defaults | rest))


def _qwen3_30b(rope_theta: float, positions: int) -> ModelConfig:
    moe = {"num_experts": 128, "num_experts_per_token": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    rope = {"rope_theta": rope_theta, "max_position_embeddings": positions}
    return _qwen3(2048, 6144, 48, 32, 4, tie_embeddings=False, **moe, **rope)


def _qwen25(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        *(vocab, hidden, layers, heads, kv_heads, hidden // heads, inner),
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_embeddings=tied,
        qk_norm=False,
        qkv_bias=True,
    )


def _llama3(hidden: int, inner: int, layers: int, head_dim: int, factor: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        *(128256, hidden, layers, 32, 8, head_dim, inner),
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", factor, original_positions=8192),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_embeddings=tied,
        qk_norm=False,
    )


def _smollm2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, theta: float) -> ModelConfig:
    return ModelConfig(
        *(49152, hidden, layers, heads, kv_heads, 64, inner),
        rope_theta=theta,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        qk_norm=False,
    )


PRESETS: dict[str, ModelConfig] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, tie_embeddings=False),
    "qwen3-30b-a3b": _qwen3_30b(1e6, 40960),
    "qwen3-coder-30b-a3b": _qwen3_30b(1e7, 262144),
    "qwen2.5-0.5b": _qwen25(151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": _qwen25(151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": _qwen25(152064, 3584, 18944, 28, 28, 4, False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 64, 32.0, True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 128, 8.0, False),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 1e5),
}


def preset(name: str) -> ModelConfig:
    """The config of a published model, in float32; `dataclasses.replace` changes what a run needs otherwise.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]

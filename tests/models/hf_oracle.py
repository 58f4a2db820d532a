"""Small random models of Hugging Face transformers, and their logits: the independent oracle of `rome.models`."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import transformers

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def hf_model(model_type: str, fields: dict[str, Any]) -> torch.nn.Module:
    """A float32 model whose every tensor, norms and biases too, is drawn from its own name."""
    config_class, model_class = CLASSES[model_type]
    config = config_class(**fields, attn_implementation="eager")
    model = model_class(config).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.normal(size=tuple(tensor.shape)) * (0.35 if tensor.ndim > 1 else 0.3)
        tensor.copy_(torch.from_numpy(values + ("norm" in name)))
    return model


def hf_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V]."""
    return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

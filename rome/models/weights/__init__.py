"""Weights in and out: Hugging Face folders of safetensors."""

from rome.models.weights.pretrained import load_config, load_params, load_pretrained, save_pretrained
from rome.models.weights.tensors import LazyTensor, WeightsError, read_folder, read_safetensors

__all__ = [
    "LazyTensor",
    "WeightsError",
    "load_config",
    "load_params",
    "load_pretrained",
    "read_folder",
    "read_safetensors",
    "save_pretrained",
]

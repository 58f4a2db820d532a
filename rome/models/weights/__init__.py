"""Weights in and out: Hugging Face folders (safetensors) and GGUF files."""

from rome.models.weights.gguf_file import load_gguf, open_gguf
from rome.models.weights.pretrained import check_pretrained, load_config, load_params, load_pretrained, save_pretrained
from rome.models.weights.tensors import LazyTensor, WeightsError, read_folder, read_safetensors

__all__ = [
    "LazyTensor",
    "WeightsError",
    "check_pretrained",
    "load_config",
    "load_gguf",
    "load_params",
    "load_pretrained",
    "open_gguf",
    "read_folder",
    "read_safetensors",
    "save_pretrained",
]

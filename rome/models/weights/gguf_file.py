"""GGUF files (llama.cpp's format) as checkpoints: their tensors under Hugging Face names, dequantised when read.

Needs the package ``gguf`` (extra ``pretrained``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rome.models.config import ModelConfig
from rome.models.families import FAMILIES
from rome.models.params import Params
from rome.models.weights.pretrained import load_params
from rome.models.weights.tensors import LazyTensor, WeightsError

_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def load_gguf(path: str | Path, shardings: Any = None, **runtime: Any) -> tuple[ModelConfig, Params]:
    """Config and parameters of a GGUF file; ``runtime`` fields as in `from_hf_config`, the rest as in `load_params`.

    Raises:
        WeightsError: the file is missing or broken, or of an architecture or with a setting that isn't supported.
        ImportError: the package ``gguf`` is not installed.
    """
    reader = open_gguf(path)
    config = _config(reader, Path(path), runtime)
    return config, load_params(dict(_tensors(reader, Path(path), config)), config, shardings)


def open_gguf(path: str | Path) -> Any:
    """A ``gguf.GGUFReader``.

    Raises:
        WeightsError: the file is missing, cut short or no GGUF file.
        ImportError: the package ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'rome-agents[pretrained]'") from error
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:  # what it raises on a broken file
        raise WeightsError(f"{path}: expected a whole GGUF file: {error}") from error


class _Metadata:
    """Typed look-ups; keys of the architecture by their short names."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._fields, self._path = reader.fields, path
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in _ARCHITECTURES:
            expected = f"one of {sorted(_ARCHITECTURES)}"
            raise WeightsError(f"{path}: general.architecture: expected {expected}, found {self.architecture!r}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Raises WeightsError if the key is absent without a default, or of another type."""
        field = self._fields.get(key)
        value = default if field is None else field.contents()
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise WeightsError(f"{self._path}: {key}: expected {kind.__name__}, found {value!r}")
        return value

    def own(self, key: str, kind: type, default: Any = None) -> Any:
        return self.get(f"{self.architecture}.{key}", kind, default)

    def expect(self, key: str, value: Any) -> None:
        """The architecture's key must be absent or have this value."""
        if (found := self.own(key, type(value), value)) != value:
            raise WeightsError(
                f"{self._path}: {self.architecture}.{key}: expected {value!r} (no other works), found {found!r}"
            )


def _config(reader: Any, path: Path, runtime: dict[str, Any]) -> ModelConfig:
    data = _Metadata(reader, path)
    family = FAMILIES[_ARCHITECTURES[data.architecture]]
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise WeightsError(f"{path}: missing: expected token_embd.weight, found no such tensor")
    hidden, heads = data.own("embedding_length", int), data.own("attention.head_count", int)
    head_dim = data.own("attention.key_length", int, hidden // max(heads, 1))
    data.expect("attention.value_length", head_dim)
    data.expect("rope.dimension_count", head_dim)
    data.expect("rope.scaling.type", "none")
    fields: dict[str, Any] = {
        "vocab_size": int(shapes["token_embd.weight"][1]),  # GGUF lists the fastest axis first
        "hidden_size": hidden,
        "num_layers": data.own("block_count", int),
        "num_heads": heads,
        "num_kv_heads": data.own("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": data.own("feed_forward_length", int),
        "rope_theta": data.own("rope.freq_base", float, 1e4),
        "max_position_embeddings": data.own("context_length", int),
        # stored as float32: 1e-5 comes back as 9.999999747378752e-06
        "rms_norm_eps": float(f"{data.own('attention.layer_norm_rms_epsilon', float):.6g}"),
        "tie_embeddings": "output.weight" not in shapes,
        "qk_norm": family.qk_norm,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "output_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }
    if family.moe:
        fields |= {
            "num_experts": data.own("expert_count", int),
            "num_experts_per_token": data.own("expert_used_count", int),
            "moe_intermediate_size": data.own("expert_feed_forward_length", int),
            "norm_topk_prob": True,  # llama.cpp knows Qwen3-MoE only so
        }
    return ModelConfig(**fields, **runtime)


def _tensors(reader: Any, path: Path, config: ModelConfig) -> Iterator[tuple[str, LazyTensor]]:
    """Under Hugging Face names; names that this doesn't know stay as they are, and `load_params` refuses them."""
    permuted = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    if _Metadata(reader, path).architecture != "llama":
        permuted = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        stem, _, suffix = tensor.name.rpartition(".")
        block, _, part = stem.partition(".")[2].partition(".")
        where = f"{path}: {tensor.name}"
        if part in _EXPERTS:
            for expert in range(shape[0]):
                name = f"model.layers.{block}.mlp.experts.{expert}.{_EXPERTS[part]}.{suffix}"
                yield name, LazyTensor(shape[1:], where, _dequantise(tensor, where, expert))
        elif part in _LAYER:
            heads = permuted.get(_LAYER[part], 0)
            name = f"model.layers.{block}.{_LAYER[part]}.{suffix}"
            yield name, LazyTensor(shape, where, _dequantise(tensor, where, None, heads))
        else:
            yield f"{_TOP.get(stem, stem)}.{suffix}", LazyTensor(shape, where, _dequantise(tensor, where, None))


def _dequantise(tensor: Any, where: str, expert: int | None, heads: int = 0) -> Callable[[], np.ndarray]:
    """float32 values; of one expert if given; with the rows of each of ``heads`` heads back in half-split order.

    llama.cpp rotates neighbouring rows of Llama's queries and keys, so its files interleave the halves of each head.
    """

    def read() -> np.ndarray:
        import gguf

        stored = tensor.data if expert is None else tensor.data[expert]
        try:
            values = gguf.quants.dequantize(stored, tensor.tensor_type)
        except NotImplementedError as error:
            raise WeightsError(f"{where}: expected a type that gguf can dequantise: {error}") from error
        if not heads:
            return values
        split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)

    return read

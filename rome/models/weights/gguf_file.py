"""GGUF files (llama.cpp's format) as checkpoints: their tensors under Hugging Face names, dequantised when read.

Their blocks are dequantised by the package ``gguf`` (extra ``pretrained``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rome.models.config import ModelConfig
from rome.models.families import FAMILIES
from rome.models.params import Params
from rome.models.weights.gguf_header import GGUFFile, GGUFTensor, read_header
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
    file = open_gguf(path)
    config = _config(file, runtime)
    return config, load_params(dict(_tensors(file, config)), config, shardings)


def open_gguf(path: str | Path) -> GGUFFile:
    """Metadata and table of tensors, checked against each other and the file's size; no data is read.

    Raises:
        WeightsError: the file is missing, cut short, no GGUF file, or has a tensor that can't be dequantised.
        ImportError: the package ``gguf`` is not installed.
    """
    return read_header(Path(path), _block_sizes())


@cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Values and bytes of a block of each type that ``gguf`` dequantises, by its number."""
    gguf = _gguf()
    sizes = {}
    for kind, (values, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        sizes[int(kind)] = (values, size)
    return sizes


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'rome-agents[pretrained]'") from error
    return gguf


class _Metadata:
    """Typed look-ups; keys of the architecture by their short names, each of which has to be asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self._fields, self._path = file.fields, file.path
        self._asked: set[str] = set()
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in _ARCHITECTURES:
            expected = f"one of {sorted(_ARCHITECTURES)}"
            raise WeightsError(f"{self._path}: general.architecture: expected {expected}, found {self.architecture!r}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Raises WeightsError if the key is absent without a default, or of another type."""
        self._asked.add(key)
        value = self._fields.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = "nothing" if value is None else repr(value)
            raise WeightsError(f"{self._path}: {key}: expected {kind.__name__}, found {found}")
        return value

    def own(self, key: str, kind: type, default: Any = None) -> Any:
        return self.get(f"{self.architecture}.{key}", kind, default)

    def expect(self, key: str, value: Any) -> None:
        """The architecture's key must be absent or have this value."""
        if (found := self.own(key, type(value), value)) != value:
            raise WeightsError(
                f"{self._path}: {self.architecture}.{key}: expected {value!r} (no other works), found {found!r}"
            )

    def finish(self) -> None:
        """Raises WeightsError if the architecture has a key that nobody asked for: it may change what is computed."""
        unknown = (key for key in self._fields if key.startswith(f"{self.architecture}.") and key not in self._asked)
        if (key := next(unknown, None)) is not None:
            raise WeightsError(f"{self._path}: {key}: unknown key, with value {self._fields[key]!r}")


def _config(file: GGUFFile, runtime: dict[str, Any]) -> ModelConfig:
    data = _Metadata(file)
    family = FAMILIES[_ARCHITECTURES[data.architecture]]
    if "token_embd.weight" not in file.tensors:
        raise WeightsError(f"{file.path}: missing: expected token_embd.weight, found no such tensor")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    data.expect("vocab_size", vocab_size)
    hidden, heads = data.own("embedding_length", int), data.own("attention.head_count", int)
    head_dim = data.own("attention.key_length", int, hidden // max(heads, 1))
    data.expect("attention.value_length", head_dim)
    data.expect("rope.dimension_count", head_dim)
    data.expect("rope.scaling.type", "none")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
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
        "tie_embeddings": "output.weight" not in file.tensors,
        "qk_norm": family.qk_norm,
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "output_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    if family.moe:
        fields |= {
            "num_experts": data.own("expert_count", int),
            "num_experts_per_token": data.own("expert_used_count", int),
            "moe_intermediate_size": data.own("expert_feed_forward_length", int),
            "norm_topk_prob": True,  # llama.cpp knows Qwen3-MoE only so
        }
    else:
        data.expect("expert_count", 0)
        data.expect("expert_used_count", 0)
    data.finish()
    return ModelConfig(**fields, **runtime)


def _tensors(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[str, LazyTensor]]:
    """Under Hugging Face names; names that this doesn't know stay as they are, and `load_params` refuses them."""
    permuted = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    if file.fields["general.architecture"] != "llama":
        permuted = {}
    for tensor in file.tensors.values():
        stem, _, suffix = tensor.name.rpartition(".")
        block, _, part = stem.partition(".")[2].partition(".")
        where = f"{file.path}: {tensor.name}"
        if part in _EXPERTS:
            for expert in range(tensor.shape[0]):
                name = f"model.layers.{block}.mlp.experts.{expert}.{_EXPERTS[part]}.{suffix}"
                yield name, LazyTensor(tensor.shape[1:], where, _dequantise(file.path, tensor, expert))
        elif part in _LAYER:
            heads = permuted.get(_LAYER[part], 0)
            name = f"model.layers.{block}.{_LAYER[part]}.{suffix}"
            yield name, LazyTensor(tensor.shape, where, _dequantise(file.path, tensor, heads=heads))
        else:
            yield f"{_TOP.get(stem, stem)}.{suffix}", LazyTensor(tensor.shape, where, _dequantise(file.path, tensor))


def _dequantise(path: Path, tensor: GGUFTensor, expert: int | None = None, heads: int = 0) -> Callable[[], np.ndarray]:
    """float32 values; of one expert if given; with the rows of each of ``heads`` heads back in half-split order.

    llama.cpp rotates neighbouring rows of Llama's queries and keys, so its files interleave the halves of each head.
    """

    def read() -> np.ndarray:
        shape = (*tensor.shape[:-1], tensor.size // math.prod(tensor.shape[:-1]))  # bytes a row
        stored = np.memmap(path, np.uint8, "r", tensor.start, shape)
        gguf = _gguf()
        kind = gguf.GGMLQuantizationType(tensor.kind)
        values = gguf.quants.dequantize(stored if expert is None else stored[expert], kind)
        if not heads:
            return values
        split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)

    return read

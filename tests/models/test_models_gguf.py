"""GGUF files: small ones of every family against transformers' reader, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rome.models import ConfigError, ModelConfig, param_specs
from rome.models.params import is_spec
from rome.models.weights import WeightsError, load_gguf
from rome.models.weights.table import leaf_slots

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
transformers = pytest.importorskip("transformers", reason="needs the oracle transformers")

SIZES: dict[str, Any] = {"max_position_embeddings": 128, "rope_theta": 500.0, "rms_norm_eps": 1e-4}
CONFIGS = {
    "llama": ModelConfig(64, 64, 2, 4, 2, 16, 96, qk_norm=False, **SIZES),
    "qwen2": ModelConfig(64, 64, 2, 4, 2, 16, 96, qk_norm=False, qkv_bias=True, tie_embeddings=False, **SIZES),
    "qwen3": ModelConfig(64, 64, 2, 4, 2, 32, 96, **SIZES),
    "qwen3moe": ModelConfig(
        *(64, 64, 2, 4, 2, 32, 96),
        tie_embeddings=False,
        num_experts=3,
        num_experts_per_token=2,
        moe_intermediate_size=32,
        **SIZES,
    ),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}


def metadata(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_token)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def write(path: Path, architecture: str, change: Any = lambda writer: None, quantise: bool = False) -> dict:
    """A random model's file; its parameters as NumPy leaves. Queries and keys of Llama go in as the file has them."""
    config = CONFIGS[architecture]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda spec: rng.normal(size=spec.shape).astype(np.float32), param_specs(config), is_leaf=is_spec
    )
    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer, config)
    change(writer)
    experts: dict[str, list[np.ndarray]] = {}
    for keys, _, slots in leaf_slots(config):
        leaf = params[keys[0]] if len(keys) == 1 else params[keys[0]][keys[1]]
        for slot in slots:
            values = slot.to_tensor(leaf[slot.at])
            stem, _, suffix = slot.name.rpartition(".")
            layer = ""
            if stem.startswith("model.layers."):
                layer, stem = f"blk.{stem.split('.')[2]}.", stem.split(".", 3)[3]
            if stem.startswith("mlp.experts."):
                kind = stem.split(".")[-1].removesuffix("_proj")
                experts.setdefault(f"{layer}ffn_{kind}_exps.weight", []).append(values)
                continue
            add(writer, f"{layer}{NAMES[stem]}.{suffix}", values, quantise)
    for name, parts in experts.items():
        add(writer, name, np.stack(parts), quantise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


def add(writer: Any, name: str, values: np.ndarray, quantise: bool) -> None:
    if quantise and values.ndim > 1:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_family_reads_as_transformers_does(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    write(path, architecture)
    config, params = load_gguf(path)
    assert config == CONFIGS[architecture]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for layer in range(config.num_layers):  # transformers keeps the experts of a layer together
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.gate_up_proj" in state:
            both, down = state.pop(f"{prefix}.gate_up_proj"), state.pop(f"{prefix}.down_proj")
            for expert in range(config.num_experts):
                state[f"{prefix}.{expert}.gate_proj.weight"], state[f"{prefix}.{expert}.up_proj.weight"] = np.split(
                    both[expert], 2
                )
                state[f"{prefix}.{expert}.down_proj.weight"] = down[expert]
    if config.tie_embeddings:
        del state["lm_head.weight"]
    found = {}
    for keys, _, slots in leaf_slots(config):
        leaf = np.asarray(params[keys[0]] if len(keys) == 1 else params[keys[0]][keys[1]])
        found |= {slot.name: slot.to_tensor(leaf[slot.at]) for slot in slots}
    assert set(found) == set(state)
    for name, values in found.items():
        np.testing.assert_array_equal(values, state[name], err_msg=name)


def test_quantised_experts_are_dequantised_one_by_one(tmp_path):
    path = tmp_path / "model.gguf"
    stored = write(path, "qwen3moe", quantise=True)
    _, params = load_gguf(path)
    for name in ("gate", "up", "down", "wq"):
        expected, actual = stored["layers"][name], np.asarray(params["layers"][name])
        assert 0 < np.abs(actual - expected).max() < 0.02  # Q8_0 of unit normals: half a step of max / 127


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"llama.rope.scaling.type: .*found 'yarn'"),
        (lambda w: w.add_rope_dimension_count(8), r"llama.rope.dimension_count: expected 16 .*, found 8"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), r"extra: .*rope_freqs.weight \[8\]"),
        (lambda w: w.add_tensor("blk.2.attn_q.weight", np.ones((4, 4), np.float32)), r"extra: .*layers.2.self_attn.q"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), r"missing: expected .*bias"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, message):
    path = tmp_path / "model.gguf"
    write(path, "llama", change)
    with pytest.raises(WeightsError, match=message):
        load_gguf(path)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    whole = path.read_bytes()
    for data in (whole[:-200], whole[:100], b"GGUF", b"", b"nonsense" * 99):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"model.gguf: expected a whole GGUF file"):
            load_gguf(path)
    with pytest.raises(WeightsError, match=r"none.gguf: expected a whole GGUF file"):
        load_gguf(tmp_path / "none.gguf")
    write(path, "qwen3")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"qwenX"))
    with pytest.raises(WeightsError, match=r"general.architecture: expected one of .*found 'qwenX'"):
        load_gguf(path)
    write(path, "llama")
    with pytest.raises(ConfigError, match="dtype"):
        load_gguf(path, dtype="int8")

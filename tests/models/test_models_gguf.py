"""GGUF files: small ones of every family against transformers' reader, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rome.models import ConfigError, ModelConfig, PretrainedTokenizer, TokenizerError, param_specs
from rome.models.families import to_hf_config
from rome.models.params import is_spec
from rome.models.tokenizer import BYTE_OF
from rome.models.weights import WeightsError, load_gguf, open_gguf
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


def write(
    path: Path,
    architecture: str,
    change: Any = lambda writer: None,
    quantise: bool = False,
    alter: Any = lambda name, values: values,
) -> dict:
    """A random model's file; its parameters as NumPy leaves. Queries and keys of Llama go in as the file has them.

    ``alter`` gets each tensor and returns what to write instead; None leaves it out.
    """
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
            name = f"{layer}{NAMES[stem]}.{suffix}"
            if (values := alter(name, values)) is not None:
                add(writer, name, values, quantise)
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
    # transformers' reader takes Qwen3's head and expert widths for the default ones: it is told the config
    told = transformers.AutoConfig.for_model(**to_hf_config(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=told, dtype="float32"
    )
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
        (lambda w: w.add_sliding_window(8), r"llama.attention.sliding_window: unknown key, with value 8"),
        (lambda w: w.add_expert_count(8), r"llama.expert_count: expected 0 .*, found 8"),
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


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("blk.1.ffn_up.weight", None, r"missing: expected model.layers.1.mlp.up_proj.weight \[96, 64\]; found no such"),
        ("token_embd.weight", None, r"missing: expected token_embd.weight, found no such tensor"),
        (
            "blk.1.attn_k.weight",
            np.ones((48, 64), np.float32),
            r"layers.1.self_attn.k_proj.weight: expected shape \[32, 64\], found \[48, 64\] in .*blk.1.attn_k.weight",
        ),
        ("token_embd.weight", np.ones((60, 64), np.float32), r"llama.vocab_size: expected 60 .*, found 64"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(tmp_path, part, change, message):
    path = tmp_path / "model.gguf"
    write(path, "llama", alter=lambda name, values: change if name == part else values)
    with pytest.raises(WeightsError, match=message):
        load_gguf(path)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.I8, 9999])
def test_a_type_that_cannot_be_dequantised_is_refused_before_any_data_is_read(tmp_path, kind):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    data = bytearray(path.read_bytes())
    # the name is followed by the number of axes, two axes of 8 bytes, and the type
    at = data.index(b"blk.1.ffn_down.weight") + len(b"blk.1.ffn_down.weight") + 4 + 16
    data[at : at + 4] = int(kind).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"blk.1.ffn_down.weight: expected a type .*, found type {int(kind)}"):
        load_gguf(path)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.attn_norm.weight") + len(b"blk.1.attn_norm.weight") + 4
    data[at : at + 12] = (63).to_bytes(8, "little") + int(gguf.GGMLQuantizationType.Q8_0).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"blk.1.attn_norm.weight: expected rows of blocks of 32 .*shape \[63\]"):
        load_gguf(path)


def test_a_file_cut_in_its_data_names_the_first_tensor_that_is_not_whole(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    whole, tensors = path.read_bytes(), list(open_gguf(path).tensors.values())
    for tensor in (tensors[0], tensors[5], tensors[-1]):
        for left in (tensor.start, tensor.start + tensor.size - 1):
            path.write_bytes(whole[:left])
            expected = rf"{tensor.name}: expected bytes {tensor.start}..{tensor.start + tensor.size}, the file ends"
            with pytest.raises(WeightsError, match=rf"{expected} at {left}"):
                load_gguf(path)


def test_a_file_cut_anywhere_in_its_header_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama", lambda writer: writer.add_token_list(["a", "b"]))
    whole, first = path.read_bytes(), next(iter(open_gguf(path).tensors.values())).start
    for left in range(0, first, 3):
        path.write_bytes(whole[:left])
        with pytest.raises(WeightsError, match=r"model.gguf: .*expected"):
            open_gguf(path)


def test_metadata_is_that_of_the_package_gguf(tmp_path):
    """Every kind of value, and where each tensor lies."""
    path = tmp_path / "model.gguf"

    def change(writer: Any) -> None:
        for method in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            getattr(writer, f"add_{method}")(f"test.{method}", 2 ** (int(method.strip("uint")) - 1) - 1)
        writer.add_float32("test.float32", -0.1)
        writer.add_float64("test.float64", -0.1)
        writer.add_bool("test.bool", True)
        writer.add_string("test.string", "naïve 🙂")
        writer.add_array("test.strings", ["", "é", "x" * 300])
        writer.add_array("test.numbers", [1, -2, 3])
        writer.add_custom_alignment(64)

    write(path, "qwen3moe", change)
    file, oracle = open_gguf(path), gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert file.fields == expected
    assert [(t.name, t.start, t.size, t.kind) for t in file.tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes, t.tensor_type) for t in oracle.tensors
    ]
    assert all(t.start % 64 == 0 for t in file.tensors.values())


def test_what_is_no_gguf_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    whole = path.read_bytes()
    broken = {
        b"": "expected a GGUF file",
        b"nonsense" * 99: "starts with b'GGUF', found b'nons'",
        whole[:4] + b"\1" + whole[5:]: "version: expected one of .*, found 1",
        whole.replace(b"llama.block_count", b"llama.head_count\xff"): "a metadata key in UTF-8",
        whole.replace(b"llama.block_count", b"llama.vocab_size\0"): "llama.block_count: expected int, found nothing",
        whole.replace(b"output_norm.weight", b"blk.0.attn_q.weigh"): "missing",
    }
    for data, message in broken.items():
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            load_gguf(path)
    with pytest.raises(WeightsError, match=r"none.gguf: expected a GGUF file"):
        load_gguf(tmp_path / "none.gguf")
    write(path, "qwen3")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"qwenX"))
    with pytest.raises(WeightsError, match=r"general.architecture: expected one of .*found 'qwenX'"):
        load_gguf(path)
    write(path, "llama")
    with pytest.raises(ConfigError, match="dtype"):
        load_gguf(path, dtype="int8")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "qwen2", r"tokenizer.ggml.pre: expected 'smollm', found 'qwen2'"),
        ("tokens", None, r"tokenizer.ggml.tokens: expected list, found None"),
        ("token_type", [1], r"tokenizer.ggml.token_type: expected 258 types, found 1"),
        ("eos_token_id", 258, r"tokenizer.ggml.eos_token_id: expected an id, found 258"),
        ("eos_token_id", "x", r"tokenizer.ggml.eos_token_id: expected int, found 'x'"),
    ],
)
def test_tokenizers_in_files_are_refused_where_they_make_no_sense(tmp_path, key, value, message):
    pieces = ["<|end|>", *sorted(BYTE_OF), "ab"]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": pieces, "merges": ["a b"], "eos_token_id": 0}
    fields["token_type"] = [3] + [1] * (len(pieces) - 1)

    def change(writer: Any) -> None:
        for name, content in fields.items():
            kind = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}.get(type(content))
            if kind is not None:
                kind(f"tokenizer.ggml.{name}", content)

    path = tmp_path / "model.gguf"
    write(path, "llama", change)
    tokenizer = PretrainedTokenizer.from_gguf(path)
    assert tokenizer.decode(tokenizer.encode("abba é")) == "abba é"
    assert tokenizer.stop_ids == {0}
    fields[key] = value
    write(path, "llama", change)
    with pytest.raises(TokenizerError, match=message):
        PretrainedTokenizer.from_gguf(path)

"""Every field of every family's config against Hugging Face transformers, and configs in both directions."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from rome.models import ConfigError, ModelConfig, RopeScaling, count_params, extend, forward, init_cache
from rome.models.families import PRESETS, from_hf_config, preset, to_hf_config
from rome.models.weights import LazyTensor, load_params

oracle = pytest.importorskip("hf_oracle", reason="needs torch and transformers", exc_type=ImportError)

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.02,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 60.0},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
BASES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "qwen2": COMMON | WINDOW | {"max_window_layers": 1},
    "qwen3": COMMON | WINDOW | {"head_dim": 8, "attention_bias": True, "max_window_layers": 2},
    "qwen3_moe": COMMON
    | WINDOW
    | {
        "head_dim": 8,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
}
YARN = {"rope_type": "yarn", "rope_theta": 60.0, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# what is changed; a pair (b, a): a differs from b, and not only from the base
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 60.0, "factor": 3.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.5, "high_freq_factor": 2.5}}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 48, "factor": 9.0}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 5.0, "beta_slow": 0.3, "truncate": False}}),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.4}}),
    ("llama", {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}}),
    ("llama", {"rms_norm_eps": 0.3}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": False}),
    ("llama", {"mlp_bias": False}),
    ("llama", {"head_dim": 6}),
    ("llama", {"hidden_size": 32}),
    ("llama", {"num_attention_heads": 6}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_hidden_layers": 2}),
    ("qwen2", {"sliding_window": 3}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"max_window_layers": 2}),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen3", {"attention_bias": False}),
    ("qwen3", {"head_dim": 4}),
    ("qwen3", {"intermediate_size": 28}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"num_experts_per_tok": 3}),
    ("qwen3_moe", {"num_experts": 4}),
    ("qwen3_moe", {"moe_intermediate_size": 8}),
    ("qwen3_moe", {"mlp_only_layers": []}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("qwen3_moe", {"sliding_window": 9, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("qwen3_moe", {"attention_bias": True}),
]
TOKENS = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, 26)).astype(np.int32)


@cache
def compare(model_type: str, changes: str) -> np.ndarray:
    """Our logits of a model, once they agree with the oracle's. Eager: each case would compile another program."""
    model = oracle.hf_model(model_type, BASES[model_type] | json.loads(changes))
    raw = json.loads(json.dumps(model.config.to_diff_dict()))
    config = from_hf_config(raw)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {name: LazyTensor(value.shape, "memory", lambda value=value: value) for name, value in state.items()}
    positions = np.tile(np.arange(TOKENS.shape[1], dtype=np.int32), (len(TOKENS), 1))
    with jax.disable_jit():
        params = load_params(tensors, config)
        ours = np.asarray(forward(params, config, TOKENS, positions, np.ones_like(TOKENS)))
    expected = oracle.hf_logits(model, TOKENS)
    assert np.abs(expected).max() > 1.0  # 1e-4 is little beside what is compared
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    assert from_hf_config(to_hf_config(config)) == config
    return ours


@pytest.mark.parametrize(("model_type", "changes"), CHANGES, ids=lambda value: json.dumps(value)[:60])
def test_every_field_changes_the_logits_as_it_does_upstream(model_type, changes):
    base = compare(model_type, "{}")
    changed = compare(model_type, json.dumps(changes))
    assert np.abs(changed - base).max() > 1e-2


# no part of the function that a model computes: how it is computed, how it starts, and what training adds
RUNTIME = {
    *("dtype", "param_dtype", "remat", "scan_layers", "head_chunk", "attention_kernel", "moe_dispatch"),
    *("qk_norm_init", "router_aux_loss_coef", "router_z_loss_coef", "max_position_embeddings"),
}


def test_no_field_is_left_out():
    """The cases above change every field of a config and of its rope scaling, or the families differ in it."""

    def fields(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
        raw = oracle.CLASSES[model_type][0](**BASES[model_type] | changes).to_diff_dict()
        config = from_hf_config(json.loads(json.dumps(raw)))
        found = dict(vars(config))
        scaling = vars(found.pop("rope_scaling") or RopeScaling("linear", 1.0))
        return found | {f"rope_scaling.{name}": value for name, value in scaling.items()}

    changed = set()
    for model_type, changes in CHANGES:
        before, after = fields(model_type, {}), fields(model_type, changes)
        changed |= {name for name in after if before.get(name) != after[name]}
    bases = [fields(model_type, {}) for model_type in BASES]
    changed |= {name for base in bases for name in base if base[name] != bases[0][name]}
    named = {field.name for field in dataclasses.fields(ModelConfig)} - {"rope_scaling", "vocab_size"} - RUNTIME
    named |= {f"rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
    assert named - changed == set()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_the_cache_sees_the_same_windows_and_layers(model_type):
    """Compiled, scanned over runs of layers, and decoded in two deltas: the same logits as upstream's."""
    model = oracle.hf_model(model_type, BASES[model_type])
    config = from_hf_config(model.config.to_diff_dict())
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = load_params({n: LazyTensor(v.shape, "memory", lambda v=v: v) for n, v in state.items()}, config)
    expected = oracle.hf_logits(model, TOKENS)
    step = jax.jit(extend, static_argnums=1)
    cache, width = init_cache(config, 2, 32), 13
    for start in (0, width):
        logits, cache = step(params, config, cache, TOKENS[:, start : start + width], np.full(2, width, np.int32))
        np.testing.assert_allclose(logits, expected[:, start + width - 1], rtol=0, atol=1e-4)
    positions = np.tile(np.arange(26, dtype=np.int32), (2, 1))
    whole = jax.jit(forward, static_argnums=1)(params, config, TOKENS, positions, np.ones_like(TOKENS))
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)


# ---- configs alone

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_30b_preset_is_what_its_published_config_says():
    config = preset("qwen3-coder-30b-a3b")
    assert from_hf_config(QWEN3_MOE) == config
    assert from_hf_config(to_hf_config(config)) == config
    assert count_params(config) == count_params(preset("qwen3-30b-a3b")) == 30_532_122_624
    assert count_params(config, active=True) == 3_353_032_704


# as their model cards and files count them
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
}


def test_presets_have_the_published_number_of_parameters():
    assert set(PUBLISHED) | {"qwen3-30b-a3b", "qwen3-coder-30b-a3b"} == set(PRESETS)
    for name, expected in PUBLISHED.items():
        assert count_params(preset(name)) == expected, name
        assert from_hf_config(to_hf_config(preset(name))) == preset(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated_attention": True}, r"gated_attention: unknown field, with value True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: unknown field"),
        ({"model_type": "mamba"}, r"model_type: expected one of .*qwen3_moe.*, found 'mamba'"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "architectures: expected"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"hidden_size": "2048"}, "hidden_size: expected int, found '2048'"),
        ({"hidden_size": None}, "hidden_size: expected int, found nothing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected bool, found 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: expected .*'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "bend": 1}}, "rope_scaling.bend: unknown field"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: expected float, found nothing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: expected a number >= 1"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers: expected layers in 0..47"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: expected a positive integer"),
        ({"num_experts_per_tok": 129}, "num_experts_per_token: expected 1..128, got 129"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, found 0.5"),
    ],
)
def test_configs_with_unknown_or_unsupported_fields_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(QWEN3_MOE | changes)


@pytest.mark.parametrize(
    ("base", "changes", "field"),
    [
        ("qwen3-8b", {"output_bias": True}, "output_bias"),
        ("qwen3-8b", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3-8b", {"max_position_embeddings": 0}, "max_position_embeddings"),
        ("qwen3-30b-a3b", {"qk_norm": False}, "qk_norm"),
        ("qwen3-30b-a3b", {"sliding_window": 8, "sliding_layers": (3,)}, "sliding_layers"),
        ("llama-3.2-1b", {"sliding_window": 8, "sliding_layers": (3,)}, "sliding_window"),
    ],
)
def test_what_no_family_can_express_is_not_exported(base, changes, field):
    with pytest.raises(ConfigError, match=rf"ModelConfig\.{field}"):
        to_hf_config(dataclasses.replace(preset(base), **changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sliding_window": 4}, "sliding_window"),
        ({"sliding_layers": (0,)}, "sliding_window"),
        ({"sliding_window": 4, "sliding_layers": (1, 0)}, "sliding_layers"),
        ({"sliding_window": 4, "sliding_layers": (2,)}, "sliding_layers"),
        ({"dense_layers": (0,)}, "dense_layers"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ],
)
def test_model_configs_that_contradict_themselves_are_refused(changes, field):
    with pytest.raises(ConfigError, match=rf"ModelConfig\.{field}: expected"):
        ModelConfig(61, 16, 2, 4, 2, 8, 20, **changes)


@pytest.mark.parametrize(
    ("kind", "fields", "field"),
    [
        ("ntk", {}, "kind"),
        ("linear", {"original_positions": 8}, "original_positions"),
        ("yarn", {}, "original_positions"),
        ("llama3", {"original_positions": 8, "low_freq_factor": 4.0}, "low_freq_factor"),
        ("llama3", {"original_positions": 8, "beta_fast": 8.0}, "beta_fast"),
        ("yarn", {"original_positions": 8, "attention_factor": 0.0}, "attention_factor"),
    ],
)
def test_rope_scalings_that_contradict_themselves_are_refused(kind, fields, field):
    with pytest.raises(ConfigError, match=rf"rope_scaling\.{field}: expected"):
        RopeScaling(kind, 2.0, **fields)


def test_a_cache_longer_than_the_model_is_refused():
    config = dataclasses.replace(preset("smollm2-135m"), num_layers=1)
    with pytest.raises(ConfigError, match="max_length: expected at most max_position_embeddings = 8192, got 8193"):
        init_cache(config, 1, 8193)

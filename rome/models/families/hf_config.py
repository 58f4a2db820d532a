"""Hugging Face configs (``config.json``) to `ModelConfig` and back, for Llama, Qwen2/2.5, Qwen3 and Qwen3-MoE.

Every field of the file is read, known to change nothing that this package computes, or an error. The way back is
checked by going forth again: a model that a family can't express is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rome.models.config import ConfigError, ModelConfig, RopeScaling


@dataclass(frozen=True)
class Family:
    """What a ``model_type`` fixes. ``bias``: q, k and v always have one, or ``attention_bias`` says so for all four.

    ``sliding``: no such field, layer by layer, or all layers alike.
    """

    model_type: str
    architecture: str
    qk_norm: bool = False
    bias: Literal["qkv", "config"] = "config"
    mlp_bias: bool = False
    head_dim: int | None = None
    sliding: Literal["none", "by_layer", "all"] = "none"
    moe: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", mlp_bias=True),
        Family("qwen2", "Qwen2ForCausalLM", bias="qkv", sliding="by_layer"),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, head_dim=128, sliding="by_layer"),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, sliding="all", moe=True),
    )
}

# These tell how the model is trained, stored or sampled from, not what it computes.
_IGNORED = frozenset(
    (
        *("transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef"),
    )
)
_MISSING = object()


class _Fields:
    """A config's fields, each taken once; what is left at the end is unknown."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = dict(raw)
        self._where = where

    def take(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """The field as ``kind``; ``default`` if it is absent or null. Integers pass for floats."""
        value = self._raw.pop(name, None)
        if value is None:
            if default is _MISSING:
                raise self.error(name, kind.__name__, "nothing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(name, kind.__name__, repr(value))
        return value

    def expect(self, name: str, *values: Any) -> None:
        """The field may be absent or null, or have one of the values: others are not supported."""
        value = self._raw.pop(name, None)
        if value is not None and value not in values:
            raise self.error(name, " or ".join(map(repr, values)), repr(value))

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        if unknown := sorted(set(self._raw) - ignored):
            raise ConfigError(f"{self._where}.{unknown[0]}: unknown field, with value {self._raw[unknown[0]]!r}")

    def error(self, name: str, expected: str, found: str) -> ConfigError:
        return ConfigError(f"{self._where}.{name}: expected {expected}, found {found}")


def from_hf_config(raw: Mapping[str, Any], **runtime: Any) -> ModelConfig:
    """The model that a ``config.json`` describes, in float32.

    Args:
        raw: the parsed file. Both ways of writing rotary parameters are read: ``rope_theta`` with ``rope_scaling``
            (transformers 4) and ``rope_parameters`` (5).
        runtime: fields of `ModelConfig` that such a file doesn't have (``dtype``, ``param_dtype``, ``remat``...).

    Raises:
        ConfigError: names the field that is unknown, missing, of the wrong type, or has an unsupported value.
        TypeError: ``runtime`` names a field that the file determines.
    """
    return ModelConfig(**_architecture(raw), **runtime)


def _architecture(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that the file determines."""
    fields = _Fields(raw, "config.json")
    model_type = fields.take("model_type", str)
    if model_type not in FAMILIES:
        raise fields.error("model_type", f"one of {sorted(FAMILIES)}", repr(model_type))
    family = FAMILIES[model_type]
    fields.expect("architectures", [family.architecture])
    fields.expect("hidden_act", "silu")
    fields.expect("attention_dropout", 0, 0.0)
    fields.expect("pretraining_tp", 1)
    heads, hidden = fields.take("num_attention_heads", int), fields.take("hidden_size", int)
    if heads < 1:
        raise fields.error("num_attention_heads", "a positive integer", repr(heads))
    result = {
        "vocab_size": fields.take("vocab_size", int),
        "hidden_size": hidden,
        "num_layers": fields.take("num_hidden_layers", int),
        "num_heads": heads,
        # only Llama's default is certain: one a query head
        "num_kv_heads": fields.take("num_key_value_heads", int, heads if model_type == "llama" else _MISSING),
        "head_dim": fields.take("head_dim", int, family.head_dim or hidden // heads),
        "intermediate_size": fields.take("intermediate_size", int),
        "max_position_embeddings": fields.take("max_position_embeddings", int),
        "rms_norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, False),
        "qk_norm": family.qk_norm,
    }
    result |= _rope(fields, result["max_position_embeddings"])
    result |= _biases(fields, family) | _sliding(fields, family, result["num_layers"])
    result |= _experts(fields, result["num_layers"]) if family.moe else {"num_experts": 0, "dense_layers": ()}
    fields.finish(_IGNORED)
    return result


def _biases(fields: _Fields, family: Family) -> dict[str, Any]:
    attention = fields.take("attention_bias", bool, False) if family.bias == "config" else False
    mlp = fields.take("mlp_bias", bool, False) if family.mlp_bias else False
    return {"qkv_bias": attention or family.bias == "qkv", "output_bias": attention, "mlp_bias": mlp}


def _sliding(fields: _Fields, family: Family, layers: int) -> dict[str, Any]:
    none: dict[str, Any] = {"sliding_window": 0, "sliding_layers": ()}
    if family.sliding == "none":
        return none
    slides = fields.take("use_sliding_window", bool, False)
    window = fields.take("sliding_window", int, 4096)
    first = fields.take("max_window_layers", int, 28 if family.sliding == "by_layer" else 0)
    chosen = [index for index in range(layers) if family.sliding == "all" or index >= first]
    if family.sliding == "by_layer":
        kinds = fields.take("layer_types", list, None)
        if kinds is not None:
            if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
                raise fields.error("layer_types", f"{layers} of 'full_attention' or 'sliding_attention'", repr(kinds))
            chosen = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
            if chosen and not slides:
                raise fields.error("layer_types", "only 'full_attention' without use_sliding_window", repr(kinds))
    if not slides or not chosen:
        return none
    return {"sliding_window": window, "sliding_layers": tuple(chosen)}


def _experts(fields: _Fields, layers: int) -> dict[str, Any]:
    step = fields.take("decoder_sparse_step", int, 1)
    if step < 1:
        raise fields.error("decoder_sparse_step", "a positive integer", repr(step))
    listed = fields.take("mlp_only_layers", list, [])
    if any(type(layer) is not int or not 0 <= layer < layers for layer in listed):
        raise fields.error("mlp_only_layers", f"layers in 0..{layers - 1}", repr(listed))
    experts = fields.take("num_local_experts", int, None) or fields.take("num_experts", int)
    fields.expect("num_experts", experts)
    return {
        "num_experts": experts,
        "num_experts_per_token": fields.take("num_experts_per_tok", int),
        "moe_intermediate_size": fields.take("moe_intermediate_size", int),
        "norm_topk_prob": fields.take("norm_topk_prob", bool, False),
        "dense_layers": tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step),
    }


def _rope(fields: _Fields, max_positions: int) -> dict[str, Any]:
    theta = fields.take("rope_theta", float, 1e4)
    new, old = fields.take("rope_parameters", dict, None), fields.take("rope_scaling", dict, None)
    if new is not None and old is not None:
        raise fields.error("rope_scaling", "null beside rope_parameters", repr(old))
    rope = _Fields(new or old or {}, "config.json.rope_parameters" if new else "config.json.rope_scaling")
    theta = rope.take("rope_theta", float, theta)
    rope.expect("partial_rotary_factor", 1.0)
    fields.expect("partial_rotary_factor", 1.0)
    kind = rope.take("type", str, "default")
    kind = rope.take("rope_type", str, kind)
    scaling: dict[str, Any] = {}
    if kind in ("llama3", "yarn"):
        scaling["original_positions"] = rope.take("original_max_position_embeddings", int, max_positions)
    if kind == "llama3":
        scaling |= {name: rope.take(name, float) for name in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        scaling |= {"beta_fast": rope.take("beta_fast", float, 32.0), "beta_slow": rope.take("beta_slow", float, 1.0)}
        scaling["truncate"] = rope.take("truncate", bool, True)
    elif kind not in ("default", "linear"):
        raise rope.error("rope_type", "one of ('default', 'linear', 'llama3', 'yarn')", repr(kind))
    if kind == "default":
        rope.finish()
        return {"rope_theta": theta, "rope_scaling": None}
    factor = rope.take("factor", float)
    if kind == "yarn":
        scaling["attention_factor"] = _attention_factor(rope, factor)
    rope.finish()
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, factor, **scaling)}


def _attention_factor(rope: _Fields, factor: float) -> float | None:
    given = rope.take("attention_factor", float, None)
    scale, scale_all = rope.take("mscale", float, 0.0), rope.take("mscale_all_dim", float, 0.0)
    if given is not None or not (scale and scale_all):
        return given
    log = math.log(max(factor, 1.0))
    return (0.1 * scale * log + 1.0) / (0.1 * scale_all * log + 1.0)


def family_of(config: ModelConfig) -> Family:
    """The family whose checkpoints look like this model's; `to_hf_config` finds out whether it really is one."""
    if config.is_moe:
        return FAMILIES["qwen3_moe"]
    if config.qk_norm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if config.qkv_bias and not config.output_bias else "llama"]


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model, as transformers 4 and 5 read it. ``from_hf_config`` gives the same model back.

    Raises:
        ConfigError: names a field whose value no family of `FAMILIES` can express.
    """
    family = family_of(config)
    if not config.max_position_embeddings:
        raise ConfigError("ModelConfig.max_position_embeddings: expected a positive integer to export, got 0")
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _hf_rope_scaling(config.rope_scaling),
        "attention_dropout": 0.0,
    }
    if family.bias == "config":
        raw["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        raw["mlp_bias"] = config.mlp_bias
    if family.sliding != "none":
        slides = bool(config.sliding_layers)
        raw |= {"use_sliding_window": slides, "sliding_window": config.sliding_window if slides else None}
    if family.sliding == "by_layer":
        slow = set(config.sliding_layers)
        kinds = ["sliding_attention" if index in slow else "full_attention" for index in range(config.num_layers)]
        raw |= {"layer_types": kinds, "max_window_layers": config.num_layers}
    if family.moe:
        raw |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_token,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
        }
    for name, value in _architecture(raw).items():
        if value != getattr(config, name):
            raise ConfigError(
                f"ModelConfig.{name}: expected {value!r}, as {family.model_type} has it, got {getattr(config, name)!r}"
            )
    return raw


def _hf_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    raw: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        raw["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        raw |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            raw["attention_factor"] = scaling.attention_factor
    return raw

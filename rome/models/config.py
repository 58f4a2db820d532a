"""The hyperparameters of the transformer: one frozen, hashable value that jit can take as static."""

from __future__ import annotations

from dataclasses import dataclass

_DTYPES = ("float32", "bfloat16", "float16")
_DISPATCHES = ("auto", "dense", "sparse", "ragged")


class ConfigError(ValueError):
    """A field of a config has a value that it can't have; the message names the field and what was expected."""


@dataclass(frozen=True)
class ModelConfig:
    """Decoder-only transformer of the Qwen3 family, dense (``num_experts == 0``) or mixture of experts.

    ``qk_norm_init`` is the initial gain of the per-head query and key norms; 1.5 sharpens attention enough for small
    models to learn copying early. ``dtype`` is that of activations and of the KV cache, ``param_dtype`` that of stored
    parameters; norms, softmax, routing and log-probs are float32 whatever the two say.

    ``head_chunk`` is how many tokens `token_log_probs` turns into logits at a time. ``moe_dispatch`` picks how tokens
    reach their experts (`rome.models.moe`); ``auto`` takes the one with less to multiply.
    ``scan_layers`` compiles one layer and loops over it; unrolled layers compile longer and run faster when small.

    Raises:
        ConfigError: a field is out of range or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = True
    qk_norm_init: float = 1.0
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    moe_dispatch: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    scan_layers: bool = True
    head_chunk: int = 1024

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "head_chunk"):
            _require(getattr(self, name) >= 1, name, "a positive integer", getattr(self, name))
        _require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", "a divisor of num_heads", self.num_kv_heads)
        _require(self.head_dim % 2 == 0, "head_dim", "an even number (rotary pairs)", self.head_dim)
        _require(self.rope_theta > 0, "rope_theta", "a positive number", self.rope_theta)
        _require(self.rms_norm_eps > 0, "rms_norm_eps", "a positive number", self.rms_norm_eps)
        _require(self.dtype in _DTYPES, "dtype", f"one of {_DTYPES}", self.dtype)
        _require(self.param_dtype in _DTYPES, "param_dtype", f"one of {_DTYPES}", self.param_dtype)
        _require(self.moe_dispatch in _DISPATCHES, "moe_dispatch", f"one of {_DISPATCHES}", self.moe_dispatch)
        if self.is_moe:
            top = self.num_experts_per_token
            _require(1 <= top <= self.num_experts, "num_experts_per_token", f"1..{self.num_experts}", top)
            size = self.moe_intermediate_size
            _require(size >= 1, "moe_intermediate_size", "a positive integer", size)
        else:
            _require(self.num_experts == 0, "num_experts", "0 or a positive integer", self.num_experts)
            _require(self.intermediate_size >= 1, "intermediate_size", "a positive integer", self.intermediate_size)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


def _require(condition: bool, field: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"ModelConfig.{field}: expected {expected}, got {value!r}")

"""The hyperparameters of the transformer: one frozen, hashable value that jit can take as static."""

from __future__ import annotations

from dataclasses import dataclass

_DTYPES = ("float32", "bfloat16", "float16")
_DISPATCHES = ("auto", "dense", "sparse", "ragged")
_KERNELS = ("auto", "xla", "cudnn", "splash")
_ROPE_KINDS = ("linear", "llama3", "yarn")


class ConfigError(ValueError):
    """A field of a config has a value that it can't have; the message names the field and what was expected."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed for contexts longer than those of pre-training (`rome.models.rope`).

    ``linear`` (position interpolation) divides all of them by ``factor``. ``llama3`` divides those whose wavelength
    exceeds ``original_positions / low_freq_factor``, keeps those below ``original_positions / high_freq_factor``, and
    blends in between. ``yarn`` blends from the pair that turns ``beta_fast`` times in ``original_positions`` to the one
    that turns ``beta_slow`` times (``truncate`` rounds these two outwards to whole pairs), and multiplies queries and
    keys by ``attention_factor`` (None: 0.1 ln(factor) + 1).

    Raises:
        ConfigError: a field is out of range, or set although its kind doesn't read it.
    """

    kind: str
    factor: float
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, expected: str) -> None:
            _require(condition, f"rope_scaling.{field}", expected, getattr(self, field))

        require(self.kind in _ROPE_KINDS, "kind", f"one of {_ROPE_KINDS}")
        require(self.factor >= 1, "factor", "a number >= 1")
        if self.kind == "linear":
            require(self.original_positions == 0, "original_positions", "0 (linear doesn't read it)")
        else:
            require(self.original_positions >= 1, "original_positions", "a positive integer")
        if self.kind == "llama3":
            require(0 < self.low_freq_factor < self.high_freq_factor, "low_freq_factor", "0 < low < high_freq_factor")
        else:
            require(self.low_freq_factor == 1.0, "low_freq_factor", "1.0 (only llama3 reads it)")
            require(self.high_freq_factor == 4.0, "high_freq_factor", "4.0 (only llama3 reads it)")
        if self.kind == "yarn":
            require(0 < self.beta_slow <= self.beta_fast, "beta_slow", "0 < slow <= beta_fast")
            require(self.attention_factor is None or self.attention_factor > 0, "attention_factor", "positive or None")
        else:
            require(self.beta_fast == 32.0, "beta_fast", "32.0 (only yarn reads it)")
            require(self.beta_slow == 1.0, "beta_slow", "1.0 (only yarn reads it)")
            require(self.truncate, "truncate", "True (only yarn reads it)")
            require(self.attention_factor is None, "attention_factor", "None (only yarn reads it)")


@dataclass(frozen=True)
class ModelConfig:
    """Decoder-only transformer of the Llama, Qwen2 and Qwen3 families, dense (``num_experts == 0``) or mixture of
    experts. `rome.models.families` makes one from a Hugging Face config.

    ``rope_scaling`` stretches the context; ``max_position_embeddings`` is the longest that the model is meant for (0:
    not known), and no KV cache may be longer. Layers in ``sliding_layers`` see ``sliding_window`` tokens, the token
    itself included; those in ``dense_layers`` have a plain MLP of ``intermediate_size`` although the model has experts.
    Both are increasing 0-based indices. ``qkv_bias``, ``output_bias`` and ``mlp_bias`` add biases to the projections of
    attention, to its output and to dense MLPs.

    ``qk_norm_init`` is the initial gain of the per-head query and key norms; 1.5 sharpens attention enough for small
    models to learn copying early. ``dtype`` is that of activations and of the KV cache, ``param_dtype`` that of stored
    parameters; norms, softmax, routing and log-probs are float32 whatever the two say.

    ``head_chunk`` is how many tokens `token_log_probs` turns into logits at a time. ``moe_dispatch`` picks how tokens
    reach their experts (`rome.models.moe`), ``attention_kernel`` who multiplies queries and keys
    (`rome.models.kernels`); ``auto`` takes what suits the shapes and the platform.
    ``router_aux_loss_coef`` and ``router_z_loss_coef`` weigh the router's load-balance and z-loss in training (0: off).
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
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 0
    sliding_window: int = 0
    sliding_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = True
    qk_norm_init: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    moe_dispatch: str = "auto"
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    attention_kernel: str = "auto"
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
        _require(self.attention_kernel in _KERNELS, "attention_kernel", f"one of {_KERNELS}", self.attention_kernel)
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            _require(value == 0 or (value > 0 and self.is_moe), name, "0, or a positive number with experts", value)
        size = self.max_position_embeddings
        _require(size >= 0, "max_position_embeddings", "0 or a positive integer", size)
        self._require_layers("sliding_layers")
        self._require_layers("dense_layers")
        window = self.sliding_window
        _require((window >= 1) == bool(self.sliding_layers), "sliding_window", "positive iff any layer slides", window)
        if self.is_moe:
            top = self.num_experts_per_token
            _require(1 <= top <= self.num_experts, "num_experts_per_token", f"1..{self.num_experts}", top)
            size = self.moe_intermediate_size
            _require(size >= 1, "moe_intermediate_size", "a positive integer", size)
            most = self.num_layers - 1
            _require(len(self.dense_layers) <= most, "dense_layers", f"at most {most} layers", self.dense_layers)
        else:
            _require(self.num_experts == 0, "num_experts", "0 or a positive integer", self.num_experts)
            _require(not self.dense_layers, "dense_layers", "() without experts", self.dense_layers)
        if self.has_dense_mlp:
            _require(self.intermediate_size >= 1, "intermediate_size", "a positive integer", self.intermediate_size)
        else:
            _require(not self.mlp_bias, "mlp_bias", "False without a dense MLP", self.mlp_bias)

    def _require_layers(self, field: str) -> None:
        layers = getattr(self, field)
        increasing = isinstance(layers, tuple) and list(layers) == sorted(set(layers))
        inside = increasing and all(0 <= layer < self.num_layers for layer in layers)
        _require(inside, field, f"a tuple of increasing layers in 0..{self.num_layers - 1}", layers)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def routed_layers(self) -> int:
        """How many layers have a router."""
        return self.num_layers - len(self.dense_layers) if self.is_moe else 0

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens each layer sees, the token itself included; 0: all."""
        return tuple(self.sliding_window * (layer in self.sliding_layers) for layer in range(self.num_layers))

    @property
    def has_dense_mlp(self) -> bool:
        return not self.is_moe or bool(self.dense_layers)


def _require(condition: bool, field: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"ModelConfig.{field}: expected {expected}, got {value!r}")

"""Our model as an engine of JetStream (google-jetstream 0.2.2, extra `jetstream`), for its orchestrator and server.

Import this module only where that package is; nothing else in `rome` does. It brings TensorFlow along, its upstream is
archived, and the package that is named just `jetstream` is something else.

JetStream's `ResultTokens` has no place for log-probs. They travel in two more columns of the one array that it copies
to the host, which it never looks at, and `log_probs` reads them.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

try:
    from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2
except ImportError as error:
    raise ImportError(
        f"{error}; JetStream's engine needs google-jetstream (not `jetstream`): pip install 'rome-agents[jetstream]'"
    ) from error

from rome.models import ModelConfig, PretrainedTokenizer, Tokenizer, extend, unstack_layers
from rome.rollout.programs import DecodeState, append, bits, empty_state, share
from rome.rollout.sampling import sample_tokens
from rome.rollout.weights import EngineError

_SHORTEST = 16  # the smallest of JetStream's prefill sizes


@flax.struct.dataclass
class JetStreamState:
    """Slots in flight: `slots` of B rows; `keys` uint32[B, 2]; `generated` int32[B], tokens since the prompt;
    `occupied` bool[B]."""

    slots: DecodeState
    keys: jax.Array
    generated: jax.Array
    occupied: jax.Array


class JetStreamEngine(engine_api.Engine):
    """Prefill, insert and generate over `slots` rows of `max_length` tokens.

    Args:
      params, model_config: as for `rome.models.forward`.
      tokenizer: of the model.
      stop_ids: what JetStream ends an answer at.
      temperature: 0 is greedy; `top_k`, `top_p`, `min_p` as in `EngineConfig`.
      seed: of the sampling, with the slot and the position.
    """

    def __init__(
        self,
        params: Any,
        model_config: ModelConfig,
        tokenizer: Tokenizer | PretrainedTokenizer,
        stop_ids: frozenset[int],
        slots: int,
        max_length: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> None:
        if slots < 1 or max_length <= _SHORTEST:
            raise EngineError(
                f"slots, max_length: expected at least 1 and {_SHORTEST + 1}, found {slots}, {max_length}"
            )
        self._params = unstack_layers(params, model_config)
        self._model_config, self._tokenizer, self._stop_ids = model_config, tokenizer, stop_ids
        self._slots, self._max_length, self._seed = slots, max_length, seed
        self._mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
        self._append = jax.jit(functools.partial(append, model_config))
        self._insert = jax.jit(_insert, donate_argnums=1)
        step = functools.partial(_generate, model_config, max_length, temperature, top_k, top_p, min_p)
        self._generate = jax.jit(step, donate_argnums=1)

    def load_params(self, *args: Any, **kwargs: Any) -> Any:
        return self._params

    def init_decode_state(self, *args: Any, **kwargs: Any) -> JetStreamState:
        rows = self._slots
        keys = np.stack([np.full(rows, self._seed, np.uint32), np.arange(rows, dtype=np.uint32)], 1)
        empty = empty_state(self._model_config, rows, self._max_length)
        return JetStreamState(empty, jnp.array(keys), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def prefill(
        self,
        *,
        params: Any,
        existing_prefix: DecodeState | None = None,
        padded_tokens: jax.Array,
        true_length: int,
    ) -> DecodeState:
        """One row that holds the first `true_length` of `padded_tokens` int32[S], after `existing_prefix` if there is
        one, which stays as it was."""
        fresh = existing_prefix is None
        row = empty_state(self._model_config, 1, self._max_length) if fresh else existing_prefix
        tokens = jnp.asarray(padded_tokens, jnp.int32)[None]
        return self._append(params, row, tokens, jnp.array([true_length], jnp.int32), jnp.array([fresh]))

    def insert(self, prefix: DecodeState, decode_state: JetStreamState, slot: int) -> JetStreamState:
        """Slot `slot` goes on from `prefix`, which can be used again. `decode_state` is donated."""
        return self._insert(prefix, decode_state, jnp.int32(slot))

    def generate(self, params: Any, decode_state: JetStreamState) -> tuple[JetStreamState, Any]:
        """One more token for each occupied slot that has room. `decode_state` is donated."""
        state, data = self._generate(params, decode_state)
        return state, engine_api.ResultTokens(data, (0, 1), (1, 2), (2, 3), samples_per_slot=1)

    @staticmethod
    def log_probs(result: Any, slot: int) -> tuple[float, float]:
        """Of the token that a slot got: under the distribution it was drawn from, and raw."""
        sampled, raw = np.asarray(result.data)[slot, 3:].view(np.float32)
        return float(sampled), float(raw)

    def get_prefix_destination_sharding(self) -> Any:
        return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())

    def get_tokenizer(self) -> Any:
        return tokenizer_pb2.TokenizerParameters(path="", extra_ids=0)  # `build_tokenizer` needs none of it

    def build_tokenizer(self, metadata: Any) -> JetStreamTokenizer:
        return JetStreamTokenizer(self._tokenizer, self._stop_ids)

    @property
    def max_concurrent_decodes(self) -> int:
        return self._slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        """The largest of JetStream's prefill sizes, powers of two, that leaves room for a token."""
        return 1 << ((self._max_length - 1).bit_length() - 1)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        return None


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """Our tokenizers in JetStream's shape. Text has no beginning token: chat templates write theirs."""

    def __init__(self, tokenizer: Tokenizer | PretrainedTokenizer, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids

    def encode(self, s: str, **kwargs: Any) -> tuple[Any, int]:
        """Ids, padded to one of JetStream's sizes, and how many there are. `is_bos` is not read; see the class."""
        sizes = {name: kwargs[name] for name in ("prefill_lengths", "max_prefill_length") if name in kwargs}
        ids = np.array(self._tokenizer.encode(s), np.int32)
        padding = kwargs.get("jax_padding", True)
        return token_utils.pad_tokens(ids, self.bos_id, self.pad_id, is_bos=False, jax_padding=padding, **sizes)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return self._tokenizer.decode(token_ids)

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_id

    @property
    def eos_id(self) -> int:
        return min(self._stop_ids)

    @property
    def bos_id(self) -> int:
        return self._tokenizer.pad_id

    @property
    def stop_tokens(self) -> set[int]:
        return set(self._stop_ids)


def _insert(prefix: DecodeState, state: JetStreamState, slot: jax.Array) -> JetStreamState:
    here = jnp.arange(state.generated.shape[0]) == slot
    slots = share(None, state.slots, prefix, jnp.where(here, 0, -1))
    return state.replace(
        slots=slots, generated=jnp.where(here, 0, state.generated), occupied=jnp.where(here, True, state.occupied)
    )


def _generate(
    model_config: ModelConfig,
    max_length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    params: Any,
    state: JetStreamState,
) -> tuple[JetStreamState, jax.Array]:
    """The state, and int32[B, 5]: token, whether it is valid, tokens generated, bits of the two float32 log-probs."""
    cache, logits = state.slots.cache, state.slots.logits
    tokens, logp, raw = sample_tokens(logits, state.keys, cache.length, jnp.float32(temperature), top_k, top_p, min_p)
    live = state.occupied & (cache.length < max_length)
    after, cache = extend(params, model_config, cache, tokens[:, None], live.astype(jnp.int32))
    slots = DecodeState(cache, jnp.where(live[:, None], after, logits))
    generated = state.generated + live
    data = jnp.stack([tokens, live.astype(jnp.int32), generated, bits(logp), bits(raw)], axis=1)
    return state.replace(slots=slots, generated=generated), data

"""The engine of the model service: requests come and go at any step, each with a sampling distribution of its own.

Where `DecodeEngine` decodes whole turns for training, this one advances all its slots by a few tokens at a time, a
*burst*, between which slots are freed, taken and prefilled. It runs on the same model, cache and sampling code.

Freed slots keep what they hold. A new prompt starts from the slot that shares the longest prefix with it (rewound if
that slot is free, copied if it is busy), so a conversation that grows is prefilled only from where it grew, and the
samples of one prompt share its prefill.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rome.models import ModelConfig, extend
from rome.rollout.grammar import Constraint, GrammarError
from rome.rollout.programs import DecodeState, append, bits, empty_state
from rome.rollout.sampling import RowSampling, sample_rows
from rome.rollout.weights import PRECISIONS, EngineError, Publisher, check_version

_SHARED_AT_LEAST = 16  # tokens; a shorter prefix of a busy slot is prefilled rather than copied


@dataclass(frozen=True)
class StreamConfig:
    """Static shapes of a service. `burst`: tokens that a slot may get before the host sees them; `alternatives`: the
    most likely tokens reported at each position when a request wants them; the rest as in `EngineConfig`."""

    slots: int = 8
    max_length: int = 1024
    extend_buckets: tuple[int, ...] = (16, 128)
    burst: int = 4
    alternatives: int = 20
    precision: str = "model"

    def __post_init__(self) -> None:
        buckets = tuple(self.extend_buckets)
        ascending = bool(buckets) and buckets == tuple(sorted(set(buckets))) and buckets[0] >= 1
        checks = {
            "slots": (self.slots >= 1, "at least 1"),
            "max_length": (self.max_length >= 2, "at least 2"),
            "extend_buckets": (ascending, "ascending sizes of at least 1"),
            "burst": (self.burst >= 1, "at least 1"),
            "alternatives": (self.alternatives >= 1, "at least 1"),
            "precision": (self.precision in PRECISIONS, f"one of {PRECISIONS}"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise EngineError(f"{name}: expected {expected}, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class Sampling:
    """What one request draws from, with which 64-bit seed, and how many tokens at most. Ranges as in `EngineConfig`."""

    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    alternatives: bool = False  # report the most likely tokens at each position, too

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number >= 0"),
            "top_k": (0 <= self.top_k < 2**31, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "min_p": (0 <= self.min_p < 1, "0 <= min_p < 1"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise EngineError(f"{name}: expected {expected}, found {getattr(self, name)!r}")


class Burst(NamedTuple):
    """What a slot got: arrays over its n new tokens, and why it will get no more ("stop", "length", or
    "grammar": its constraint became too complex) or None.

    `top_ids` int32[n, A] and `top_logp` float32[n, A] (raw, most likely first) are None unless the request wants them.
    """

    tokens: np.ndarray  # int32[n]
    behavior_logp: np.ndarray  # float32[n], under the distribution that the request asked for
    raw_logp: np.ndarray  # float32[n], at temperature 1 without truncation
    version: int  # of the weights
    finish: str | None
    top_ids: np.ndarray | None
    top_logp: np.ndarray | None


@dataclass
class StreamStats:
    """Tokens since the engine was made: prefilled, taken over from an earlier or a neighbouring request, decoded."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0
    decoded_tokens: int = 0
    bursts: int = 0
    seconds: float = 0.0  # in `advance`


@dataclass
class _Slot:
    sampling: Sampling
    prompt: np.ndarray  # int32[m], what is still to be prefilled
    left: int  # tokens it may still get
    constraint: Constraint | None = None


class StreamEngine:
    """Slots, cache and weights of one policy. One thread calls it; `update_params` may come from another.

    Args:
      params, model_config: as for `rome.models.forward`.
      stop_ids: end a request; sampled as its last token.
      pad_id: fills unused positions of appends.
      version: of `params`.
    """

    def __init__(
        self,
        params: Any,
        model_config: ModelConfig,
        config: StreamConfig,
        stop_ids: frozenset[int],
        pad_id: int,
        version: int = 0,
    ) -> None:
        vocabulary = model_config.vocab_size
        outside = sorted(i for i in {*stop_ids, pad_id} if not 0 <= i < vocabulary)
        if outside:
            raise EngineError(f"stop_ids, pad_id: expected ids below {vocabulary}, found {outside}")
        if config.alternatives > vocabulary:
            raise EngineError(f"alternatives: expected at most {vocabulary}, found {config.alternatives}")
        self._publisher = Publisher(params, model_config, config.precision)
        self.config, self.model_config, self.pad_id = config, self._publisher.model_config, pad_id
        self.stats = StreamStats()
        self._programs = _programs(self.model_config, config.max_length, config.burst, config.alternatives)
        self._stop_ids = jnp.array(sorted(stop_ids) or [-1], jnp.int32)
        self._lock = threading.Lock()
        self._weights = (self._publisher.own(params), int(version))
        self._kept_version = int(version)  # of the weights that computed what free slots hold
        self._reset()

    @property
    def compilations(self) -> int:
        """How many shapes were compiled so far, by all engines with the same static configuration."""
        return self._programs.traces

    @property
    def version(self) -> int:
        """Of the weights that the next burst samples from."""
        return self._weights[1]

    @property
    def free_slots(self) -> int:
        return sum(slot is None for slot in self._slots)

    def update_params(self, params: Any, version: int) -> None:
        """Swaps the weights between bursts: requests in flight go on under the new ones, new ones reuse no old cache.

        Raises EngineError unless the version grows and shapes and dtypes stay.
        """
        check_version(version, self._weights[1])
        weights = (self._publisher.own(params), int(version))
        with self._lock:
            self._weights = weights

    def warmup(self) -> None:
        """Compiles every shape. Call it while no slot is in use; nothing compiles afterwards."""
        if self.free_slots != self.config.slots:
            raise EngineError("warmup: expected no slot in use")
        rows, params = self.config.slots, self._weights[0]
        idle, zeros = np.zeros(rows, bool), np.zeros(rows, np.int32)
        for bucket in self.config.extend_buckets:
            tokens = np.full((rows, bucket), self.pad_id, np.int32)
            self._state = self._programs.append(params, self._state, tokens, zeros, idle)
        self._state = self._programs.place(self._state, np.arange(rows, dtype=np.int32), zeros)
        for wanted in (False, True):
            arguments = self._row_sampling(), idle, zeros, self._stop_ids
            self._state, _, out = self._programs.burst[wanted](params, self._state, *arguments)
        jax.block_until_ready(out)

    def start(self, prompt: np.ndarray, sampling: Sampling, constraint: Constraint | None = None) -> int:
        """Gives a free slot to a request; its prompt (int32[m], m ≥ 1) is prefilled by the next calls of `advance`.
        With a constraint, which must end with stop ids of the engine, it gets one token a burst.

        Raises EngineError if no slot is free, or the prompt leaves no room for a token.
        """
        prompt = np.asarray(prompt, np.int32)
        room = self.config.max_length - len(prompt)
        if not self.free_slots:
            raise EngineError("slots: expected a free one")
        if len(prompt) < 1 or room < 1:
            raise EngineError(f"prompt: expected 1..{self.config.max_length - 1} tokens, found {len(prompt)}")
        self._forget_outdated()
        slot, kept = self._place(prompt)
        self._slots[slot] = _Slot(sampling, prompt[kept:], min(sampling.max_tokens, room), constraint)
        self._used[slot] = self._clock = self._clock + 1
        self.stats.reused_tokens += kept
        return slot

    def free(self, slot: int) -> None:
        """Releases a slot; what it holds stays until another prompt needs the place. Idempotent."""
        self._slots[slot] = None

    def forget(self) -> None:
        """Freed slots hold nothing any more, as in a new engine: what follows does not depend on what came before.
        Call it while no slot is in use."""
        if self.free_slots != self.config.slots:
            raise EngineError("forget: expected no slot in use")
        self._shareable = np.zeros(self.config.slots, bool)
        self._used, self._clock = [0] * self.config.slots, 0

    def shares_soon(self, prompt: np.ndarray) -> bool:
        """Whether a slot is just prefilling a prompt that starts as this one does: waiting for it saves the work."""
        for index, slot in enumerate(self._slots):
            if slot is None or not len(slot.prompt):
                continue
            coming = np.concatenate([self._held[index, : self._lengths[index]], slot.prompt])
            shared = _common(coming, prompt)
            if shared >= _SHARED_AT_LEAST and shared > self._best_source(prompt)[1]:
                return True
        return False

    def advance(self) -> dict[int, Burst]:
        """One append for slots that are still prefilling, then one burst for those that are not: slot → new tokens.

        A long prompt thus delays the others by one append of the largest bucket, never by all of itself. After an
        exception all slots are free and empty.
        """
        started = time.perf_counter()
        with self._lock:
            params, version = self._weights
        try:
            self._prefill(params)
            bursts = self._decode(params, version)
            self.stats.seconds += time.perf_counter() - started
            return bursts
        except BaseException:  # the donated state is gone
            self._reset()
            raise

    # ------------------------------------------------------------------------------------------------ inside

    def _reset(self) -> None:
        rows = self.config.slots
        self._state = empty_state(self.model_config, rows, self.config.max_length)
        self._held = np.zeros((rows, self.config.max_length), np.int32)  # tokens in each slot's cache
        self._lengths = np.zeros(rows, np.int32)
        self._slots: list[_Slot | None] = [None] * rows
        self._used, self._clock = [0] * rows, 0
        self._shareable = np.ones(rows, bool)  # whether all that a slot holds comes from the present weights

    def _forget_outdated(self) -> None:
        """What was computed under other weights is no prefix for a new request."""
        version = self._weights[1]
        if version != self._kept_version:
            self._kept_version = version
            self._shareable = np.zeros(self.config.slots, bool)

    def _best_source(self, prompt: np.ndarray) -> tuple[int, int]:
        """The slot with the longest prefix of the prompt, and how long that is. The last token is never reused: its
        logits are what decoding starts from."""
        shared = [
            _common(self._held[slot, : self._lengths[slot]], prompt[:-1]) if self._shareable[slot] else 0
            for slot in range(self.config.slots)
        ]
        best = int(np.argmax(shared))
        return best, shared[best]

    def _place(self, prompt: np.ndarray) -> tuple[int, int]:
        """Chooses a free slot and makes it start with as much of the prompt as any slot holds: (slot, how much)."""
        best, kept = self._best_source(prompt)
        if self._slots[best] is None and kept:
            slot = best
        else:
            slot = min((s for s, busy in enumerate(self._slots) if busy is None), key=lambda s: self._used[s])
            if kept < _SHARED_AT_LEAST:
                best, kept = slot, 0
        source, lengths = np.arange(self.config.slots, dtype=np.int32), self._lengths.copy()
        source[slot], lengths[slot] = best, kept
        self._state = self._programs.place(self._state, source, lengths)
        self._held[slot, :kept] = prompt[:kept]
        self._lengths[slot] = kept
        self._shareable[slot] = True
        return slot, kept

    def _prefill(self, params: Any) -> None:
        waiting = {index: slot for index, slot in enumerate(self._slots) if slot is not None and len(slot.prompt)}
        if not waiting:
            return
        longest = max(len(slot.prompt) for slot in waiting.values())
        bucket = next((size for size in self.config.extend_buckets if size >= longest), self.config.extend_buckets[-1])
        tokens = np.full((self.config.slots, bucket), self.pad_id, np.int32)
        counts = np.zeros(self.config.slots, np.int32)
        for index, slot in waiting.items():
            part = slot.prompt[:bucket]
            tokens[index, : len(part)], counts[index] = part, len(part)
        fresh = np.zeros(self.config.slots, bool)
        self._state = self._programs.append(params, self._state, tokens, counts, fresh)
        for index, slot in waiting.items():
            self._hold(index, tokens[index, : counts[index]])
            slot.prompt = slot.prompt[counts[index] :]
        self.stats.prefilled_tokens += int(counts.sum())

    def _hold(self, index: int, tokens: np.ndarray) -> None:
        start = self._lengths[index]
        self._held[index, start : start + len(tokens)] = tokens
        self._lengths[index] += len(tokens)
        if self._weights[1] != self._kept_version:
            self._shareable[index] = False

    def _decode(self, params: Any, version: int) -> dict[int, Burst]:
        ready = {
            i: slot for i, slot in enumerate(self._slots) if slot is not None and not len(slot.prompt) and slot.left
        }
        rows, bursts = self._row_sampling(), {}
        for index in [index for index, slot in ready.items() if slot.constraint is not None]:
            try:
                rows.allowed[index] = ready[index].constraint.mask()
                rows.constrained[index] = True
            except GrammarError:
                ready.pop(index).left = 0
                none = np.zeros(0, np.float32)
                bursts[index] = Burst(none.astype(np.int32), none, none, version, "grammar", None, None)
        if not ready:
            return bursts
        live, left = np.zeros(self.config.slots, bool), np.zeros(self.config.slots, np.int32)
        for index, slot in ready.items():
            live[index], left[index] = True, slot.left
        wanted = any(slot.sampling.alternatives for slot in ready.values())
        program = self._programs.burst[wanted]
        self._state, status, out = program(params, self._state, rows, live, left, self._stop_ids)
        (counts, stops), out = np.asarray(status), np.asarray(out)  # out int32[steps, 3 + 2A, B]
        for index, slot in ready.items():
            count = int(counts[index])
            mine = out[:count, :, index]
            tokens, slot.left = mine[:, 0].copy(), slot.left - count
            finish = "stop" if stops[index] else None if slot.left else "length"
            self._hold(index, tokens[: count - (finish is not None)])  # the last token is never processed
            tops = _alternatives(mine) if slot.sampling.alternatives else (None, None)
            bursts[index] = Burst(tokens, _floats(mine[:, 1]), _floats(mine[:, 2]), version, finish, *tops)
            if finish is not None:
                slot.left = 0
            elif slot.constraint is not None:
                slot.constraint.accept(tokens[0])
            self.stats.decoded_tokens += count
        self.stats.bursts += 1
        return bursts

    def _row_sampling(self) -> RowSampling:
        rows, words = self.config.slots, -(-self.model_config.vocab_size // 32)
        keys, top_k = np.zeros((rows, 2), np.uint32), np.zeros(rows, np.int32)
        temperature, top_p, min_p = np.zeros(rows, np.float32), np.ones(rows, np.float32), np.zeros(rows, np.float32)
        for index, slot in enumerate(self._slots):
            if slot is not None:
                s = slot.sampling
                keys[index] = s.seed >> 32 & 0xFFFFFFFF, s.seed & 0xFFFFFFFF
                temperature[index], top_k[index], top_p[index], min_p[index] = s.temperature, s.top_k, s.top_p, s.min_p
        constrained, allowed = np.zeros(rows, bool), np.zeros((rows, words), np.int32)
        return RowSampling(keys, temperature, top_k, top_p, min_p, constrained, allowed)


class _Programs:
    """The jitted functions of one static configuration, and how often they were traced."""

    def __init__(self, model_config: ModelConfig, max_length: int, size: int, alternatives: int) -> None:
        self.traces = 0
        self.append = self._jit(functools.partial(append, model_config), 1)
        self.place = self._jit(_place, 0)
        self.burst = {
            wanted: self._jit(functools.partial(_burst, model_config, max_length, size, alternatives * wanted), 1)
            for wanted in (False, True)
        }

    def _jit(self, function: Callable[..., Any], donated: int) -> Callable[..., Any]:
        def traced(*args: Any) -> Any:
            self.traces += 1  # runs when jit traces, that is once a compiled shape
            return function(*args)

        return jax.jit(traced, donate_argnums=donated)


_programs = functools.cache(_Programs)


def _place(state: DecodeState, source: jax.Array, lengths: jax.Array) -> DecodeState:
    """Slot b becomes a copy of slot source[b] (itself, for most) cut to lengths[b] tokens; both int32[B]."""
    moved = source != jnp.arange(source.shape[0])

    def pick(held: jax.Array) -> jax.Array:
        chosen = moved.reshape(-1, *[1] * (held.ndim - 1))
        return jnp.where(chosen, held[source], held)

    picked = jax.lax.cond(moved.any(), lambda: jax.tree.map(pick, state), lambda: state)
    return picked.replace(cache=picked.cache.replace(length=lengths))


def _burst(
    model_config: ModelConfig,
    max_length: int,
    size: int,
    alternatives: int,
    params: Any,
    state: DecodeState,
    rows: RowSampling,
    live: jax.Array,
    left: jax.Array,
    stop_ids: jax.Array,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Samples up to `size` tokens for each live slot, at most `left` (int32[B]).

    Returns the state, int32[2, B] (how many tokens, and whether the last is a stop id), and int32[size, 3 + 2A, B]:
    tokens, bits of the float32 log-probs under the row's distribution and raw, and the A alternatives: ids, then bits.
    """

    def going(carry: Any) -> jax.Array:
        *_, live, step = carry
        return live.any() & (step < size)

    def body(carry: Any) -> Any:
        cache, logits, out, count, stopped, live, step = carry
        drawn, logp, raw = sample_rows(logits, rows, cache.length)
        columns = [drawn[None], bits(logp)[None], bits(raw)[None]]
        if alternatives:
            top_logp, top_ids = jax.lax.top_k(jax.nn.log_softmax(logits), alternatives)
            columns += [top_ids.T.astype(jnp.int32), bits(top_logp).T]
        out = jax.lax.dynamic_update_slice(out, jnp.concatenate(columns)[None], (step, 0, 0))
        count += live
        stopped |= live & jnp.isin(drawn, stop_ids)
        live &= ~stopped & (count < left) & (cache.length + 1 < max_length)
        after, cache = extend(params, model_config, cache, drawn[:, None], live.astype(jnp.int32))
        logits = jnp.where(live[:, None], after, logits)
        return cache, logits, out, count, stopped, live & ~rows.constrained, step + 1  # the host knows their next mask

    out = jnp.zeros((size, 3 + 2 * alternatives, live.shape[0]), jnp.int32)
    carry = (state.cache, state.logits, out, jnp.zeros_like(left), jnp.zeros_like(live), live, jnp.int32(0))
    cache, logits, out, count, stopped, _, _ = jax.lax.while_loop(going, body, carry)
    return DecodeState(cache, logits), jnp.stack([count, stopped.astype(jnp.int32)]), out


def _floats(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float32)


def _alternatives(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids int32[n, A] and log-probs float32[n, A] of int32[n, 3 + 2A]."""
    count = (columns.shape[1] - 3) // 2
    return columns[:, 3 : 3 + count].copy(), _floats(columns[:, 3 + count :])


def _common(held: np.ndarray, prompt: np.ndarray) -> int:
    """How many tokens the two start with alike."""
    count = min(len(held), len(prompt))
    differs = held[:count] != prompt[:count]
    return int(np.argmax(differs)) if differs.any() else count

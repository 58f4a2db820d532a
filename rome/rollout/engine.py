"""The decode engine: batched sampling over fixed slots, with a KV cache that outlives chunks.

The shape is JetStream's (slots; insert / append / generate / free; an opaque decode state), extended by what RL needs:
log-probs under the sampling distribution, the policy version of every token, and an explicit key for every trajectory.

A *turn* is the unit of work. `generate` appends each slot's new tokens (a prompt, or the last stop token and the
observation after it) in static buckets, then decodes all of them in one jitted `while_loop` until each has sampled a
stop id or `max_chunk_tokens`. There is one host ↔ device synchronisation a turn, and every token passes through the
model at most once: a chunk's last token is only processed when (and if) the next delta is appended, and slots that
start a turn with the same prompt (the samples of a group) share its prefill: it runs once, apart, and is copied; or,
with a cache in pages (`rome.rollout.pages`), shared.

Slots are split into cohorts, each with a decode state of its own, so that the environments of one cohort can run while
another decodes. All cohorts have the same shape: they share every compiled function.

An engine may have several *placements*, each a mesh over some of the devices, and moves between them while trajectories
are in flight: `move_to` takes weights and caches along. That is how training borrows devices from rollouts.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from rome.models import ModelConfig
from rome.models.paged import Paging
from rome.models.sharding import RULES, Mesh
from rome.rollout.appends import Append, PromptPass, batches, idle_append
from rome.rollout.engine_config import EngineConfig
from rome.rollout.pages import Claim, PagePool
from rome.rollout.programs import (
    Compiled,
    DecodeState,
    Finish,
    compiled,
    empty_state,
    lend_pool,
    row_of,
    slot_shardings,
    with_table,
)
from rome.rollout.weights import EngineError, Publisher, check_version


class Sampled(NamedTuple):
    """One chunk, as arrays over its n tokens."""

    tokens: np.ndarray  # int32[n]
    behavior_logp: np.ndarray  # float32[n], under the sampling distribution
    raw_logp: np.ndarray  # float32[n], at temperature 1 without truncation
    versions: np.ndarray  # int32[n]
    finish: Finish


@dataclass
class EngineStats:
    """Counts since the engine was made. Each token is processed once: prefilled or decoded; or it is another slot's.

    Of a cache in pages: those that slots have now, that several slots have now, and that were taken at most.
    """

    turns: int = 0
    prefilled_tokens: int = 0  # prompts and observations
    copied_tokens: int = 0  # of prompts that another slot of the same turn starts with too (with pages, few are copied)
    decoded_tokens: int = 0  # sampled
    processed_tokens: int = 0  # went through the model; the last token of a chunk only once its slot continues
    padded_tokens: int = 0  # what appends went through the model with, padding included
    decode_steps: int = 0
    seconds: float = 0.0  # in `generate`, device time included
    host_seconds: float = 0.0  # of these, outside dispatch and wait
    moves: int = 0  # to another placement
    pages_in_use: int = 0
    pages_shared: int = 0
    pages_peak: int = 0
    pages_copied: int = 0  # the last, partly filled ones of prompts
    postponed: int = 0  # chunks that had to wait for pages, counted once a turn


class _Placement(NamedTuple):
    """Where an engine's arrays may lie, and its programs for there. Without a mesh: on the default device."""

    mesh: Mesh | None
    compiled: Compiled
    shardings: Any  # of the weights; None without a mesh


class DecodeEngine:
    """Slots, caches and weights of one policy. One thread calls `generate`; any may call `update_params` and `move_to`.

    Args:
      params, model_config: as for `rome.models.forward`. The engine keeps a copy, so a trainer may donate its own.
      stop_ids: sampled as the last token of a chunk.
      pad_id: fills unused positions of appends.
      version: of `params`.
      meshes: the engine's placements, each spreading slots and weights over its devices (None: the default device).
        The first is where it starts.
    """

    def __init__(
        self,
        params: Any,
        model_config: ModelConfig,
        config: EngineConfig,
        stop_ids: frozenset[int],
        pad_id: int,
        version: int = 0,
        meshes: Sequence[Mesh | None] = (None,),
    ) -> None:
        outside = sorted(i for i in {*stop_ids, pad_id} if not 0 <= i < model_config.vocab_size)
        if outside or not stop_ids:
            raise EngineError(
                f"stop_ids, pad_id: expected ids below {model_config.vocab_size}, found {outside or 'none'}"
            )
        if config.top_k > model_config.vocab_size:
            raise EngineError(f"top_k: expected at most {model_config.vocab_size}, found {config.top_k}")
        if config.record_experts and not model_config.is_moe:
            raise EngineError("record_experts: expected False of a policy without experts, found True")
        if not meshes or (None in meshes and len(meshes) > 1):
            raise EngineError(f"meshes: expected None alone, or one or more meshes, found {meshes!r}")
        if config.page_size and (len(meshes) > 1 or any(_splits_rows(mesh) for mesh in meshes)):
            raise NotImplementedError(
                f"page_size: expected 0 with several placements or a mesh that splits rows "
                f"({', '.join(RULES['batch'])}), found {config.page_size}"
            )
        self._publisher = Publisher(params, model_config, config.precision)
        self.config, self.model_config, self.pad_id = config, self._publisher.model_config, pad_id
        self.stats = EngineStats()
        self._placements = tuple(
            _Placement(
                mesh,
                compiled_functions(self.model_config, config, mesh),
                None if mesh is None else self._publisher.shardings(mesh),
            )
            for mesh in meshes
        )
        self._at = 0
        self._changing = threading.Lock()  # one update or move at a time
        # a move stands in the gate until the turn has ended, so that no other turn overtakes it
        self._gate, self._turn = threading.Lock(), threading.Lock()
        self._weights = (self._publisher.own(params, self._placements[0].shardings), int(version))
        self._stop_ids = np.array(sorted(stop_ids), np.int32)
        rows = config.slots
        self._held = np.zeros((rows, config.max_length), np.int32)  # the tokens in each slot's cache
        self._lengths = np.zeros(rows, np.int64)
        self._keys = np.zeros((rows, 2), np.uint32)
        self._occupied = np.zeros(rows, bool)
        self._fresh = np.zeros(rows, bool)  # inserted, not yet appended to
        self._inserted = np.zeros(rows, np.int64)  # when: the number of insertions before
        self._insertions = 0
        self._prompt_rows = min(config.prompt_rows, config.slots_per_cohort)
        self._states: dict[int, DecodeState] = {}
        self._pools: dict[int, PagePool] = {}  # of a cache in pages
        self._reset_states(range(config.cohorts))

    @property
    def version(self) -> int:
        """Of the weights that the next turn samples from."""
        return self._weights[1]

    @property
    def compilations(self) -> int:
        """How many shapes were compiled so far, by all engines with the same static configuration."""
        return sum(placement.compiled.traces for placement in self._placements)

    @property
    def placement(self) -> int:
        """The index of the mesh that the next turn decodes on."""
        return self._at

    @property
    def _compiled(self) -> Compiled:
        return self._placements[self._at].compiled

    def update_params(self, params: Any, version: int) -> None:
        """Swaps the weights between turns, without draining: trajectories in flight go on under the new ones.

        Cached keys and values of earlier tokens stay those of the weights that computed them; `versions` tells.
        Raises EngineError unless the version grows and shapes and dtypes stay.
        """
        with self._changing:
            check_version(version, self.version)
            own = self._publisher.own(params, self._placements[self._at].shardings)
            self._weights = (own, int(version))

    def move_to(self, placement: int) -> None:
        """Moves the weights and what every slot holds to `meshes[placement]`, after the turn that is being decoded.

        Nothing is prefilled again: trajectories in flight go on there as they would have here. Until it returns, both
        placements hold everything. Raises EngineError for an index that there is not.
        """
        if not 0 <= placement < len(self._placements):
            raise EngineError(f"placement: expected 0..{len(self._placements) - 1}, found {placement}")
        with self._changing:
            if placement == self._at:
                return
            target, (params, version) = self._placements[placement], self._weights
            params = jax.block_until_ready(jax.device_put(params, target.shardings))  # while turns go on
            with self._gate, self._turn:
                held = [self._prompts, *self._states.values()]
                where = [slot_shardings(state, target.mesh) for state in held]
                self._prompts, *states = jax.block_until_ready(jax.device_put(held, where))
                self._states = dict(zip(self._states, states, strict=True))
                self._at, self._weights = placement, (params, version)
            self.stats.moves += 1

    @contextmanager
    def _one_turn(self) -> Iterator[tuple[Any, int]]:
        """While it lasts the engine does not move. Gives (params, version)."""
        with self._gate:
            self._turn.acquire()
        try:
            yield self._weights
        finally:
            self._turn.release()

    def cohort_slots(self, cohort: int) -> range:
        """The slots of a cohort, in order."""
        size = self.config.slots_per_cohort
        return range(cohort * size, (cohort + 1) * size)

    def insert(self, slot: int, seed: int) -> None:
        """Gives an empty slot to a new trajectory, whose tokens are drawn with the 64-bit `seed` as key."""
        if self._occupied[slot]:
            raise EngineError(f"slot {slot}: expected a free one")
        self._occupied[slot] = self._fresh[slot] = True
        self._inserted[slot], self._insertions = self._insertions, self._insertions + 1
        self._lengths[slot] = 0
        self._keys[slot] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF

    def free(self, slot: int) -> None:
        """Releases a slot, and its pages. Idempotent."""
        self._occupied[slot] = False
        self._lengths[slot] = 0
        if self._pools:
            cohort, row = divmod(slot, self.config.slots_per_cohort)
            self._pools[cohort].shrink(row, 0)
            self._count_pages()

    def processed(self, slot: int) -> np.ndarray:
        """The tokens (int32[n]) that the slot's cache holds. The next delta continues exactly these."""
        return self._held[slot, : self._lengths[slot]]

    def routed_experts(self, slot: int) -> np.ndarray:
        """int16[n, layers, k]: the experts that each token of `processed(slot)` visited. Needs `record_experts`."""
        if not self.config.record_experts:
            raise EngineError("routed_experts: expected an engine that was made with record_experts")
        cohort, row = divmod(slot, self.config.slots_per_cohort)
        with self._one_turn():
            recorded = self._recorded(cohort, row)
        return recorded[: self._lengths[slot]]

    def warmup(self) -> None:
        """Compiles every shape, on every placement. Call it while no slot is in use; nothing compiles afterwards."""
        if self._occupied.any():
            raise EngineError("warmup: expected no slot in use")
        start = self._at
        for placement in range(len(self._placements)):
            self.move_to(placement)
            self._compile()
        self.move_to(start)

    def _compile(self) -> None:
        """A turn in which nothing happens, with every shape."""
        rows, prompts = self.config.slots_per_cohort, self._prompt_rows
        appends = [idle_append(rows, bucket) for bucket in self.config.extend_buckets]
        source, placed = np.full(rows, -1, np.int32), ()
        if self._pools:
            placed = self._pools[0].place([], [], prompts)
        passes = [PromptPass([idle_append(prompts, self.config.extend_buckets[-1])], source, *placed)]
        idle, temperature = np.zeros(rows, bool), np.float32(self.config.temperature)
        with self._one_turn() as (params, _):
            self._advance(0, params, passes, appends, idle, temperature)
        if self.config.record_experts:
            self._recorded(0, 0)

    def _recorded(self, cohort: int, row: int) -> np.ndarray:
        """The experts of all the tokens for which a row has room."""
        cache = self._states[cohort].cache
        if self._pools:
            return np.asarray(row_of(cache.pool.experts, self._pools[cohort].table[row].copy()))
        return np.asarray(row_of(cache.experts, np.int32(row)))

    def affordable(self, cohort: int, deltas: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Those of a turn's deltas that `generate` takes: all, unless pages are scarce (`PagePool.affordable`).

        The other slots keep what they have; ask again once a turn was decoded or a slot freed. If every slot that has
        tokens has a delta, at least one is taken: longest inserted come first. Raises as `generate` does.
        """
        self._check_deltas(cohort, deltas)
        if not self._pools:
            return dict(deltas)
        first, claims = self.cohort_slots(cohort).start, []
        for slot in sorted(deltas, key=self._inserted.__getitem__):
            prompt = np.asarray(deltas[slot], np.int32) if self._fresh[slot] else None
            claims.append(Claim(slot - first, self._most(slot, deltas[slot]), prompt))
        granted = set(self._pools[cohort].affordable(claims))
        self.stats.postponed += len(claims) - len(granted)
        return {slot: delta for slot, delta in deltas.items() if slot - first in granted}

    def _most(self, slot: int, delta: np.ndarray) -> int:
        """How many tokens a slot may hold after a turn; the last one of a chunk is not processed."""
        return min(int(self._lengths[slot]) + len(delta) + self.config.max_chunk_tokens - 1, self.config.max_length)

    def generate(
        self, cohort: int, deltas: Mapping[int, np.ndarray], temperature: float | None = None
    ) -> dict[int, Sampled]:
        """One turn of a cohort: appends each slot's delta, then samples one chunk for each.

        Args:
          cohort: whose slots.
          deltas: slot → int32[m], m ≥ 1, the tokens that follow `processed(slot)`. Slots without one rest untouched.
          temperature: overrides the config's; 0 is greedy.

        Raises EngineError if a slot is not occupied, its delta leaves no room for a token, or (with pages) the deltas
        are not `affordable`; then nothing has changed.
        """
        started = time.perf_counter()
        first, rows = self.cohort_slots(cohort).start, self.config.slots_per_cohort
        if waiting := sorted(deltas.keys() - self.affordable(cohort, deltas).keys()):
            raise EngineError(
                f"deltas: expected those that are affordable (pages are scarce), found also slots {waiting}"
            )
        active = np.zeros(rows, bool)
        active[[slot - first for slot in deltas]] = True
        prompts = {slot - first: delta for slot, delta in deltas.items() if self._fresh[slot]}
        continued = {slot - first: delta for slot, delta in deltas.items() if not self._fresh[slot]}
        shared = self._prompt_passes(cohort, prompts)
        appends = batches(rows, continued, self.config.extend_buckets, self.pad_id)
        if self._pools:
            for slot, delta in deltas.items():
                self._pools[cohort].grow(slot - first, self._most(slot, delta))
            self._count_pages()
        prepared = time.perf_counter()
        heat = np.float32(self.config.temperature if temperature is None else temperature)
        with self._one_turn() as (params, version):
            packed = self._advance(cohort, params, shared, appends, active, heat)
        waited = time.perf_counter() - prepared
        sampled = {slot: self._unpack(slot, delta, packed[slot - first], version) for slot, delta in deltas.items()}
        if self._pools:
            for slot in deltas:
                self._pools[cohort].shrink(slot - first, int(self._lengths[slot]))
            self._count_pages()
        passes = [*(prefill for prompts in shared for prefill in prompts.prefills), *appends]
        self._account(sampled, deltas, len(continued), passes, time.perf_counter() - started, waited)
        return sampled

    def _advance(
        self,
        cohort: int,
        params: Any,
        shared: Sequence[PromptPass],
        appends: Sequence[Append],
        active: np.ndarray,
        temperature: np.float32,
    ) -> np.ndarray:
        """A turn on the device: what `_decode` returns of it, on the host."""
        run, slots = self._compiled, self.cohort_slots(cohort)
        rows = slice(slots.start, slots.stop)
        try:
            for prompts in shared:
                self._prefill(cohort, params, prompts)
            for append in appends:
                self._states[cohort] = run.append(params, self._state(cohort), *append)
            self._states[cohort], packed = run.decode(
                params, self._state(cohort), self._keys[rows], active, temperature, self._stop_ids
            )
            return np.asarray(packed)  # the turn's one synchronisation
        except BaseException:  # Ctrl-C too: the donated states are gone, and with them what the slots held
            self._reset_states([cohort])
            self._occupied[rows], self._lengths[rows] = False, 0
            raise

    def _prefill(self, cohort: int, params: Any, prompts: PromptPass) -> None:
        """Prefills prompts, and has the cohort's rows start with them; in pages, they are prefilled where they stay."""
        run, state, held = self._compiled, self._states[cohort], self._prompts
        if prompts.table is not None:
            state, held = lend_pool(state, held)
        for prefill in prompts.prefills:
            held = held if prompts.table is None else with_table(held, prompts.table)
            held = run.append(params, held, *prefill)
        if prompts.table is not None:
            held, state = lend_pool(held, state)
        self._prompts, self._states[cohort] = held, state
        self._states[cohort] = run.share(self._state(cohort), held, prompts.source, *prompts.copies)

    def _state(self, cohort: int) -> DecodeState:
        """A cohort's state; in pages, with the table as it is now."""
        state = self._states[cohort]
        return with_table(state, self._pools[cohort].table) if self._pools else state

    def _count_pages(self) -> None:
        stats, pools = self.stats, self._pools.values()
        stats.pages_in_use = sum(pool.in_use for pool in pools)
        stats.pages_shared = sum(pool.shared for pool in pools)
        stats.pages_peak = max(stats.pages_peak, stats.pages_in_use)

    def _reset_states(self, cohorts: Iterable[int]) -> None:
        """Empties cohorts, and where prompts are prefilled."""
        config, paging = self.config, self.config.paging
        # prompts in pages are prefilled into those of the cohort
        self._prompts = self._empty_state(self._prompt_rows, paging and paging._replace(pages=0))
        for cohort in cohorts:
            self._states[cohort] = self._empty_state(config.slots_per_cohort, paging)
            if paging is not None:
                self._pools[cohort] = PagePool(config.slots_per_cohort, paging, config.max_length)

    def _empty_state(self, rows: int, paging: Paging | None) -> DecodeState:
        empty = functools.partial(
            empty_state, self.model_config, rows, self.config.max_length, self.config.record_experts, paging
        )
        mesh = self._placements[self._at].mesh
        if mesh is None:
            return empty()
        return jax.jit(empty, out_shardings=slot_shardings(jax.eval_shape(empty), mesh))()

    def _check_deltas(self, cohort: int, deltas: Mapping[int, np.ndarray]) -> None:
        slots = self.cohort_slots(cohort)
        for slot, delta in deltas.items():
            if slot not in slots or not self._occupied[slot]:
                raise EngineError(f"slot {slot}: expected an inserted one of cohort {cohort}")
            room = self.config.max_length - self._lengths[slot]
            if not 1 <= len(delta) < room:
                raise EngineError(f"slot {slot}: expected a delta of 1..{room - 1} tokens, found {len(delta)}")

    def _prompt_passes(self, cohort: int, prompts: Mapping[int, np.ndarray]) -> list[PromptPass]:
        """How to prefill prompts (by row of the cohort), each distinct one once."""
        sharers: dict[bytes, list[int]] = {}
        for row, prompt in prompts.items():
            sharers.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(row)
        distinct, passes = list(sharers.values()), []
        for start in range(0, len(distinct), self._prompt_rows):
            source = np.full(self.config.slots_per_cohort, -1, np.int32)
            chosen = distinct[start : start + self._prompt_rows]
            for index, rows in enumerate(chosen):
                source[rows] = index
            given = {index: prompts[rows[0]] for index, rows in enumerate(chosen)}
            prefills = batches(self._prompt_rows, given, self.config.extend_buckets[-1:], self.pad_id, fresh=True)
            placed = ()
            if self._pools:
                pool, lengths = self._pools[cohort], [len(prompt) for prompt in given.values()]
                _, copies = placed = pool.place(chosen, lengths, self._prompt_rows)
                self.stats.pages_copied += int((copies[1] < pool.paging.pages).sum())
            passes.append(PromptPass(prefills, source, *placed))
        return passes

    def _unpack(self, slot: int, delta: np.ndarray, packed: np.ndarray, version: int) -> Sampled:
        """One row of `_decode`'s packed result; records what the slot's cache now holds."""
        size = self.config.max_chunk_tokens
        count, finish = int(packed[-2]), tuple(Finish)[packed[-1]]
        tokens = packed[:count].copy()
        logps = packed[size : 3 * size].view(np.float32)
        length = int(self._lengths[slot])
        end = length + len(delta) + count - 1
        self._held[slot, length : length + len(delta)] = delta
        self._held[slot, length + len(delta) : end] = tokens[:-1]
        self._lengths[slot], self._fresh[slot] = end, False
        versions = np.full(count, version, np.int32)
        return Sampled(tokens, logps[:count].copy(), logps[size : size + count].copy(), versions, finish)

    def _account(
        self,
        sampled: Mapping[int, Sampled],
        deltas: Mapping[int, np.ndarray],
        continued: int,
        appends: list[Append],
        seconds: float,
        waited: float,
    ) -> None:
        stats = self.stats
        lengths = [len(chunk.tokens) for chunk in sampled.values()]
        passed = sum(int(append.counts.sum()) for append in appends)
        stats.turns += 1
        stats.prefilled_tokens += passed - continued  # a continued slot's first token was sampled, not given
        stats.copied_tokens += sum(map(len, deltas.values())) - passed
        stats.decoded_tokens += sum(lengths)
        stats.processed_tokens += passed + sum(lengths) - len(lengths)
        stats.padded_tokens += sum(append.tokens.size for append in appends)
        stats.decode_steps += max(lengths, default=0)
        stats.seconds += seconds
        stats.host_seconds += seconds - waited


def _splits_rows(mesh: Mesh | None) -> bool:
    return mesh is not None and any(mesh.shape.get(axis, 1) > 1 for axis in RULES["batch"])


def compiled_functions(model_config: ModelConfig, config: EngineConfig, mesh: Mesh | None = None) -> Compiled:
    """The engine's jitted `append` and `decode`, shared by all that ask for the same static configuration."""
    c = config
    return compiled(mesh, model_config, c.max_length, c.max_chunk_tokens, c.top_k, c.top_p, c.min_p)

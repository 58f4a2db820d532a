"""Adapters travel alone and become, where they arrive, the weights that merging before the journey would have given."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_toys import MODEL, Journal, ToyEnv, ToyRenderer, toy_engine, toy_params, toy_requests

from rome.models.lora import LoraConfig, adapt, merge
from rome.rollout import RolloutRunner
from rome.rollout.sync import AdapterMerger, AdapterUpdate, num_bytes, update_of
from rome.rollout.weights import EngineError

LORA = LoraConfig(rank=2, targets=("wq", "down", "lm_head"))


def adapted(step: int = 1):
    """The toy policy with adapters that `step` updates have moved."""
    fresh = adapt(jax.tree.map(jnp.copy, toy_params()), MODEL, LORA, jax.random.key(1))
    return fresh.replace(adapters=jax.tree.map(lambda leaf: leaf + 0.05 * step, fresh.adapters))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_there_is_merged_here_bit_for_bit(dtype):
    config = dataclasses.replace(MODEL, dtype=dtype)
    start, later = adapted(0), adapted(3)
    merger = AdapterMerger(start, config)
    jax.tree.map(lambda leaf: leaf.delete(), start.base)  # as a train step that donates its state does
    here = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.jit(merge)(later))
    assert same(merger(AdapterUpdate(later.adapters)), here)
    assert same(merger(jax.tree.map(np.asarray, update_of(later))), here)  # as they come out of an object store
    assert same(AdapterMerger(later, config, keeps_base=False)(later), here)
    assert not same(merger(AdapterUpdate(adapted(2).adapters)), here)


def test_what_travels_is_small_and_plain_weights_stay_whole():
    assert num_bytes(update_of(adapted())) < num_bytes(toy_params()) / 4
    assert update_of(toy_params()) is toy_params()


def test_a_borrowed_base_must_come_along():
    with pytest.raises(EngineError, match="params: expected adapters with their base"):
        AdapterMerger(adapted(), MODEL, keeps_base=False)(update_of(adapted()))


def test_a_runner_goes_on_with_merged_weights():
    def tokens(update):
        engine = toy_engine()
        engine.warmup()
        merger = AdapterMerger(adapted(0), MODEL)
        with RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal()), merger=merger) as runner:
            if update is not None:
                assert runner.update_weights(update, 1) > 0
            groups = runner.run(toy_requests(groups=2, size=2))
            assert {int(v) for g in groups for t in g for c in t.chunks for v in c.versions} == {
                int(update is not None)
            }
            return [[c.tokens.tolist() for c in t.chunks] for g in groups for t in g]

    engine = toy_engine()
    engine.update_params(merge(adapted(5)), 1)
    with RolloutRunner(engine, ToyRenderer(), lambda: ToyEnv(Journal())) as runner:
        expected = [[c.tokens.tolist() for c in t.chunks] for g in runner.run(toy_requests(2, 2)) for t in g]
    assert tokens(update_of(adapted(5))) == expected
    assert tokens(None) != expected

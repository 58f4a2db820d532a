"""Router replay: the experts that a rollout visited, recorded by the engine, are visited again in training."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from rollout_toys import MODEL, Journal, ToyEnv, ToyRenderer, toy_engine, toy_requests

from rome.models import init_params, score_sequences
from rome.rollout import Deadlines, DecodeEngine, EngineConfig, EngineError, RolloutConfig, RolloutRunner
from rome.training.compilations import count_compilations
from rome.training.packing import PackingError, pack_trajectories
from rome.trajectory import load_trajectories, save_trajectories

MOE = dataclasses.replace(MODEL, num_layers=2, num_experts=16, num_experts_per_token=2, moe_intermediate_size=16)
ROUTED = (2, 2)
score = jax.jit(score_sequences, static_argnums=1)


@cache
def trained():
    """Sharper than at initialisation, so that log-probs, routing and experts say something."""
    params = init_params(MOE, jax.random.key(0))
    layers = {**params["layers"], "down": params["layers"]["down"] * 4}
    return {**params, "lm_head": params["lm_head"] * 3, "layers": layers}


def int8(params):
    """What an inference engine that keeps its weights in 8 bits computes with."""

    def rounded(w):
        step = abs(w).max() / 127
        return (w / step).round() * step

    return jax.tree.map(lambda w: rounded(w) if w.ndim > 2 else w, params)


@cache
def rollout(quantised: bool):
    """16 trajectories of a policy in the engine, its weights as trained or in 8 bits."""
    settings = EngineConfig(
        slots=8, cohorts=1, max_length=96, extend_buckets=(16,), max_chunk_tokens=10, record_experts=True
    )
    params = int8(trained()) if quantised else trained()
    engine = DecodeEngine(params, MOE, settings, ToyRenderer.stop_ids, pad_id=0)
    engine.warmup()
    deadlines = Deadlines(reset=60, step=60, verify=60, close=60)
    runner = RolloutRunner(
        engine, ToyRenderer(), lambda: ToyEnv(Journal()), RolloutConfig(env_threads=4, deadlines=deadlines)
    )
    with count_compilations() as compiled, runner:
        groups = runner.run(toy_requests(groups=4, size=4))
    assert compiled.count == 0
    return [t for group in groups for t in group]


def log_probs(trajectories, replay: bool):
    """(log-probs in training, in the engine) float32[n] each, of all sampled tokens."""
    rows = pack_trajectories(trajectories, 96, 64, 16, ROUTED)
    experts = rows.experts if replay else None
    logp, *_ = score(trained(), MOE, rows.tokens, rows.positions, rows.segment_ids, 1.0, experts)
    sampled = rows.chunk_ids >= 0
    return np.asarray(logp)[sampled], rows.behavior_logp[sampled]


def test_every_processed_token_has_its_experts_and_keeps_them_in_a_file(tmp_path):
    trajectories = rollout(False)
    for t in trajectories:
        experts = t.experts()
        assert experts.shape == (t.num_tokens, *ROUTED) and experts.dtype == np.int16
        assert (experts[:-1] >= 0).all() and (experts[:-1] < 16).all()
        assert (experts[-1] == -1).all()  # sampled, never processed
        assert (experts[:-1, :, 0] != experts[:-1, :, 1]).all()
    assert len({tuple(e) for t in trajectories for e in t.experts()[:-1, 0]}) > 10
    save_trajectories(tmp_path / "t", trajectories)
    for t, again in zip(trajectories, load_trajectories(tmp_path / "t"), strict=True):
        np.testing.assert_array_equal(t.experts(), again.experts())


def test_with_the_same_weights_replay_changes_nothing():
    for replay in (False, True):
        training, engine = log_probs(rollout(False), replay)
        np.testing.assert_allclose(training, engine, rtol=0, atol=2e-4)


def test_replay_shrinks_the_mismatch_of_a_quantised_rollout():
    free, engine = log_probs(rollout(True), False)
    replayed, _ = log_probs(rollout(True), True)
    gaps = {"free": np.abs(free - engine), "replayed": np.abs(replayed - engine)}
    rerouted = np.abs(free - replayed) > 1e-4
    assert 0.05 < rerouted.mean() < 1.0  # rounding did change somebody's experts
    squares = {name: float((gap**2).mean()) for name, gap in gaps.items()}
    assert squares["replayed"] < 0.5 * squares["free"], squares
    assert gaps["replayed"].max() < gaps["free"].max()


def test_what_does_not_fit_is_refused():
    with pytest.raises(PackingError, match="expected 2 experts a token in 3 layers, found 2 in 2"):
        pack_trajectories(rollout(False), 96, 64, routed=(3, 2))
    with pytest.raises(EngineError, match="record_experts: expected False of a policy without experts"):
        toy_engine(record_experts=True)
    with pytest.raises(EngineError, match="made with record_experts"):
        toy_engine().routed_experts(0)

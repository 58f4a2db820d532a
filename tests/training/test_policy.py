import dataclasses

import jax
import numpy as np
import pytest
from training_toys import SHALLOW as DENSE
from training_toys import SHALLOW_MOE as MOE
from training_toys import distance, params_of, settings, trainer, trajectories

from rome.ipa import ObjectiveConfig
from rome.models import token_log_probs
from rome.training.compilations import count_compilations
from rome.training.packing import pack_trajectories
from rome.training.policy import PolicySettings
from rome.training.resampling import Expert
from rome.training.state import OptimizerConfig

# log-ratios of these trajectories to the untrained model are far from 0: nothing is to be masked, nor near a clip
WIDE = {"mismatch_upper": 1e6}
PUNISHING = ObjectiveConfig(failure_reward=-1.0, **WIDE)


def _logps(model, given):
    """Each trajectory's log-probs per token, in a row of its own."""
    rows = pack_trajectories(given, 256, 64)
    logp, _ = jax.jit(token_log_probs, static_argnums=1)(
        params_of(model), model, rows.tokens, rows.positions, rows.segment_ids
    )
    return [np.asarray(logp)[p.row, p.start : p.start + p.length] for p in rows.places]


# An epsilon far above every gradient makes Adam linear in it. (Adam's first steps are ±1 whatever the size of a
# gradient, so those near 0 would show every rounding.)
LINEAR = OptimizerConfig(learning_rate=1e3, epsilon=1e3)


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_micro_batches_change_nothing(model):
    given = trajectories(0)
    results = []
    for micro_rows in (1, 4):
        runner, state = trainer(model, PUNISHING, settings(micro_rows=micro_rows, optimizer=LINEAR))
        for seed in range(2):
            state, update = runner.update(state, given, seed)
        results.append((state, update.metrics))
    (one, metrics), (four, others) = results
    assert int(one.step) == 2
    assert distance(one.params, four.params) < 1e-6
    assert distance(one.params, params_of(model)) > 1e-3
    assert metrics.keys() == others.keys()
    for name in metrics.keys() - {"train/row_fill"}:
        assert metrics[name] == pytest.approx(others[name], rel=1e-4, abs=1e-5), name


def test_leaving_out_what_is_inert_changes_no_parameter():
    """With reward 0 for failures their gradient is exactly 0; the normaliser still counts their tokens."""
    given = trajectories(1)
    found = {}
    for skip in (True, False):
        runner, state = trainer(DENSE, ObjectiveConfig(**WIDE), settings(skip_inert=skip, optimizer=LINEAR))
        found[skip] = runner.update(state, given, 0)
    assert distance(found[True][0].params, found[False][0].params) < 1e-6
    assert distance(found[True][0].params, params_of(DENSE)) > 1e-3
    skipped, whole = found[True][1].metrics, found[False][1].metrics
    assert skipped["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-5)
    assert skipped["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)
    assert skipped["train/trajectories"] == 4  # the metrics say what was looked at
    assert whole["train/trajectories"] == 8


def test_showing_a_batch_changes_neither_the_metrics_nor_the_update():
    """The viewer sees the failures that are left out; the curves of that step are about the same samples as others."""
    given = trajectories(1)
    found = {}
    for annotate in (False, True):
        runner, state = trainer(DENSE, ObjectiveConfig(**WIDE), settings())
        runner.warmup(state)
        with count_compilations() as compiled:
            found[annotate] = runner.update(state, given, 0, annotate=annotate)
        assert compiled.count == 0
    (quiet, plain), (shown, annotated) = found[False], found[True]
    assert distance(quiet.params, shown.params) == 0
    assert plain.metrics == annotated.metrics
    assert plain.annotations == {}
    failed = [t for t in given if not t.succeeded]
    assert failed and len(annotated.annotations) == len(given)
    for t, logp in zip(given, _logps(DENSE, given), strict=True):
        if not t.succeeded:
            ids = np.concatenate([np.full(len(part), k) for k, part in t.segments()])
            gaps = [np.mean(logp[ids == k] - chunk.behavior_logp) for k, chunk in enumerate(t.chunks)]
            assert annotated.annotations[t.id]["ratio"] == [1.0] * len(t.chunks)
            assert annotated.annotations[t.id]["mismatch"] == pytest.approx(np.exp(gaps), rel=1e-4)


@pytest.mark.parametrize("updates", [1, 2])
def test_one_update_is_on_policy_and_a_second_is_not(updates):
    given = trajectories(2)
    runner, state = trainer(DENSE, PUNISHING, settings(updates_per_batch=updates))
    state, update = runner.update(state, given, 0, annotate=True)
    assert int(state.step) == updates
    ratios = [ratio for shown in update.annotations.values() for ratio in shown["ratio"]]
    assert len(update.annotations) == len(given)
    if updates == 1:
        assert all(ratio == 1.0 for ratio in ratios)
        assert update.metrics["ratio/token_max"] == update.metrics["ratio/token_min"] == 1.0
    else:
        # π_old is the policy before the first update: its part has ratio 1 (two compiled programs), the second has not
        moved = [t.id for t in given if np.max(np.abs(np.array(update.annotations[t.id]["ratio"]) - 1)) > 1e-3]
        assert len(moved) == 4
        assert update.metrics["ratio/token_max"] > 1.01


def test_a_second_update_reads_the_log_probs_of_before_the_first():
    given = trajectories(2)
    runner, state = trainer(DENSE, PUNISHING, settings(updates_per_batch=2))
    before = _logps(DENSE, given)
    old = runner._old_logp(state, given)
    for t, expected in zip(given, before, strict=True):
        np.testing.assert_allclose(old[t.id], expected, atol=1e-5)


def test_the_seed_decides_which_part_comes_first():
    given = trajectories(2)

    def split(seed):
        runner, state = trainer(DENSE, PUNISHING, settings(updates_per_batch=2))
        return runner.update(state, given, seed)[0].params

    assert distance(split(0), split(0)) == 0
    assert distance(split(0), split(1)) > 1e-4


def test_nothing_to_train_leaves_the_state_untouched():
    given = trajectories(3, rewards=(0.0,))
    runner, state = trainer(DENSE, ObjectiveConfig(), settings())
    before = jax.tree.map(np.asarray, state)
    after, update = runner.update(state, given, 0, annotate=True)
    assert distance(after, before) == 0
    assert update.metrics == {"train/nothing_to_train": 1.0, "train/grad_norm": 0.0, "train/loss": 0.0}


def test_a_part_with_nothing_to_train_does_not_hide_the_other():
    """One success among failures: of two updates, one has nothing to train."""
    given = trajectories(4, rewards=(1.0, *[0.0] * 7))
    for seed in range(4):  # the part that trains is the first or the second
        runner, state = trainer(DENSE, ObjectiveConfig(**WIDE), settings(updates_per_batch=2, micro_rows=1))
        state, update = runner.update(state, given, seed)
        assert int(state.step) == 1
        assert update.metrics["train/nothing_to_train"] == 0.5
        assert update.metrics["train/trajectories"] == 1
        assert update.metrics["train/grad_norm"] > 0


def test_annotations_match_a_recomputation():
    given = trajectories(5)
    objective = ObjectiveConfig(failure_reward=-1.0, gamma=0.9, mismatch_upper=1.05, mismatch_lower=0.9)
    runner, state = trainer(DENSE, objective, settings())
    logps = _logps(DENSE, given)
    _, update = runner.update(state, given, 0, annotate=True)
    kept = []
    for t, logp in zip(given, logps, strict=True):
        shown, reward, count = update.annotations[t.id], 1.0 if t.final_reward > 0 else -1.0, len(t.chunks)
        ids = np.concatenate([np.full(len(part), k) for k, part in t.segments()])
        gap = [np.mean(logp[ids == k] - t.chunks[k].behavior_logp) for k in range(count)]
        assert shown["returns"] == pytest.approx([reward * 0.9 ** (count - 1 - k) for k in range(count)])
        assert shown["mismatch"] == pytest.approx(np.exp(gap), rel=1e-4)
        assert shown["kept"] == [0.9 <= np.exp(g) <= 1.05 for g in gap]
        assert shown["ratio"] == [1.0] * count
        assert shown["positive"] == (t.final_reward > 0)
        kept += shown["kept"]
    assert 0 < sum(kept) < len(kept)
    assert update.metrics["mask/chunk_dropped"] == pytest.approx(1 - np.mean(kept), abs=1e-6)


def test_no_mask_keeps_everything_in_the_annotations_too():
    given = trajectories(5)
    objective = ObjectiveConfig(failure_reward=-1.0, mask_level="none", mismatch_upper=1e-3)
    runner, state = trainer(DENSE, objective, settings())
    _, update = runner.update(state, given, 0, annotate=True)
    assert update.metrics["mask/chunk_dropped"] == 0
    assert all(all(shown["kept"]) for shown in update.annotations.values())


def test_mismatch_metrics_compare_the_trainer_with_the_sampler():
    given = trajectories(6)
    runner, state = trainer(DENSE, PUNISHING, settings())
    chunks, toks = [], []
    for t, logp in zip(given, _logps(DENSE, given), strict=True):
        ids = np.concatenate([np.full(len(part), k) for k, part in t.segments()])
        for k, chunk in enumerate(t.chunks):
            gaps = logp[ids == k] - chunk.behavior_logp
            chunks.append(np.exp(gaps.mean()))
            toks += list(np.exp(gaps))
    _, update = runner.update(state, given, 0)
    for level, values in (("chunk", chunks), ("token", toks)):
        for name, f in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            assert update.metrics[f"mismatch/{level}_{name}"] == pytest.approx(f(values), rel=1e-4)
        assert update.metrics[f"mismatch/{level}_gap"] == pytest.approx(np.abs(np.log(values)).mean(), rel=1e-4)
    kl = np.mean(toks) - 1 - np.log(toks).mean()
    assert update.metrics["mismatch/token_kl"] == pytest.approx(kl, rel=1e-2, abs=1e-6)
    assert update.metrics["train/tokens"] == len(toks)
    assert update.metrics["train/chunks"] == len(chunks)
    assert 0 < update.metrics["train/entropy"] <= np.log(DENSE.vocab_size) + 1e-6


def test_intrinsic_rewards_reach_the_batch():
    given = trajectories(7, rewards=(0.0,))
    rewards = np.array([0.5], np.float32)
    paid = [dataclasses.replace(t, intrinsic_rewards=np.repeat(rewards, len(t.chunks))) for t in given]
    objective = ObjectiveConfig(gamma=1.0, **WIDE)
    runner, state = trainer(DENSE, objective, settings())
    _, update = runner.update(state, paid, 0, annotate=True)
    for t in given:
        count = len(t.chunks)
        assert update.annotations[t.id]["returns"] == pytest.approx([0.5 * (count - k) for k in range(count)])


def test_a_replayed_prefix_is_context_and_an_expert_is_imitated_once():
    given = trajectories(7, rewards=(0.0,))
    led = [dataclasses.replace(t, prefix_chunks=len(t.chunks) - 1) for t in given]
    expert = dataclasses.replace(given[3], id="expert", final_reward=1.0)
    assert len(expert.chunks) == 4
    objective = ObjectiveConfig(failure_reward=-1.0, baseline="group_mean", gamma=0.5, imitation="always", **WIDE)
    runner, state = trainer(DENSE, objective, settings())
    runner.warmup(state)
    with count_compilations() as compiled:
        # all failed alike: with a baseline they teach nothing, but the expert's part does, undiscounted by its own
        state, update = runner.update(state, led, 0, annotate=True, experts=[Expert(expert, 2)])
    assert compiled.count == 0
    assert update.metrics["train/imitation_tokens"] == sum(len(chunk.tokens) for chunk in expert.chunks[:2])
    assert update.metrics["train/tokens"] == update.metrics["train/entropy"] == 0  # nothing sampled is trained
    assert update.annotations["expert"]["returns"] == [0.125, 0.25]  # of its whole trajectory, not of the part
    assert update.metrics["train/grad_norm"] > 0
    rows = pack_trajectories(led, 48, 8)
    trained = sorted(rows.tokens[rows.chunk_ids >= 0].tolist())
    assert trained == sorted(token for t in led for token in t.chunks[-1].tokens.tolist())


def test_nothing_compiles_after_the_warm_up():
    """Batches of one or several micro-batches, with and without something to train."""
    chosen = settings(updates_per_batch=2, micro_rows=1)
    runner, state = trainer(DENSE, ObjectiveConfig(**WIDE), chosen)
    before = jax.tree.map(np.asarray, state)
    runner.warmup(state)
    assert distance(state, before) == 0
    with count_compilations() as compiled:
        for seed, rewards in enumerate([(0.0,), (1.0, *[0.0] * 7), (1.0, 0.0), (1.0,)]):
            state, update = runner.update(state, trajectories(seed, rewards=rewards), seed, annotate=seed == 2)
    assert update.metrics["train/grad_norm"] > 0
    assert compiled.count == 0


@pytest.mark.parametrize("name", ["groups", "group_size", "row_length", "max_chunks", "micro_rows", "save_every"])
def test_settings_refuse_what_makes_no_sense(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, found 0"):
        settings(**{name: 0})
    assert isinstance(settings(**{name: 1}), PolicySettings)


def test_router_replay_visits_the_recorded_experts():
    rng = np.random.default_rng(0)
    plain = trajectories(0)
    recorded = [
        t.with_experts(
            np.stack([rng.permuted(np.arange(4))[:2] for _ in range(t.num_tokens - 1)])[:, None].astype("i2")
        )
        for t in plain
    ]
    found = {}
    for replay in (False, True):
        for name, given in (("plain", plain), ("recorded", recorded)):
            runner, state = trainer(MOE, PUNISHING, settings(router_replay=replay, updates_per_batch=2))
            found[name, replay] = runner.update(state, given, 0)[1].metrics
    assert found["plain", False] == found["recorded", False]
    for name, value in found["plain", True].items():  # nothing recorded: routed as ever
        assert value == pytest.approx(found["plain", False][name], rel=1e-4, abs=1e-6), name
    for name in ("train/loss", "train/entropy", "train/grad_norm"):
        assert abs(found["recorded", True][name] - found["plain", True][name]) > 1e-5, name
    with pytest.raises(ValueError, match="router_replay: expected False of a policy without experts"):
        trainer(DENSE, PUNISHING, settings(router_replay=True))


def test_router_losses_join_the_objective_whatever_the_micro_batches():
    given, found = trajectories(0), {}
    for coefficient, micro_rows in ((0.0, 4), (2.0, 1), (2.0, 4)):
        model = dataclasses.replace(MOE, router_z_loss_coef=coefficient)
        runner, state = trainer(model, PUNISHING, settings(micro_rows=micro_rows, optimizer=LINEAR))
        found[coefficient, micro_rows] = runner.update(state, given, 0)
    (without, plain), (one, _), (four, added) = found.values()
    assert "train/router_loss" not in plain.metrics and added.metrics["train/router_loss"] > 0.1
    assert distance(one.params, four.params) < 1e-5
    assert distance(four.params["layers"]["router"], without.params["layers"]["router"]) > 1e-3

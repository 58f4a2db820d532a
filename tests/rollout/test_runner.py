"""The lockstep runner: deterministic, gapless, and never fooled or hung by an environment."""

from __future__ import annotations

import threading
import time

import jax
import numpy as np
import pytest
from rollout_toys import (
    MODEL,
    Journal,
    ToyEnv,
    ToyRenderer,
    same_trajectory,
    toy_engine,
    toy_params,
    toy_requests,
    toy_task,
)
from waiting import wait_until

from rome.envs import EnvFailure
from rome.models import token_log_probs
from rome.rollout import Deadlines, EngineError, GroupRequest, LedgerError, RolloutConfig, RolloutRunner
from rome.trajectory import Status

ROW = 96
training_path = jax.jit(token_log_probs, static_argnums=1)


def make_runner(journal=None, engine=None, **config):
    journal = journal or Journal()
    deadlines = config.pop("deadlines", Deadlines(reset=20, step=20, verify=20, close=20))
    settings = RolloutConfig(**{"env_threads": 4, "deadlines": deadlines, **config})
    return RolloutRunner(engine or toy_engine(), ToyRenderer(), lambda: ToyEnv(journal), settings), journal


def roll(requests, journal=None, engine=None, temperature=None, **config):
    runner, journal = make_runner(journal, engine, **config)
    with runner:
        groups = runner.run(requests, temperature)
    assert journal.opened == journal.closed
    return groups, runner


def flat(groups):
    return [sample for group in groups for sample in group]


def fail_once(where, error):
    """A fault that strikes the first `where` calls of the journal's environments."""
    left = [where]

    def fault(env):
        with env.journal.lock:
            left[0] -= 1
            strikes = left[0] >= 0
        if strikes:
            raise error

    return fault


def test_groups_come_back_whole_in_order_and_satisfy_the_contract():
    requests = toy_requests(groups=3, size=4)
    groups, runner = roll(requests)
    assert [[t.id for t in group] for group in groups] == [[f"g{g}/{s}" for s in range(4)] for g in range(3)]
    samples = flat(groups)
    assert {t.status for t in samples} <= {Status.COMPLETED, Status.TRUNCATED}
    assert len({len(t.chunks) for t in samples}) > 1
    assert max(len(t.chunks) for t in samples) <= ToyEnv.max_chunks
    for group, request in zip(groups, requests, strict=True):
        assert len({t.prompt.tokens.tobytes() for t in group}) == 1
        assert len({tuple(t.chunks[0].tokens) for t in group}) > 1  # the same state, different samples
        assert all((t.task, t.seed, t.start_version) == (request.task.task, request.seed, 0) for t in group)
    assert runner.stats.trajectories == 12
    assert runner.stats.chunks == sum(len(t.chunks) for t in samples)
    assert all(set(t.timings) >= {"reset", "generate", "verify", "total"} for t in samples)
    # the environment's word on its second command
    assert all(t.chunks[1].error for t in samples if len(t.chunks) > 1)


def test_log_probs_of_whole_trajectories_are_those_of_the_training_path():
    groups, runner = roll(toy_requests(groups=2, size=4, seed=5))
    for t in flat(groups):
        tokens = np.concatenate([part for _, part in t.segments()])
        row = np.zeros((1, ROW), np.int32)
        row[0, : len(tokens)] = tokens
        segments = (np.arange(ROW) < len(tokens)).astype(np.int32)[None]
        logp, _ = training_path(toy_params(), MODEL, row, np.arange(ROW, dtype=np.int32)[None], segments)
        start = 0
        for chunk, part in t.segments():
            if chunk >= 0:
                np.testing.assert_allclose(
                    t.chunks[chunk].behavior_logp, np.asarray(logp[0])[start : start + len(part)], atol=1e-4
                )
            start += len(part)
    # every prompt and observation was prefilled exactly once, over all turns
    given = sum(len(part) for t in flat(groups) for chunk, part in t.segments() if chunk < 0)
    stats = runner.engine.stats
    assert stats.prefilled_tokens + stats.copied_tokens == given
    assert runner.engine.stats.decoded_tokens == sum(len(c.tokens) for t in flat(groups) for c in t.chunks)


def test_timing_does_not_matter_a_rerun_gives_the_same_bits():
    requests = toy_requests(groups=4, size=3, seed=2)
    calm = flat(roll(requests)[0])
    hectic = flat(roll(requests, Journal(jitter=0.01), env_threads=7)[0])
    assert len(calm) == 12
    assert all(same_trajectory(a, b) for a, b in zip(calm, hectic, strict=True))
    other = flat(roll(toy_requests(groups=4, size=3, seed=99))[0])
    assert not any(same_trajectory(a, b) for a, b in zip(calm, other, strict=True))


def test_what_is_sampled_does_not_depend_on_how_slots_are_scheduled():
    requests = toy_requests(groups=3, size=3, seed=4)
    narrow = flat(roll(requests)[0])
    wide = flat(roll(requests, engine=toy_engine(slots=6, cohorts=3))[0])
    lonely = flat(roll(requests[1:2])[0])
    for a, b in [*zip(narrow, wide, strict=True), *zip(narrow[3:6], lonely, strict=True)]:
        assert [s.tolist() for _, s in a.segments()] == [s.tolist() for _, s in b.segments()]
        assert a.final_reward == b.final_reward
        for x, y in zip(a.chunks, b.chunks, strict=True):
            np.testing.assert_allclose(x.behavior_logp, y.behavior_logp, atol=1e-5)


def test_greedy_evaluation_makes_the_samples_of_a_group_equal():
    (group,), _ = roll(toy_requests(groups=1, size=3), temperature=0.0)
    assert len({tuple(np.concatenate([c.tokens for c in t.chunks])) for t in group}) == 1


def test_new_weights_between_chunks_show_in_versions():
    engine = toy_engine()
    runner, _ = make_runner(engine=engine)
    decode = engine.generate

    def generate(*args):
        if engine.stats.turns == 3:  # before the second turn of the second cohort
            engine.update_params(toy_params(1), 7)
        return decode(*args)

    engine.generate = generate
    with runner:
        samples = flat(runner.run(toy_requests(groups=2, size=4, seed=3)))
    stamps = [[int(v) for c in t.chunks for v in c.versions] for t in samples]
    assert all(s == sorted(s) and set(s) <= {0, 7} for s in stamps)
    assert any(set(s) == {0, 7} for s in stamps)
    assert all(t.start_version == s[0] for t, s in zip(samples, stamps, strict=True))


def test_a_full_context_truncates_and_the_verifier_still_speaks():
    journal = Journal(observation_tokens=12)
    groups, runner = roll(toy_requests(groups=4, size=2), journal, toy_engine(max_length=40))
    cut = [t for t in flat(groups) if t.status is Status.TRUNCATED]
    assert len(cut) > 2
    assert runner.stats.truncated == len(cut)
    assert all(t.num_tokens <= 40 and t.final_reward in (0.0, 1.0) for t in flat(groups))
    # either the last observation did not fit, or the chunk itself hit the end
    assert any(len(t.observations) == len(t.chunks) - 1 and t.num_tokens < 40 for t in cut)


def test_a_chunk_without_a_stop_is_the_final_answer_and_an_error():
    groups, _ = roll(toy_requests(groups=3, size=4), engine=toy_engine(max_chunk_tokens=2))
    endless = [t for t in flat(groups) if t.chunks[-1].tokens[-1] not in ToyRenderer.stop_ids]
    assert endless
    assert all(len(t.chunks[-1].tokens) == 2 and t.chunks[-1].error for t in endless)
    assert all(t.status is Status.COMPLETED and t.final_reward is not None for t in endless)


@pytest.mark.parametrize("stage", ["reset", "step"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EnvFailure(Status.INFRA_FAILURE, "the sandbox died"), "infra_failure"),
        (EnvFailure(Status.VERIFIER_FAILURE, "no reward file"), "verifier_failure"),
        (OSError(28, "no space left"), "infra_failure"),
    ],
)
def test_a_lost_sample_is_counted_and_sampled_again_never_scored(stage, error, reason):
    journal = Journal(**{f"{stage}_fault": fail_once(2, error)})
    groups, runner = roll(toy_requests(groups=2, size=3), journal)
    assert runner.stats.failures == {f"{reason}/{stage}": 2}
    assert runner.stats.resampled == 2
    samples = flat(groups)
    assert len(samples) == 6
    again = [t for t in samples if "+1" in t.id]
    assert len(again) == 2
    clean = {t.id: t for t in flat(roll(toy_requests(groups=2, size=3))[0])}
    for t in samples:
        assert t.status.is_reliable
        first = clean[t.id.split("+")[0]]
        assert t.prompt.tokens.tolist() == first.prompt.tokens.tolist()  # the same initial state
    said = [[chunk.tokens.tolist() for chunk in t.chunks] for t in again]
    before = [[chunk.tokens.tolist() for chunk in clean[t.id.split("+")[0]].chunks] for t in again]
    assert said != before  # under keys of their own (one short chunk may well be the same)


def test_a_group_that_keeps_failing_is_dropped_by_name_and_the_others_live():
    def fault(env):
        if env.history.startswith("t1/"):
            raise EnvFailure(Status.INFRA_FAILURE, "the disk is gone")

    groups, runner = roll(toy_requests(groups=3, size=3), Journal(step_fault=fault), max_retries=1)
    assert [group[0].group_id for group in groups] == ["g0", "g2"]
    ((name, reason),) = runner.stats.dropped_groups.items()
    assert name == "g1"
    assert "the disk is gone" in str(reason)
    assert "lost 2 times" in str(reason)
    assert isinstance(reason.__cause__, EnvFailure)


def test_max_retries_zero_drops_at_the_first_loss():
    fault = fail_once(1, EnvFailure(Status.INFRA_FAILURE, "x"))
    groups, runner = roll(toy_requests(groups=1, size=2), Journal(reset_fault=fault), max_retries=0)
    assert groups == []
    assert list(runner.stats.dropped_groups) == ["g0"]


@pytest.mark.parametrize("stage", ["reset", "step"])
def test_a_hung_environment_meets_its_deadline_and_is_closed(stage):
    release, hung = threading.Event(), []

    def fault(env):
        if not hung:
            hung.append(env)
            release.wait(120)

    journal = Journal(**{f"{stage}_fault": fault})
    deadlines = Deadlines(**{"reset": 60, "step": 60, "close": 60, "verify": 2.0} | {stage: 2.0})
    runner, _ = make_runner(journal, deadlines=deadlines)
    runner.engine.warmup()
    started = time.monotonic()
    with runner:
        groups = runner.run(toy_requests(groups=2, size=3))
        assert time.monotonic() - started < 100
        assert len(flat(groups)) == 6
        assert runner.stats.failures == {f"timeout/{stage}": 1}
        assert runner.stats.hung_calls == 1
    release.set()
    wait_until(lambda: journal.opened == journal.closed)  # the late one too


def test_a_close_that_hangs_is_counted_and_does_not_hang_the_run():
    release = threading.Event()
    journal = Journal(close_fault=lambda env: release.wait(120))
    started = time.monotonic()
    groups, runner = roll(
        toy_requests(groups=1, size=2), journal, deadlines=Deadlines(reset=60, step=60, verify=60, close=0.2)
    )
    assert time.monotonic() - started < 100
    assert len(flat(groups)) == 2
    assert runner.stats.failures == {"DeadlineExceeded/close": 2}
    release.set()


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_bugs_and_interrupts_propagate_and_everything_is_closed(error):
    runner, journal = make_runner(Journal(step_fault=fail_once(1, error)))
    with runner, pytest.raises(type(error)):
        runner.run(toy_requests(groups=2, size=4))
    assert journal.opened == journal.closed > 0
    # and the runner's slots are free again
    with make_runner(engine=runner.engine)[0] as again:
        assert len(flat(again.run(toy_requests(groups=2, size=2)))) == 4


def test_a_reward_that_is_no_number_is_a_verifier_failure():
    class Broken(ToyEnv):
        def step(self, action):
            text, _, over, cut, info = super().step(action)
            return text, float("nan"), over, cut, info

    runner = RolloutRunner(toy_engine(), ToyRenderer(), lambda: Broken(Journal()), RolloutConfig(max_retries=1))
    with runner:
        assert runner.run(toy_requests(groups=1, size=1)) == []
    assert runner.stats.failures == {"verifier_failure/step": 2}


def test_a_trajectory_can_start_from_an_expert_prefix():
    donors = flat(roll(toy_requests(groups=4, size=4, seed=8))[0])
    expert = max(donors, key=lambda t: len(t.chunks))
    assert len(expert.chunks) >= 3
    request = GroupRequest(toy_task(expert.task.id), "resampled", 4, expert.seed, prefix=expert, prefix_chunks=2)
    (group,), runner = roll([request])
    for t in group:
        assert t.prefix_chunks == 2
        assert t.prompt.tokens.tolist() == expert.prompt.tokens.tolist()
        for k in range(2):
            assert t.chunks[k].tokens.tolist() == expert.chunks[k].tokens.tolist()
            assert t.chunks[k].behavior_logp.tobytes() == expert.chunks[k].behavior_logp.tobytes()
            assert t.observations[k].tokens.tolist() == expert.observations[k].tokens.tolist()
        assert len(t.chunks) > 2
    assert len({t.chunks[2].tokens.tobytes() for t in group}) > 1
    # the prompt, the expert's chunks and all observations are given; c is -1 for what is no chunk
    given = sum(len(p) for t in group for c, p in t.segments() if c < 2)
    stats = runner.engine.stats
    assert stats.prefilled_tokens + stats.copied_tokens == given
    with pytest.raises(ValueError, match="prefix_chunks: expected"):
        GroupRequest(toy_task(expert.task.id), "r", 1, 0, prefix=expert, prefix_chunks=len(expert.chunks))
    with pytest.raises(ValueError, match="expected task other"):
        GroupRequest(toy_task("other"), "r", 1, 0, prefix=expert, prefix_chunks=1)


def test_a_prompt_that_does_not_fit_drops_its_group_at_once():
    groups, runner = roll(toy_requests(groups=1, size=2), engine=toy_engine(max_length=4, extend_buckets=(8,)))
    assert groups == []
    assert "leaves no room in max_length=4" in str(runner.stats.dropped_groups["g0"])
    assert runner.stats.resampled == 0


def test_a_history_that_changes_under_way_raises():
    runner, journal = make_runner()

    def corrupt(env):
        runner.engine._held[:, 1] = 63

    journal.step_fault = corrupt
    with runner, pytest.raises(LedgerError, match="token 1 was 63 in the engine"):
        runner.run(toy_requests(groups=1, size=4))


def test_requests_and_configs_are_checked_by_name():
    runner, _ = make_runner()
    with runner, pytest.raises(ValueError, match=r"distinct group ids, found \['g0'\]"):
        runner.run([*toy_requests(1, 1), *toy_requests(1, 1)])
    with pytest.raises(ValueError, match="size"):
        GroupRequest(toy_task(), "g", 0, 0)
    for field, value in [("env_threads", 0), ("max_retries", -1), ("gather_seconds", -1.0)]:
        with pytest.raises(ValueError, match=field):
            RolloutConfig(**{field: value})
    for field in ("reset", "step", "verify", "close"):
        with pytest.raises(ValueError, match=field):
            Deadlines(**{field: 0})
    with pytest.raises(EngineError):
        toy_engine(slots=5)

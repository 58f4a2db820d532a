"""Rollouts lend devices to training: what is in flight moves with its caches, and nobody can tell from the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_devices import run_on_fake_devices
from rollout_toys import toy_engine

from rome.rollout import EngineError

HERE = Path(__file__).parent
ALL, REST = set(range(8)), set(range(4, 8))
SPLITS = ["data", "data × tensor", "expert"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=250"
    return run_on_fake_devices(HERE / "multiplexed_run.py", tmp_path_factory.mktemp("multiplexed"), flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_a_trajectory_that_moved_says_what_one_that_stayed_says(found, name):
    stayed, moved = found["splits"][name]["stayed"], found["splits"][name]["moved"]
    for slot, chunks in stayed["said"].items():
        for (tokens, behavior, raw, versions), other in zip(chunks, moved["said"][slot], strict=True):
            np.testing.assert_array_equal(other[0], tokens)
            np.testing.assert_allclose(other[1], behavior, atol=1e-5)
            np.testing.assert_allclose(other[2], raw, atol=1e-5)
            np.testing.assert_array_equal(other[3], versions)
        if stayed["experts"]:
            np.testing.assert_array_equal(moved["experts"][slot], stayed["experts"][slot])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_it_lies_where_it_should_and_nothing_is_prefilled_or_compiled_again(found, name):
    stayed, moved = found["splits"][name]["stayed"], found["splits"][name]["moved"]
    assert moved["lay"] == [(ALL, ALL), (REST, REST)] * 3  # weights, states; a move before each turn but the first
    assert stayed["lay"] == [(ALL, ALL)] * 6
    assert moved["compiled"] == 0
    counts = ("turns", "prefilled_tokens", "copied_tokens", "decoded_tokens", "processed_tokens", "padded_tokens")
    assert [moved["stats"][c] for c in counts] == [stayed["stats"][c] for c in counts]
    assert moved["stats"]["moves"] - 2 == 5  # warm-up moves there and back


@pytest.mark.slow
def test_weights_published_while_narrow_take_effect_there(found):
    moved = found["splits"]["data"]["moved"]
    assert moved["lay"][3] == (REST, REST)
    for chunks in moved["said"].values():
        assert [set(versions.tolist()) for *_, versions in chunks] == [{0}] * 3 + [{5}] * 3


@pytest.mark.slow
def test_free_running_rollouts_go_on_while_a_trainer_borrows_devices_again_and_again(found):
    free = found["free"]
    assert free["moves"] - 2 == 2 * 6
    assert free["compiled"] == 0
    assert free["turns"][1] >= 2 * 6  # narrow
    samples = free["samples"]
    assert len(samples) == len({sample["id"] for _, sample in samples}) == 6 * 4 * 4
    for step, sample in samples:
        assert 0 <= step - sample["start"] <= 1
        assert sample["stamps"] == sorted(sample["stamps"])
        assert sample["stamps"][0] == sample["start"]
    assert any(len(set(sample["stamps"])) > 1 for _, sample in samples)  # one was in flight when it moved


@pytest.mark.slow
def test_moves_and_updates_never_wait_for_a_gap_between_turns(found):
    hammered = found["hammered"]
    assert hammered["failures"] == []
    assert not hammered["alive"]
    assert hammered["moves"] - 2 == 40
    assert hammered["turns"] > 0


def test_a_placement_that_is_not_there_is_refused():
    engine = toy_engine()
    engine.move_to(0)
    with pytest.raises(EngineError, match=r"placement: expected 0\.\.0, found 1"):
        engine.move_to(1)

"""The families without a sandbox: shape, budget and variety of what they draw."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from rome.envs import FAMILIES, HELD_OUT_FAMILIES, draft_task, expert_actions, generate_task, load_task
from rome.envs.families import MAX_HORIZON, MIN_HORIZON, REGISTRY
from rome.envs.families.words import WORDS
from rome.envs.generate import build_draft

ALL = (*FAMILIES, *HELD_OUT_FAMILIES)
HORIZONS = range(MIN_HORIZON, MAX_HORIZON + 1)
CELLS = list(itertools.product(ALL, HORIZONS))


def test_there_are_enough_families_and_none_is_both_trained_and_held_out() -> None:
    assert len(set(FAMILIES)) >= 12
    assert HELD_OUT_FAMILIES
    assert not set(FAMILIES) & set(HELD_OUT_FAMILIES)
    assert set(REGISTRY) == set(ALL)
    assert (MIN_HORIZON, MAX_HORIZON) == (2, 12)


def test_names_cannot_be_mistaken_for_one_another() -> None:
    assert 120 <= len(WORDS) <= 160
    assert len({word[:3] for word in WORDS}) == len(WORDS)
    assert all(re.fullmatch("[a-z]{4,6}", word) for word in WORDS)
    assert not [(a, b) for a, b in itertools.permutations(WORDS, 2) if a in b]
    spoken = " ".join(build_draft(family, 0, horizon).instruction for family, horizon in CELLS)
    verbs = {word for word in re.findall("[a-z]+", spoken) if word not in WORDS}
    assert not verbs & set(WORDS)


@pytest.mark.parametrize(("family", "horizon"), CELLS)
def test_the_expert_takes_exactly_the_horizon(family: str, horizon: int) -> None:
    for seed in range(6):
        task = draft_task(family, seed, horizon)
        actions = expert_actions(task, seed, flawed=False)
        assert len(actions) == task.task.horizon == horizon
        assert actions[-1] is None and None not in actions[:-1]
        assert [line for line in task.solution.splitlines()[1:]] == actions[:-1]
        assert len(task.task.instruction.split()) <= 35
        assert all(action is None or len(action) <= 60 for action in actions)


@pytest.mark.parametrize(("family", "horizon"), CELLS)
def test_flawed_experts_err_in_many_ways_and_always_stop(family: str, horizon: int) -> None:
    task = draft_task(family, 4, horizon)
    reference = expert_actions(task, 0, flawed=False)
    drawn = [expert_actions(task, seed, flawed=True) for seed in range(60)]
    assert drawn == [expert_actions(task, seed, flawed=True) for seed in range(60)]
    assert all(actions != reference and actions[-1] is None and None not in actions[:-1] for actions in drawn)
    # One step leaves room for few mistakes; long tasks have many.
    assert len({tuple(actions) for actions in drawn}) >= min(horizon, 6)
    places = {next(i for i, (a, b) in enumerate(zip(actions, reference, strict=False)) if a != b) for actions in drawn}
    assert len(places) >= max(1, min(horizon - 2, 3))


@pytest.mark.parametrize("family", ["follow_hints", "count_matches", "move_files", "edit_config", "make_links"])
def test_the_right_branch_has_no_fixed_place(family: str) -> None:
    """Over many tasks the wrong branch stands before the right one about half of the time."""
    first_wrong = []
    for seed in range(60):
        for file in draft_task(family, seed, 7).files.values():
            old, *right = (file.content.find(mark) for mark in (b"old", b"new", b"next:", b"code:", b"use:"))
            if old >= 0 and max(right) >= 0:
                first_wrong.append(old < max(right))
    assert len(first_wrong) >= 60
    assert 0.35 < sum(first_wrong) / len(first_wrong) < 0.65


@pytest.mark.parametrize("family", ALL)
def test_answers_cannot_be_guessed(family: str) -> None:
    """No blind sequence of commands solves a noticeable share of the tasks, not even of the shortest."""
    shortest = Counter(draft_task(family, seed, 2).solution for seed in range(300))
    assert shortest.most_common(1)[0][1] <= 9
    assert len({draft_task(family, seed, 6).solution for seed in range(200)}) == 200


def test_experts_of_hand_made_tasks_follow_the_solution_script(tmp_path: Path) -> None:
    folder = Path(generate_task("make_links", 1, 4, tmp_path).task.path)
    config = folder / "task.toml"
    config.write_text(config.read_text().replace('family = "make_links"\n', ""))
    task = load_task(folder)
    reference = expert_actions(task, 0, flawed=False)
    assert reference == expert_actions(draft_task("make_links", 1, 4), 0, flawed=False)
    flawed = expert_actions(task, 0, flawed=True)
    assert flawed[-1] is None and flawed[:-1] == reference[: len(flawed) - 1] and len(flawed) < len(reference)
    (folder / "solution" / "solve.sh").unlink()
    with pytest.raises(ValueError, match=r"solution/solve\.sh: expected the commands"):
        expert_actions(load_task(folder), 0, flawed=False)


def test_a_new_family_is_one_class() -> None:
    """The size that the guide promises: no family takes more than 50 lines."""
    for family in REGISTRY.values():
        lines = inspect.getsource(type(family)).count("\n")
        assert lines <= 50, (family.name, lines)

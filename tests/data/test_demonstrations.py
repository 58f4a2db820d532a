"""Scripted experts in real sandboxes, their tokens, and what relabelling leaves of them."""

import functools
import re

import numpy as np
import pytest

from rome.data import Episode, collect_episodes, fixed_tasks, relabel, relabelling, tokenize_episodes
from rome.envs import FAMILIES, EnvFailure, TerminalEnv, draft_task, expert_actions
from rome.envs.families.words import WORDS
from rome.models import ChatRenderer, train_tokenizer
from rome.trajectory import Status

pytestmark = pytest.mark.usefixtures("sandbox_machine")
SPECS = fixed_tasks(FAMILIES, (2, 3, 5), 36, first_seed=4_000_000_000)


def _collect(workers, flawed=0.5, seed=3, **changes):
    factory = functools.partial(TerminalEnv, max_chunks=10)
    return collect_episodes(SPECS, flawed, seed, changes.pop("env_factory", factory), workers, **changes)


@pytest.fixture(scope="module")
def episodes():
    return _collect(6)


@pytest.fixture(scope="module")
def renderer(episodes):
    return ChatRenderer(train_tokenizer((text for e in episodes for text in e.texts()), 700))


def test_the_number_of_workers_does_not_show(episodes):
    seen = []
    assert _collect(1, on_episode=seen.append) == episodes
    assert seen == list(range(1, len(SPECS) + 1))
    assert _collect(3, seed=4) != episodes


def test_flawed_episodes_fail_and_the_others_succeed(episodes):
    flawed = [e.flawed for e in episodes]
    assert 10 <= sum(flawed) <= 26
    assert all(e.reward == (0.0 if e.flawed else 1.0) for e in episodes)
    assert all(len(e.actions) == len(e.outputs) == len(e.errors) for e in episodes)
    for e, spec in zip(episodes, SPECS, strict=True):
        assert (e.task.family, e.task.horizon, e.task.seed) == (spec.family, spec.horizon, spec.seed)
        assert e.actions[-1] is None
        assert e.status is Status.COMPLETED
        assert e.flawed or len(e.actions) == spec.horizon
    assert not any(e.flawed for e in _collect(6, flawed=0.0))
    assert all(e.flawed for e in _collect(6, flawed=1.0))


def test_an_infrastructure_failure_is_tried_again_then_raised(episodes):
    class Fails(TerminalEnv):
        """Each episode's first `failures` resets fail."""

        failures, seen = 2, {}

        def reset(self, *, seed=None, options=None):
            name = options["task"].task.id
            self.seen[name] = self.seen.get(name, 0) + 1
            if self.seen[name] <= self.failures:
                raise EnvFailure(Status.INFRA_FAILURE, "on purpose")
            return super().reset(seed=seed, options=options)

    assert _collect(6, env_factory=functools.partial(Fails, max_chunks=10)) == episodes
    Fails.seen.clear()
    Fails.failures = 3
    with pytest.raises(EnvFailure, match="on purpose"):
        _collect(6, env_factory=functools.partial(Fails, max_chunks=10))


def test_tokens_are_the_conversation(episodes, renderer):
    for number, (e, t) in enumerate(zip(episodes, tokenize_episodes(episodes, renderer), strict=True)):
        assert t.id == t.group_id == f"demo-{number}"
        assert (t.final_reward, t.status, t.start_version) == (e.reward, e.status, -1)
        assert len(t.observations) == len(t.chunks) - 1
        text = renderer.tokenizer.decode(np.concatenate([tokens for _, tokens in t.segments()]).tolist())
        for part in (e.task.instruction, *filter(None, e.actions), *filter(None, e.outputs[:-1])):
            assert part in text
        for chunk, action, error in zip(t.chunks, e.actions, e.errors, strict=True):
            parsed = renderer.parse(chunk.tokens)
            assert (parsed.kind, parsed.command) == (("final", "") if action is None else ("tool_call", action))
            assert chunk.error == error
            assert (chunk.versions == -1).all()
            assert not chunk.behavior_logp.any()


# --- relabelling -----------------------------------------------------------------------------------------------------

_PIECE = re.compile(r"[a-z]+|[0-9]{3,}")


def test_names_are_permuted_and_numbers_drawn_anew():
    mapping = relabelling(np.random.default_rng(0), WORDS)
    assert sorted(map(mapping, WORDS)) == sorted(WORDS)
    assert sum(mapping(word) != word for word in WORDS) > 0.9 * len(WORDS)
    modes = [mapping(str(n)) for n in range(400, 500)]
    assert all(re.fullmatch("[4-7][0-7][0-7]", mode) for mode in modes)
    codes = [mapping(str(n)) for n in range(10_000, 10_400)]
    assert all(re.fullmatch("[1-9][0-9]{4}", code) for code in codes)
    for mapped in (modes, codes):
        assert len(set(mapped)) == len(mapped)  # what differed, differs
    assert mapping("400") == modes[0]  # the same again
    # more three-digit numbers than there are modes: then some have to meet
    assert all(len(mapping(str(n))) == 3 for n in range(100, 1000))


def test_everything_else_stays():
    mapping = relabelling(np.random.default_rng(1), ["kelp", "wolf"])
    text = "cat Kelp kelps x_kelp/wolf.txt 12 7 [exit 2] WOLF\n\tkelp-99"
    swapped = text.replace("x_kelp/wolf", "x_wolf/kelp").replace("kelp-99", "wolf-99")
    assert mapping(text) in (text, swapped)
    assert mapping("") == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_commands_stay_the_programs_that_they_call(family):
    """`sha256sum` was once relabelled to `sha535sum`: a family that a policy could then not learn."""
    for seed in range(5):
        mapping = relabelling(np.random.default_rng(seed), WORDS)
        for action in filter(None, expert_actions(draft_task(family, seed, 6), seed, False)):
            programs = re.findall(r"(?:^|[|;] *)([a-z0-9]+)", action)
            assert programs and re.findall(r"(?:^|[|;] *)([a-z0-9]+)", mapping(action)) == programs


def test_a_mapping_is_a_function_of_its_generator():
    text = " ".join(WORDS[:40]) + " 123 4567"
    one, two, other = (relabelling(np.random.default_rng(seed), WORDS)(text) for seed in (5, 5, 6))
    assert one == two != other


def _texts(t):
    return [t.prompt.text, *(c.text for c in t.chunks), *(o.text for o in t.observations)]


def test_relabelled_demonstrations_keep_their_structure(episodes, renderer):
    """Names and numbers may be others, but each occurs where it did, and what was copied is still a copy."""
    rng = np.random.default_rng(0)
    changed = 0
    for t in tokenize_episodes(episodes, renderer):
        again = relabel(t, relabelling(rng, WORDS), renderer)
        for name in ("id", "group_id", "seed", "final_reward", "status", "start_version"):
            assert getattr(again, name) == getattr(t, name)
        assert (again.task.id, again.task.family) == (t.task.id, t.task.family)
        assert [c.error for c in again.chunks] == [c.error for c in t.chunks]
        assert [renderer.parse(c.tokens).kind for c in again.chunks] == [
            renderer.parse(c.tokens).kind for c in t.chunks
        ]
        before, after = "\0".join(_texts(t)), "\0".join(_texts(again))
        assert _PIECE.sub("@", after) == _PIECE.sub("@", before)
        first_place = lambda pieces: [pieces.index(piece) for piece in pieces]  # noqa: E731
        assert first_place(_PIECE.findall(after)) == first_place(_PIECE.findall(before))
        changed += after != before
        text = renderer.tokenizer.decode(np.concatenate([tokens for _, tokens in again.segments()]).tolist())
        assert all(part in text for part in _texts(again))
    assert changed >= len(episodes) - 3  # a permutation may leave the few names of one task where they are


def test_relabelling_with_nothing_to_change_is_the_same_demonstration(episodes, renderer):
    for t in tokenize_episodes(episodes, renderer):
        again = relabel(t, lambda text: text, renderer)
        assert [k for k, _ in again.segments()] == [k for k, _ in t.segments()]
        for (_, a), (_, b) in zip(again.segments(), t.segments(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert _texts(again) == _texts(t)


def test_texts_are_all_that_a_tokenizer_meets(episodes):
    e = episodes[0]
    assert isinstance(e, Episode)
    assert set(e.texts()) == {e.task.instruction, *filter(None, e.actions), *filter(None, e.outputs)}

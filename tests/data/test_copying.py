import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data import copy_exercises

lengths = st.tuples(st.integers(1, 12), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(2, 60), st.integers(2, 40), lengths, lengths)
def test_every_trained_token_can_be_predicted(seed, rows, row_length, words, context, segment):
    """A trained token stands in the context after the same token as it does here: a copying head finds it."""
    vocabulary = np.arange(100, 100 + words, dtype=np.int32)
    batch = copy_exercises(np.random.default_rng(seed), rows, row_length, vocabulary, context, segment)
    tokens, chunk_ids = batch["tokens"], batch["chunk_ids"]
    assert tokens.shape == chunk_ids.shape == (rows, row_length)
    assert all(array.dtype == np.int32 for array in batch.values())
    assert np.isin(tokens, vocabulary).all()
    assert set(np.unique(chunk_ids)) <= {-1, 0}
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(row_length), (rows, 1)))
    assert (batch["segment_ids"] == 1).all()
    for row, trained in zip(tokens, chunk_ids == 0, strict=True):
        pairs = {}
        size = min(context[1], row_length)
        for at in range(1, row_length):
            if trained[at]:
                assert at > context[0]  # never within the context
                assert row[at] in pairs.get(row[at - 1], ())
            if at < size:
                pairs.setdefault(row[at - 1], set()).add(row[at])


def test_segments_are_spans_of_the_context():
    """With a context without repetitions: trained runs continue their cue's place, and are of the lengths asked for."""
    rng = np.random.default_rng(0)
    vocabulary = np.arange(5000, dtype=np.int32)
    batch = copy_exercises(rng, 40, 80, vocabulary, (20, 20), (3, 6))
    runs = []
    for row, trained in zip(batch["tokens"], batch["chunk_ids"] == 0, strict=True):
        where = {token: at for at, token in enumerate(row[:20])}
        if len(where) < 20:
            continue
        for at in range(20, 80):
            if trained[at]:
                assert where[row[at]] == where[row[at - 1]] + 1
        cues = [at for at in range(20, 80) if not trained[at]]
        runs += list(np.diff(cues))
    assert set(runs) == {3, 4, 5, 6}
    assert 0.6 < (batch["chunk_ids"][:, 20:] == 0).mean() < 0.9


def test_exercises_are_a_function_of_the_generator():
    vocabulary = np.arange(50, dtype=np.int32)
    one, two, other = (copy_exercises(np.random.default_rng(seed), 4, 64, vocabulary) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["tokens"], other["tokens"])


@pytest.mark.parametrize("context", [(64, 64), (100, 120)])
def test_a_context_that_fills_the_row_leaves_nothing_to_train(context):
    batch = copy_exercises(np.random.default_rng(0), 2, 64, np.arange(9, dtype=np.int32), context, (2, 4))
    assert (batch["chunk_ids"] == -1).all()

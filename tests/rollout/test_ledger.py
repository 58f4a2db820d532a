"""The ledger only appends, and says when somebody did otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from rome.rollout import LedgerError, TokenLedger
from rome.trajectory import Chunk


def chunk(*tokens: int) -> Chunk:
    n = len(tokens)
    return Chunk("c", np.array(tokens, np.int32), np.zeros(n, np.float32), np.zeros(n, np.int32))


@pytest.fixture
def ledger() -> TokenLedger:
    ledger = TokenLedger("g/0", 16)
    ledger.append_prompt([5, 6, 7])
    ledger.append_chunk(chunk(8, 9))
    return ledger


def test_pieces_follow_each_other(ledger):
    ledger.append_observation([1, 2], "out")
    ledger.append_chunk(chunk(3))
    assert ledger.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert (len(ledger), ledger.room) == (8, 8)
    assert ledger.prompt.tokens.tolist() == [5, 6, 7]
    assert [o.text for o in ledger.observations] == ["out"]
    assert len(ledger.chunks) == 2


def test_the_delta_is_what_the_engine_has_not_seen(ledger):
    assert ledger.delta(np.array([], np.int32)).tolist() == [5, 6, 7, 8, 9]
    assert ledger.delta(np.array([5, 6, 7, 8], np.int32)).tolist() == [9]


def test_a_changed_history_raises_and_names_the_token(ledger):
    with pytest.raises(LedgerError, match=r"g/0: token 1 was 4 in the engine, is 6 now"):
        ledger.delta(np.array([5, 4, 7], np.int32))
    with pytest.raises(LedgerError, match="engine holds 6 tokens, the ledger only 5"):
        ledger.delta(np.arange(6, dtype=np.int32))


def test_what_is_written_cannot_be_written_again(ledger):
    for array in (ledger.tokens, ledger.prompt.tokens):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    given = [1, 2]
    ledger.append_observation(given)
    given[0] = 99
    assert ledger.tokens[5] == 1


def test_turns_must_alternate(ledger):
    with pytest.raises(LedgerError, match="append_prompt"):
        ledger.append_prompt([1])
    with pytest.raises(LedgerError, match="append_chunk"):
        ledger.append_chunk(chunk(1))
    ledger.append_observation([1])
    with pytest.raises(LedgerError, match="append_observation"):
        ledger.append_observation([1])
    with pytest.raises(LedgerError, match="append_chunk"):
        TokenLedger("x", 4).append_chunk(chunk(1))


def test_what_does_not_fit_changes_nothing(ledger):
    with pytest.raises(LedgerError, match="12 tokens do not fit, 11 of 16 left"):
        ledger.append_observation(list(range(12)))
    with pytest.raises(LedgerError, match="non-empty"):
        ledger.append_observation([])
    assert ledger.tokens.tolist() == [5, 6, 7, 8, 9]
    assert ledger.observations == ()

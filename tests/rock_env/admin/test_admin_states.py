"""The persisted state machine: a sandbox changes as TRANSITIONS says, once, and its history tells of every change."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rock_env.admin.database import Database, WrongState
from rock_env.admin.models import TRANSITIONS, SandboxRow, State, Tenant


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    opened = Database(f"sqlite:///{tmp_path_factory.mktemp('states') / 'admin.db'}")
    opened.put_tenant(Tenant(name="t", max_lifetime_seconds=60.0, created_at=0.0), new=True)
    yield opened
    opened.close()


def add(database, id, state):
    now = time.time()
    given = {"tenant": "t", "key": "k", "name": "", "reason": "", "spec": {}, "idle_seconds": 60.0}
    database.add_sandbox(SandboxRow(id=id, state=state, created_at=now, deadline=now + 60, **given))


@pytest.mark.parametrize("old", list(State))
def test_only_what_the_machine_allows(database, old):
    for new in State:
        id = f"{old}-{new}"
        add(database, id, old)
        if new in TRANSITIONS[old]:
            database.move(id, old, new, "why")
            expected = [old, new]
        else:
            with pytest.raises(WrongState, match=f"{old} does not become {new}"):
                database.move(id, old, new, "why")
            expected = [old]
        row = database.sandbox(id)
        assert row.state == expected[-1]
        assert [each.state for each in database.history(id)] == expected
        assert (row.ended_at is not None) == (len(expected) == 2 and new.is_terminal)
        is_live = id in {each.id for each in database.live_sandboxes()}
        assert is_live == (not State(row.state).is_terminal)


def test_of_many_changes_at_once_one_is_made(database):
    add(database, "a", State.RUNNING)

    def stop(number):
        try:
            database.move("a", State.RUNNING, State.STOPPING, f"{number}", worker=f"w{number}")
        except WrongState:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [number for number in pool.map(stop, range(32)) if number is not None]
    row = database.sandbox("a")
    assert (row.state, row.reason, row.worker) == ("stopping", f"{winner}", f"w{winner}")
    assert [each.reason for each in database.history("a")] == ["", f"{winner}"]


def test_what_is_not_there_does_not_change(database):
    with pytest.raises(WrongState, match="is not running"):
        database.move("none", State.RUNNING, State.STOPPED, "why")
    assert database.history("none") == []

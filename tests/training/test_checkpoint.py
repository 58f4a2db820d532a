import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from training_toys import DENSE, distance, params_of, trajectories

from rome.models import init_params
from rome.rollout import SampleBuffer
from rome.training.checkpoint import Checkpointer, CheckpointError
from rome.training.compilations import count_compilations
from rome.training.state import OptimizerConfig, init_state, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, name="muon", adam_learning_rate=1e-3), 10)
CURSOR = {"stage": "ipa", "step": 3, "records": 17, "results": {"warm_start": {"success": 1 / 3, "cells": {}}}}


def _state(seed=0):
    shapes = jax.eval_shape(lambda params: init_state(params, OPTIMIZER), params_of(DENSE))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return state.replace(step=jnp.int32(41 + seed))


@pytest.fixture
def folder(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(3, _state(), CURSOR, b"first")
    checkpointer.save(5, _state(1), {**CURSOR, "step": 5}, bytes(range(256)) * 40)
    checkpointer.close()
    return tmp_path / "checkpoints"


def _restore(folder, step=5):
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore(step, _state(7))
    finally:
        checkpointer.close()


def test_a_round_trip_is_bit_exact(folder):
    state, cursor, buffer = _restore(folder)
    assert cursor == {**CURSOR, "step": 5}
    assert buffer == bytes(range(256)) * 40
    assert jax.tree.structure(state) == jax.tree.structure(_state())
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(_state(1)), strict=True):
        assert found.dtype == expected.dtype
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_the_newest_are_kept_and_an_empty_buffer_is_one(tmp_path):
    checkpointer = Checkpointer(tmp_path / "new", keep=2)
    assert checkpointer.latest_step is None
    for step in (1, 2, 4):
        checkpointer.save(step, _state(step), {"step": step})
    assert checkpointer.latest_step == 4
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"2", "4"}
    assert checkpointer.cursor(2)["step"] == 2
    _, cursor, buffer = checkpointer.restore(4, _state())
    assert (cursor, buffer) == ({"step": 4}, b"")
    checkpointer.close()


def test_special_numbers_survive(tmp_path):
    """NaN, infinities, −0, denormals, and bfloat16."""
    values = jnp.array([np.nan, np.inf, -np.inf, -0.0, 1e-42, 1.0], jnp.float32)
    state = {"a": values, "b": values.astype(jnp.bfloat16), "n": jnp.int32(7)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {})
    found = checkpointer.restore(1, jax.tree.map(jnp.zeros_like, state))[0]
    checkpointer.close()
    for name in state:
        assert np.asarray(found[name]).tobytes() == np.asarray(state[name]).tobytes()


def test_what_is_restored_runs_what_is_compiled_already(folder):
    """Orbax commits arrays to a device, which makes other programs of them."""
    f = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state))
    f(_state())
    state, _, _ = _restore(folder)
    with count_compilations() as compiled:
        f(state)
    assert compiled.count == 0


def test_a_step_that_is_not_after_the_newest_is_refused(folder):
    checkpointer = Checkpointer(folder)
    for step in (5, 4):
        with pytest.raises(CheckpointError, match=f"{folder}/{step}: "):
            checkpointer.save(step, _state(2), CURSOR)
    checkpointer.close()
    assert distance(_restore(folder)[0].params, _state(1).params) == 0


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_damage_is_found_wherever_it_is_or_does_no_harm(folder, tmp_path):
    """A byte flipped, or half of the file missing, in each file in turn: named, or the very same state."""
    state, cursor, buffer = _restore(folder)
    caught = []
    for file in _files(folder / "5"):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0x10
        for damaged in (bytes(flipped), content[: len(content) // 2]):
            file.write_bytes(damaged)
            try:
                again = _restore(folder)
            except CheckpointError as error:
                caught.append(str(error))
            else:
                assert distance(again[0], state) == 0, file
                assert again[1:] == (cursor, buffer), file
        file.write_bytes(content)
    assert len(caught) >= 6
    assert all(str(folder / "5") in message and "Delete this folder" in message for message in caught)
    assert _restore(folder)[1] == cursor


def test_a_digit_changed_in_the_cursor_is_found(folder):
    (file,) = [p for p in _files(folder / "5" / "cursor") if b'"records"' in p.read_bytes()]
    file.write_bytes(file.read_bytes().replace(b"17", b"71"))
    with pytest.raises(CheckpointError, match="cursor is damaged"):
        _restore(folder)


def test_a_state_of_another_shape_is_refused(folder):
    wide = dataclasses.replace(DENSE, hidden_size=24)
    other = init_state(init_params(wide, jax.random.key(0)), OPTIMIZER)
    checkpointer = Checkpointer(folder)
    with pytest.raises(CheckpointError, match=f"{folder}/5"):
        checkpointer.restore(5, other)
    checkpointer.close()


def test_without_the_damaged_folder_the_one_before_it_continues(folder):
    shutil.rmtree(folder / "5")
    checkpointer = Checkpointer(folder)
    assert checkpointer.latest_step == 3
    checkpointer.close()
    state, cursor, buffer = _restore(folder, 3)
    assert distance(state.params, _state(0).params) == 0
    assert (cursor["step"], buffer) == (3, b"first")


_SAVING = """
import sys, itertools, os
sys.path.insert(0, {tests!r})
import numpy as np
from test_checkpoint import _state, Checkpointer, CheckpointError, CURSOR
import resource
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
checkpointer = Checkpointer({folder!r})
state = _state(2)
if {limit}:
    state = (state, [np.random.default_rng(i).random((200, 200)) for i in range(8)])  # many writes, all in flight
print("ready", flush=True)
for step in itertools.count(checkpointer.latest_step + 1):
    try:
        checkpointer.save(step, state, {{**CURSOR, "step": step}}, os.urandom(300_000))
    except CheckpointError as error:
        print("refused:", str(error).replace("\\n", " ")[:300], flush=True)
        break
    print("saved", step, flush=True)
"""


def _saving(folder, limit=0):
    code = _SAVING.format(tests=str(Path(__file__).parent), folder=str(folder), limit=limit)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_while_saving_leaves_the_checkpoint_before(folder):
    """Killed at several moments of a save: what is there afterwards is whole, and no older than what was finished."""
    for delay in (0.005, 0.04):
        process = _saving(folder)
        lines = iter(process.stdout.readline, "")
        saved = next(int(line.split()[1]) for line in lines if line.startswith("saved"))
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=30)[0]
        saved = max([saved, *(int(line.split()[1]) for line in rest.splitlines() if line.startswith("saved"))])
        checkpointer = Checkpointer(folder)  # also removes what the dead process had begun
        latest = checkpointer.latest_step
        checkpointer.close()
        assert latest in (saved, saved + 1)
        state, cursor, _ = _restore(folder, latest)
        assert cursor["step"] == latest
        assert distance(state.params, _state(2).params) == 0
        assert all(p.name.isdigit() for p in folder.iterdir())


def test_a_save_that_the_system_refuses_is_typed_and_the_old_one_stays(folder):
    process = _saving(folder, limit=100_000)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    (line,) = [line for line in output.splitlines() if line.startswith("refused")]
    assert f"{folder}/6: could not be written" in line
    assert "Traceback" not in errors  # neither Orbax's log nor TensorStore's threads tell it again
    state, cursor, _ = _restore(folder)
    assert cursor["step"] == 5
    assert distance(state.params, _state(1).params) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_full_disk_is_typed_and_a_later_save_works(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tiny", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        checkpointer = Checkpointer(place / "checkpoints")
        checkpointer.save(1, _state(1), CURSOR, b"small")
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpointer.save(2, _state(2), CURSOR, os.urandom(2_000_000))
        assert checkpointer.latest_step == 1
        assert distance(checkpointer.restore(1, _state(7))[0].params, _state(1).params) == 0
        checkpointer.close()
        checkpointer = Checkpointer(place / "checkpoints")
        checkpointer.save(2, _state(2), CURSOR, b"small again")
        assert checkpointer.restore(2, _state(7))[2] == b"small again"
        checkpointer.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_buffers_bytes_are_whatever_they_are(tmp_path):
    buffer = SampleBuffer(1.0, 4)
    given = trajectories(0, 8)
    for group in (given[:4], given[4:]):
        buffer.put_group(group)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _state(), CURSOR, msgpack.packb(buffer.state_dict()))
    restored = SampleBuffer(1.0, 4)
    restored.load_state_dict(msgpack.unpackb(checkpointer.restore(1, _state())[2]))
    checkpointer.close()
    assert restored.group_ids() == ["g0", "g1"]
    assert restored.state_dict() == buffer.state_dict()

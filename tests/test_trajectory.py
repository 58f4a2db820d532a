"""Trajectories: lossless files, and one clear error for everything that breaks the contract."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.trajectory import (
    Chunk,
    Observation,
    Status,
    Task,
    Trajectory,
    TrajectoryError,
    load_trajectories,
    save_trajectories,
    trajectory_from_record,
    trajectory_to_record,
)


def make_trajectory(seed: int = 0, chunks: int = 3, status: Status = Status.COMPLETED, text: str = "x") -> Trajectory:
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, 1000, count).astype(np.int32)

    def chunk(index: int) -> Chunk:
        n = int(rng.integers(1, 9))
        logp = -rng.random(n).astype(np.float32)
        experts = rng.integers(0, 8, (n, 2, 3)).astype(np.int16) if seed % 2 else None
        return Chunk(f"t/{index}", tokens(n), logp, tokens(n), text, experts, error=bool(index % 2))

    return Trajectory(
        id=f"t{seed}",
        group_id="g",
        task=Task("task-1", "Do it.", "family", seed, chunks, "/tasks/1"),
        seed=seed,
        prompt=Observation(tokens(5), text),
        chunks=tuple(chunk(i) for i in range(chunks)),
        observations=tuple(Observation(tokens(int(rng.integers(0, 4))), text) for _ in range(max(chunks - 1, 0))),
        final_reward=1.0 if status.is_reliable else None,
        status=status,
        start_version=4,
        intrinsic_rewards=rng.random(chunks).astype(np.float32),
        timings={"generate": 0.25},
    )


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), chunks=st.integers(0, 5), status=st.sampled_from(Status), text=st.text(max_size=30))
def test_record_round_trip_is_lossless(seed: int, chunks: int, status: Status, text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        return  # lone surrogates are not text that UTF-8 can carry
    trajectory = make_trajectory(seed, chunks, status, text)
    packed = msgpack.unpackb(msgpack.packb(trajectory_to_record(trajectory)))
    assert_same(trajectory_from_record(packed), trajectory)


def test_file_round_trip_and_bits(tmp_path) -> None:
    odd = make_trajectory(1)
    logp = odd.chunks[0].behavior_logp.copy()
    logp[0] = np.float32(-1e-45)  # a denormal survives
    odd = dataclasses.replace(odd, chunks=(dataclasses.replace(odd.chunks[0], behavior_logp=logp), *odd.chunks[1:]))
    path = tmp_path / "a.msgpack"
    save_trajectories(path, [odd, make_trajectory(2)])
    assert_same(load_trajectories(path), [odd, make_trajectory(2)])
    assert os.listdir(tmp_path) == ["a.msgpack"]


def test_adjacent_chunks_stay_apart() -> None:
    trajectory = make_trajectory(3, chunks=3)
    empty = Observation(np.zeros(0, np.int32))
    merged = dataclasses.replace(trajectory, observations=(empty, empty))
    indices = [index for index, tokens in merged.segments() if len(tokens)]
    assert indices == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"final_reward": None}, "final_reward"),
        ({"final_reward": float("nan")}, "final_reward"),
        ({"status": Status.INFRA_FAILURE}, "final_reward"),
        ({"status": "completed!"}, "status"),
        ({"observations": ()}, "observations"),
        ({"prefix_chunks": 9}, "prefix_chunks"),
        ({"intrinsic_rewards": np.zeros(2, np.float32)}, "intrinsic_rewards"),
        ({"prompt": Observation(np.zeros(3, np.int64))}, "prompt.tokens"),
    ],
)
def test_contract_is_checked_by_name(change: dict, field: str) -> None:
    with pytest.raises(TrajectoryError, match=field.replace(".", r"\.")):
        dataclasses.replace(make_trajectory(), **change)


def test_chunk_arrays_must_match() -> None:
    trajectory = make_trajectory()
    short = dataclasses.replace(trajectory.chunks[1], behavior_logp=np.zeros(1 + len(trajectory.chunks[1].tokens)))
    with pytest.raises(TrajectoryError, match=r"chunks\[1\]\.behavior_logp"):
        dataclasses.replace(trajectory, chunks=(trajectory.chunks[0], short, trajectory.chunks[2]))


def test_bad_files_name_what_is_wrong(tmp_path) -> None:
    path = tmp_path / "a.msgpack"
    save_trajectories(path, [make_trajectory()])
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(TrajectoryError, match=r"a\.msgpack"):
        load_trajectories(path)
    document = msgpack.unpackb(good)
    path.write_bytes(msgpack.packb({**document, "version": 99}))
    with pytest.raises(TrajectoryError, match="schema version 1, found 99"):
        load_trajectories(path)
    document["trajectories"][0]["chunks"][1]["surprise"] = 1
    path.write_bytes(msgpack.packb(document))
    with pytest.raises(TrajectoryError, match=r"trajectories\[0\]\.chunks\[1\].*surprise"):
        load_trajectories(path)
    path.write_bytes(b"\x93abc")
    with pytest.raises(TrajectoryError):
        load_trajectories(path)


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    """A write that the system refuses half-way (here by RLIMIT_FSIZE, in a child) changes nothing."""
    path = tmp_path / "a.msgpack"
    save_trajectories(path, [make_trajectory()])
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "from rome.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))\n"
        "try:\n    atomic_write(sys.argv[1], b'x' * 100_000)\n"
        "except OSError as error:\n    print('refused', error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("refused"), done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.msgpack"]

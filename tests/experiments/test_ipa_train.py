"""The whole run through its command, in real sandboxes: what it leaves behind, how it dies, how it goes on.

One uninterrupted run is the reference that interrupted ones are compared with, record by record.
"""

import json
import shutil
import signal

import pytest
from training_run import Run, ended, finished, has_checkpoint, has_record, records, refused

from rome.training.evaluation import EvaluationResult
from rome.trajectory import load_trajectories

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sandbox_machine"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", autouse=True)
def _compiled_as_users_have_it():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
        yield


@pytest.fixture(scope="module")
def reference(_compiled_as_users_have_it, tmp_path_factory):
    """An uninterrupted run, which leaves nothing behind but its directory."""
    with Run(tmp_path_factory.mktemp("reference") / "run", "--config.tensorboard=true") as run:
        run.halt(has_record(run, "cpt", 1))
        run.go_on()
    return run.workdir


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_run_directory_is_complete(reference):
    config = json.loads((reference / "config.json").read_text())
    assert config["sft"]["rows"] == 8
    assert config["seed"] == 0
    found = records(reference, keep_measured=True)
    stages = [(record["stage"], record["step"]) for record in found]
    sft = [("sft", step) for step in range(4, 25, 4)]
    ipa = [("ipa", step) for step in range(1, 5)]
    assert stages == [("demonstrations", 24), *(("cpt", s) for s in range(1, 5)), *sft, ("eval", 0), *ipa, ("eval", 4)]
    names = {
        "train/loss train/success train/grad_norm train/return_mean train/entropy ratio/chunk_mean ratio/chunk_max",
        "ratio/clipped_fraction mask/chunk_dropped mismatch/chunk_mean buffer/staleness_mean buffer/dropped_stale",
        "rollout/tokens_per_second rollout/chunks_mean time/rollout time/train time/step compile/programs",
    }
    assert set(" ".join(names).split()) <= found[-2].keys()
    for record in found:
        assert all(isinstance(value, (int, float)) for name, value in record.items() if name != "stage"), record
    for name in ("report.html", "tokenizer/tokenizer.json", "demonstrations.msgpack"):
        assert (reference / name).stat().st_size > 500, name
    assert list((reference / "plots").glob("*.png"))
    assert {folder.name for folder in (reference / "tensorboard").iterdir()} >= {"cpt", "sft", "ipa", "eval"}
    assert not [path for path in reference.rglob(".*") if path.is_file()]  # no temporary name is left


def test_result_holds_both_evaluations(reference):
    result = json.loads((reference / "result.json").read_text())
    assert set(result) == {"warm_start", "final"}
    for evaluation in result.values():
        assert evaluation.keys() == EvaluationResult.__dataclass_fields__.keys()
        assert evaluation["episodes"] == evaluation["tasks"] == 4
        assert evaluation["low"] <= evaluation["success"] <= evaluation["high"]
        assert set(evaluation["by_family"]) == {"follow_hints", "count_matches"}
        assert set(evaluation["by_horizon"]) == {"2", "3"}


def test_kept_trajectories_come_with_what_the_update_made_of_them(reference):
    """Steps 1, 2 and 4 are kept: the first, each second, the last."""
    folder = reference / "trajectories"
    assert sorted(p.stem for p in folder.glob("step_*.json")) == ["step_000001", "step_000002", "step_000004"]
    for path in folder.glob("step_*.msgpack"):
        annotations = json.loads(path.with_suffix(".json").read_text())
        trajectories = load_trajectories(path)
        assert len(trajectories) == 4
        for t in trajectories:
            shown = annotations[t.id]
            count = len(t.chunks)
            assert [len(shown[name]) for name in ("returns", "ratio", "mismatch", "kept")] == [count] * 4
            reward = 1.0 if t.succeeded else -1.0
            assert shown["returns"] == pytest.approx([reward * 0.95 ** (count - 1 - k) for k in range(count)])
            assert shown["ratio"] == pytest.approx([1.0] * count)  # on-policy: one update a batch
            assert shown["mismatch"] == pytest.approx([1.0] * count, abs=1e-3)  # engine and trainer agree
            assert all(shown["kept"])
            assert shown["positive"] == t.succeeded


def test_steps_that_are_kept_leave_a_trace(reference):
    folder = reference / "traces"
    assert sorted(path.stem for path in folder.iterdir()) == ["step_000001", "step_000002", "step_000004"]
    for path in folder.iterdir():
        spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
        names = [event["name"] for event in spans]
        samples = load_trajectories(reference / "trajectories" / f"{path.stem}.msgpack")
        assert names.count("reset") == len(samples) == 4
        assert names.count("step") == sum(len(t.chunks) for t in samples)
        assert [names.count(name) for name in ("wait for groups", "update", "publish weights")] == [1, 1, 1]
    assert "Timeline of a step" in (reference / "report.html").read_text()
    assert 'class="card spans"' in (reference / "report.html").read_text()


def test_policy_acts_and_learns(reference):
    """The rest of this file would prove little about a policy that never calls a tool, or never changes."""
    ipa = records(reference, "ipa")
    assert max(record["rollout/chunks_mean"] for record in ipa) > 1.2
    assert all(record["train/grad_norm"] > 0 and record["train/nothing_to_train"] == 0 for record in ipa)
    sft = [record["train/loss"] for record in records(reference, "sft")]
    assert sft[-1] < 0.6 * sft[0]


def test_nothing_compiles_once_ipa_has_begun(reference):
    assert [record["compile/programs"] for record in records(reference, "ipa")] == [0.0] * 4


def test_a_finished_run_answers_at_once_and_mends_its_report(reference, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(reference, workdir)
    (workdir / "report.html").unlink()  # as if killed just before it was written
    before = (workdir / "metrics.jsonl").read_bytes()
    output = finished(workdir, "--config.tensorboard=true")
    assert "warm_start: " in output
    assert "final: " in output
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert (workdir / "report.html").stat().st_size > 500


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_metrics_depend_on_the_seed(reference, tmp_path):
    finished(tmp_path / "run", "--config.seed=1")
    both = (records(workdir) for workdir in (tmp_path / "run", reference))
    losses = [[record["train/loss"] for record in found if "train/loss" in record] for found in both]
    assert len(losses[0]) == len(losses[1])
    assert all(a != b for a, b in zip(*losses, strict=True))


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_like_one_that_was_not(reference, tmp_path):
    """Killed in SFT, interrupted (Ctrl-C) in IPA, killed right after a checkpoint; then run to its end.

    Nor do the number of workers and the place of temporary files show: the metrics are a function of the rest."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    alone = "--config.demonstrations.workers=1"
    elsewhere = {"environment": {"TMPDIR": str(temporary), "ROCK_STATE_DIR": "/tmp"}}

    with Run(tmp_path / "run", alone, **elsewhere) as run:
        run.halt(has_record(run, "sft", 5))  # step 20; the checkpoint before it is step 16's
        run.go_on(signal.SIGKILL)

    with Run(tmp_path / "run", alone, **elsewhere) as run:
        run.halt(has_record(run, "ipa", 1))
        output = run.go_on(signal.SIGINT)
    assert "continuing at sft step 16" in output
    assert "interrupted; the same command continues" in output
    assert "Traceback" not in output

    with Run(tmp_path / "run", alone, **elsewhere) as run:
        # CPT, SFT, the start of SFT and of IPA, the warm start, 2 steps
        run.halt(has_checkpoint(run, 4 + 24 + 2 + 1 + 2))
        assert "continuing at ipa step 0" in run.go_on(signal.SIGKILL)

    assert "continuing at ipa step 2" in finished(tmp_path / "run", alone, **elsewhere)
    assert records(tmp_path / "run") == records(reference)
    for name in ("result.json", "trajectories/step_000004.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (reference / name).read_bytes(), name
    assert list(temporary.iterdir()) == []


# --- refusals --------------------------------------------------------------------------------------------------------


def checkpoints(workdir):
    """The complete ones; the next start removes what an interrupted save left."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture
def unfinished(reference, tmp_path):
    """A copy of the reference run without its result: the same command would go on from its last checkpoint."""
    workdir = tmp_path / "unfinished"
    shutil.copytree(reference, workdir)
    (workdir / "result.json").unlink()
    return workdir


def test_an_unknown_key_is_answered_with_the_nearest_one(tmp_path):
    output = refused(tmp_path / "run", "--config.ipa.gama=0.9")
    assert "ipa.gama" in output
    assert "did you mean 'ipa.gamma'" in output
    assert not (tmp_path / "run").exists()


def test_a_senseless_value_is_refused_before_anything_runs(tmp_path):
    output = refused(tmp_path / "run", "--config.sft.log_every=0")
    assert "config.sft: log_every: expected at least 1, found 0" in output
    assert not (tmp_path / "run").exists()


def test_another_config_does_not_continue_a_run(unfinished):
    before = (unfinished / "metrics.jsonl").read_bytes()
    output = refused(unfinished, "--config.tensorboard=true", "--config.ipa.gamma=0.5")
    assert "ipa.gamma: was 0.95, now 0.5" in output
    assert (unfinished / "metrics.jsonl").read_bytes() == before


def test_a_corrupt_checkpoint_is_named(unfinished):
    newest = unfinished / "checkpoints" / str(checkpoints(unfinished)[-1])
    damaged = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    output = refused(unfinished, "--config.tensorboard=true")
    (line,) = [line for line in output.splitlines() if "CheckpointError" in line]
    assert str(newest) in line
    assert "Delete this folder" in line
    # and the advice is good: the checkpoint before it continues, and ends as if nothing had happened
    shutil.rmtree(newest)
    before = records(unfinished)
    assert "continuing at ipa step 2" in finished(unfinished, "--config.tensorboard=true")
    assert records(unfinished) == before


def test_metrics_that_a_checkpoint_counts_on_are_missed(unfinished):
    path = unfinished / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:3]))
    output = refused(unfinished, "--config.tensorboard=true")
    assert "MetricsError" in output
    assert str(path) in output


def test_missing_bwrap_is_one_clear_line(tmp_path):
    output = refused(tmp_path / "run", environment={"ROCK_BWRAP": "/nonexistent/bwrap"})
    (line,) = [line for line in output.splitlines() if "Error" in line or "Unavailable" in line]
    assert line.startswith("BackendUnavailable: ")
    assert "/nonexistent/bwrap" in line


def test_a_full_disk_is_one_clear_line_and_what_was_there_stays(unfinished):
    """The system refuses files above a size: as a full disk does, in the middle of one."""
    for number in checkpoints(unfinished)[1:]:
        shutil.rmtree(unfinished / "checkpoints" / str(number))
    left = checkpoints(unfinished)
    limit = 100_000
    assert max(p.stat().st_size for p in (unfinished / "checkpoints").rglob("*")) > limit
    code, output = ended(unfinished, "--config.tensorboard=true", file_bytes=limit)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("CheckpointError: ")]
    assert "could not be written" in line
    # TensorStore's own threads print that Orbax closed their event loop; none of it is ours
    assert "ipa_train.py" not in output.replace(line, "")
    assert "rome/training" not in output.replace(line, "")
    assert checkpoints(unfinished) == left
    finished(unfinished, "--config.tensorboard=true")
    assert all(path.name.isdigit() for path in (unfinished / "checkpoints").iterdir())

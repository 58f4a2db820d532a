"""The whole run through its command, in real sandboxes: what it leaves behind, how it dies, how it goes on.

One uninterrupted run is the reference that interrupted ones are compared with, record by record.
"""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rock_env import doctor
from rock_env.client import state_directory
from rock_env.supervisor import cgroups
from rome.training.evaluation import EvaluationResult
from rome.trajectory import load_trajectories

_HERE = Path(__file__).parent
_COMMAND = [sys.executable, str(_HERE.parents[1] / "experiments" / "ipa_train.py"), f"--config={_HERE / 'tiny_run.py'}"]
_DEADLINE = 200.0  # of one run; on an idle machine it takes about ten seconds


@pytest.fixture(scope="session", autouse=True)
def _machine():
    report = doctor()
    if not report["backend"]["ok"]:
        pytest.skip(report["backend"]["how"])


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Runs share what they compile: XLA's cache on disk saves each process most of its start."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class Run:
    """One process that trains in `workdir`."""

    def __init__(self, workdir, environment, *arguments, file_bytes=resource.RLIM_INFINITY):
        self.workdir = Path(workdir)
        self.metrics = self.workdir / "metrics.jsonl"
        self.log = self.workdir.parent / f"{self.workdir.name}.{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*_COMMAND, f"--workdir={workdir}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
            )

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def wait(self, seconds=_DEADLINE):
        """(exit code, what it printed)."""
        try:
            return self.process.wait(seconds), self.output
        finally:
            self.kill()

    def halt(self, reached):
        """Halts the run (SIGSTOP) as soon as `reached()`; fails if it ends before, or never gets there."""
        deadline = time.monotonic() + _DEADLINE
        while not reached():
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"never got there:\n{self.output}"
            time.sleep(0.002)
        self.process.send_signal(signal.SIGSTOP)

    def send(self, number):
        """A signal for a run that was halted."""
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        if number == signal.SIGKILL:
            self.process.wait(60)

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)

    def stages(self):
        lines = self.metrics.read_bytes().split(b"\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line)["stage"] for line in lines]


def finished(workdir, environment, *arguments):
    code, output = Run(workdir, environment, *arguments).wait()
    assert code == 0, output
    return output


def records(workdir, keep_measured=False):
    """The metrics without what a clock measured."""
    measured = lambda name: name == "time" or name.startswith("time/") or name.endswith("tokens_per_second")  # noqa: E731
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if keep_measured or not measured(k)} for line in lines]


@pytest.fixture(scope="session")
def reference(tmp_path_factory, environment):
    """An uninterrupted run, which leaves nothing behind but its directory."""
    run = Run(tmp_path_factory.mktemp("reference") / "run", environment, "--config.tensorboard=true")
    run.halt(has_record(run, "cpt", 1))
    footprint = Footprint(run)
    run.send(signal.SIGCONT)
    code, output = run.wait()
    assert code == 0, output
    footprint.assert_gone(2.0)
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
    found = records(reference)
    ipa = [record for record in found if record["stage"] == "ipa"]
    assert max(record["rollout/chunks_mean"] for record in ipa) > 1.2
    assert all(record["train/grad_norm"] > 0 and record["train/nothing_to_train"] == 0 for record in ipa)
    sft = [record["train/loss"] for record in found if record["stage"] == "sft"]
    assert sft[-1] < 0.6 * sft[0]


def test_nothing_compiles_once_ipa_has_begun(reference):
    assert [record["compile/programs"] for record in records(reference) if record["stage"] == "ipa"] == [0.0] * 4


def test_a_finished_run_answers_at_once_and_mends_its_report(reference, environment, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(reference, workdir)
    (workdir / "report.html").unlink()  # as if killed just before it was written
    before = (workdir / "metrics.jsonl").read_bytes()
    output = finished(workdir, environment, "--config.tensorboard=true")
    assert "warm_start: " in output
    assert "final: " in output
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert (workdir / "report.html").stat().st_size > 500


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_are_a_function_of_the_config(reference, environment, tmp_path, seed):
    finished(tmp_path / "run", environment, f"--config.seed={seed}", "--config.demonstrations.workers=1")
    again, first = records(tmp_path / "run"), records(reference)
    if seed == 0:
        assert again == first
    else:
        losses = [[r["train/loss"] for r in found if "train/loss" in r] for found in (again, first)]
        assert len(losses[0]) == len(losses[1])
        assert all(a != b for a, b in zip(*losses, strict=True))


# --- interruptions ---------------------------------------------------------------------------------------------------


def _stat(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


class Footprint:
    """All that a live run has on this host: its processes, and what its sandboxes' keeper has made."""

    def __init__(self, run):
        parents = {int(p.name): int(s[1]) for p in Path("/proc").iterdir() if p.name.isdigit() and (s := _stat(p.name))}
        root = run.process.pid
        found = {root}
        while grown := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= grown
        self._processes = {pid: s[19] for pid in found if (s := _stat(pid))}
        # a keeper has a session of its own, and names what it makes after itself
        self._marks = [f"-{pid}-" for pid in found if parents.get(pid) == root and _stat(pid)[3] == str(pid)]
        assert self._marks, "the run has no sandboxes yet"
        assert self.what_is_left()

    def what_is_left(self):
        left = [f"process {pid}" for pid, born in self._processes.items() if (s := _stat(pid)) and s[19] == born]
        folders = [Path(state_directory()), *map(Path, cgroups.Hierarchies.detect().directories())]
        places = [str(path) for folder in folders for path in folder.glob("rock-*")]
        places += Path("/proc/self/mountinfo").read_text().splitlines()
        return left + [place for place in places if any(mark in place for mark in self._marks)]

    def assert_gone(self, seconds=60.0):
        deadline = time.monotonic() + seconds
        while (left := self.what_is_left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []


def checkpoints(workdir):
    """The complete ones; the next start removes what an interrupted save left."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def has_record(run, stage, number):
    return lambda: run.stages().count(stage) >= number


def has_checkpoint(run, number):
    return lambda: (run.workdir / "checkpoints" / str(number)).is_dir()


def test_an_interrupted_run_ends_like_one_that_was_not(reference, environment, tmp_path):
    """Killed in SFT, interrupted (Ctrl-C) in IPA, killed right after a checkpoint; then run to its end."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**environment, "TMPDIR": str(temporary), "ROCK_STATE_DIR": "/tmp"}
    start = lambda: Run(tmp_path / "run", environment)  # noqa: E731

    run = start()
    run.halt(has_record(run, "sft", 5))  # step 20; the checkpoint before it is step 16's
    footprint = Footprint(run)
    run.send(signal.SIGKILL)
    footprint.assert_gone()

    run = start()
    run.halt(has_record(run, "ipa", 1))
    footprint = Footprint(run)
    run.send(signal.SIGINT)
    code, output = run.wait()
    assert code == 130, output
    assert "continuing at sft step 16" in output
    assert "interrupted; the same command continues" in output
    assert "Traceback" not in output
    footprint.assert_gone(2.0)

    run = start()
    run.halt(has_checkpoint(run, 4 + 24 + 2 + 1 + 2))  # CPT, SFT, the start of SFT and of IPA, the warm start, 2 steps
    footprint = Footprint(run)
    run.send(signal.SIGKILL)
    assert "continuing at ipa step 0" in run.output
    footprint.assert_gone()

    code, output = start().wait()
    assert code == 0, output
    assert "continuing at ipa step 2" in output
    assert records(tmp_path / "run") == records(reference)
    for name in ("result.json", "trajectories/step_000004.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (reference / name).read_bytes(), name
    assert list(temporary.iterdir()) == []


def test_resampling_from_prefixes_resumes_exactly(environment, tmp_path):
    """Half of the groups start from an expert's prefix, and who fails there imitates: killed between two batches. The
    KV cache is in few pages: a cohort of four has room for one trajectory that reaches the end."""
    arguments = ["--config.resampling.fraction=0.5", "--config.ipa.imitation=fallback"]
    arguments += ["--config.engine.page_size=16", "--config.engine.pages=24"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(whole, environment, *arguments)
    ipa = [record for record in records(whole) if record["stage"] == "ipa"]
    assert [record["resampling/groups"] for record in ipa] == [1.0] * 4
    assert any(record["resampling/imitated"] > 0 for record in ipa)
    assert [record["compile/programs"] for record in ipa] == [0.0] * 4

    run = Run(killed, environment, *arguments)
    run.halt(has_record(run, "ipa", 3))  # the checkpoint before it is step 2's
    run.send(signal.SIGKILL)
    assert "continuing at ipa step 2" in finished(killed, environment, *arguments)
    assert records(killed) == records(whole)


def test_asynchronous_run_ends_and_resumes(environment, tmp_path):
    """Staleness stays within the ratio; with two updates a batch, ratios leave 1."""
    arguments = ["--config.rollout.async_ratio=1", "--config.rl.steps=6", "--config.rl.updates_per_batch=2"]
    arguments += ["--config.rollout.filter_groups=1"]
    run = Run(tmp_path / "run", environment, *arguments)
    run.halt(has_record(run, "ipa", 3))
    footprint = Footprint(run)
    run.send(signal.SIGKILL)
    footprint.assert_gone()

    run = Run(tmp_path / "run", environment, *arguments)
    run.halt(has_record(run, "ipa", 5))
    footprint = Footprint(run)
    run.send(signal.SIGCONT)
    code, output = run.wait()
    assert code == 0, output
    assert "continuing at ipa step 2" in output
    footprint.assert_gone(2.0)
    ipa = [record for record in records(tmp_path / "run") if record["stage"] == "ipa"]
    assert [record["step"] for record in ipa] == [1, 2, 3, 4, 5, 6]
    assert all(record["buffer/staleness_max"] <= 1 for record in ipa)
    assert any(record["buffer/staleness_max"] == 1 for record in ipa)
    assert 4 <= ipa[-1]["buffer/filtered_failed"] <= 8  # one between two batches; the policy hardly ever succeeds
    assert all(record["compile/programs"] == 0 for record in ipa)
    assert any(record["ratio/token_max"] != 1.0 for record in ipa)  # the second update is off-policy
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {"warm_start", "final"}


def test_an_agent_that_is_a_program_is_trained_and_resumes_exactly(environment, tmp_path):
    """The whole run halts once; a copy of what a kill would have left there ends as the run itself does."""
    arguments = ["--config.rollout.agent=native", "--config.rl.steps=3", "--config.checkpoint.every=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = Run(whole, environment, *arguments)
    run.halt(has_record(run, "ipa", 2))
    footprint = Footprint(run)
    shutil.copytree(whole, killed)
    run.send(signal.SIGCONT)
    code, output = run.wait()
    assert code == 0, output
    footprint.assert_gone(2.0)
    ipa = [record for record in records(whole) if record["stage"] == "ipa"]
    assert max(record["rollout/chunks_mean"] for record in ipa) > 1.2
    assert all(record["train/grad_norm"] > 0 for record in ipa)
    assert all(record["mismatch/chunk_mean"] == pytest.approx(1.0, abs=1e-3) for record in ipa)
    assert [record["compile/programs"] for record in ipa] == [0.0] * 3
    assert "continuing at ipa step 1" in finished(killed, environment, *arguments)
    assert records(killed) == records(whole)


def test_a_run_on_ray_hosts_goes_on_when_one_is_killed_and_leaves_nothing_behind(environment, tmp_path):
    """It trains adapters, and nothing else goes to the hosts."""
    pytest.importorskip("ray")
    arguments = ["--config.rollout.hosts=2", "--config.rollout.async_ratio=2", "--config.rl.steps=8"]
    arguments += ["--config.rl.lora.rank=1", "--config.rl.lora.targets=wq"]
    run = Run(tmp_path / "run", environment, *arguments)
    run.halt(has_record(run, "ipa", 2))
    processes = psutil.Process(run.process.pid).children(recursive=True)
    hosts = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, or gone since
            if "RolloutHostActor" in " ".join(process.cmdline()):
                hosts.append(process)
    assert len(hosts) == 2
    hosts[0].kill()
    run.process.send_signal(signal.SIGCONT)
    code, output = run.wait()
    assert code == 0, output
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    ipa = [record for record in records(tmp_path / "run") if record["stage"] == "ipa"]
    assert [record["step"] for record in ipa] == list(range(1, 9))
    assert ipa[-1]["rollout/lost_hosts"] == 1
    layers, inputs, outputs = 2, 32, 2 * 16
    assert {record["sync/bytes"] for record in ipa} == {4.0 * layers * (inputs + outputs)}
    assert all(record["train/grad_norm"] > 0 for record in ipa)
    assert all(record["buffer/staleness_max"] <= 2 for record in ipa)
    assert sum(record["compile/programs"] for record in ipa) == 0


def test_multiplexing_lends_devices_to_training_at_every_step(environment, tmp_path):
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=280"
    arguments = [
        "--config.mesh.multiplex=true",
        "--config.mesh.rollout.data=8",
        "--config.mesh.train.data=2",
        "--config.mesh.train.fsdp=2",
        "--config.rollout.async_ratio=1",
        "--config.engine.slots=16",
        "--config.engine.prompt_rows=8",
        "--config.rl.micro_rows=4",
        "--config.cpt.steps=1",
        "--config.sft.steps=8",
        "--config.demonstrations.count=8",
        "--config.checkpoint.every=3",
        "--config.rl.lora.rank=1",  # its base lies on the devices that always roll out
    ]
    run = Run(tmp_path / "run", {**environment, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, *arguments)
    code, output = run.wait(280)
    assert code == 0, output
    assert "{4, 5, 6, 7} of them while {0, 1, 2, 3} train" in " ".join(output.split())
    ipa = [r for r in records(tmp_path / "run", keep_measured=True) if r["stage"] == "ipa"]
    assert [record["step"] for record in ipa] == [1, 2, 3, 4]
    for record in ipa:
        assert record["time/shrink"] > 0
        assert record["time/expand"] > 0
        assert record["devices/training"] == record["devices/rolling_out_meanwhile"] == 4
        assert record["buffer/staleness_max"] <= 1
        assert record["compile/programs"] == 0
        assert record["train/grad_norm"] > 0
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {"warm_start", "final"}


def test_mixture_of_experts_held_out_families_and_evaluations_on_the_way(environment, tmp_path):
    arguments = [
        "--config.model.num_experts=4",
        "--config.model.num_experts_per_token=2",
        "--config.model.moe_intermediate_size=32",
        "--config.rl.steps=2",
        "--config.evaluation.every=1",
        "--config.evaluation.tasks_during=2",
        "--config.tasks.held_out=merge_records",
        "--config.checkpoint.every=1",
    ]
    finished(tmp_path / "run", environment, *arguments)
    found = records(tmp_path / "run")
    assert [(r["stage"], r["step"]) for r in found[-6:]] == [
        ("eval", 0),
        ("ipa", 1),
        ("eval", 1),
        ("ipa", 2),
        ("eval", 2),
        ("eval", 2),
    ]
    ipa = [record for record in found if record["stage"] == "ipa"]
    assert all(record["train/grad_norm"] > 0 and record["compile/programs"] == 0 for record in ipa)
    assert all(math.isfinite(value) for record in ipa for name, value in record.items() if name != "stage")
    assert found[-4]["eval/episodes"] == 2
    assert {"eval_held_out/success", "eval_held_out/success/merge_records"} <= found[-1].keys()
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {
        "warm_start",
        "final",
        "held_out_families",
    }


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(workdir, environment, *arguments):
    """What a run that can't go on says: exit code 2, and no traceback."""
    code, output = Run(workdir, environment, *arguments).wait()
    assert code == 2, output
    assert "Traceback" not in output
    return output


@pytest.fixture
def unfinished(reference, tmp_path):
    """A copy of the reference run without its result: the same command would go on from its last checkpoint."""
    workdir = tmp_path / "unfinished"
    shutil.copytree(reference, workdir)
    (workdir / "result.json").unlink()
    return workdir


def test_an_unknown_key_is_answered_with_the_nearest_one(environment, tmp_path):
    output = refused(tmp_path / "run", environment, "--config.ipa.gama=0.9")
    assert "ipa.gama" in output
    assert "did you mean 'ipa.gamma'" in output
    assert not (tmp_path / "run").exists()


def test_a_senseless_value_is_refused_before_anything_runs(environment, tmp_path):
    output = refused(tmp_path / "run", environment, "--config.sft.log_every=0")
    assert "config.sft: log_every: expected at least 1, found 0" in output
    assert not (tmp_path / "run").exists()


def test_another_config_does_not_continue_a_run(unfinished, environment):
    before = (unfinished / "metrics.jsonl").read_bytes()
    output = refused(unfinished, environment, "--config.tensorboard=true", "--config.ipa.gamma=0.5")
    assert "ipa.gamma: was 0.95, now 0.5" in output
    assert (unfinished / "metrics.jsonl").read_bytes() == before


def test_a_corrupt_checkpoint_is_named(unfinished, environment):
    newest = unfinished / "checkpoints" / str(checkpoints(unfinished)[-1])
    damaged = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    output = refused(unfinished, environment, "--config.tensorboard=true")
    (line,) = [line for line in output.splitlines() if "CheckpointError" in line]
    assert str(newest) in line
    assert "Delete this folder" in line
    # and the advice is good: the checkpoint before it continues, and ends as if nothing had happened
    shutil.rmtree(newest)
    before = records(unfinished)
    assert "continuing at ipa step 2" in finished(unfinished, environment, "--config.tensorboard=true")
    assert records(unfinished) == before


def test_metrics_that_a_checkpoint_counts_on_are_missed(unfinished, environment):
    path = unfinished / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:3]))
    output = refused(unfinished, environment, "--config.tensorboard=true")
    assert "MetricsError" in output
    assert str(path) in output


def test_missing_bwrap_is_one_clear_line(environment, tmp_path):
    output = refused(tmp_path / "run", {**environment, "ROCK_BWRAP": "/nonexistent/bwrap"})
    (line,) = [line for line in output.splitlines() if "Error" in line or "Unavailable" in line]
    assert line.startswith("BackendUnavailable: ")
    assert "/nonexistent/bwrap" in line


def test_a_full_disk_is_one_clear_line_and_what_was_there_stays(unfinished, environment):
    """The system refuses files above a size: as a full disk does, in the middle of one."""
    for number in checkpoints(unfinished)[1:]:
        shutil.rmtree(unfinished / "checkpoints" / str(number))
    left = checkpoints(unfinished)
    limit = 100_000
    assert max(p.stat().st_size for p in (unfinished / "checkpoints").rglob("*")) > limit
    code, output = Run(unfinished, environment, "--config.tensorboard=true", file_bytes=limit).wait()
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("CheckpointError: ")]
    assert "could not be written" in line
    # TensorStore's own threads print that Orbax closed their event loop; none of it is ours
    assert "ipa_train.py" not in output.replace(line, "")
    assert "rome/training" not in output.replace(line, "")
    assert checkpoints(unfinished) == left
    finished(unfinished, environment, "--config.tensorboard=true")
    assert all(path.name.isdigit() for path in (unfinished / "checkpoints").iterdir())

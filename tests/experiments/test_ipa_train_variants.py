"""Whole runs with what the main job can be asked for: that each trains, resumes where it can, and leaves nothing."""

import contextlib
import json
import math
import shutil
import signal

import psutil
import pytest
from training_run import Run, finished, has_record, records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sandbox_machine"), pytest.mark.timeout(1200)]


def test_resampling_from_prefixes_resumes_exactly(tmp_path):
    """Half of the groups start from an expert's prefix, and who fails there imitates. The KV cache is in few pages: a
    cohort of four has room for one trajectory that reaches the end.

    The run halts once between two batches; a copy of what a kill would have left there ends as the run itself does."""
    arguments = ["--config.resampling.fraction=0.5", "--config.ipa.imitation=fallback"]
    arguments += ["--config.engine.page_size=16", "--config.engine.pages=24"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Run(whole, *arguments) as run:
        run.halt(has_record(run, "ipa", 3))  # the checkpoint before it is step 2's
        shutil.copytree(whole, killed)
        run.go_on()
    ipa = records(whole, "ipa")
    assert [record["resampling/groups"] for record in ipa] == [1.0] * 4
    assert any(record["resampling/imitated"] > 0 for record in ipa)
    assert [record["compile/programs"] for record in ipa] == [0.0] * 4
    assert "continuing at ipa step 2" in finished(killed, *arguments)
    assert records(killed) == records(whole)


def test_asynchronous_run_ends_and_resumes(tmp_path):
    """Staleness stays within the ratio; with two updates a batch, ratios leave 1."""
    arguments = ["--config.rollout.async_ratio=1", "--config.rl.steps=6", "--config.rl.updates_per_batch=2"]
    arguments += ["--config.rollout.filter_groups=1"]
    with Run(tmp_path / "run", *arguments) as run:
        run.halt(has_record(run, "ipa", 3))
        run.go_on(signal.SIGKILL)

    with Run(tmp_path / "run", *arguments) as run:
        run.halt(has_record(run, "ipa", 5))
        assert "continuing at ipa step 2" in run.go_on()
    ipa = records(tmp_path / "run", "ipa")
    assert [record["step"] for record in ipa] == [1, 2, 3, 4, 5, 6]
    assert all(record["buffer/staleness_max"] <= 1 for record in ipa)
    assert any(record["buffer/staleness_max"] == 1 for record in ipa)
    assert 4 <= ipa[-1]["buffer/filtered_failed"] <= 8  # one between two batches; the policy hardly ever succeeds
    assert all(record["compile/programs"] == 0 for record in ipa)
    assert any(record["ratio/token_max"] != 1.0 for record in ipa)  # the second update is off-policy
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {"warm_start", "final"}


def test_an_agent_that_is_a_program_is_trained_and_resumes_exactly(tmp_path):
    """Halted and copied as above."""
    arguments = ["--config.rollout.agent=native", "--config.rl.steps=3", "--config.checkpoint.every=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Run(whole, *arguments) as run:
        run.halt(has_record(run, "ipa", 2))
        shutil.copytree(whole, killed)
        run.go_on()
    ipa = records(whole, "ipa")
    assert max(record["rollout/chunks_mean"] for record in ipa) > 1.2
    assert all(record["train/grad_norm"] > 0 for record in ipa)
    assert all(record["mismatch/chunk_mean"] == pytest.approx(1.0, abs=1e-3) for record in ipa)
    assert [record["compile/programs"] for record in ipa] == [0.0] * 3
    assert "continuing at ipa step 1" in finished(killed, *arguments)
    assert records(killed) == records(whole)


def test_a_run_on_ray_hosts_goes_on_when_one_is_killed_and_leaves_nothing_behind(tmp_path):
    """It trains adapters, and nothing else goes to the hosts."""
    pytest.importorskip("ray")
    arguments = ["--config.rollout.hosts=2", "--config.rollout.async_ratio=2", "--config.rl.steps=8"]
    arguments += ["--config.rl.lora.rank=1", "--config.rl.lora.targets=wq"]
    with Run(tmp_path / "run", *arguments) as run:
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
    ipa = records(tmp_path / "run", "ipa")
    assert [record["step"] for record in ipa] == list(range(1, 9))
    assert ipa[-1]["rollout/lost_hosts"] == 1
    layers, inputs, outputs = 2, 32, 2 * 16
    assert {record["sync/bytes"] for record in ipa} == {4.0 * layers * (inputs + outputs)}
    assert all(record["train/grad_norm"] > 0 for record in ipa)
    assert all(record["buffer/staleness_max"] <= 2 for record in ipa)
    assert sum(record["compile/programs"] for record in ipa) == 0


def test_multiplexing_lends_devices_to_training_at_every_step(tmp_path):
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
    output = finished(tmp_path / "run", *arguments, environment={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    assert "{4, 5, 6, 7} of them while {0, 1, 2, 3} train" in " ".join(output.split())
    ipa = records(tmp_path / "run", "ipa", keep_measured=True)
    assert [record["step"] for record in ipa] == [1, 2, 3, 4]
    for record in ipa:
        assert record["time/shrink"] > 0
        assert record["time/expand"] > 0
        assert record["devices/training"] == record["devices/rolling_out_meanwhile"] == 4
        assert record["buffer/staleness_max"] <= 1
        assert record["compile/programs"] == 0
        assert record["train/grad_norm"] > 0
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {"warm_start", "final"}


def test_mixture_of_experts_held_out_families_and_evaluations_on_the_way(tmp_path):
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
    finished(tmp_path / "run", *arguments)
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

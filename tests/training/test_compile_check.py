"""Reading compiled programs, and the whole check on fake CPU devices; on real TPU topologies where libtpu is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rome.models.kernels import splash_attention
from rome.training.compile_check import TopologyError, topology_devices
from rome.training.flops import count_flops
from rome.training.hlo import traffic

ROOT = Path(__file__).parents[2]
SMALL = (
    *("vocab_size=512", "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8", "model.scan_layers=True"),
    *("model.num_experts=4", "model.num_experts_per_token=2", "model.moe_intermediate_size=16", "model.num_heads=4"),
    *("rl.row_length=64", "rl.max_chunks=16", "rl.micro_rows=8", "environment.max_chunks=4"),
    *("engine.slots=8", "engine.cohorts=1", "engine.max_length=64", "engine.extend_buckets=(16,)"),
    *("mesh.train.fsdp=4", "mesh.train.context=2", "mesh.rollout.data=4", "mesh.rollout.tensor=2"),
)

MODULE = """HloModule m, num_partitions=8

%inside (param_0: f32[48,1024], param_1: s32[]) -> f32[1,1024] {
  %param_0 = f32[48,1024]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,1024]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,1024}
}

%scattered (param_0: f32[48,1024], param_1: s32[2,1], param_2: f32[2,1024]) -> f32[48,1024] {
  %param_0 = f32[48,1024]{1,0} parameter(0)
  %param_1 = s32[2,1]{1,0} parameter(1)
  %param_2 = f32[2,1024]{1,0} parameter(2)
  ROOT %set = f32[48,1024]{1,0} scatter(%param_0, %param_1, %param_2), to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[48,1024], f32[1,1024])) -> (s32[], f32[48,1024], f32[1,1024]) {
  %state = (s32[], f32[48,1024]{1,0}, f32[1,1024]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %stack = f32[48,1024]{1,0} get-tuple-element(%state), index=1
  %none = () custom-call(), custom_call_target="tpu_custom_call", backend_config={"kernel":{
"name":"k"
}}, metadata={op_name="k"}
  %row = f32[1,1024]{1,0} fusion(%stack, %index), kind=kLoop, calls=%inside
  %summed = f32[1,1024]{1,0} all-reduce(%row), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %next = (s32[], f32[48,1024]{1,0}, f32[1,1024]{1,0}) tuple(%index, %stack, %summed)
}

%condition (state: (s32[], f32[48,1024], f32[1,1024])) -> pred[] {
  %state = (s32[], f32[48,1024]{1,0}, f32[1,1024]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %count = s32[] constant(48)
  ROOT %less = pred[] compare(%index, %count), direction=LT
}

ENTRY %main (start: (s32[], f32[48,1024], f32[1,1024])) -> f32[1,1024] {
  %start = (s32[], f32[48,1024]{1,0}, f32[1,1024]{1,0}) parameter(0)
  %loop = (s32[], f32[48,1024]{1,0}, f32[1,1024]{1,0}) while(%start), condition=%condition, body=%body
  %last = f32[1,1024]{1,0} get-tuple-element(%loop), index=2
  %table = f32[48,1024]{1,0} get-tuple-element(%start), index=1
  %where = s32[2,1]{1,0} parameter(1)
  %rows = f32[2,1024]{1,0} parameter(2)
  %changed = f32[48,1024]{1,0} fusion(%table, %where, %rows), kind=kCustom, calls=%scattered
  %near = f32[1,1024]{1,0:T(8,128)S(1)} copy(%last)
  ROOT %gathered = f32[8,1024]{1,0} all-gather(%last), replica_groups=[1,8]<=[8], dimensions={0}
}
"""


def test_traffic_of_a_module_counted_by_hand():
    row = 4 * 1024
    found = traffic(MODULE)
    # 48 times: a slice read and a row written, a row summed (read and written); then a copy to on-chip memory and the
    # gather; two rows read and written in place, at two indices
    assert found.hbm == 48 * ((row + 4 + row) + 2 * row) + row + (row + 8 * row) + (4 * row + 8)
    assert found.collectives == {"all-reduce": 48 * 2 * row * 3 // 4, "all-gather": 7 * row}
    assert found.calls == {"all-reduce": 48, "all-gather": 1}


def test_flops_count_loops_recomputation_and_the_dearest_branch():
    x, w = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))

    def scanned(x, w):
        step = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return jax.lax.scan(step, x, w)[0].sum()

    def branching(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])

    def looping(x, w):
        return jax.lax.while_loop(lambda c: (c[0] < 7) & (c[1] < 9).any(), lambda c: (c[0] + 1, c[1] @ w[0]), (0, x))

    product = 2 * 8 * 16 * 16
    assert count_flops(jax.make_jaxpr(looping)(x, w).jaxpr) == 7 * product
    assert count_flops(jax.make_jaxpr(scanned)(x, w).jaxpr) == 5 * product
    # forward, forward again (its input is not kept, only sin's is recomputed from it), and two in the backward pass
    assert count_flops(jax.make_jaxpr(jax.grad(scanned, (0, 1)))(x, w).jaxpr) == 4 * 5 * product
    assert count_flops(jax.make_jaxpr(branching)(x, w).jaxpr) == 2 * product


def test_flops_of_splash_attention_leave_out_what_the_causal_order_hides():
    q, k = jnp.zeros((2, 2, 4, 1024, 128)), jnp.zeros((2, 2, 2048, 128))
    of_q, of_k = jnp.ones((2, 1024), jnp.int32), jnp.ones((2, 2048), jnp.int32)

    def attend(q, k, v):
        return splash_attention(q, k, v, of_q, of_k, None).sum()

    product = 2 * 16 * 1024 * 2048 * 128  # of all queries with all keys
    seen = (3 + 4) / 8  # blocks of 512 × 512 in the last two rows of four
    assert count_flops(jax.make_jaxpr(attend)(q, k, k).jaxpr) == seen * 2 * product
    # forward 2, keys and values 4, queries 3; and the product of each output with its gradient
    gradients = jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(q, k, k).jaxpr
    assert count_flops(gradients) == seen * 9 * product + 2 * q.size


@pytest.mark.parametrize("name", ["v5p", "v9z:2x2", "v5p:4by4", "cpu:many", "cpu:100000"])
def test_a_topology_that_cannot_be_is_refused(name):
    with pytest.raises(TopologyError, match="expected"):
        topology_devices(name)


SMALL_CHIP = """
import runpy, sys
import jax
from rome.training import compile_check
chip = compile_check.Chip(hbm=float(sys.argv.pop(1)), flops=1e12, bandwidth=1e9, interconnect=1e9)
compile_check.topology_devices = lambda name: (jax.devices(), chip)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def _check(topology: str, *arguments: str, hbm: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the script; `hbm`: for chips of so many bytes, which no topology that can be had here has."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    run = [sys.executable] if hbm is None else [sys.executable, "-c", SMALL_CHIP, str(hbm)]
    command = [*run, str(ROOT / "experiments/compile_check.py"), f"--topology={topology}"]
    command += [f"--config={ROOT / 'configs/rome_tiny.py'}", *(f"--config.{one}" for one in SMALL), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_every_program_compiles_for_eight_cpu_devices():
    done = _check("cpu:8")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for name in ("train step", "update", "log-probs", "prefill", "decode"):
        assert f" {name} " in done.stdout
    assert "every program compiles" in done.stdout
    assert "all-gather" in done.stdout  # fsdp gathers weights


@pytest.mark.slow
def test_a_program_compiles_for_a_tpu_that_is_not_there():
    pytest.importorskip("libtpu")
    done = _check("v5e:2x4", "--programs=log-probs")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "every program fits" in done.stdout


def test_shapes_alone_give_the_memory_that_is_kept():
    done = _check("cpu:8", "--shapes", "--programs=update,decode", "--config.rl.optimizer.memory=pinned_host")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "optimizer (host's memory)" in done.stdout
    assert "KV cache" in done.stdout
    assert "temporaries" not in done.stdout


def test_what_does_not_fit_the_chip_is_an_error():
    state = ("--shapes", "--programs=update")
    assert _check("cpu:8", *state, hbm=1e9).returncode == 0
    done = _check("cpu:8", *state, hbm=1e3)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert "update" in done.stdout


def test_a_mesh_of_another_size_is_one_sentence():
    done = _check("cpu:4")
    assert done.returncode == 2
    assert "ShardingError: mesh: expected 8 devices (fsdp 4 × context 2), found 4" in done.stdout.replace("\n", " ")

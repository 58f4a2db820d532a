"""Compiles the programs of a run for a topology that need not be there, and says whether they fit and how fast they
could be.

With libtpu installed, XLA's TPU compiler runs on any machine: `v5p:4x4x8` compiles for 128 such chips. `cpu:8` takes
that many of this process's (fake) CPU devices: the same code path, without a chip's limits.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rome.models.sharding import MeshConfig, make_mesh
from rome.training.flops import count_flops
from rome.training.hlo import Traffic, traffic
from rome.training.programs import Program, rollout_programs, train_programs
from rome.training.settings import RunSettings


class TopologyError(ValueError):
    """A topology that can't be compiled for; says what was expected."""


@dataclass(frozen=True)
class Chip:
    """`hbm` bytes; `flops` a second in bfloat16; `bandwidth` of HBM and `interconnect` (all links, one way) bytes/s."""

    hbm: float
    flops: float
    bandwidth: float
    interconnect: float


# Cloud TPU's published system architecture pages, per chip.
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 448e9),
}


@dataclass(frozen=True)
class Result:
    """Of one program, per device: bytes by kind, floating-point operations, traffic, seconds to compile.

    `error` is the compiler's sentence if it refused (too much memory); then the rest is what is known without it.
    """

    program: Program
    memory: dict[str, int]
    flops: float
    traffic: Traffic
    seconds: float
    error: str | None = None

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def roofline(self, chip: Chip) -> dict[str, float]:
        """Least seconds that each resource takes by itself; the largest bounds the step from below."""
        sent = sum(self.traffic.collectives.values())
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic.hbm / chip.bandwidth,
            "network": sent / chip.interconnect,
        }

    def mfu_bound(self, chip: Chip, devices: int) -> float:
        """The model FLOPs utilisation that the roofline allows; 0 for what has no model FLOPs."""
        return self.program.model_flops / (devices * chip.flops * max(max(self.roofline(chip).values()), 1e-12))


def topology_devices(name: str) -> tuple[list[Any], Chip | None]:
    """The devices of `v5p:4x4x8`, with what such a chip can do; of `cpu:8`, without.

    Raises TopologyError for another name, or without libtpu.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        devices = jax.devices("cpu")
        if not shape.isdigit() or int(shape) > len(devices):
            raise TopologyError(
                f"topology {name!r}: expected at most cpu:{len(devices)}; "
                "XLA_FLAGS=--xla_force_host_platform_device_count=N gives more"
            )
        return devices[: int(shape)], None
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise TopologyError(f"topology {name!r}: expected KIND:AxB or KIND:AxBxC with KIND in {[*CHIPS]}, or cpu:N")
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"topology {name!r}: expected libtpu to be installed (pip install 'rome-agents[tpu]')")
    # without these, libtpu asks a metadata server that only a TPU machine has
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened that two processes could want
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices), CHIPS[kind]
    except Exception as error:  # libtpu raises what it likes for a shape that no slice has
        raise TopologyError(f"topology {name!r}: expected one that libtpu knows, found {error}") from error


def programs_of(settings: RunSettings, devices: Sequence[Any], names: Sequence[str] = ()) -> list[Program]:
    """The run's programs on `devices`, or those named. Raises ShardingError if a mesh has another number of devices."""
    found = []
    mesh = settings.mesh
    training = devices[: mesh.train.size] if mesh.multiplex else devices
    for config, used, make in ((mesh.train, training, train_programs), (mesh.rollout, devices, rollout_programs)):
        found += make(settings, _mesh(config, used))
    unknown = sorted(set(names) - {program.name for program in found})
    if unknown:
        raise TopologyError(f"programs: expected some of {[p.name for p in found]}, found {unknown}")
    return [program for program in found if not names or program.name in names]


def _mesh(config: MeshConfig, devices: Sequence[Any]) -> jax.sharding.Mesh:
    mesh = make_mesh(config, devices)
    if mesh is None:
        raise TopologyError("mesh: expected more than one device")
    return mesh


def shapes_of(program: Program) -> Result:
    """What its shapes alone say, without compiling: the bytes of its arguments and of what stays beside them."""
    resident = {f"{name} (resident)": size for name, size in program.resident.items()}
    return Result(program, {**program.arguments, **resident}, 0.0, Traffic(), 0.0)


def compile_program(program: Program, devices: int, chip: Chip | None) -> Result:
    """Traces, lowers and compiles it; one that does not fit the chip gives a result with `error`."""
    started = time.monotonic()
    traced = program.trace()
    flops = count_flops(traced.jaxpr.jaxpr) / devices
    held = dict(shapes_of(program).memory)
    try:
        compiled, text = _compile(traced.lower(), chip is not None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sentence = str(error).splitlines()[0]
        return Result(program, held, flops, Traffic(), time.monotonic() - started, sentence)
    stats = compiled.memory_analysis()
    held["outputs"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    held["temporaries"] = stats.temp_size_in_bytes
    held["code"] = stats.generated_code_size_in_bytes
    return Result(program, held, flops, traffic(text), time.monotonic() - started)


def _compile(lowered: jax.stages.Lowered, for_tpu: bool) -> tuple[jax.stages.Compiled, str]:
    """The program, and the text of its optimised module. libtpu writes the text to a folder, because jaxlib's parser
    refuses instructions of a newer libtpu ("async-update instruction should have 1 operands")."""
    if not for_tpu:
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder})
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, written.read_text()

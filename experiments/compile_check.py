"""Compiles a run's programs for a topology that need not be at hand, and exits with 1 unless all of them fit.

    python experiments/compile_check.py --config=configs/rome_30b.py --topology=v5p:4x4x8 [--programs=decode,prefill]
                                        [--shapes]

`--shapes` compiles nothing: seconds instead of minutes, and only the memory of what is passed in and kept.

Overrides are those of `ipa_train.py` (`--config.rl.row_length=8192`). TPU topologies need `pip install -e '.[tpu]'`
but no TPU. `--topology=cpu:8` takes fake CPU devices (XLA_FLAGS=--xla_force_host_platform_device_count=8).
"""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def main(argv: list[str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rome.models import ConfigError as ModelConfigError
    from rome.models.sharding import ShardingError
    from rome.training.compile_check import TopologyError, compile_program, programs_of, shapes_of, topology_devices
    from rome.training.config import ConfigError, load_config
    from rome.training.settings import load_settings

    console = Console(width=max(Console().width, 110))
    own = {"topology": "", "programs": "", "shapes": ""}
    rest = []
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in own:
            own[name] = value if equals else "yes"
        else:
            rest.append(argument)
    try:
        if not own["topology"]:
            raise TopologyError("expected --topology=KIND:SHAPE, such as v5p:4x4x8")
        settings = load_settings(load_config(rest))
        devices, chip = topology_devices(own["topology"])
        programs = programs_of(settings, devices, [name for name in own["programs"].split(",") if name])
    except (ConfigError, ModelConfigError, ShardingError, TopologyError) as error:
        console.print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    if own["shapes"]:
        results = [shapes_of(program) for program in programs]
        console.print(memory_table(results, chip))
        return 1 if any(chip and result.total > chip.hbm for result in results) else 0
    results = []
    for program in programs:
        console.print(f"compiling {program.name} for {own['topology']}…", highlight=False)
        results.append(compile_program(program, len(devices), chip))
    console.print(memory_table(results, chip))
    console.print(speed_table(results, chip, len(devices)))
    misfits = [r for r in results if r.error or (chip and r.total > chip.hbm)]
    for result in misfits:
        console.print(f"[bold red]{result.program.name} does not fit:[/] {escape(result.error or 'too many bytes')}")
    if not misfits:
        console.print("every program fits" if chip else "every program compiles")
    return 1 if misfits else 0


def memory_table(results: list, chip: object) -> Table:
    """GiB a device, by kind."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.memory))
    table = Table(title="memory a device, GiB" + (f" (HBM {chip.hbm / 2**30:.0f})" if chip else ""))
    hosted = list(dict.fromkeys(kind for result in results for kind in result.program.host))
    for title in ("program", *kinds, "total", *(f"{kind} (host's memory)" for kind in hosted)):
        table.add_column(title, justify="left" if title == "program" else "right")
    for result in results:
        cells = [f"{result.memory[kind] / 2**30:.3f}" if kind in result.memory else "" for kind in kinds]
        total = "too much" if result.error else f"{result.total / 2**30:.3f}"
        host = [f"{result.program.host[kind] / 2**30:.3f}" if kind in result.program.host else "" for kind in hosted]
        table.add_row(result.program.name, *cells, total, *host)
    return table


def speed_table(results: list, chip: object, devices: int) -> Table:
    """What a device computes, moves and sends in one call (of decode: a chunk), and its roofline on a real chip."""
    table = Table(title="one call, a device")
    titles = ["program", "compile s", "tokens (all)", "TFLOP", "model TFLOP", "HBM GB", "collectives, GB sent (calls)"]
    titles += ["compute s", "memory s", "network s", "bound s", "MFU bound"] if chip else []
    for title in titles:
        table.add_column(title, justify="left" if title.startswith(("program", "coll")) else "right")
    for result in results:
        moved = result.traffic
        sent = [f"{kind} {size / 1e9:.2f} ({moved.calls[kind]})" for kind, size in sorted(moved.collectives.items())]
        cells = [
            result.program.name,
            f"{result.seconds:.0f}",
            f"{result.program.tokens:,}",
            f"{result.flops / 1e12:.3g}",
            f"{result.program.model_flops / devices / 1e12:.3g}",
            f"{moved.hbm / 1e9:.3g}",
            "\n".join(sent) or "none",
        ]
        if chip and not result.error:
            times = result.roofline(chip)
            cells += [f"{value:.3g}" for value in times.values()] + [f"{max(times.values()):.3g}"]
            cells += [f"{result.mfu_bound(chip, devices):.0%}" if result.program.model_flops else ""]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs a script on eight fake CPU devices, in a process of its own: JAX counts its devices only once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_fake_devices(script: Path, folder: Path, flags: str = "") -> Any:
    """What the script pickles into the file that it is given; it imports what lies beside it. `flags`: more for XLA."""
    path = folder / "found.pickle"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}".strip(),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(script.parent)]),
    }
    command = [sys.executable, str(script), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return pickle.loads(path.read_bytes())

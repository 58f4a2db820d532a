"""The policy of a run directory, read without touching the run: it may be training meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from rome.models import ModelConfig, ParamSpec, Tokenizer, param_specs
from rome.training.checkpoint import CheckpointError, _checksums, _cursor_crc
from rome.training.settings import load_settings


def load_policy(directory: Path) -> tuple[Any, ModelConfig, Tokenizer, int]:
    """Parameters of the newest checkpoint, with their config, tokenizer and `engine.max_length`.

    Raises ConfigError or TokenizerError for a folder that is no run, CheckpointError if there is no checkpoint or its
    parameters are damaged.
    """
    directory = Path(directory).absolute()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(directory / "tokenizer")
    settings = load_settings(ConfigDict(config))
    model = settings.model_config(tokenizer.vocab_size)
    folder = directory / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected checkpoints, found none")
    # read only: a manager that may write would delete what the run is just writing
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{folder}: expected a checkpoint, found none")
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(), cursor=ocp.args.JsonRestore())
            restored = manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise a dozen types for a damaged file
            raise CheckpointError(f"{folder / str(step)}: can't be read ({type(error).__name__}: {error})") from error
    cursor = dict(restored["cursor"])
    if cursor.pop("crc", None) != _cursor_crc(cursor):
        raise CheckpointError(f"{folder / str(step)}: its cursor is damaged (the CRC differs)")
    params = restored["state"]["params"]
    for name, checksum in _checksums(params).items():
        if cursor["checksums"].get(f".params{name}") != checksum:
            raise CheckpointError(f"{folder / str(step)}: params{name} is damaged (its CRC differs)")
    declared = jax.tree.map(lambda spec: spec.shape, param_specs(model), is_leaf=lambda x: isinstance(x, ParamSpec))
    if jax.tree.map(lambda leaf: tuple(leaf.shape), params) != declared:
        raise CheckpointError(f"{folder / str(step)}: expected the parameters of the model in config.json")
    return (
        jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params),
        model,
        tokenizer,
        settings.engine.max_length,
    )

"""Runs that start from a published model: what they keep of its folder, and how they become such a folder again.

Such a run keeps ``config.json`` and the tokenizer's files in its directory ``tokenizer``; the weights are in its
checkpoints. So it continues, and is exported, whatever has become of the folder that it started from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rome.files import atomic_write
from rome.models import ModelConfig, PretrainedTokenizer, TemplateRenderer, Tokenizer, load_tokenizer, param_specs
from rome.models.lora import adapt, merge
from rome.models.params import Params, is_spec
from rome.models.weights import check_pretrained, load_config, load_pretrained, save_pretrained
from rome.training.checkpoint import Checkpointer, CheckpointError
from rome.training.config import ConfigError
from rome.training.settings import PretrainedModel, RunSettings, load_settings
from rome.training.state import TrainState, init_state, make_optimizer

FOLDER = "tokenizer"


def adopt(model: PretrainedModel, run: Path) -> PretrainedTokenizer:
    """Checks the whole folder but the numbers in its weights; keeps its config and tokenizer in the run's directory.

    Raises:
        ConfigError: the folder is missing or describes a model that isn't supported; names the field.
        WeightsError: a tensor is missing, unknown, of another shape, or cut short; names it.
        TokenizerError: no tokenizer or chat template, or not of a kind that can be used.
    """
    source, folder = Path(model.pretrained), run / FOLDER
    if not source.is_dir():
        raise ConfigError(f"model.pretrained: expected a Hugging Face folder, found {model.pretrained!r}")
    config = check_pretrained(source, **model.runtime)
    tokenizer = PretrainedTokenizer.from_folder(source).padded_to(config.vocab_size)
    TemplateRenderer(tokenizer)  # has the template that a run needs, or says what is wrong
    tokenizer.save(folder)
    atomic_write(folder / "config.json", (source / "config.json").read_bytes())
    return tokenizer


def kept_config(model: PretrainedModel, run: Path) -> ModelConfig:
    """The model of a run that has adopted one."""
    return load_config(run / FOLDER, **model.runtime)


def kept_tokenizer(run: Path) -> Tokenizer | PretrainedTokenizer:
    """The tokenizer of any run; a published model's decodes all ids that the model has."""
    tokenizer = load_tokenizer(run / FOLDER)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return tokenizer.padded_to(load_config(run / FOLDER).vocab_size)


def first_params(model: PretrainedModel, run: Path, shardings: Any = None) -> Params:
    """The weights that the run starts from, read straight to where ``shardings`` wants them.

    Raises:
        ConfigError: the folder's ``config.json`` is no longer the one that the run has adopted.
    """
    config, params = load_pretrained(model.pretrained, shardings, **model.runtime)
    if config != kept_config(model, run):
        raise ConfigError(
            f"{model.pretrained}/config.json: expected the model that this run was started with, found another"
        )
    return params


def export_run(run: str | Path, folder: str | Path, step: int | None = None) -> int:
    """Writes the policy of a run's checkpoint as a Hugging Face folder: config, weights, tokenizer, chat template.

    Adapters are merged. The checkpoint may have been written on any number of devices.

    Args:
        run: the directory of a run that started from a published model.
        folder: made if need be; it must not hold weights yet.
        step: the checkpoint's number; None takes the newest one.

    Returns:
        The number of the checkpoint.

    Raises:
        ConfigError: no such run, or it trained a tokenizer of its own, which no Hugging Face folder can hold.
        CheckpointError: no such checkpoint, or it is damaged.
        WeightsError: the folder has weights.
    """
    run = Path(run)
    try:
        settings = load_settings(ConfigDict(json.loads((run / "config.json").read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run}: expected the directory of a run: {error}") from error
    if settings.pretrained is None:
        raise ConfigError(f"{run}: expected a run with model.pretrained; other runs have a tokenizer of their own")
    config = kept_config(settings.pretrained, run)
    checkpointer = Checkpointer(run / "checkpoints", read_only=True)
    try:
        at = checkpointer.latest_step if step is None else step
        if at is None:
            raise CheckpointError(f"{run / 'checkpoints'}: expected a checkpoint, found none")
        stage = str(checkpointer.cursor(at)["stage"])
        state, _, _ = checkpointer.restore(at, _abstract_state(settings, config, stage))
    finally:
        checkpointer.close()
    save_pretrained(folder, merge(state.params), config)
    kept_tokenizer(run).save(folder)
    return at


def _abstract_state(settings: RunSettings, config: ModelConfig, stage: str) -> TrainState:
    """The shapes of a stage's state, all on this process's first device."""
    optimizer, lora = make_optimizer(*settings.optimizer_of(stage)), settings.rl.lora

    def fresh() -> TrainState:
        params = zero_params(config)
        return init_state(
            adapt(params, config, lora, jax.random.key(0)) if stage == "ipa" and lora.rank else params, optimizer
        )

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(fresh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)


def zero_params(config: ModelConfig) -> Params:
    """Parameters to restore others into."""

    def zeros(spec: Any) -> jax.Array:
        return jax.numpy.zeros(spec.shape, spec.dtype)

    return jax.tree.map(zeros, param_specs(config), is_leaf=is_spec)

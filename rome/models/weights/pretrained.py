"""Checkpoints to parameters and back, bit for bit where the dtypes agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rome.files import atomic_write
from rome.models.config import ConfigError, ModelConfig
from rome.models.families import from_hf_config, to_hf_config
from rome.models.params import Params, ParamSpec
from rome.models.weights.table import Slot, leaf_slots
from rome.models.weights.tensors import (
    INDEX,
    SINGLE,
    Tensors,
    WeightsError,
    read_folder,
    split_fused_experts,
    write_folder,
)

_LAYOUTS = ("per_expert", "fused")
_SHOWN = 3  # names in one message


def load_config(folder: str | Path, **runtime: Any) -> ModelConfig:
    """The model that ``config.json`` in the folder describes; ``runtime`` as in `from_hf_config`.

    Raises:
        ConfigError: the file is missing or no JSON object, or has a field that isn't supported.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a model config: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return from_hf_config(raw, **runtime)


def load_pretrained(folder: str | Path, shardings: Any = None, **runtime: Any) -> tuple[ModelConfig, Params]:
    """Config and parameters of a Hugging Face folder (``config.json`` and safetensors); see `load_params`."""
    config = load_config(folder, **runtime)
    return config, load_params(read_folder(folder), config, shardings)


def check_pretrained(folder: str | Path, **runtime: Any) -> ModelConfig:
    """The config of a Hugging Face folder whose weights `load_pretrained` would load: names, shapes, whole files.

    Raises:
        ConfigError, WeightsError: as `load_pretrained` does.
    """
    config = load_config(folder, **runtime)
    tensors = split_fused_experts(read_folder(folder))
    _check(tensors, config, [slot for _, _, slots in leaf_slots(config) for slot in slots])
    return config


def load_params(tensors: Tensors, config: ModelConfig, shardings: Any = None) -> Params:
    """Parameters in ``config.param_dtype`` from a checkpoint's tensors.

    Experts may be stored one by one or together, layer by layer. Nothing is read but what a shard of this process
    needs, and one shard of one leaf is in host memory at a time.

    Args:
        tensors: from `read_folder` or `read_safetensors`, or under the same names from elsewhere.
        config: the model's config.
        shardings: a pytree of `jax.sharding.Sharding` like `param_specs`; None puts all on the default device.

    Raises:
        WeightsError: a tensor is missing, unknown or has another shape than the model's; names it.
    """
    tensors = split_fused_experts(tensors)
    leaves = list(leaf_slots(config))
    _check(tensors, config, [slot for _, _, slots in leaves for slot in slots])
    params: Params = {}
    for path, spec, slots in leaves:
        read = _block_reader(tensors, spec, slots)
        if shardings is None:
            leaf = jax.numpy.asarray(read((slice(None),) * len(spec.shape)))
        else:
            sharding = shardings
            for key in path:
                sharding = sharding[key]
            leaf = _place(spec.shape, sharding, read)
        home = params
        for key in path[:-1]:
            home = home.setdefault(key, {})
        home[path[-1]] = leaf
    return params


def _place(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Reads each shard of this process once, and has it on its devices before the next one is read."""
    holders: dict[str, list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        holders.setdefault(str(index), []).append(device)
    arrays = []
    for devices in holders.values():
        block = read(indices[devices[0]])
        arrays += jax.block_until_ready([jax.device_put(block, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _check(tensors: Tensors, config: ModelConfig, slots: list[Slot]) -> None:
    """Names and shapes, before the first byte is read."""
    expected = {slot.name: slot.shape for slot in slots}
    missing = [name for name in expected if name not in tensors]
    extra = sorted(set(tensors) - set(expected))
    if config.tie_embeddings and "lm_head.weight" in extra:
        _check_tied(tensors)
        extra.remove("lm_head.weight")
    if missing:
        shapes = [f"{name} {list(expected[name])}" for name in missing[:_SHOWN]]
        raise WeightsError(f"missing: expected {', '.join(shapes)}{_more(missing)}; found no such tensor")
    if extra:
        found = [f"{name} {list(tensors[name].shape)} in {tensors[name].where}" for name in extra[:_SHOWN]]
        raise WeightsError(
            f"extra: expected no tensor that the model doesn't have, found {', '.join(found)}{_more(extra)}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise WeightsError(
                f"{name}: expected shape {list(shape)}, found {list(tensors[name].shape)} in {tensors[name].where}"
            )


def _check_tied(tensors: Tensors) -> None:
    """A tied model may store its output projection, if that is the embedding."""
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is None or head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise WeightsError("lm_head.weight: expected none or the embedding (tie_word_embeddings), found other values")


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _block_reader(tensors: Tensors, spec: ParamSpec, slots: list[Slot]) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reads one block of a leaf, given by a slice an axis."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(size)[part] for size, part in zip(spec.shape, index, strict=True)]
        block = np.empty([len(span) for span in ranges], spec.dtype)
        for slot in slots:
            depth = len(slot.at)
            if all(at in span for at, span in zip(slot.at, ranges, strict=False)):
                place = tuple(at - span.start for at, span in zip(slot.at, ranges, strict=False))
                block[place] = slot.to_leaf(tensors[slot.name].read())[index[depth:]]
        return block

    return read


def save_pretrained(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    experts: str = "per_expert",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `load_pretrained` and Hugging Face transformers read: the config, and safetensors.

    Args:
        folder: made if need be. It must not hold weights yet: replacing them file by file could leave a mixture.
        params: layers stacked, as `param_specs` declares them. They are written in their dtypes.
        config: the model's config.
        experts: ``per_expert``, one tensor each (as checkpoints are published), or ``fused``, one a layer.
        max_shard_bytes: size above which weights are split into several files.

    Raises:
        ConfigError: no family expresses this model (`to_hf_config`), or ``experts`` is unknown.
        WeightsError: the folder has weights.
    """
    if experts not in _LAYOUTS:
        raise ConfigError(f"experts: expected one of {_LAYOUTS}, got {experts!r}")
    raw = to_hf_config(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if taken := [name for name in (SINGLE, INDEX) if (folder / name).exists()]:
        raise WeightsError(f"{folder}: expected a folder without weights, found {taken[0]}")
    sources = dict(_outgoing(params, config, fused=experts == "fused"))
    layout = ((name, shape, dtype) for name, (shape, dtype, _) in sources.items())
    write_folder(folder, layout, lambda name: sources[name][2](), max_shard_bytes)
    raw["torch_dtype"] = str(params["embedding"].dtype)
    atomic_write(folder / "config.json", json.dumps(raw, indent=2) + "\n")


_Outgoing = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def _outgoing(params: Params, config: ModelConfig, fused: bool) -> Iterator[tuple[str, _Outgoing]]:
    """Name, shape, dtype and reader of each tensor to write. Only what is being written is copied to the host."""
    pending: dict[str, list[tuple[jax.Array, list[Slot]]]] = {}
    for path, _, slots in leaf_slots(config):
        leaf = params[path[0]] if len(path) == 1 else params[path[0]][path[1]]
        by_layer: dict[str, list[Slot]] = {}
        for slot in slots:
            before, separator, after = slot.name.partition(".mlp.experts.")
            if not separator or not fused:
                yield slot.name, (slot.shape, np.dtype(leaf.dtype), _one(leaf, slot))
            else:
                kind = "down_proj" if "down_proj" in after else "gate_up_proj"
                by_layer.setdefault(f"{before}.mlp.experts.{kind}", []).append(slot)
        for name, group in by_layer.items():
            pending.setdefault(name, []).append((leaf, group))
    for name, parts in pending.items():
        rows, columns = parts[0][1][0].shape
        shape = (len(parts[0][1]), rows * len(parts), columns)
        yield name, (shape, np.dtype(parts[0][0].dtype), _stacked(parts))


def _one(leaf: jax.Array, slot: Slot) -> Callable[[], np.ndarray]:
    return lambda: slot.to_tensor(np.asarray(leaf[slot.at]))


def _stacked(parts: list[tuple[jax.Array, list[Slot]]]) -> Callable[[], np.ndarray]:
    """[experts, rows, columns] of one layer: the leaves' experts (gate, then up) above each other."""

    def read() -> np.ndarray:
        halves = []
        for leaf, slots in parts:
            experts = np.asarray(leaf[slots[0].at[0]])
            halves.append(np.stack([slot.to_tensor(experts[slot.at[1]]) for slot in slots]))
        return np.concatenate(halves, axis=1)

    return read

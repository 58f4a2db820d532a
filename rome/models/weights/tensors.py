"""Tensors in safetensors files: read through a memory map, a slice at a time, and written whole or not at all.

The format: eight bytes with the length of a JSON header (little-endian), the header (name -> dtype, shape, first and
last byte), then the bytes of all tensors, in C order and without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rome.files import atomic_open, atomic_write

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # upstream's limit
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightsError(ValueError):
    """Weights are missing, cut short or don't fit the model; the message names the tensor, expected and found."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for. ``read`` gives an array of ``shape``, a view of a file where it can."""

    shape: tuple[int, ...]
    where: str
    read: Callable[[], np.ndarray]


Tensors = Mapping[str, LazyTensor]


def read_safetensors(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of one file, none of them read yet.

    Raises:
        WeightsError: the file is missing, cut short, or its header is not of this format; names file and tensor.
    """
    path = Path(path)
    header, start = _read_header(path)
    size = path.stat().st_size - start
    header.pop("__metadata__", None)
    last = 0
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        dtype, shape, begin, end = _entry(path, name, entry)
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if begin != last or end - begin != expected:
            raise WeightsError(f"{path}: {name}: expected bytes {last}..{last + expected}, found {begin}..{end}")
        if end > size:
            raise WeightsError(f"{path}: {name}: expected bytes {begin}..{end} of the data, the file ends at {size}")
        last = end
        tensors[name] = LazyTensor(shape, str(path), _reader(path, dtype, shape, start + begin))
    if last != size:
        raise WeightsError(f"{path}: expected {last} bytes of data, found {size}")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the byte at which the data starts."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= _LONGEST_HEADER:
                raise WeightsError(f"{path}: expected a safetensors header, found {prefix!r} at the start")
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path}: expected a safetensors file: {error}") from error
    if len(text) < length:
        raise WeightsError(f"{path}: expected a header of {length} bytes, the file ends after {len(text)}")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{path}: expected a JSON header: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: expected a JSON object as header, found {type(header).__name__}")
    return header, 8 + length


def _begin(entry: Any) -> int:
    try:
        return int(entry["data_offsets"][0])
    except (TypeError, KeyError, IndexError, ValueError):
        return -1  # `_entry` tells what is wrong


def _entry(path: Path, name: str, entry: Any) -> tuple[type, tuple[int, ...], int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"expected non-negative integers, found {numbers}")
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: {name}: expected dtype, shape and data_offsets: {error}") from error
    if code not in _DTYPES:
        raise WeightsError(f"{path}: {name}: expected a dtype of {sorted(_DTYPES)}, found {code!r}")
    return _DTYPES[code], shape, begin, end


def _reader(path: Path, dtype: type, shape: tuple[int, ...], offset: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)

    return read


def read_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder: those of its index, or of its one ``model.safetensors``.

    Raises:
        WeightsError: a file is missing or broken, or index and files disagree on a tensor.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        return read_safetensors(folder / SINGLE)
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: expected an index with a weight_map: {error!r}") from error
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise WeightsError(f"{index}: expected names of files beside it, found {file!r}")
        found = read_safetensors(folder / file)
        expected = {name for name, holder in files.items() if holder == file}
        for name in sorted(expected ^ set(found)):
            verb = "expected, but missing" if name in expected else "found, but the index does not place it there"
            raise WeightsError(f"{folder / file}: {name}: {verb}")
        tensors |= found
    return tensors


def write_folder(
    folder: str | Path,
    layout: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors as ``model.safetensors``, or as numbered shards and their index when they exceed one shard.

    Args:
        folder: where to; it exists.
        layout: name, shape and dtype of each tensor, in the order of writing.
        read: gives a tensor by name; called once each, in that order.
        max_shard_bytes: no file holds more data, unless a single tensor does.

    Raises:
        WeightsError: a dtype that safetensors files here don't have, or ``read`` gave another array than declared.
    """
    folder = Path(folder)
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    total = size = 0
    for name, shape, dtype in layout:
        if dtype not in _CODES:
            raise WeightsError(f"{name}: expected a dtype of {sorted(_DTYPES)}, found {dtype}")
        count = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + count > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size, total = size + count, total + count
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], read)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, read)
        weight_map |= dict.fromkeys(shard, file)
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write(folder / INDEX, json.dumps(document, indent=2) + "\n")


def _write_file(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable[[str], np.ndarray]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # readers refuse a file that doesn't say
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with atomic_open(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, dtype) in tensors.items():
            array = read(name)
            if array.shape != shape or array.dtype != dtype:
                found = f"{array.dtype}{list(array.shape)}"
                raise WeightsError(f"{path}: {name}: expected {dtype}{list(shape)}, found {found}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def split_fused_experts(tensors: Tensors) -> dict[str, LazyTensor]:
    """Gives experts that are stored together names of their own, as the per-expert layout has them.

    ``mlp.experts.gate_up_proj`` [E, 2F, D] holds each expert's gate above its up projection, ``mlp.experts.down_proj``
    is [E, D, F].

    Raises:
        WeightsError: such a tensor has another rank, or an odd number of rows.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".mlp.experts") or kind not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        if len(tensor.shape) != 3 or (kind == "gate_up_proj" and tensor.shape[1] % 2):
            expected = "[experts, 2 * rows, columns]" if kind == "gate_up_proj" else "[experts, rows, columns]"
            raise WeightsError(f"{tensor.where}: {name}: expected {expected}, found {list(tensor.shape)}")
        result |= dict(_expert_tensors(name, prefix, kind, tensor))
    return result


def _expert_tensors(name: str, prefix: str, kind: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    experts, rows, columns = tensor.shape
    halves = {"down_proj": (0, rows)}
    if kind == "gate_up_proj":
        halves = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
    for expert in range(experts):
        for half, (start, stop) in halves.items():

            def read(expert: int = expert, start: int = start, stop: int = stop) -> np.ndarray:
                return tensor.read()[expert, start:stop]

            where = f"{tensor.where}: {name}"
            yield f"{prefix}.{expert}.{half}.weight", LazyTensor((stop - start, columns), where, read)

"""The metadata and the table of tensors of a GGUF file (llama.cpp's format, versions 2 and 3, little-endian).

The format: magic, version, the two counts; per metadata entry a key, a type and a value; per tensor its name, axes
(fastest first), type and offset; then the data, every tensor aligned. Read here rather than by the package ``gguf``
because that one makes several objects a vocabulary entry, and does not say which tensor a cut file lacks.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rome.models.weights.tensors import WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_AXES = 4  # ggml's own


@dataclass(frozen=True)
class GGUFTensor:
    """``kind`` is the number of its type (``gguf.GGMLQuantizationType``), ``shape`` in C order, ``start`` a byte."""

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """``fields``: the metadata, arrays as lists. ``tensors``: by name; all of their bytes are in the file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads values one after another; past the end, says what it expected."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self.at, self.where = data, 0, str(path)

    def error(self, expected: str, found: str) -> WeightsError:
        return WeightsError(f"{self.where}: expected {expected} at byte {self.at}, found {found}")

    def take(self, size: int, what: str) -> bytes:
        if size > len(self._data) - self.at:
            raise self.error(f"{what} of {size} bytes", f"the end of the file at {len(self._data)}")
        self.at += size
        return self._data[self.at - size : self.at]

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        data = self.take(struct.calcsize(f"<{code}") * count, what)
        return list(struct.unpack(f"<{count}{code}", data))

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} in UTF-8", str(error)) from error

    def value(self, what: str) -> Any:
        kind = self.number("I", f"the type of {what}")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.error(f"the type of {what}", f"type {kind}")
        kind, count = self.number("I", f"the type of {what}"), self.number("Q", f"the length of {what}")
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], count, what)
        if kind != _STRING:
            raise self.error(f"{what}, an array of numbers or strings", f"items of type {kind}")
        return [self.string(what) for _ in range(count)]


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFFile:
    """Reads all but the data.

    Args:
        path: the file.
        block_sizes: values and bytes in a block, by type number: the types that can be dequantised.

    Raises:
        WeightsError: the file is missing, cut short, no GGUF file, or a tensor has an unknown type or a wrong place;
            names the key or the tensor, what was expected and what was found.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data, path), path, len(data), block_sizes)
    except (OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: expected a GGUF file: {error}") from error  # ValueError: it is empty


def _read(cursor: _Cursor, path: Path, end: int, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFFile:
    if (magic := cursor.take(4, "the magic number")) != _MAGIC:
        raise WeightsError(f"{path}: expected a GGUF file, which starts with {_MAGIC!r}, found {magic!r}")
    if (version := cursor.number("I", "the version")) not in _VERSIONS:
        raise WeightsError(f"{path}: version: expected one of {_VERSIONS}, found {version}")
    tensor_count, field_count = cursor.numbers("Q", 2, "the counts")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string("a metadata key")
        if key in fields:
            raise WeightsError(f"{path}: {key}: expected once, found twice")
        fields[key] = cursor.value(key)
    table = [_entry(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise WeightsError(f"{path}: general.alignment: expected a positive integer, found {alignment!r}")
    first, after = -(-cursor.at // alignment) * alignment, 0
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise WeightsError(f"{path}: {name}: expected once, found twice")
        size = _size(path, name, shape, kind, block_sizes)
        if offset != after:
            raise WeightsError(f"{path}: {name}: expected at byte {after} of the data, found at {offset}")
        if first + offset + size > end:
            raise WeightsError(
                f"{path}: {name}: expected bytes {first + offset}..{first + offset + size}, the file ends at {end}"
            )
        tensors[name] = GGUFTensor(name, kind, shape, first + offset, size)
        after = -(-(offset + size) // alignment) * alignment
    return GGUFFile(path, fields, tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor's name")
    axes = cursor.number("I", f"{name}: the number of axes")
    if not 1 <= axes <= _MAX_AXES:
        raise cursor.error(f"{name}: 1 to {_MAX_AXES} axes", str(axes))
    shape = tuple(reversed(cursor.numbers("Q", axes, f"{name}: the shape")))
    return name, shape, cursor.number("I", f"{name}: the type"), cursor.number("Q", f"{name}: the offset")


def _size(path: Path, name: str, shape: tuple[int, ...], kind: int, block_sizes: Mapping[int, tuple[int, int]]) -> int:
    if kind not in block_sizes:
        raise WeightsError(
            f"{path}: {name}: expected a type that can be dequantised, one of {sorted(block_sizes)}, found type {kind}"
        )
    values, size = block_sizes[kind]
    if not math.prod(shape) or shape[-1] % values:
        raise WeightsError(
            f"{path}: {name}: expected rows of blocks of {values} values (type {kind}), found shape {list(shape)}"
        )
    return math.prod(shape) // values * size

"""What a compiled program will do, read from its HLO text: collectives and memory traffic, loops multiplied out.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as its loops run; a
loop's trip count is the constant that its condition compares with. Traffic follows XLA's convention (operands are read,
results are written; a fusion's inside is free; a slice reads what it yields; an update in place writes what it
changes), and what lies in on-chip memory (`S(1)` in TPU layouts) is free.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "copy-done", "opt-barrier", "async-done", "async-update"),
}
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # in place; which operand is written
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[suf]\d+(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^{}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass
class Instruction:
    """One line: `shapes` are (bytes, is in HBM) of each array of its result, `operands` names of instructions."""

    name: str
    opcode: str
    shapes: list[tuple[int, bool]]
    operands: list[str]
    called: dict[str, list[str]]
    text: str
    is_root: bool


@dataclass
class Traffic:
    """Of one device, for one run of the program: bytes through HBM, bytes that each kind of collective sends."""

    hbm: float = 0.0
    collectives: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


def traffic(text: str) -> Traffic:
    """Reads the text of an optimised module (`compiled.as_text()`)."""
    computations = _parse(text)
    total = Traffic()
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    _walk(computations, entry, 1, total)
    return total


def _walk(computations: dict[str, tuple[bool, list[Instruction]]], name: str, times: int, total: Traffic) -> None:
    body = computations[name][1]
    table = {instruction.name: instruction for instruction in body}
    for instruction in body:
        opcode = instruction.opcode
        _count_collective(computations, instruction, table, times, total)
        if opcode == "while":
            trips = _trip_count(computations, instruction)
            for part in instruction.called["body"]:
                _walk(computations, part, times * trips, total)
        elif opcode in ("call", "conditional"):
            for parts in instruction.called.values():
                for part in parts:
                    _walk(computations, part, times, total)
        elif opcode not in _FREE:
            total.hbm += times * _bytes_moved(computations, instruction, table)


def _count_collective(
    computations: dict, instruction: Instruction, table: dict[str, Instruction], times: int, total: Traffic
) -> None:
    """A collective may be an instruction, or hide in a fusion (TPU's all-reduce that keeps one shard of the sum)."""
    for hidden, operands in _collectives_of(computations, instruction, table):
        kind = hidden.opcode.removesuffix("-start")
        ways = _group_size(hidden.text)
        size = sum(operands)
        if kind == "all-reduce" and "all-reduce-scatter" in instruction.text:
            kind = "reduce-scatter"
        share = (ways - 1) / ways if ways else 1.0
        sent = {"all-gather": size * max(ways - 1, 0), "all-reduce": 2 * size * share, "collective-permute": size}
        total.collectives[kind] += round(times * sent.get(kind, size * share))
        total.calls[kind] += times


def _collectives_of(
    computations: dict, instruction: Instruction, table: dict[str, Instruction]
) -> Iterator[tuple[Instruction, list[int]]]:
    """Collective instructions that this one stands for, with the sizes of their operands."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        yield instruction, [_size(table.get(name)) for name in instruction.operands]
    elif instruction.opcode in ("fusion", "async-start"):
        for part in instruction.called.get("calls", []):
            body = computations[part][1]
            inner = {one.name: one for one in body}
            for one in body:
                yield from _collectives_of(computations, one, inner)


def _bytes_moved(computations: dict, instruction: Instruction, table: dict[str, Instruction]) -> int:
    operands = [table.get(name) for name in instruction.operands]
    written = sum(size for size, in_hbm in instruction.shapes if in_hbm)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if instruction.opcode in _UPDATES:
        return 2 * _size(operands[_UPDATES[instruction.opcode]])
    if instruction.opcode != "fusion":
        return written + sum(_hbm_size(operand) for operand in operands)
    body = computations[instruction.called["calls"][0]][1]
    read = sum(_read_by_fusion(body, index, operand) for index, operand in enumerate(operands))
    return read + _written_by_fusion(body, written)


def _read_by_fusion(body: list[Instruction], index: int, operand: Instruction | None) -> int:
    """Bytes of an operand that a fusion reads: slices of it, if it does nothing else with it."""
    whole = _hbm_size(operand)
    parameter = next((one for one in body if one.opcode == "parameter" and f"parameter({index})" in one.text), None)
    if parameter is None or not whole:
        return whole
    names, sliced, grew = {parameter.name}, 0, True
    while grew:  # through bitcasts
        more = {one.name for one in body if one.opcode == "bitcast" and set(one.operands) & names} - names
        grew = bool(more)
        names |= more
    for one in body:
        if one.opcode == "bitcast" or not set(one.operands) & names:
            continue
        if one.opcode in ("dynamic-slice", "gather", "slice") and one.operands[0] in names:
            sliced += _size(one)
        elif not (one.opcode in _UPDATES and one.operands[0] in names):
            return whole
    return min(sliced, whole)


def _written_by_fusion(body: list[Instruction], written: int) -> int:
    """Bytes that a fusion writes: of an update in place, the update."""
    table = {one.name: one for one in body}
    root = next(one for one in body if one.is_root)
    outputs = [table.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    for one in outputs:
        while one is not None and one.opcode == "bitcast":
            one = table.get(one.operands[0])
        if one is not None and one.opcode in _UPDATES:
            written -= _size(one) - _size(table.get(one.operands[_UPDATES[one.opcode]]))
    return max(written, 0)


def _size(instruction: Instruction | None) -> int:
    return sum(size for size, _ in instruction.shapes) if instruction else 0


def _hbm_size(instruction: Instruction | None) -> int:
    return sum(size for size, in_hbm in instruction.shapes if in_hbm) if instruction else 0


def _trip_count(computations: dict, loop: Instruction) -> int:
    """The largest integer constant of the condition, which counts up to it from 0; 1 if there is none."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    parts, constants = list(loop.called["condition"]), [1]
    while parts:
        for one in computations[parts.pop()][1]:
            parts += [name for names in one.called.values() for name in names]
            if one.opcode == "constant" and (value := re.search(r"constant\((\d+)\)", one.text)):
                constants.append(int(value[1]))
    return max(constants)


def _group_size(text: str) -> int:
    """Devices in one replica group; 0 where the text does not say."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", found[2]) if name in sizes)
    return 0


def _parse(text: str) -> dict[str, tuple[bool, list[Instruction]]]:
    """Name → (is the entry, instructions) of every computation."""
    computations: dict[str, tuple[bool, list[Instruction]]] = {}
    body: list[Instruction] | None = None
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            is_entry = line.startswith("ENTRY")
            name = line.removeprefix("ENTRY").split()[0].lstrip("%")
            body = []
            computations[name] = (is_entry, body)
        elif line == "}" or line.startswith("}, "):  # "}}, metadata=..." ends an instruction of several lines
            body = None
        elif body is not None and (found := _LINE.match(line)):
            body.append(_instruction(bool(found[1]), found[2], found[3]))
    return computations


def _instruction(is_root: bool, name: str, rest: str) -> Instruction:
    shape, rest = _split_shape(rest)
    opcode, _, after = rest.partition("(")
    arguments, attributes = _split_arguments(after)
    called = {
        found[1]: [part.strip().lstrip("%") for part in (found[2] or found[3]).split(",")]
        for found in _CALLED.finditer(attributes)
    }
    operands = re.findall(r"%([\w.\-]+)", arguments)
    return Instruction(name, opcode.strip(), _arrays(shape), operands, called, rest, is_root)


def _split_shape(rest: str) -> tuple[str, str]:
    """The result's type, which may be a tuple, and the rest of the line."""
    if not rest.startswith("("):
        shape, _, rest = rest.partition(" ")
        return shape, rest
    depth = 0
    for index, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[: index + 1], rest[index + 1 :].strip()
    raise ValueError(f"HLO text: expected a closing parenthesis, found {rest[:80]!r}")


def _split_arguments(after: str) -> tuple[str, str]:
    depth = 1
    for index, letter in enumerate(after):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return after[:index], after[index + 1 :]
    return after, ""


def _arrays(shape: str) -> list[tuple[int, bool]]:
    arrays = []
    for dtype, dimensions, layout in _SHAPE.findall(shape):
        bits = _BITS.get(dtype) or int(re.match(r"[suf](\d+)", dtype)[1])
        count = math.prod(int(size.lstrip("<=")) for size in dimensions.split(",") if size)
        arrays.append((-(-bits * count // 8), "S(1)" not in layout))
    return arrays

"""Floating-point operations of a traced program, from its jaxpr."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr) -> float:
    """Multiplications and additions of a program's matrix products on all devices, recomputation included.

    Splash attention counts the blocks that its causal mask lets through. A scan counts as often as it runs; a `while`
    loop as often as the constant that it counts up to (a decoding loop: the longest chunk), a `cond` as its dearest
    branch.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = 2.0
            for axis in contracted:
                inner *= shape[axis]
            total += inner * equation.outvars[0].aval.size
        elif name.startswith("ragged_dot"):
            rows, weights = (equation.invars[i].aval.shape for i in (0, 1))
            total += 2.0 * rows[0] * rows[1] * (weights[-1] if len(weights) == 3 else weights[1])
        elif name == "pallas_call":
            kernel = count_flops(params["jaxpr"]) * math.prod(params["grid_mapping"].grid)
            total += kernel * _share_computed(equation)
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = 1
            if name == "scan":
                times = params["length"]
            elif name == "while":
                times = _most_turns(params["cond_jaxpr"].jaxpr)
            elif name == "shard_map":
                times = params["mesh"].size
            total += times * sum(count_flops(inner) for inner in _inner(params))
    return total


def _most_turns(condition: core.Jaxpr) -> int:
    """The largest integer that a loop's condition compares with; 1 if there is none."""
    found = [1]
    for equation in condition.eqns:
        if equation.primitive.name == "lt":
            bounds = (one for one in equation.invars if isinstance(one, core.Literal))
            found += [int(one.val) for one in bounds if jnp.issubdtype(one.aval.dtype, jnp.integer)]
        found += [_most_turns(inner) for inner in _inner(equation.params)]
    return max(found)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def _share_computed(equation: core.JaxprEqn) -> float:
    """Of the grid of a splash attention kernel, the share of blocks that the causal order does not hide; else 1."""
    if not equation.params["name"].startswith("splash_mha"):
        return 1.0
    block_mask, _, q, k = (variable.aval.shape for variable in equation.invars[:4])
    rows, columns = block_mask[-2:]
    queries, keys = q[-2], k[-2]
    of_q, of_k = queries // rows, keys // columns
    ends = (keys - queries + (row + 1) * of_q for row in range(rows))
    return sum(math.ceil(end / of_k) for end in ends) / (rows * columns)

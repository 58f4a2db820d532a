"""How long the three MoE dispatches take: `python benchmarks/moe_dispatch.py`, 2 minutes on one core.

Prints, for each shape, milliseconds of processor time of a forward pass and of forward and backward together (the
least of several interleaved runs), relative to the fastest. Run it where the choice in `rome.models.moe` is in doubt.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rome.models.moe import DISPATCHES, Dispatch, Experts, Routing

# tokens, hidden, expert width, experts, experts a token
SHAPES = {
    "tiny twin, train": (2048, 128, 192, 8, 2),
    "tiny twin, decode": (32, 128, 192, 8, 2),
    "E64 K8, train": (512, 256, 96, 64, 8),
    "E64 K8, decode": (8, 256, 96, 64, 8),
    "E128 K8, train": (512, 256, 96, 128, 8),
}
ROUNDS = 5


def problem(tokens: int, width: int, inner: int, experts: int, top: int) -> tuple[jax.Array, Routing, Experts]:
    """Random activations, weights and routing; a few experts are favoured, as in a real router."""
    keys = jax.random.split(jax.random.key(0), 5)
    gate, up = (jax.random.normal(key, (experts, width, inner)) * width**-0.5 for key in keys[:2])
    down = jax.random.normal(keys[2], (experts, inner, width)) * inner**-0.5
    scores = jax.random.normal(keys[3], (tokens, experts)) + jnp.linspace(0, 1, experts)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores), top)
    return jax.random.normal(keys[4], (tokens, width)), Routing(chosen, weights), Experts(gate, up, down)


def passes(dispatch: Dispatch) -> tuple[Callable, Callable]:
    """The jitted forward pass, and forward with backward into everything that has a gradient."""

    def loss(x: jax.Array, weights: jax.Array, experts: Experts, chosen: jax.Array) -> jax.Array:
        return (dispatch(x, Routing(chosen, weights), experts) ** 2).sum()

    return jax.jit(dispatch), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def measure(shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Milliseconds of the two passes by dispatch."""
    x, routing, experts = problem(*shape)
    arguments = (x, routing, experts), (x, routing.weights, experts, routing.experts)
    functions = {name: passes(dispatch) for name, dispatch in DISPATCHES.items()}
    best = {name: [float("inf")] * 2 for name in functions}
    for round_ in range(ROUNDS + 1):
        for name, pair in functions.items():
            for kind, function in enumerate(pair):
                start = time.process_time()
                jax.block_until_ready(function(*arguments[kind]))
                if round_:  # the first compiles
                    best[name][kind] = min(best[name][kind], 1e3 * (time.process_time() - start))
    return best


def main() -> None:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: forward ms (ratio), forward and backward ms (ratio)")
    for title, shape in SHAPES.items():
        best = measure(shape)
        fastest = [min(times[kind] for times in best.values()) for kind in range(2)]
        cells = [
            f"{name} " + ", ".join(f"{t:.1f} ({t / f:.1f}x)" for t, f in zip(times, fastest, strict=True))
            for name, times in best.items()
        ]
        print(f"{title:18} {shape}: " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()

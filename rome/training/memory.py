"""How the process treats memory that XLA frees: kept between steps, given back after compiling."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import jax
import jax.numpy as jnp

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks instead of handing them back to the kernel; elsewhere does nothing.

    On CPU, XLA allocates and frees a step's temporaries (hundreds of MB) every step. By default glibc maps them anew
    each time, and the page faults cost up to a quarter of a small model's step.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        library.mallopt(_M_ARENA_MAX, 1)


def dispatch_synchronously() -> None:
    """Has JAX's CPU backend run a program before it returns; for one device, and before the backend is first used.

    Otherwise a step's result is ready a moment before its temporaries are freed, and on a busy machine the next step
    may begin in between, which doubles them for the rest of the run. (Several devices wait for each other in programs
    that several threads start: those are left to JAX's own order.)
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def give_back_freed_memory() -> None:
    """Has glibc hand freed blocks back to the kernel, once; elsewhere does nothing. See `keep_freed_memory`."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


class AheadOfTime:
    """A jitted function that is compiled before its first call, and gives back what the compiler used.

    The compiler's memory would otherwise stay with the process, in pieces too small for a step's temporaries: on CPU
    a third of a small run's peak. Called with arguments of other shapes, it compiles once more.
    """

    def __init__(self, function: Any) -> None:
        self._jitted = function
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(*args)

    def compile(self, *args: Any) -> Any:
        """The program for such arguments; nothing is run."""
        leaves, structure = jax.tree.flatten(args)
        key = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(*args).compile()
            give_back_freed_memory()
        return self._compiled[key]

    def trace(self, *args: Any) -> Any:
        """As a jitted function's."""
        return self._jitted.trace(*args)

"""What the process asks of the machine before XLA starts."""

from __future__ import annotations

import ctypes
import sys

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

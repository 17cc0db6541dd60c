"""What the C library does with memory that tensors gave back, while training on a CPU."""

from __future__ import annotations

import ctypes

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> bool:
    """Keep it for the next tensors instead of handing it back; whether this C library can be told so.

    By default every large tensor is mapped anew and given back, and the system clears each of its pages again
    in every step. What a process needs at most it then holds until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))

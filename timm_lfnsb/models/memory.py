"""Memory of training on a CPU: glibc gives freed memory back to the system, and asks for it again in every step.

A training step of 32 faces takes and frees some 2 GB. glibc maps blocks of more than 32 MB anew each time and trims the
end of its heap, and the system fills each page with zeros when it is touched again. How much that is depends on what
else lies in the heap: 10,000 to 150,000 page faults a step of lfnsb. Without them a bare loop of steps took 10 to 30 %
less time, timm's train script no measurable difference; what is certain is that steps vary less.

A thread of its own computes the gradients. glibc gives it a heap in maps that it unmaps when they are empty, whatever
is set: another 19,000 faults a step in some processes. So all threads share one heap.
"""
from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocations.

    Where a MALLOC_... variable or GLIBC_TUNABLES says how memory is to be handled, that stands.

    Returns:
        Whether it does: False without glibc, or where the environment decides.
    """
    if platform.libc_ver()[0] != 'glibc' or any(
            name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_') for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_ARENA_MAX, 1) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0))

"""Let the process keep the memory that a step on a CPU frees, so that the next step can reuse it.

By default, glibc returns every large block to the system when it is freed and requests it again in the next
step; the kernel then has to zero each page on first use.
"""

import ctypes

# Options from malloc.h: number of blocks to mmap, free bytes to keep, and extra bytes to request.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
_NEVER = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Keep freed memory for the rest of the process. Does nothing if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 64 << 20)):
            mallopt(option, value)

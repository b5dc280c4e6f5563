"""What a step on a CPU frees stays with the process, for the next step to use.

By itself glibc gives every large block back to the system as it is freed, and asks for it anew in the next
step, whose first touch of each page then has the system zero it.
"""

import ctypes

# Of malloc.h: blocks of their own, room at the end that is given back, room that is asked for besides.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
_NEVER = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """For the rest of the process. Where the C library is not glibc, nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 64 << 20)):
            mallopt(option, value)

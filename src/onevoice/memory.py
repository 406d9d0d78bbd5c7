"""Keeping freed memory in the process, which is worth more on a CPU than most arithmetic.

A batch of audio or a layer of activations takes megabytes. By default glibc asks the system for each such block and
gives it back when freed, and the system clears every page of it again at its next use: rendering mixtures becomes
three times as slow, and training steps vary by a factor of six. Nothing here happens on import.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next allocation; return False where it is not glibc.

    For the rest of the life of the process: large blocks come from the heap too, and the heap is never trimmed.
    Memory in use then stays at its peak, which training reaches in its first steps anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))

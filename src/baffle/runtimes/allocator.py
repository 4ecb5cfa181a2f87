"""Keep freed memory for the next pass, instead of giving it back to the system and faulting it in again.

The C library returns large blocks as soon as they are free, and the system hands out new pages zeroed: for
activations of some megabytes that costs more than computing them. glibc only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
_LARGEST = 2**30


@cache
def keep_freed_memory() -> bool:
    """Tell this process's C library to, once; whether it could be told.

    Examples:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    done = [mallopt(option, _LARGEST) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD)]
    return done == [1, 1]

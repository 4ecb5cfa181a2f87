"""What the C library does with freed memory: keep it for the next pass, or return it to the system at once.

Every layer allocates and frees activations of some megabytes. If their pages are returned to the system, they must be
faulted in and zeroed again, which can cost more than computing them. If they are kept, a process holds up to twice
its peak need. So evaluation for speed keeps freed memory, and evaluation within a memory budget returns it. The
setting applies to the whole process; the last call wins. It works with glibc only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of mallopt(3), from malloc.h
_NEVER, _LARGE = 2**30, 2**18
_MOST = 2**25  # the largest mmap threshold that glibc accepted before 2.35


def keep_freed_memory() -> bool:
    """Keep freed memory for reuse.

    Returns:
        Whether the C library accepted the setting.

    Examples:
        >>> keep_freed_memory() in (True, False)
        True
    """
    accepted = _mallopt(_MMAP_THRESHOLD, _NEVER) or _mallopt(_MMAP_THRESHOLD, _MOST)
    return accepted and _mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> bool:
    """Return blocks of 256 KiB and more to the system as soon as they are freed.

    Returns:
        Whether the C library accepted the setting.

    Examples:
        >>> give_back_freed_memory() in (True, False)
        True
    """
    return _mallopt(_MMAP_THRESHOLD, _LARGE) and _mallopt(_TRIM_THRESHOLD, _LARGE)


def _mallopt(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value) == 1)
    except (AttributeError, OSError):  # another C library
        return False

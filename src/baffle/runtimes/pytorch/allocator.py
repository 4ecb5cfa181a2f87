"""What the C library does with freed memory: keep it for the next pass, or give it back at once.

Activations of some megabytes are allocated and freed by every layer. Given back to the system, their pages are
faulted in again and zeroed, which can cost more than computing them; kept, a process holds up to twice of what it
ever needed at one time. So evaluating for speed keeps, and evaluating within little memory gives back. It concerns
the whole process; the last who said so decides. glibc only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
_NEVER, _LARGE = 2**30, 2**18
_MOST = 2**25  # of the threshold of mmap, before glibc 2.35


def keep_freed_memory() -> bool:
    """Reuse freed memory; whether the C library could be told.

    Examples:
        >>> keep_freed_memory() in (True, False)
        True
    """
    told = _mallopt(_MMAP_THRESHOLD, _NEVER) or _mallopt(_MMAP_THRESHOLD, _MOST)
    return told and _mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> bool:
    """Return blocks of 256 KiB and more as soon as they are free; whether the C library could be told.

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

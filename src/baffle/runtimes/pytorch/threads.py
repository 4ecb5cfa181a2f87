"""PyTorch's kernels on one thread each, while any lane works.

PyTorch keeps its number of threads partly by thread and partly for the whole process, so it is set by whoever works
and given back by the last to leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_lock = Lock()
_working, _before = 0, 1


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """One thread for kernels called in here; may be entered from several threads, and again.

    Examples:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    global _working, _before
    if not wanted:
        yield
        return
    with _lock:
        if _working == 0:
            _before = torch.get_num_threads()
        _working += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _working -= 1
            if _working == 0:
                torch.set_num_threads(_before)

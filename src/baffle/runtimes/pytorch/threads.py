"""Confines PyTorch's kernels to one thread each while any lane works.

PyTorch keeps its number of threads partly per thread and partly for the whole process. So every lane sets it when it
starts, and the last one to finish restores the number from before.
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
    """A context in which PyTorch's kernels use one thread; several threads may enter it, and it may be nested.

    Args:
        wanted: False for a context that does nothing (on a GPU).

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

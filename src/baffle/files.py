"""Writing files so that a crash, a kill or a full disk leaves the old content or the new, never a mixture."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

TEMPORARY = ".baffle-tmp-"
"""Prefix of the names of unfinished files, which a crash may leave behind."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content atomically: write under a temporary name, flush to disk, rename.

    Raises:
        OSError: it could not be written; the old file, if any, is unchanged.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.rename(path)
        sync_folder(path.parent)  # the rename itself is only durable once the folder is flushed
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(descriptor: int, data: bytes) -> None:
    """Append to an open file and flush it to disk."""
    view = memoryview(data)
    while view:  # os.write may write only a part
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (new and changed names) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """The path itself or, if it exists, the first free one with a number appended: ``run.1``, ``run.2``, ..."""
    numbered = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())

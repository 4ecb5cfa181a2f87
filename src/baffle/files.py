"""Writing to disk so that a kill or a full disk leaves the old content or the new, never half of it."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

TEMPORARY = ".baffle-tmp-"
"""How the names of unfinished files begin."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole: temporary name, flush to the disk, rename. OSError leaves what was there."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(descriptor: int, data: bytes) -> None:
    """Append to an open file and flush it to the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (new names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """The path, with a number behind it if it is taken."""
    numbered = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())

"""Files: the old content or the new, never a mixture; and names that are free."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from baffle.files import append, free_name, write_atomic


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"new and longer", b""):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename"])
def test_what_fails_leaves_the_old_content_and_no_other_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_are_appended_whole_though_the_system_writes_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        append(descriptor, b"some ")
        append(descriptor, b"longer data")
    finally:
        os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"some longer data"


def test_a_free_name_is_the_path_or_numbered(tmp_path: Path) -> None:
    assert free_name(tmp_path / "run") == tmp_path / "run"
    for name in ("run", "run.1"):
        (tmp_path / name).touch()
    assert free_name(tmp_path / "run") == tmp_path / "run.2"

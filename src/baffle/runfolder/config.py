"""The settings of a run, ``config.json``, and how a run folder is created."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from baffle.core.method import Method
from baffle.core.types import Table, UInt64, Weights
from baffle.errors import BaffleError, CorruptRunError, JournalError, RunExistsError
from baffle.files import sync_folder, write_atomic
from baffle.runfolder.snapshots import encode_weights

_FORMAT = 4
_READABLE = (3, 4)


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a run: everything it is made from, except data and model code.

    Attributes:
        format: Version of the run folder.
        method: What happens in a round.
        key: Run key of the directions: the seed.
        rounds: Number of updates.
        evaluate_every: Rounds from one evaluation to the next.
        snapshot_every: Rounds from one saved state to the next.
        table: The trainable tensors.
        plan: How forward passes are evaluated, as the engine describes it (``EvaluationPlan`` reads it).
        clients: Number of examples of each client.
        backprop: Which backpropagation baseline the run is, if it is one; it has no rows.
        command: Options of the command line, from which it rebuilds data and model.
    """

    format: int = _FORMAT
    method: Method
    key: UInt64
    rounds: int
    evaluate_every: int
    snapshot_every: int
    table: Table
    plan: dict[str, str | int]
    clients: tuple[int, ...]
    backprop: Literal["fedsgd", "fedavg"] | None = None
    command: dict[str, str | int | float | bool | None] | None = None


def create_folder(path: Path, config: RunConfig, initial: Weights, logs: Sequence[str]) -> None:
    """Create a run folder with empty ``logs``, under a temporary name first so that it is never incomplete.

    Raises RunExistsError if ``path`` exists, JournalError if it cannot be written.
    """
    if os.path.lexists(path):
        raise RunExistsError(f"{path} exists: choose another folder, or continue it with: baffle resume {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder, "run")
            (temporary / "snapshots").mkdir(parents=True)
            write_atomic(temporary / "config.json", encode_config(config))
            write_atomic(temporary / "initial.safetensors", encode_weights(config.table, initial))
            for name in logs:
                write_atomic(temporary / name, b"")
            temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise JournalError(f"{path}: cannot create the run folder: {error.strerror}") from error


def write_file(file: Path, data: bytes) -> None:
    """Write a file of a run folder atomically. Raises JournalError."""
    try:
        write_atomic(file, data)
    except OSError as error:
        raise JournalError(f"{file}: cannot write: {error.strerror}") from error


def encode_config(config: RunConfig) -> bytes:
    """The bytes of ``config.json``."""
    return msgspec.json.format(msgspec.json.encode(config)) + b"\n"


def read_config(path: Path) -> RunConfig:
    """Read the settings of a run folder. Raises JournalError if it is not one, CorruptRunError if malformed."""
    file = path / "config.json"
    try:
        config = msgspec.json.decode(file.read_bytes(), type=RunConfig)
    except FileNotFoundError as error:
        raise JournalError(f"{path}: no config.json: expected the folder of a run") from error
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, BaffleError) as error:
        raise CorruptRunError(f"{file}: {error}") from error
    if config.format not in _READABLE:
        raise CorruptRunError(f"{file}: format = {config.format}: expected {' or '.join(map(str, _READABLE))}")
    return config

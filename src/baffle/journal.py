"""The run folder: configuration, initial state, an append-only log of rows, metrics, snapshots.

    run/
      config.json            method, seed, rounds, tensor table, evaluation plan
      initial.safetensors    the weights that training started from
      rows.bin               length and its complement (4 bytes each), row, chain checksum (32 bytes); repeated
      metrics.jsonl          a line a round
      snapshots/*.safetensors  weights, optimizer slots, average; the newest two
      model.safetensors      the averaged weights, once training is done

The journal *is* the run: initial state and rows give every round's weights (``method.replay``). The chain is
sha256(previous checksum + row), starting from a hash of the configuration and the initial weights. Rows are
flushed to the disk before a round counts; a kill loses at most the round in flight.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import load_file, save

from baffle.errors import BaffleError, CorruptRunError, JournalError, RunExistsError
from baffle.estimate import FAST, Execution
from baffle.method import Method, State, replay, state_sha256, weights_sha256
from baffle.types import Row, Table, UInt64, Weights, table_size
from baffle.wire import decode_row

_HEADER = struct.Struct("<II")  # length, and its complement: an edited length is not a short write
_CHAIN = 32
_FORMAT = 1
_KEEP_SNAPSHOTS = 2


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a run is made from, but for data and model code (which ``command`` names for the CLI)."""

    format: int = _FORMAT
    method: Method
    key: UInt64
    """Run key of the directions (the seed)."""
    rounds: int
    evaluate_every: int
    snapshot_every: int
    table: Table
    plan: dict[str, str | int]
    clients: tuple[int, ...]
    """Examples of each client."""
    command: dict[str, str | int | float | bool | None] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ``metrics.jsonl``: what one round did and cost. Loss and accuracy are of the averaged weights."""

    round: int
    applied: bool
    loss: float | None
    accuracy: float | None
    lr: float
    sigma: float
    exponent: int
    clip_factor: float
    scalar_rms: float
    """Root mean square of the aggregated scalars: directional derivatives of the clients' mean loss."""
    estimate_norm: float
    """scalar_rms x sqrt(n / number of directions): norm of the estimate, noise included."""
    participants: int
    clipped: int
    nonfinite: int
    forward_passes: int
    samples_forwarded: int
    bytes_up: int
    bytes_down: int
    seconds: float
    weights_sha256: str


class Journal:
    """A run folder. ``Journal.create`` starts one, ``Journal.open`` continues or reads one."""

    def __init__(self, path: Path, config: RunConfig, initial: Weights) -> None:
        self.path, self.config, self.initial = path, config, initial
        self.rows: list[bytes] = []
        self.records: list[Record] = []
        self.damage: str | None = None
        self._chain = _genesis(config, initial)
        self._files: tuple[int, int] | None = None

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, initial: Weights) -> Journal:
        """Make the folder whole under a temporary name, then give it its own.

        Raises RunExistsError if ``path`` exists, JournalError if it cannot be written.
        """
        path = Path(path)
        if os.path.lexists(path):
            raise RunExistsError(f"{path} exists: choose another folder, or continue it with: baffle resume {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                temporary = Path(folder, "run")
                (temporary / "snapshots").mkdir(parents=True)
                write_atomic(temporary / "config.json", _encode_config(config))
                write_atomic(temporary / "initial.safetensors", save(named_tensors(config.table, initial)))
                for name in ("rows.bin", "metrics.jsonl"):
                    write_atomic(temporary / name, b"")
                temporary.rename(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise JournalError(f"{path}: cannot create the run folder: {error.strerror}") from error
        journal = cls(path, config, initial)
        journal._lock()
        return journal

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False, repair: bool = False) -> Journal:
        """Read a run folder and check it.

        ``damage`` says what is wrong, if anything; ``rows`` and ``records`` hold the valid prefix. With
        ``write`` the folder is locked and a round that a kill cut short is dropped, and other damage raises
        CorruptRunError, unless ``repair``: then the damaged files are kept aside as ``*.damaged``.
        """
        path = Path(path)
        config, initial = _read_config(path), None
        try:
            initial = _flatten(config.table, load_file(path / "initial.safetensors"))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CorruptRunError(f"{path / 'initial.safetensors'}: cannot be read: {error}") from error
        journal = cls(path, config, initial)
        if not write:
            journal._read()
            return journal
        journal._lock()
        try:
            torn = journal._read()
            if journal.damage and not journal.rows:
                raise CorruptRunError(f"{journal.damage}; there is no round before it")
            if journal.damage and not repair:
                raise CorruptRunError(
                    f"{journal.damage}; rounds before it are intact ({len(journal.rows)} rows): "
                    f"continue from there with: baffle resume {path} --repair"
                )
            if torn or journal.damage:
                journal._cut(keep_aside=journal.damage is not None)
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Release the files and the lock."""
        if self._files is not None:
            for descriptor in self._files:
                os.close(descriptor)
            self._files = None

    def commit(self, row: bytes, record: Record) -> None:
        """Append a round: the metrics line first, then the row that makes it count. Whole, or not at all.

        Raises JournalError if the disk is full; the folder then holds the rounds before.
        """
        if self._files is None:
            raise JournalError(f"{self.path}: opened for reading only")
        rows, metrics = self._files
        chain = hashlib.sha256(self._chain + row).digest()
        sizes = os.fstat(rows).st_size, os.fstat(metrics).st_size
        try:
            _append(metrics, msgspec.json.encode(record) + b"\n")
            _append(rows, _HEADER.pack(len(row), len(row) ^ 0xFFFFFFFF) + row + chain)
        except OSError as error:
            os.ftruncate(rows, sizes[0])
            os.ftruncate(metrics, sizes[1])
            raise JournalError(
                f"{self.path}: cannot write round {record.round}: {error.strerror}; the run is intact up to the "
                f"round before: make room, then: baffle resume {self.path}"
            ) from error
        self._chain = chain
        self.rows.append(row)
        self.records.append(record)

    def snapshot(self, state: State) -> None:
        """Save a state, so that a resume need not replay from the start; the newest two are kept."""
        tensors = {"weights": state.weights, "average": state.average}
        tensors |= {f"slots.{name}": values for name, values in state.slots.items()}
        metadata = {
            "round": str(state.round),
            "step": str(state.step),
            "average_sha256": weights_sha256(state.average).hex(),
        }
        self._write(f"snapshots/{state.round:08d}.safetensors", save(tensors, metadata))
        files = sorted((self.path / "snapshots").glob("*.safetensors"))
        ahead = [file for file in files if file.stem > f"{state.round:08d}"]
        for old in [*files[: len(files) - len(ahead)][:-_KEEP_SNAPSHOTS], *ahead]:
            old.unlink(missing_ok=True)

    def extend(self, rounds: int) -> None:
        """Set a new total of rounds."""
        self.config = msgspec.structs.replace(self.config, rounds=rounds)
        self._write("config.json", _encode_config(self.config))

    def finish(self, state: State) -> None:
        """Write ``model.safetensors``: the averaged weights under the model's own names."""
        self._write("model.safetensors", save(named_tensors(self.config.table, state.average)))

    def state(self, execution: Execution = FAST) -> State:
        """The state after the last row: the newest good snapshot, then the rows behind it."""
        for file in sorted((self.path / "snapshots").glob("*.safetensors"), reverse=True):
            state = self._load_snapshot(file)
            if state is not None:
                break
        else:
            state = self.config.method.init(self.initial)
        for index in range(state.round, len(self.rows)):
            state = self._replay_row(state, index, execution)
        return state

    def states(self, execution: Execution = FAST) -> Iterator[State]:
        """Every round's state, rebuilt from the initial weights and the rows alone, each checked by its hash."""
        state = self.config.method.init(self.initial)
        for index in range(len(self.rows)):
            state = self._replay_row(state, index, execution)
            yield state

    def last_row(self) -> Row | None:
        """The newest row."""
        return decode_row(self.rows[-1]) if self.rows else None

    def _replay_row(self, state: State, index: int, execution: Execution) -> State:
        row = decode_row(self.rows[index])
        after = replay(state, self.config.table, row, execution)
        if state_sha256(after) != row.state_sha256 or weights_sha256(after.weights) != row.weights_sha256:
            raise CorruptRunError(f"{self.path}: round {index}: replay gives other weights than the row's hash says")
        return after

    def _read(self) -> bool:
        """Fill rows and records with the valid prefix; True if a kill left an unfinished tail to drop."""
        try:
            data = (self.path / "rows.bin").read_bytes()
            lines = (self.path / "metrics.jsonl").read_bytes().split(b"\n")
        except OSError as error:
            raise CorruptRunError(f"{error.filename}: cannot be read: {error.strerror}") from error
        position, chain = 0, self._chain
        while position < len(data):
            index = len(self.rows)
            end = position + _HEADER.size
            if end > len(data):
                break  # unfinished
            length, complement = _HEADER.unpack(data[position:end])
            whole = length ^ complement == 0xFFFFFFFF
            if whole and end + length + _CHAIN > len(data):
                break  # unfinished
            row = data[end : end + length]
            expected = hashlib.sha256(chain + row).digest()
            if not whole or data[end + length : end + length + _CHAIN] != expected:
                what = "config.json or initial.safetensors, or the row," if index == 0 else "the row"
                self.damage = f"{self.path / 'rows.bin'}: round {index} fails its checksum: {what} was edited"
                break
            try:
                record = msgspec.json.decode(lines[index] if index < len(lines) else b"", type=Record)
            except msgspec.DecodeError as error:
                self.damage = f"{self.path / 'metrics.jsonl'}: line {index + 1}: {error}"
                break
            if record.round != index or record.weights_sha256 != decode_row(row).weights_sha256.hex():
                self.damage = f"{self.path / 'metrics.jsonl'}: line {index + 1} is not of round {index}: it was edited"
                break
            self.rows.append(row)
            self.records.append(record)
            position, chain = end + length + _CHAIN, expected
        self._chain = chain
        return position < len(data) or len([line for line in lines if line]) > len(self.rows)

    def _cut(self, keep_aside: bool) -> None:
        """Bring both files back to the valid prefix."""
        try:
            self._cut_files(keep_aside)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot drop an unfinished round: {error.strerror}") from error

    def _cut_files(self, keep_aside: bool) -> None:
        size = sum(_HEADER.size + len(row) + _CHAIN for row in self.rows)
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in self.records)
        if keep_aside:
            for name in ("rows.bin", "metrics.jsonl"):
                shutil.copyfile(self.path / name, _free(self.path / f"{name}.damaged"))
        assert self._files is not None
        os.ftruncate(self._files[0], size)
        os.fsync(self._files[0])
        write_atomic(self.path / "metrics.jsonl", lines)
        os.close(self._files[1])
        self._files = self._files[0], os.open(self.path / "metrics.jsonl", os.O_RDWR | os.O_APPEND)

    def _load_snapshot(self, file: Path) -> State | None:
        """The snapshot's state if it is one of this run's; None if it is damaged or ahead of the rows."""
        try:
            data = file.read_bytes()
            tensors = load_tensors(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            weights, average = tensors["weights"], tensors["average"]
            slots = {k.removeprefix("slots."): v for k, v in tensors.items() if k.startswith("slots.")}
            state = State(int(header["round"]), int(header["step"]), weights, slots, average)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if slots.keys() != self.config.method.optimizer.init(0).keys():
            return None
        if not 0 < state.round <= len(self.rows) or header.get("average_sha256") != weights_sha256(average).hex():
            return None
        return state if state_sha256(state) == decode_row(self.rows[state.round - 1]).state_sha256 else None

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self.path / name, data)
        except OSError as error:
            raise JournalError(f"{self.path / name}: cannot write: {error.strerror}") from error

    def _lock(self) -> None:
        try:
            flags = os.O_RDWR | os.O_APPEND
            self._files = os.open(self.path / "rows.bin", flags), os.open(self.path / "metrics.jsonl", flags)
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise JournalError(f"{self.path}: another process is writing this run") from error
        except OSError as error:
            raise JournalError(f"{error.filename}: cannot open for writing: {error.strerror}") from error


def named_tensors(table: Table, weights: Weights) -> dict[str, Weights]:
    """The flat weights as the model's tensors, by name."""
    return {spec.name: weights[spec.slice].reshape(spec.shape) for spec in table}


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole: temporary name, flush to the disk, rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flatten(table: Table, tensors: dict[str, np.ndarray]) -> Weights:
    flat = np.empty(table_size(table), np.float32)
    for spec in table:
        if tensors[spec.name].shape != spec.shape:
            raise ValueError(f"{spec.name} has shape {tensors[spec.name].shape}: expected {spec.shape}")
        flat[spec.slice] = tensors[spec.name].reshape(-1)
    return flat


def _encode_config(config: RunConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config)) + b"\n"


def _read_config(path: Path) -> RunConfig:
    file = path / "config.json"
    try:
        config = msgspec.json.decode(file.read_bytes(), type=RunConfig)
        if config.format != _FORMAT:
            raise CorruptRunError(f"{file}: format = {config.format}: expected {_FORMAT}")
        return config
    except CorruptRunError:
        raise
    except FileNotFoundError as error:
        raise JournalError(f"{path}: no config.json: expected the folder of a run") from error
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, BaffleError) as error:
        raise CorruptRunError(f"{file}: {error}") from error


def _genesis(config: RunConfig, initial: Weights) -> bytes:
    fixed = msgspec.msgpack.encode((config.format, config.method, config.key, config.table))
    return hashlib.sha256(b"baffle journal\n" + fixed + weights_sha256(initial)).digest()


def _free(path: Path) -> Path:
    """The path, with a number behind it if it is taken."""
    numbered = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _append(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The run folder: configuration, initial state, an append-only log of rows, metrics, snapshots.

    run/
      config.json            method, seed, rounds, tensor table, evaluation plan
      initial.safetensors    the weights that training started from
      rows.bin               length and its complement (4 bytes each), row, chain checksum (32 bytes); repeated
      metrics.jsonl          a line a round
      snapshots/*.safetensors  weights, optimizer slots, average; the newest two
      model.safetensors      the averaged weights, once training is done
      summary.json           totals, once training is done, as ``baffle train --json`` prints them

The journal *is* the run: initial state and rows give every round's weights (``method.replay``). The checksum chain
(``rowlog``) starts from a hash of the configuration and the initial weights. Rows are flushed to the disk before a
round counts; a kill loses at most the round in flight.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Literal

import msgspec

from baffle import rowlog
from baffle.core.aggregate import scalar_rms
from baffle.core.method import Method, State, replay, state_sha256, weights_sha256
from baffle.core.rebuild import FAST, Execution
from baffle.core.types import Row, Table, UInt64, Weights
from baffle.errors import BaffleError, CorruptRunError, JournalError, RunExistsError
from baffle.files import TEMPORARY, append, free_name, sync_folder, write_atomic
from baffle.snapshots import decode_weights, encode_state, encode_weights, load_state
from baffle.wire import decode_row

_FORMAT = 3
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
    backprop: Literal["fedsgd", "fedavg"] | None = None
    """A baseline with true gradients, which has no rows."""
    command: dict[str, str | int | float | bool | None] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ``metrics.jsonl``: what one round did and cost. Loss and accuracy are of the averaged weights,
    on validation data if there are any.

    What a round cost is unknown (None) where the line was lost and rebuilt from the row.
    """

    round: int
    applied: bool
    restores: int | None
    """The run had diverged (``loss`` is what was seen) and took the state after that round again."""
    loss: float | None
    accuracy: float | None
    lr: float
    sigma: float
    exponent: int
    clip_factor: float
    scalar_rms: float
    """Root mean square of the aggregated scalars: directional derivatives of the clients' mean loss."""
    participants: int
    clipped: int
    nonfinite: int
    forward_passes: int | None
    samples_forwarded: int | None
    bytes_up: int | None
    bytes_down: int | None
    seconds: float | None
    weights_sha256: str


class Journal:
    """A run folder. ``Journal.create`` starts one, ``Journal.open`` continues or reads one."""

    def __init__(self, path: Path, config: RunConfig, initial: Weights) -> None:
        self.path, self.config, self.initial = path, config, initial
        self.rows: list[bytes] = []
        self.records: list[Record] = []
        self.damage: str | None = None
        self.lost = 0
        self._chain = _genesis(config, initial)
        self._files: tuple[int, int] | None = None

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, initial: Weights) -> Journal:
        """Make the folder whole under a temporary name, then give it its own.

        Raises RunExistsError if ``path`` exists, JournalError if it cannot be written.
        """
        path = Path(path)
        create_folder(path, config, initial, ("rows.bin", "metrics.jsonl"))
        journal = cls(path, config, initial)
        journal._lock()
        return journal

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False, repair: bool = False) -> Journal:
        """Read a run folder and check it.

        ``damage`` says what is wrong, if anything; ``rows`` holds the valid prefix, ``records`` one each; ``lost`` is
        the number of rows that metrics tell of and a shortened ``rows.bin`` has no more. With
        ``write`` the folder is locked and a round that a kill cut short is dropped, and other damage raises
        CorruptRunError, unless ``repair``: then the damaged files are kept aside as ``*.damaged``, what follows the
        last good row is dropped, and lines of metrics that are not right are rebuilt from the rows.
        """
        path = Path(path)
        config = read_config(path)
        if config.backprop:
            raise JournalError(f"{path}: a baseline of true gradients ({config.backprop}) has no journal")
        try:
            initial = decode_weights(config.table, (path / "initial.safetensors").read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptRunError(f"{path / 'initial.safetensors'}: cannot be read: {error}") from error
        journal = cls(path, config, initial)
        if not write:
            journal._read()
            return journal
        journal._lock()
        try:
            for stale in path.rglob(f"{TEMPORARY}*"):  # of a write that a kill cut short
                stale.unlink(missing_ok=True)
            torn = journal._read()
            if journal.damage and not journal.rows:
                raise CorruptRunError(f"{journal.damage}; there is no round before it")
            if journal.damage and not repair:
                raise CorruptRunError(
                    f"{journal.damage}; {len(journal.rows)} rows are intact: "
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
        framed, chain = rowlog.frame(row, self._chain)
        sizes = os.fstat(rows).st_size, os.fstat(metrics).st_size
        try:
            append(metrics, encode_record(record))
            append(rows, framed)
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
        write_file(self.path / f"snapshots/{state.round:08d}.safetensors", encode_state(state))
        files = sorted((self.path / "snapshots").glob("*.safetensors"))
        ahead = [file for file in files if file.stem > f"{state.round:08d}"]
        for old in [*files[: len(files) - len(ahead)][:-_KEEP_SNAPSHOTS], *ahead]:
            old.unlink(missing_ok=True)

    def extend(self, *, rounds: int | None = None, clients: tuple[int, ...] | None = None) -> None:
        """Set a new total of rounds, or write down that clients have joined."""
        config = self.config
        self.config = msgspec.structs.replace(
            config,
            rounds=config.rounds if rounds is None else rounds,
            clients=config.clients if clients is None else clients,
        )
        write_file(self.path / "config.json", _encode_config(self.config))

    def finish(self, state: State) -> None:
        """Write ``model.safetensors``: the averaged weights under the model's own names."""
        write_file(self.path / "model.safetensors", encode_weights(self.config.table, state.average))

    def state(self, round: int | None = None, execution: Execution = FAST) -> State:
        """The state after a round, by default the last: the newest snapshot that leads there, then the rows behind."""
        rounds = len(self.rows) if round is None else round + 1
        targets = {i: row.restores for i, row in enumerate(map(decode_row, self.rows)) if row.restores is not None}
        for file in sorted((self.path / "snapshots").glob("*.safetensors"), reverse=True):
            state = self._snapshot(file)
            if state is not None and state.round <= rounds:
                behind = [target for index, target in targets.items() if state.round <= index < rounds]
                if min(behind, default=state.round) >= state.round - 1:
                    break
        else:
            state = self.config.method.init(self.initial)
        for after in self._replay(state, rounds, set(targets.values()), execution):
            state = after
        return state

    def states(self, execution: Execution = FAST) -> Iterator[State]:
        """Every round's state, rebuilt from the initial weights and the rows alone, each checked by its hash."""
        targets = {decode_row(row).restores for row in self.rows}
        return self._replay(self.config.method.init(self.initial), len(self.rows), targets, execution)

    def last_row(self) -> Row | None:
        """The newest row."""
        return decode_row(self.rows[-1]) if self.rows else None

    def _replay(self, state: State, rounds: int, targets: Set[int | None], execution: Execution) -> Iterator[State]:
        """The states after ``state`` up to ``rounds``; those that a later row returns to are kept on the way."""
        kept = {state.round - 1: state}

        def earlier(round: int) -> State:
            if round not in kept:
                raise CorruptRunError(f"{self.path}: round {index} returns to round {round}: expected an earlier one")
            return kept[round]

        for index in range(state.round, rounds):
            row = decode_row(self.rows[index])
            state = replay(state, self.config.table, row, execution, earlier)
            if state_sha256(state) != row.state_sha256 or weights_sha256(state.weights) != row.weights_sha256:
                raise CorruptRunError(
                    f"{self.path}: round {index}: replay gives other weights than the row's hash says"
                )
            if index in targets:
                kept[index] = state
            yield state

    def _read(self) -> bool:
        """Fill rows with the valid prefix, and records; True if a kill left an unfinished tail to drop.

        A record whose line is lost is rebuilt from its row.
        """
        try:
            data, lines = (self.path / "rows.bin").read_bytes(), (self.path / "metrics.jsonl").read_bytes().split(b"\n")
        except OSError as error:
            raise CorruptRunError(f"{error.filename}: cannot be read: {error.strerror}") from error
        log = rowlog.scan(data, self._chain)
        self.rows = list(log.rows)
        self._chain = log.chain[-1] if log.chain else self._chain
        if log.edited:
            what = "the row" if self.rows else "config.json or initial.safetensors, or the row,"
            self.damage = f"{self.path / 'rows.bin'}: round {len(self.rows)} fails its checksum: {what} was edited"
        told = _records(lines)
        for index, row in enumerate(map(decode_row, self.rows)):
            record = told.get((index, row.weights_sha256.hex()))
            self.records.append(record[1] if record else record_of(row))
            if record is None or record[0] != index:
                self.damage = (
                    self.damage
                    or f"{self.path / 'metrics.jsonl'}: line {index + 1} is not of round {index}: it was edited"
                )
        surplus = len([line for line in lines if line]) - len(self.rows)
        self.lost = 0 if surplus <= 1 or self.damage else surplus  # a kill leaves one line without its row at most
        return log.unfinished or surplus > 0

    def _cut(self, keep_aside: bool) -> None:
        """Bring both files back to the valid prefix."""
        try:
            self._cut_files(keep_aside)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot drop an unfinished round: {error.strerror}") from error

    def _cut_files(self, keep_aside: bool) -> None:
        lines = b"".join(map(encode_record, self.records))
        if keep_aside:
            for name in ("rows.bin", "metrics.jsonl"):
                shutil.copyfile(self.path / name, free_name(self.path / f"{name}.damaged"))
        assert self._files is not None
        os.ftruncate(self._files[0], rowlog.size(self.rows))
        os.fsync(self._files[0])
        write_atomic(self.path / "metrics.jsonl", lines)
        os.close(self._files[1])
        self._files = self._files[0], os.open(self.path / "metrics.jsonl", os.O_RDWR | os.O_APPEND)

    def _snapshot(self, file: Path) -> State | None:
        """The state of a snapshot if it is one of this run's; None if it is damaged or ahead of the rows."""
        state = load_state(file)
        if state is None or not 0 < state.round <= len(self.rows):
            return None
        if state.slots.keys() != self.config.method.optimizer.init(0).keys():
            return None
        return state if state_sha256(state) == decode_row(self.rows[state.round - 1]).state_sha256 else None

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


def create_folder(path: Path, config: RunConfig, initial: Weights, logs: Sequence[str]) -> None:
    """Make a run folder with empty ``logs``, whole under a temporary name first.

    Raises RunExistsError if ``path`` exists, JournalError if it cannot be written.
    """
    if os.path.lexists(path):
        raise RunExistsError(f"{path} exists: choose another folder, or continue it with: baffle resume {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder, "run")
            (temporary / "snapshots").mkdir(parents=True)
            write_atomic(temporary / "config.json", _encode_config(config))
            write_atomic(temporary / "initial.safetensors", encode_weights(config.table, initial))
            for name in logs:
                write_atomic(temporary / name, b"")
            temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise JournalError(f"{path}: cannot create the run folder: {error.strerror}") from error


def encode_record(record: Record) -> bytes:
    """A line of ``metrics.jsonl``."""
    return msgspec.json.encode(record) + b"\n"


def write_file(file: Path, data: bytes) -> None:
    """Write a file of a run folder, whole. Raises JournalError."""
    try:
        write_atomic(file, data)
    except OSError as error:
        raise JournalError(f"{file}: cannot write: {error.strerror}") from error


def _records(lines: Sequence[bytes]) -> dict[tuple[int, str], tuple[int, Record]]:
    """Records by round and hash, with the numbers of their lines; what is none is left out."""
    found: dict[tuple[int, str], tuple[int, Record]] = {}
    for number, line in enumerate(lines):
        try:
            record = msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError:
            continue
        found.setdefault((record.round, record.weights_sha256), (number, record))
    return found


def record_of(row: Row) -> Record:
    """What a row alone tells of a round whose line was lost."""
    return Record(
        round=row.round,
        applied=row.applied,
        restores=row.restores,
        loss=None,
        accuracy=None,
        lr=row.coefficients["lr"],
        sigma=row.sigma,
        exponent=row.exponent,
        clip_factor=row.clip_factor,
        scalar_rms=scalar_rms(row),
        participants=len(row.participants),
        clipped=row.clipped,
        nonfinite=row.nonfinite,
        forward_passes=None,
        samples_forwarded=None,
        bytes_up=None,
        bytes_down=None,
        seconds=None,
        weights_sha256=row.weights_sha256.hex(),
    )


def _encode_config(config: RunConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config)) + b"\n"


def read_config(path: Path) -> RunConfig:
    """The settings of a run folder. Raises JournalError if it is none, CorruptRunError if they are not whole."""
    file = path / "config.json"
    try:
        config = msgspec.json.decode(file.read_bytes(), type=RunConfig)
    except FileNotFoundError as error:
        raise JournalError(f"{path}: no config.json: expected the folder of a run") from error
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, BaffleError) as error:
        raise CorruptRunError(f"{file}: {error}") from error
    if config.format != _FORMAT:
        raise CorruptRunError(f"{file}: format = {config.format}: expected {_FORMAT}")
    return config


def _genesis(config: RunConfig, initial: Weights) -> bytes:
    fixed = msgspec.msgpack.encode((config.format, config.method, config.key, config.table))
    return hashlib.sha256(b"baffle journal\n" + fixed + weights_sha256(initial)).digest()

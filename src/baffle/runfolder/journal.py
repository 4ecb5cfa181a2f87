"""The run folder: configuration, initial state, an append-only log of rows, metrics, snapshots.

    run/
      config.json            method, seed, rounds, tensor table, evaluation plan
      initial.safetensors    the weights that training started from
      rows.bin               length and its complement (4 bytes each), row, chain checksum (32 bytes); repeated
      metrics.jsonl          one line per round
      snapshots/*.safetensors  weights, optimizer slots, average; the newest two
      model.safetensors      the averaged weights, after training
      summary.json           totals, after training, as ``baffle train --json`` prints them

The journal *is* the run: initial state and rows give every round's weights (``method.replay``). The checksum chain
(``rowlog``) starts from a hash of the configuration and the initial weights. Rows are flushed to the disk before a
round counts; a kill loses at most the round in flight.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

import msgspec

from baffle.core.credit import model_table
from baffle.core.method import replay
from baffle.core.rebuild import FAST, Execution
from baffle.core.state import State, state_sha256, weights_sha256
from baffle.core.types import Row, Weights
from baffle.errors import CorruptRunError, JournalError
from baffle.files import TEMPORARY, append, free_name, write_atomic
from baffle.protocol.encoding import decode_row
from baffle.runfolder import rowlog
from baffle.runfolder.config import RunConfig, create_folder, encode_config, read_config, write_file
from baffle.runfolder.metrics import Record, encode_record, record_of, records_by_round
from baffle.runfolder.snapshots import decode_weights, encode_state, encode_weights, load_state

_KEEP_SNAPSHOTS = 2
_NEW_IN_4 = frozenset({"slices", "bits"})
"""Fields of a method that runs of format 3 did not have."""


class Journal:
    """A run folder and its log of rows, from which every round's weights can be rebuilt.

    ``Journal.create`` starts one, ``Journal.open`` reads or continues one; ``bf.train`` and ``bf.resume`` do so.

    Attributes:
        path: The folder.
        config: Settings of the run.
        initial: Weights that training started from, float32[n].
        rows: Encoded rows, one per round.
        records: Records of the rounds, one per row.
        damage: What is wrong with the folder, in words; None if it is intact.
        lost: Number of rows that the metrics mention and a truncated ``rows.bin`` no longer holds.

    Examples:
        >>> import tempfile, torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, _ = bf.load("digits")
        >>> out = Path(tempfile.mkdtemp(), "run")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> run = bf.fit(model, bf.partition(train, clients=3), loss=F.cross_entropy, rounds=2, out=out)
        >>> journal = Journal.open(out)
        >>> len(journal.rows), journal.damage
        (3, None)
        >>> bool((journal.state().weights == run.weights).all())
        True
    """

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
        """Create a run folder and open it for writing.

        Args:
            path: The new folder.
            config: Settings of the run.
            initial: Weights that training starts from, float32[n].

        Raises:
            RunExistsError: ``path`` exists.
            JournalError: It cannot be written.
        """
        path = Path(path)
        create_folder(path, config, initial, ("rows.bin", "metrics.jsonl"))
        journal = cls(path, config, initial)
        journal._lock()
        return journal

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False, repair: bool = False) -> Journal:
        """Read a run folder and check it.

        Args:
            path: The folder.
            write: Lock the folder to continue the run. A round that a kill interrupted is then dropped; other damage
                raises CorruptRunError.
            repair: With ``write``, do not raise for damage: keep the damaged files as ``*.damaged``, drop what follows
                the last intact row, and rebuild malformed lines of metrics from the rows.

        Returns:
            The journal; its ``rows`` are the intact ones before any damage.

        Raises:
            JournalError: ``path`` is not a run folder with a journal, or another process is writing it.
            CorruptRunError: Configuration or initial weights are damaged, or, with ``write``, anything is.
        """
        path = Path(path)
        config = read_config(path)
        if config.backprop:
            raise JournalError(f"{path}: a backpropagation baseline ({config.backprop}) has no journal")
        try:
            initial = decode_weights(config.table, (path / "initial.safetensors").read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptRunError(f"{path / 'initial.safetensors'}: cannot be read: {error}") from error
        journal = cls(path, config, initial)
        if write and config.format == 3:
            raise JournalError(
                f"{path}: of an earlier version (format 3): it can be replayed and evaluated, not continued; "
                f"start a new run from its weights with: baffle train --start {path}"
            )
        if not write:
            journal._read()
            return journal
        journal._lock()
        try:
            for stale in path.rglob(f"{TEMPORARY}*"):  # from a write that a kill interrupted
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
        """Append a round: the metrics line first, then the row that makes it count. All or nothing.

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
        """Save a state, so that a resume need not replay from the start. The newest two are kept."""
        write_file(self.path / f"snapshots/{state.round:08d}.safetensors", encode_state(state))
        files = sorted((self.path / "snapshots").glob("*.safetensors"))
        ahead = [file for file in files if file.stem > f"{state.round:08d}"]
        for old in [*files[: len(files) - len(ahead)][:-_KEEP_SNAPSHOTS], *ahead]:
            old.unlink(missing_ok=True)

    def extend(self, *, rounds: int | None = None, clients: tuple[int, ...] | None = None) -> None:
        """Record a new total of rounds, or clients that have joined. Raises JournalError."""
        config = self.config
        self.config = msgspec.structs.replace(
            config,
            rounds=config.rounds if rounds is None else rounds,
            clients=config.clients if clients is None else clients,
        )
        write_file(self.path / "config.json", encode_config(self.config))

    def finish(self, state: State) -> None:
        """Write ``model.safetensors``: the averaged weights under the model's own names."""
        write_file(self.path / "model.safetensors", encode_weights(model_table(self.config.table), state.ema_weights))

    def state(self, round: int | None = None, execution: Execution = FAST) -> State:
        """The state after a round, by default the last: the newest snapshot before it, then the rows that follow."""
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
        """The state after every round, rebuilt from initial weights and rows alone, each checked by its hash."""
        targets = {decode_row(row).restores for row in self.rows}
        return self._replay(self.config.method.init(self.initial), len(self.rows), targets, execution)

    def last_row(self) -> Row | None:
        """The newest row."""
        return decode_row(self.rows[-1]) if self.rows else None

    def _replay(self, state: State, rounds: int, targets: Set[int | None], execution: Execution) -> Iterator[State]:
        """The states after ``state`` up to ``rounds``. Those that a later row returns to are remembered."""
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
        """Read intact rows and their records; True if a kill left an unfinished round to drop.

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
        read = records_by_round(lines)
        for index, row in enumerate(map(decode_row, self.rows)):
            record = read.get((index, row.weights_sha256.hex()))
            self.records.append(record[1] if record else record_of(row))
            if record is None or record[0] != index:
                self.damage = (
                    self.damage
                    or f"{self.path / 'metrics.jsonl'}: line {index + 1} is not of round {index}: it was edited"
                )
        surplus = len([line for line in lines if line]) - len(self.rows)
        self.lost = 0 if surplus <= 1 or self.damage else surplus  # a kill leaves at most one line without its row
        return log.unfinished or surplus > 0

    def _cut(self, keep_aside: bool) -> None:
        """Truncate both files to the intact rows."""
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


def _genesis(config: RunConfig, initial: Weights) -> bytes:
    if config.format == 3:  # methods and tables had fewer fields
        method = msgspec.to_builtins(config.method)
        method = {name: value for name, value in method.items() if name not in _NEW_IN_4}
        table = [{name: getattr(spec, name) for name in ("name", "shape", "offset", "kept")} for spec in config.table]
        fixed = msgspec.msgpack.encode((config.format, method, config.key, table))
    else:
        fixed = msgspec.msgpack.encode((config.format, config.method, config.key, config.table))
    return hashlib.sha256(b"baffle journal\n" + fixed + weights_sha256(initial)).digest()

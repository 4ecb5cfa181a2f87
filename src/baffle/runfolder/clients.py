"""The clients of a run on other machines, and what each round cost each of them: two files in the run folder.

    clients.json    the clients in the order of their numbers: name, identity, examples; a number is never used twice
    clients.jsonl   one line per round: seconds, and for each participant the outcome of its request, seconds, bytes

An identity is what the transport authenticates: with Flower the SHA-256 of a node's public key. The operator's
table, ``baffle status`` and TensorBoard read the same lines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from baffle.errors import CorruptRunError, JournalError
from baffle.files import write_atomic

Outcome = Literal["ok", "late", "refused", "failed", "offline"]
"""Responded in time; not by the deadline; with a response that was refused; with an error; was not connected."""

_MEMBERS, ROUNDS = "clients.json", "clients.jsonl"


class Member(msgspec.Struct, frozen=True):
    """One client; its number is its position in the registry."""

    name: str
    identity: str
    examples: int
    card: str = ""
    """Its public keys for secure sums, 64 bytes in hexadecimal digits; empty if it takes part in plain sums only."""


class Visit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one client in one round."""

    client: int
    outcome: Outcome
    seconds: float | None = None
    """From the request to its response."""
    bytes_up: int = 0
    bytes_down: int = 0
    """Bytes of whole messages."""
    reason: str | None = None


class RoundLog(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of ``clients.jsonl``."""

    round: int
    seconds: float
    """From the first request until the round was closed."""
    visits: tuple[Visit, ...]
    time: float = 0.0
    """When it was closed, in seconds since 1970."""
    late: int = 0
    """Number of responses to earlier rounds that arrived since the last line."""
    refused: int = 0
    """Number of responses that were refused since the last line."""


class Roster:
    """The registry of a run's clients, saved in its folder.

    Args:
        folder: The run folder; None to stay in memory. It may be made later: files are written with the first round.

    Examples:
        >>> roster = Roster(None)
        >>> roster.add(Member("hospital", "ab12", 100)), roster.number("ab12"), roster.number("cd34")
        (0, 0, None)
    """

    def __init__(self, folder: Path | None) -> None:
        self.members: list[Member] = []
        self.last: RoundLog | None = None
        self._numbers: dict[str, int] = {}
        for member in () if folder is None else read_members(folder):
            self.add(member)
        self._folder, self._saved = folder, len(self.members)
        self._late = self._refused = 0

    def number(self, identity: str) -> int | None:
        """Number of the client with this identity; None if it is not registered."""
        return self._numbers.get(identity)

    def add(self, member: Member) -> int:
        """Register a new client and return its number."""
        self._numbers.setdefault(member.identity, len(self.members))
        self.members.append(member)
        return len(self.members) - 1

    def count_late(self) -> None:
        """Count a response that arrived after its round."""
        self._late += 1

    def count_refused(self) -> None:
        """Count a response that was refused."""
        self._refused += 1

    def save(self) -> None:
        """Write the registry; to be called before a row can name a new client. Raises JournalError."""
        if self._folder is None or self._saved == len(self.members):
            return
        try:
            write_atomic(self._folder / _MEMBERS, msgspec.json.format(msgspec.json.encode(self.members)) + b"\n")
        except OSError as error:
            raise JournalError(f"{self._folder / _MEMBERS}: cannot write: {error.strerror}") from error
        self._saved = len(self.members)

    def close(self, log: RoundLog) -> None:
        """Append a round. Raises JournalError."""
        log = msgspec.structs.replace(log, time=round(time.time(), 3), late=self._late, refused=self._refused)
        self.last, self._late, self._refused = log, 0, 0
        if self._folder is None:
            return
        try:
            with (self._folder / ROUNDS).open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                cut = file.read(1) not in (b"\n", b"")  # a kill truncated the last line
                file.write(b"\n" * cut + msgspec.json.encode(log) + b"\n")
        except OSError as error:
            raise JournalError(f"{self._folder / ROUNDS}: cannot write: {error.strerror}") from error


def read_members(folder: Path) -> tuple[Member, ...]:
    """The clients of a run, by number; none for a run in one process. Raises JournalError or CorruptRunError."""
    file = folder / _MEMBERS
    try:
        return msgspec.json.decode(file.read_bytes(), type=tuple[Member, ...])
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # msgspec's own, and of text that is not UTF-8
        raise CorruptRunError(f"{file}: {error}") from error


def read_rounds(folder: Path) -> tuple[RoundLog, ...]:
    """What each round cost each client, in the order of rounds.

    For a round that was repeated after a crash the last line counts; lines that a kill truncated are skipped. Raises
    JournalError if the file cannot be read.
    """
    try:
        lines: Sequence[bytes] = (folder / ROUNDS).read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise JournalError(f"{folder / ROUNDS}: cannot be read: {error.strerror}") from error
    by_round: dict[int, RoundLog] = {}
    for line in lines:
        try:
            log = msgspec.json.decode(line, type=RoundLog)
        except ValueError:
            continue
        by_round[log.round] = log
    return tuple(by_round[round] for round in sorted(by_round))

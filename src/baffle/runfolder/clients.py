"""Who takes part in a run on other machines, and what each round cost whom: two files in the run folder.

    clients.json    the clients in the order of their numbers: name, identity, examples; a number is never given twice
    clients.jsonl   a line a round: seconds, and for each participant what became of its question, seconds, bytes

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
"""Answered in time; asked and not answered by the deadline; answered nonsense; could not; was not connected."""

_MEMBERS, ROUNDS = "clients.json", "clients.jsonl"


class Member(msgspec.Struct, frozen=True):
    """One client; its number is its place in the roster."""

    name: str
    identity: str
    examples: int
    card: str = ""
    """In hexadecimal digits: its keys for secure sums, 64 bytes; empty: it takes part in plain sums only."""


class Visit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a round's question to one client led to."""

    client: int
    outcome: Outcome
    seconds: float | None = None
    """From the question to its answer."""
    bytes_up: int = 0
    bytes_down: int = 0
    """Of whole messages."""
    reason: str | None = None


class RoundLog(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of ``clients.jsonl``."""

    round: int
    seconds: float
    """From the first question until the round was closed."""
    visits: tuple[Visit, ...]
    time: float = 0.0
    """When it was closed, in seconds since 1970."""
    late: int = 0
    """Answers to earlier rounds that came since the last line."""
    refused: int = 0
    """Answers that were refused since the last line."""


class Roster:
    """The clients of a run, kept in its folder, or with None in memory only.

    The folder may be made after the roster; what there is to keep is written with the first round.

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
        """The client with this identity."""
        return self._numbers.get(identity)

    def add(self, member: Member) -> int:
        """Give a new client its number."""
        self._numbers.setdefault(member.identity, len(self.members))
        self.members.append(member)
        return len(self.members) - 1

    def count_late(self) -> None:
        """An answer came after its round."""
        self._late += 1

    def count_refused(self) -> None:
        """An answer was refused."""
        self._refused += 1

    def save(self) -> None:
        """Write who is which client, before a row can name one. Raises JournalError."""
        if self._folder is None or self._saved == len(self.members):
            return
        try:
            write_atomic(self._folder / _MEMBERS, msgspec.json.format(msgspec.json.encode(self.members)) + b"\n")
        except OSError as error:
            raise JournalError(f"{self._folder / _MEMBERS}: cannot write: {error.strerror}") from error
        self._saved = len(self.members)

    def close(self, log: RoundLog) -> None:
        """Write down a round. Raises JournalError."""
        log = msgspec.structs.replace(log, time=round(time.time(), 3), late=self._late, refused=self._refused)
        self.last, self._late, self._refused = log, 0, 0
        if self._folder is None:
            return
        try:
            with (self._folder / ROUNDS).open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                cut = file.read(1) not in (b"\n", b"")  # by a kill: its line ends here
                file.write(b"\n" * cut + msgspec.json.encode(log) + b"\n")
        except OSError as error:
            raise JournalError(f"{self._folder / ROUNDS}: cannot write: {error.strerror}") from error


def read_members(folder: Path) -> tuple[Member, ...]:
    """The clients of a run; none if it has no roster. Raises CorruptRunError."""
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
    """What rounds cost whom, by round; of a round that was repeated after a crash, the last line counts.

    A line that a kill cut short is left out.
    """
    try:
        lines: Sequence[bytes] = (folder / ROUNDS).read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise JournalError(f"{folder / ROUNDS}: cannot be read: {error.strerror}") from error
    found: dict[int, RoundLog] = {}
    for line in lines:
        try:
            log = msgspec.json.decode(line, type=RoundLog)
        except ValueError:
            continue
        found[log.round] = log
    return tuple(found[round] for round in sorted(found))

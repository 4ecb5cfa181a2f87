"""Which states can be reached by replaying which rows: what a server needs to bring clients up to date."""

from __future__ import annotations

from collections.abc import Sequence

from baffle.core.types import Row
from baffle.protocol.encoding import decode_row


class History:
    """Lengths and hashes of a run's rows, and where they return to an earlier state, which no client keeps.

    A state is named by the number of rows that lead to it from the initial state. Lengths are those of encoded rows,
    so the history can be rebuilt from the journal when a run is resumed.
    """

    def __init__(self) -> None:
        self._ends = [0]  # cumulative bytes
        self._hashes: list[bytes] = []
        self._return = 0  # rows up to and including the last one that returns to an earlier state

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._hashes)

    def read(self, rows: Sequence[bytes]) -> list[Row]:
        """Add the rows that are new.

        Args:
            rows: all encoded rows of the run so far.

        Returns:
            The new rows, decoded.
        """
        new = [decode_row(data) for data in rows[len(self._hashes) :]]
        for row, data in zip(new, rows[len(self._hashes) :], strict=True):
            self._hashes.append(row.state_sha256)
            self._ends.append(self._ends[-1] + len(data))
            if row.restores is not None:
                self._return = len(self._hashes)
        return new

    def hash_after(self, rows: int) -> bytes | None:
        """State hash after the first ``rows`` rows, or None if there are not that many."""
        return self._hashes[rows - 1] if 1 <= rows <= len(self._hashes) else None

    def leads_from(self, rows: int) -> bool:
        """Whether replaying the remaining rows leads from the state after the first ``rows`` rows to the newest."""
        return self._return <= rows <= len(self._hashes)

    def bytes_after(self, rows: int) -> int:
        """Bytes of the rows after the first ``rows``."""
        return self._ends[-1] - self._ends[rows]

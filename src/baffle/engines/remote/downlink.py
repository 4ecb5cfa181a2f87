"""What the rows of a run lead to from where: what a server needs to know to bring a client up to date."""

from __future__ import annotations

from collections.abc import Sequence

from baffle.protocol.encoding import decode_row


class History:
    """What rows lead from where: lengths, hashes, and returns to an earlier state, which no client keeps."""

    def __init__(self) -> None:
        self._ends = [0]
        self._hashes: list[bytes] = []
        self._return = 0  # rows up to and with the newest return

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._hashes)

    def read(self, rows: Sequence[bytes]) -> None:
        """Take in rows that are new."""
        for data in rows[len(self._hashes) :]:
            row = decode_row(data)
            self._hashes.append(row.state_sha256)
            self._ends.append(self._ends[-1] + len(data))
            if row.restores is not None:
                self._return = len(self._hashes)

    def hash_after(self, rows: int) -> bytes | None:
        """Hash of the state that so many rows lead to, if any do."""
        return self._hashes[rows - 1] if 1 <= rows <= len(self._hashes) else None

    def leads_from(self, rows: int) -> bool:
        """Whether the state after so many rows leads to the newest."""
        return self._return <= rows <= len(self._hashes)

    def bytes_after(self, rows: int) -> int:
        """Bytes of the rows behind."""
        return self._ends[-1] - self._ends[rows]

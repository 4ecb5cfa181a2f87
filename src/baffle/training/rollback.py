"""The divergence guard inside the training loop: what it has seen, and the checkpoint to roll back to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baffle.core.guard import Guard, Watch
from baffle.core.method import Checkpoint, Method
from baffle.core.state import State
from baffle.core.types import Row
from baffle.protocol.encoding import decode_row
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record


@dataclass(frozen=True, eq=False)
class Rollback:
    """The guard's watch over a run, and a way to load the best round so far; both None without a guard.

    Attributes:
        watch: What the guard has seen of the evaluations.
        checkpoint: Loads row and state of the best evaluated round.
    """

    watch: Watch | None
    checkpoint: Callable[[], Checkpoint] | None = None

    @classmethod
    def start(
        cls, guard: Guard | None, evaluate_every: int, records: list[Record], journal: Journal | None
    ) -> Rollback:
        """Repeat what the guard saw in the records of a run that is continued."""
        if guard is None:
            return cls(None)
        watch = guard.watch()
        for record in records:
            if record.restores is not None:
                watch = watch.restored()
            elif record.round % evaluate_every == 0 and record.seconds is not None:  # else its metrics line was lost
                watch = watch.see(record.round, record.loss)
        if journal is None or watch.best_round < 0:
            return cls(watch)
        return cls(watch, lambda: (decode_row(journal.rows[watch.best_round]), journal.state(watch.best_round)))

    def judge(
        self, method: Method, row: Row, state: State, loss: float | None, *, evaluated: bool
    ) -> tuple[Row, State, Rollback]:
        """Judge a round: its row and state, or, if the run has diverged, those that roll back to the best round."""
        if self.watch is None:
            return row, state, self
        watch = self.watch.see(row.round, loss) if evaluated and row.restores is None else self.watch
        if watch.diverged and self.checkpoint is not None:
            row, state = method.restore(row, self.checkpoint())
        if row.restores is not None:
            return row, state, Rollback(watch.restored(), self.checkpoint)
        return row, state, Rollback(watch, (lambda: (row, state)) if watch.best_round == row.round else self.checkpoint)

    def exhausted(self, row: Row | None) -> bool:
        """Whether a run with this last row has rolled back more often than the guard allows, and must stop."""
        if self.watch is None or row is None:
            return False
        return row.restores is not None and row.rollbacks > self.watch.guard.rollbacks

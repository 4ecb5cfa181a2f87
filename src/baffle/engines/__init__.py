"""Engines carry tasks to clients and bring their replies: the seam between training and the clients.

The training loop sees only :class:`Engine`. An engine may run clients in this process, in other processes or on other
machines; the messages are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baffle.client.calibrate import Calibration
from baffle.core.state import State
from baffle.core.types import Aggregate, Reply, Table, Task, Weights
from baffle.data import Dataset
from baffle.runtimes import Evaluation


@dataclass(frozen=True)
class Exchange:
    """One round's replies and their cost.

    A forward pass is one evaluation of the model on one client's batch; ``samples_forwarded`` counts the
    examples in them. Bytes are lengths of encoded messages.
    """

    replies: tuple[Reply, ...]
    forward_passes: int
    samples_forwarded: int
    bytes_up: int
    bytes_down: int
    total: Aggregate | None = None
    """The sum, in a secure sum; there are no replies then."""


class Engine(Protocol):
    """Carries tasks to clients: :class:`~baffle.engines.local.LocalEngine` and others."""

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of examples of each client; the index is the client's number."""
        ...

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated; recorded with a run."""
        ...

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        """Let clients measure which sigma to use.

        Args:
            task: to measure for; its own sigma is ignored.
            participants: numbers of the clients that measure.
            state: at which to measure.
        """
        ...

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Send a task and wait for the replies.

        Args:
            task: of the round.
            participants: numbers of the clients that take part.
            state: at which the task is evaluated.
            rows: all encoded rows of the run so far, from which clients catch up.
        """
        ...

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Evaluate on the server's own test data."""
        ...

"""Who carries a task to the clients and brings their replies: the seam between training and the world.

The training loop sees only :class:`Engine`. An engine may run clients in this process or on other machines;
the messages are the same.
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
    """One round's replies and what they cost.

    A forward pass is one evaluation of the model on one client's batch; ``samples_forwarded`` counts the
    examples in them. Bytes are lengths of encoded messages.
    """

    replies: tuple[Reply, ...]
    forward_passes: int
    samples_forwarded: int
    bytes_up: int
    bytes_down: int
    total: Aggregate | None = None
    """In a secure sum, instead of replies: the sum alone."""


class Engine(Protocol):
    """Carries tasks to clients."""

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each client; the index is the client's number."""
        ...

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated: recorded with a run."""
        ...

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        """Let clients measure which sigma to use for tasks like this one."""
        ...

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Send a task, wait for replies. ``rows`` are all encoded rows so far: what a client needs to catch up."""
        ...

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Evaluate on the server's own test data."""
        ...

"""The round in progress: which clients it asks, what they answered, and what each of them cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from baffle.core.types import Cohort, Task
from baffle.engines.remote.mailbox import Stage
from baffle.engines.remote.secure import SecureSum
from baffle.protocol.messages import AnyResponse, BehindResponse, printable
from baffle.runfolder.clients import Outcome, Visit

MOST_ATTEMPTS = 4
"""Requests to one client until the deadline, each answered by what the client lacks."""


@dataclass
class Round:
    """The state of a round, or of the current stage of a secure sum's round."""

    task: Task
    cohort: Cohort
    """Weight of each participant."""
    stage: Stage
    began: float
    clients: Collection[int]
    """Clients that this stage asks."""
    secure: SecureSum | None = None
    responses: dict[int, AnyResponse] = field(default_factory=dict)
    """Accepted answers, by client."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Number of requests, by client."""
    behind: dict[int, BehindResponse] = field(default_factory=dict)
    """What clients last said they lack."""
    visits: dict[int, Visit] = field(default_factory=dict)
    """Outcome, seconds and bytes, by client."""

    @property
    def reply_bytes(self) -> int:
        """Bytes of the scalars in a reply."""
        return 4 * self.task.local_steps * self.task.numbers

    @property
    def any_failed(self) -> bool:
        """Whether a client reported that it cannot answer."""
        return any(visit.outcome == "failed" for visit in self.visits.values())

    def enter(self, stage: Stage, clients: Collection[int]) -> None:
        """Go on to another stage."""
        self.stage, self.clients = stage, tuple(sorted(clients))
        self.responses, self.attempts, self.behind = {}, {}, {}
        for client in self.clients:
            if client in self.visits:
                self.visits[client] = msgspec.structs.replace(self.visits[client], outcome="late")

    def enough(self, need: int) -> bool:
        """Whether ``need`` clients answered, or enough shares arrived, to close the stage."""
        by_shares = None if self.secure is None else self.secure.enough(self.stage)
        return len(self.responses) >= need if by_shares is None else by_shares

    def to_ask(self, pending: Collection[int], connected: Collection[int]) -> list[int]:
        """Clients to send a request to: connected, without an answer or a pending request, not given up."""
        return [
            client
            for client in self.clients
            if client not in self.responses
            and client not in pending
            and client in connected
            and self.attempts.get(client, 0) < MOST_ATTEMPTS
        ]

    def awaited(self, pending: Collection[int], connected: Collection[int], stragglers: Collection[int]) -> list[int]:
        """Clients that the round waits for: connected, not a straggler, and asked or still to be asked."""
        return [
            client
            for client in self.clients
            if client not in self.responses
            and client not in stragglers
            and client in connected
            and (self.attempts.get(client, 0) < MOST_ATTEMPTS or client in pending)
        ]

    def give_up(self, client: int, outcome: Outcome, reason: str, seconds: float | None = None) -> None:
        """Ask a client no further in this stage."""
        self.attempts[client] = MOST_ATTEMPTS + 1
        self.record(client, outcome=outcome, seconds=seconds, reason=printable(reason, 200))

    def record(
        self,
        client: int,
        *,
        outcome: Outcome | None = None,
        seconds: float | None = None,
        bytes_up: int = 0,
        bytes_down: int = 0,
        reason: str | None = None,
    ) -> None:
        """Add to a participant's record of this round."""
        old = self.visits.get(client) or Visit(client=client, outcome="late")
        self.visits[client] = msgspec.structs.replace(
            old,
            outcome=outcome or old.outcome,
            seconds=old.seconds if seconds is None else seconds,
            bytes_up=old.bytes_up + bytes_up,
            bytes_down=old.bytes_down + bytes_down,
            reason=reason or old.reason,
        )

    def settle(self, connected: Collection[int], silent: Collection[int]) -> tuple[list[int], tuple[Visit, ...]]:
        """Close the round.

        Args:
            connected: participants that are connected now.
            silent: clients with a pending request of this round.

        Returns:
            Participants that missed the deadline, and the records of all, by number.
        """
        late = []
        for client in self.cohort:
            visit = self.visits.get(client)
            if client in self.responses:
                continue
            if visit is None or (visit.outcome == "late" and client not in connected):
                visit = visit or Visit(client=client, outcome="offline")
                self.visits[client] = msgspec.structs.replace(visit, outcome="offline")
            elif visit.outcome == "late" and client in silent:
                late.append(client)
        return late, tuple(self.visits[client] for client in sorted(self.visits))

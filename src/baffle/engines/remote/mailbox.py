"""Requests on their way: which ones are not answered yet, and which answer belongs to which request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from baffle.engines.remote.transport import Arrival, Clock, Request, Sent, Transport
from baffle.errors import FederationError

Stage = Literal["enrol", "calibrate", "train", "advert", "vector", "shares", "dropped"]
"""What a request asks for. The last four are the stages of a secure sum."""

_log = logging.getLogger("baffle")


@dataclass
class Pending:
    """A request that is not answered yet."""

    client: int | None
    """None: an unregistered node, which is asked to enrol."""
    identity: str
    node: int
    round: int
    stage: Stage
    whole: bool = False
    """It carried everything a stateless client needs."""
    repeated: bool = False
    """The client was asked the same again; an answer to this request still counts."""
    sent_at: float = 0.0

    @property
    def name(self) -> str:
        """The client, for messages to the operator."""
        who = "node" if self.client is None else f"client {self.client}, node"
        return f"{who} {self.identity[:12]}"


@dataclass(frozen=True)
class Answered:
    """An arrival and the request that it answers."""

    request: Pending
    arrival: Arrival


@dataclass(frozen=True)
class Stray:
    """An arrival that answers no pending request, or came from another node than the one asked."""

    reason: str


class Mailbox:
    """The pending requests of an engine.

    Args:
        transport: carries requests and answers.
        ttl: seconds until an unanswered request is forgotten.
        clock: tells the time.
    """

    def __init__(self, transport: Transport, ttl: float, clock: Clock) -> None:
        self._transport, self._ttl, self._clock = transport, ttl, clock
        self._pending: dict[str, Pending] = {}

    def send(self, requests: Sequence[Request], pending: Sequence[Pending]) -> list[Sent]:
        """Send requests; those that the transport took are pending from now on.

        Returns:
            One entry per request, or none if nothing can be sent at present: the engine then asks again.
        """
        try:
            receipts = self._transport.send(requests, self._ttl)
        except FederationError as error:
            _log.warning("not sent: %s", error)
            return []
        for sent, request in zip(receipts, pending, strict=False):
            if sent.id:
                request.sent_at = self._clock.monotonic()
                self._pending[sent.id] = request
        return receipts

    def receive(self) -> list[Answered | Stray]:
        """Fetch what has arrived, without waiting."""
        now = self._clock.monotonic()
        self._pending = {id: request for id, request in self._pending.items() if now - request.sent_at < self._ttl}
        if not self._pending:
            return []
        try:
            arrivals = self._transport.receive(list(self._pending))
        except FederationError as error:
            _log.warning("no answers: %s", error)
            return []
        return [self._match(arrival) for arrival in arrivals]

    def _match(self, arrival: Arrival) -> Answered | Stray:
        request = self._pending.get(arrival.id)
        if request is None:
            return Stray(f"an answer to no request, {arrival.size} bytes, from node {arrival.node}")
        if arrival.response is not None and arrival.node != request.node:  # the right answer may still arrive
            return Stray(f"{request.name}: an answer from node {arrival.node}: expected one from node {request.node}")
        del self._pending[arrival.id]
        return Answered(request, arrival)

    def pending_clients(self, round: int, stage: Stage, address: Callable[[int], int | None]) -> set[int]:
        """Clients with a pending request of a round's stage at their current address, not counting repeated ones."""
        return {
            request.client
            for request in self._pending.values()
            if request.client is not None
            and (request.round, request.stage, request.repeated) == (round, stage, False)
            and request.node == address(request.client)
        }

    def unregistered(self, max_age: float) -> set[tuple[str, int]]:
        """Identity and address of unregistered nodes that were asked who they are within ``max_age`` seconds."""
        now = self._clock.monotonic()
        return {
            (request.identity, request.node)
            for request in self._pending.values()
            if request.client is None and now - request.sent_at < max_age
        }

    def silent(self, round: int) -> Collection[int]:
        """Clients that have not answered a request of a round."""
        return {r.client for r in self._pending.values() if r.client is not None and r.round == round}

    def newest_whole(self, client: int) -> int | None:
        """The newest round whose state was sent to a client that has not answered yet; it takes requests in order."""
        sent = [request.round for request in self._pending.values() if request.client == client and request.whole]
        return max(sent, default=None)

    def repeat(self) -> None:
        """Mark all requests to clients as repeated, so that their clients are asked again."""
        for request in self._pending.values():
            request.repeated = request.client is not None

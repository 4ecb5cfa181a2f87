"""Clients of a run and connected nodes: which nodes join, which client is reachable where, which one is slow."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Mapping

from baffle.engines.remote.mailbox import Mailbox, Pending
from baffle.engines.remote.transport import Clock, Request, Transport
from baffle.errors import FederationError, ReplyError
from baffle.protocol.messages import SETUP, AnyResponse, EnrolRequest, EnrolResponse, FailedResponse, encode, printable
from baffle.runfolder.clients import Member, Roster
from baffle.secure.messages import PublicKeys

_log = logging.getLogger("baffle")
_MOST_EXAMPLES = 2**40
_LOOK_EVERY = 1.0  # seconds between looks at which nodes are connected


class Membership:
    """Registers the nodes that join, and knows which clients are connected.

    Args:
        transport: lists the connected nodes.
        mailbox: sends the requests to join.
        roster: the clients of the run, which are numbered in the order in which they are added.
        setup: encoded; a node has to be ready for it before it can join.
        deadline: seconds until an unregistered node that has not answered is asked again.
        clock: tells the time.
    """

    def __init__(
        self, transport: Transport, mailbox: Mailbox, roster: Roster, setup: bytes, deadline: float, clock: Clock
    ) -> None:
        self._transport, self._mailbox, self._roster, self._clock = transport, mailbox, roster, clock
        self._setup, self._deadline = setup, deadline
        self._nodes: Mapping[str, int] = {}
        self._looked_at = -math.inf
        self._rejected: dict[str, int] = {}  # unregistered nodes that cannot take part: identity -> address
        self._joining: dict[str, EnrolResponse] = {}  # by identity
        self.stragglers: set[int] = set()
        """Clients that missed their last deadline: still asked, but not waited for until they answer."""
        self.plan: dict[str, str | int] = {}
        """How the first client evaluates passes."""

    @property
    def joining(self) -> int:
        """Number of nodes that are ready to join."""
        return len(self._joining)

    def address(self, client: int) -> int | None:
        """Where a client is connected; None if it is not."""
        return self._nodes.get(self._roster.members[client].identity)

    def connected(self, clients: Collection[int]) -> set[int]:
        """Those of the clients that are connected."""
        return {client for client in clients if self.address(client) is not None}

    def look_around(self) -> int:
        """Update which nodes are connected, at most once per second, and ask unregistered ones who they are.

        Returns:
            Bytes sent.
        """
        if self._clock.monotonic() - self._looked_at < _LOOK_EVERY:
            return 0
        self._looked_at = self._clock.monotonic()
        try:
            self._nodes = self._transport.nodes()
        except FederationError as error:
            _log.warning("connected nodes are unknown: %s", error)
            return 0
        enrolling = self._mailbox.unregistered(self._deadline)
        new = [
            (identity, node)
            for identity, node in self._nodes.items()
            if (identity, node) not in enrolling
            and identity not in self._joining
            and self._roster.number(identity) is None
            and self._rejected.get(identity) != node
        ]
        if not new:
            return 0
        message = encode(EnrolRequest(hashlib.sha256(self._setup).hexdigest()))
        receipts = self._mailbox.send(
            [Request(node, message, {SETUP: self._setup}) for _, node in new],
            [Pending(None, identity, node, -1, "enrol") for identity, node in new],
        )
        return sum(sent.size for sent in receipts if sent.id)

    def welcome(self, request: Pending, response: AnyResponse) -> None:
        """Let a node join with the next round. Raises ReplyError if its response is malformed."""
        if isinstance(response, FailedResponse):
            self.reject(request)
            _log.warning("node %s cannot take part: %s", request.identity[:12], printable(response.reason))
            return
        if not isinstance(response, EnrolResponse) or not 1 <= response.examples <= _MOST_EXAMPLES:
            raise ReplyError(f"{response!r:.200}: expected a name, and 1 to {_MOST_EXAMPLES} examples")
        if self._roster.number(request.identity) is None:
            self._joining.setdefault(request.identity, response)

    def reject(self, request: Pending) -> None:
        """Do not ask a node again as long as it stays at its address."""
        self._rejected[request.identity] = request.node

    def admit(self) -> list[tuple[int, EnrolResponse]]:
        """Register the nodes that are ready to join, ordered by name.

        Returns:
            Number of each new client, and its response.
        """
        admitted = []
        for identity, response in sorted(self._joining.items(), key=lambda new: (new[1].name, new[0])):
            name = printable(response.name, 64)
            client = self._roster.add(Member(name, identity, response.examples, _hex(response.card)))
            # "data" and "frozen" are compared when a run is resumed; a client must not be able to set them
            self.plan = self.plan or {k: v for k, v in response.plan.items() if k not in ("data", "frozen")}
            _log.info("client %d joined: %s, %d examples", client, name, response.examples)
            admitted.append((client, response))
        self._joining.clear()
        return admitted


def _hex(keys: PublicKeys | None) -> str:
    """A client's keys for ``clients.json``; empty if it has none, or malformed ones."""
    usable = keys is not None and len(keys.signing) == len(keys.sealing) == 32
    return (keys.signing + keys.sealing).hex() if usable and keys is not None else ""

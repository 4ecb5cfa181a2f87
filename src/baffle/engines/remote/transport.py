"""The seam to the network: who carries questions to clients on other machines and brings what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Letter:
    """A question to a node, with its parcels."""

    node: int
    question: bytes
    parcels: Mapping[str, bytes] = field(default_factory=dict)
    client: int = 0
    """The number that the node has in this run. All else is the same for all that are asked the same."""


@dataclass(frozen=True)
class Sent:
    """A letter on its way: what its answer will refer to, and its bytes. Without an ``id`` it was not taken."""

    id: str
    size: int


@dataclass(frozen=True)
class Arrival:
    """An answer to the letter ``id``, or the transport's word that there will be none."""

    id: str
    node: int | None
    """Who sent it; None: the transport itself."""
    response: bytes | None
    error: str | None
    size: int


class Transport(Protocol):
    """Carries letters. Sizes are bytes of whole messages, as they are sent."""

    def nodes(self) -> Mapping[str, int]:
        """Who is connected: identity -> address. Raises FederationError if that cannot be told now."""
        ...

    def send(self, letters: Sequence[Letter], ttl: float) -> list[Sent]:
        """Send letters that may be answered within ``ttl`` seconds. Raises FederationError if now is not the time."""
        ...

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        """The answers that have come to some of these letters; each once. Raises FederationError as ``send`` does."""
        ...

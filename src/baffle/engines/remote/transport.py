"""The seam to the network: a transport carries requests to clients on other machines and brings their answers.

:class:`~baffle.engines.remote.flower.GridTransport` carries them over Flower,
:class:`~baffle.engines.remote.memory.MemoryTransport` within one process. Any other carrier of bytes can stand in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """An encoded message to a node, with its attachments.

    Everything but the client's number is identical for clients that are asked the same.
    """

    node: int
    """Address of the node, as in :meth:`Transport.nodes`."""
    message: bytes
    """Encoded, see ``baffle.protocol.messages``."""
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    client: int = 0
    """The client's number in this run."""


@dataclass(frozen=True)
class Sent:
    """A request on its way."""

    id: str
    """Names the request in its :class:`Arrival`; empty if the transport did not take the request."""
    size: int
    """Bytes sent."""


@dataclass(frozen=True)
class Arrival:
    """The answer to a request, or the transport's report that there will be none."""

    id: str
    """Of the request, as in :class:`Sent`."""
    node: int | None
    """Address of the sender; None if the transport itself reports an error."""
    response: bytes | None
    """Encoded, see ``baffle.protocol.messages``; None with an error."""
    error: str | None
    size: int
    """Bytes received."""


class Transport(Protocol):
    """Carries requests and answers. Sizes are bytes of whole messages, as sent."""

    def nodes(self) -> Mapping[str, int]:
        """Find the connected nodes.

        Returns:
            Address by identity. An identity is what the transport authenticates, such as the hash of a public key.

        Raises:
            FederationError: if the nodes cannot be listed at present.
        """
        ...

    def send(self, requests: Sequence[Request], ttl: float) -> list[Sent]:
        """Send requests.

        Args:
            requests: in the order of the returned list.
            ttl: seconds for which an answer is of use.

        Raises:
            FederationError: if nothing can be sent at present.
        """
        ...

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        """Fetch the answers that have arrived for these requests, each once, without waiting.

        Raises:
            FederationError: if nothing can be fetched at present.
        """
        ...


class Clock(Protocol):
    """Time, as the engine uses it: the module ``time``, or a simulated clock in tests."""

    def monotonic(self) -> float:
        """Seconds since any fixed moment."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Let time pass."""
        ...

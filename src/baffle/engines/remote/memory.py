"""A transport within one process: test your own clients and options against a remote engine, without a network.

Every message is encoded and decoded as on a network. Nodes can be slow, drop out, restart, or change their answers;
with a :class:`SimulatedClock` deadlines pass without waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from baffle.client.participant import Participant
from baffle.engines.remote.transport import Arrival, Clock, Request, Sent
from baffle.protocol.messages import AnyRequest, AnyResponse, TrainRequest, decode_request, decode_response

Twist = Callable[[Request, Arrival], Sequence[Arrival]]
"""Changes a node's answers on their way: (request, answer) -> answers that arrive."""


class SimulatedClock:
    """A clock that only sleeping moves on.

    Examples:
        >>> clock = SimulatedClock()
        >>> clock.sleep(60)
        >>> clock.monotonic()
        1060.0
    """

    def __init__(self) -> None:
        self.now = 1000.0
        """The time, in seconds; may be set."""

    def monotonic(self) -> float:
        """The simulated time."""
        return self.now

    def sleep(self, seconds: float, /) -> None:
        """Move the simulated time on."""
        self.now += seconds


class MemoryNode:
    """A node of a simulated network, with a client on it.

    Args:
        name: of the node; its identity is derived from it.
        address: a number of its own.
        start: makes the client, now and after each :meth:`restart`.
        online: whether the node is connected.
        seconds: until its answers arrive.
    """

    def __init__(
        self,
        name: str,
        address: int,
        start: Callable[[], Participant],
        *,
        online: bool = True,
        seconds: float = 0.1,
    ) -> None:
        self.name, self.address, self.online, self.seconds = name, address, online, seconds
        self.twist: Twist = lambda request, arrival: [arrival]
        """Changes this node's answers on their way."""
        self._start = start
        self.participant = start()

    @property
    def identity(self) -> str:
        """What a real transport would authenticate."""
        return f"{self.name:x<12}-key"

    def restart(self) -> None:
        """Replace the client by a new one, which has forgotten everything."""
        self.participant = self._start()


@dataclass(frozen=True)
class Delivery:
    """A request that was delivered, and the answer before any twist."""

    node: MemoryNode
    request: Request
    message: AnyRequest
    """The decoded request."""
    response: AnyResponse
    """The decoded answer."""
    size: int
    """Bytes of the request with its attachments."""


class MemoryTransport:
    """Carries requests to nodes in this process, and their answers back.

    Args:
        nodes: of the network; :attr:`members` may change later.
        clock: must be the one given to the engine.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> from baffle.engines.remote.engine import RemoteEngine
        >>> from baffle.protocol.messages import Setup
        >>> train, test = bf.load("digits")
        >>> runtime = bf.TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        >>> def node(number: int, data: bf.Dataset) -> MemoryNode:
        ...     return MemoryNode(f"client-{number}", number, lambda: Participant("c", lambda setup: (runtime, data)))
        >>> clock = SimulatedClock()
        >>> nodes = [node(number, data) for number, data in enumerate(bf.partition(train, clients=3))]
        >>> setup = Setup(
        ...     table=runtime.table, frozen="", shape=(1, 8, 8), classes=10, vocabulary=None, options={}, bundle=None
        ... )
        >>> engine = RemoteEngine(MemoryTransport(nodes, clock), runtime, setup, clients=3, clock=clock)
        >>> nodes[2].online = False  # drops out before the first round
        >>> run = bf.train(bf.Method(num_directions=10), engine, runtime.initial_weights(), rounds=3)
        >>> [record.participants for record in run.records]
        [2, 2, 2, 2]
    """

    def __init__(self, nodes: Sequence[MemoryNode], clock: Clock) -> None:
        self.clock = clock
        self.members = list(nodes)
        """The nodes of the network, connected or not."""
        self.deliveries: list[Delivery] = []
        """Every request that was delivered, in order."""
        self.on_look: Callable[[], None] = lambda: None
        """Called whenever the engine asks which nodes are connected."""
        self._ids = map(str, itertools.count())
        self._due: list[tuple[float, Arrival]] = []

    def nodes(self) -> Mapping[str, int]:
        """List the connected nodes: address by identity."""
        self.on_look()
        return {node.identity: node.address for node in self.members if node.online}

    def send(self, requests: Sequence[Request], ttl: float) -> list[Sent]:
        """Deliver requests; nodes answer at once, and the answers arrive after their ``seconds``."""
        return [self._send(request) for request in requests]

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        """Fetch the answers that have arrived, including those that answer none of the requests."""
        now = self.clock.monotonic()
        arrived = [arrival for at, arrival in self._due if at <= now]
        self._due = [(at, arrival) for at, arrival in self._due if at > now]
        return arrived

    def inject(self, arrival: Arrival) -> None:
        """Let an answer arrive that no node sent."""
        self._due.append((self.clock.monotonic(), arrival))

    def train_requests(self, node: MemoryNode) -> list[tuple[TrainRequest, frozenset[str]]]:
        """The tasks delivered to a node, each with the names of its attachments."""
        return [
            (d.message, frozenset(d.request.attachments))
            for d in self.deliveries
            if d.node is node and isinstance(d.message, TrainRequest)
        ]

    def _send(self, request: Request) -> Sent:
        node = next((n for n in self.members if n.address == request.node and n.online), None)
        size = len(request.message) + sum(map(len, request.attachments.values()))
        if node is None:
            return Sent("", size)
        id = next(self._ids)
        answer = node.participant.answer(request.message, request.attachments, request.client)
        message, response = decode_request(request.message), decode_response(answer)
        self.deliveries.append(Delivery(node, request, message, response, size))
        for arrival in node.twist(request, Arrival(id, node.address, answer, None, len(answer))):
            self._due.append((self.clock.monotonic() + node.seconds, arrival))
        return Sent(id, size)

"""What the tests of secure sums share: clients, replies, a round driven message by message, uniformity of bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from baffle.core.aggregate import word_bits
from baffle.core.scalars import MOST_MAGNITUDE
from baffle.core.types import DEFAULT_BITS, Integers, Reply, Task, limit_of, pack, unpack
from baffle.errors import SecureSumError
from baffle.secure.client import SecureClient
from baffle.secure.masks import Identity
from baffle.secure.messages import Introduced, KeysResponse, Masked, Survivors, UnmaskResponse
from baffle.secure.server import SecureRound
from helpers import TASK

KEY = 2**63 + 5
Message = TypeVar("Message", bound=msgspec.Struct)


def make_clients(count: int, *, minimum: int = 2, degree: int = 100, key: int = KEY) -> dict[int, SecureClient]:
    """Clients 0, 3, 6, ...: numbers need not be dense."""
    return {3 * i: SecureClient(Identity.make(), 3 * i, key, minimum=minimum, degree=degree) for i in range(count)}


def make_task(
    size: int, *, round: int = 0, degree: int = 100, bits: int = DEFAULT_BITS, weight_sum: int | None = None
) -> Task:
    """``weight_sum``: the words are as short as these weights allow; None: they have 32 bits."""
    word = 32 if weight_sum is None else word_bits(bits, weight_sum)
    return msgspec.structs.replace(TASK, key=KEY, round=round, num_directions=size, secure=degree, bits=bits, word=word)


def make_replies(
    clients: Collection[int], size: int, *, round: int = 0, seed: int = 0, bits: int = DEFAULT_BITS
) -> list[Reply]:
    """With the largest integers of both signs, and magnitudes up to the largest."""
    rng, limit = np.random.default_rng(seed), limit_of(bits)
    replies = []
    for client in clients:
        weight = int(rng.integers(1, 256))
        values = rng.choice([-limit, limit] if bits == 1 else [-limit, -1, 0, 1, limit, min(limit, 77)], size)
        replies.append(
            Reply(
                round=round,
                client=client,
                weight=weight,
                scalars=pack(values.astype(np.int64), bits),
                magnitudes=(weight * int(rng.choice([0, 1, 2**15, int(rng.integers(2**24)), MOST_MAGNITUDE])),),
                clipped=int(rng.integers(0, size + 1)),
                nonfinite=int(rng.integers(0, size + 1)),
            )
        )
    return replies


def size_of(reply: Reply) -> int:
    """How many integers of the usual bits a reply has."""
    return len(reply.scalars) * 8 // DEFAULT_BITS


def values_of(reply: Reply, task: Task | None = None) -> Integers:
    """A reply's weighted integers; ``task`` says their number and bits, if they have others than usual."""
    bits, size = (DEFAULT_BITS, size_of(reply)) if task is None else (task.bits, task.numbers)
    return unpack(reply.scalars, bits, size) * reply.weight


def plain_sum(
    replies: Sequence[Reply], clients: Collection[int], task: Task | None = None
) -> tuple[list[int], tuple[int, int, int]]:
    chosen = [reply for reply in replies if reply.client in clients]
    total = sum((values_of(reply, task) for reply in chosen), np.zeros_like(values_of(replies[0], task)))
    counts = (sum(r.weight for r in chosen), sum(r.clipped for r in chosen), sum(r.nonfinite for r in chosen))
    return total.tolist(), counts


@dataclass
class Driver:
    """One round, message by message, each encoded and decoded as on a wire; and everything that was sent."""

    clients: Mapping[int, SecureClient]
    replies: Sequence[Reply]
    round: int = 0
    degree: int = 100
    adverts: dict[int, KeysResponse] = field(default_factory=dict)
    introduced: dict[int, tuple[Introduced, ...]] = field(default_factory=dict)
    vectors: dict[int, Masked] = field(default_factory=dict)
    survivors: Survivors | None = None
    unmasked: dict[int, UnmaskResponse] = field(default_factory=dict)
    last: dict[int, UnmaskResponse] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cohort = sorted(self.clients)
        self.cards = {client: secure.card for client, secure in self.clients.items()}
        size = size_of(self.replies[0])
        self.server = SecureRound(KEY, self.round, self.cohort, self.cards, size, degree=self.degree)

    def advertise(self, clients: Sequence[int] | None = None) -> None:
        for client in self.cohort if clients is None else clients:
            advert = wire(self.clients[client].advertise(self.round, self.cohort, self.cards))
            self.adverts[client] = advert
            self.server.advertise(advert)

    def mask(self, clients: Sequence[int] | None = None, *, late: Collection[int] = ()) -> None:
        """Vectors; those of ``late`` clients are made and do not reach the server in time."""
        plain = {reply.client: reply for reply in self.replies}
        for client in sorted(self.adverts) if clients is None else clients:
            reply = plain[client]
            counts = (reply.weight, reply.clipped, reply.nonfinite)
            self.introduced[client] = self.server.introduce(client)
            masked = wire(self.clients[client].mask(self.round, self.introduced[client], values_of(reply), counts))
            self.vectors[client] = masked
            if client not in late:
                self.server.add(masked)

    def unmask(self, clients: Sequence[int] | None = None) -> None:
        """Both kinds of shares, of the same clients."""
        self.survivors = wire(self.server.survive())
        asked = self.survivors.clients if clients is None else clients
        for messages in (self.unmasked, self.last) if self.server.dropped else (self.unmasked,):
            for client in asked:
                if client in self.server.missing:
                    messages[client] = wire(self.clients[client].unmask(wire(self.server.survivors_for(client))))
                    self.server.unmask(messages[client])


def wire(message: Message) -> Message:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))


def refused(call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(SecureSumError):
        call(*arguments)


UNIFORM = (130.0, 400.0)
"""Chi-square of bytes with 255 degrees of freedom: mean 255, standard deviation 23; outside by chance once in 10^7."""


def counts_of(data: bytes) -> npt.NDArray[np.float64]:
    return np.bincount(np.frombuffer(data, np.uint8), minlength=256).astype(np.float64)


def chi_square(data: bytes) -> float:
    counts, expected = counts_of(data), len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_of_two(a: bytes, b: bytes) -> float:
    one, two = counts_of(a), counts_of(b)
    return float(((one - two) ** 2 / (one + two)).sum())

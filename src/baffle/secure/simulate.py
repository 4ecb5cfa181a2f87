"""A whole round of the secure sum in one process: every message is made, and its bytes are counted.

What the simulation runs; and what tests run, with clients that are lost at any stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from baffle.core.aggregate import counts_of, summed
from baffle.core.types import Aggregate, Reply, Task, unpack
from baffle.secure.client import SecureClient
from baffle.secure.server import SecureRound


@dataclass(frozen=True)
class Lost:
    """Clients that are lost before they advertise, before their vector, before their shares of either kind."""

    before_advert: Collection[int] = field(default_factory=tuple)
    before_vector: Collection[int] = field(default_factory=tuple)
    before_shares: Collection[int] = field(default_factory=tuple)
    before_last_shares: Collection[int] = field(default_factory=tuple)


@dataclass(frozen=True)
class Summed:
    """The sum of the survivors' replies, and what it took: bytes of all clients' messages, and of those to them."""

    total: Aggregate
    bytes_up: int
    bytes_down: int


def sum_together(
    task: Task, clients: Mapping[int, SecureClient], replies: Sequence[Reply], lost: Lost = Lost()
) -> Summed:
    """Sum replies by the protocol. Raises SecureSumError if too many clients are lost."""
    cards = {client: secure.card for client, secure in clients.items()}
    cohort = sorted(clients)
    size = task.local_steps * task.numbers
    here = SecureRound(
        task.key, task.round, cohort, cards, size, 3 + len(task.sizes), degree=task.secure, word=task.word
    )
    up = down = 0
    for client in cohort:
        if client not in lost.before_advert:
            advert = clients[client].advertise(task.round, cohort, cards)
            up += len(msgspec.msgpack.encode(advert))
            here.advertise(advert)
    given = {reply.client: reply for reply in replies}
    for client in sorted(here.advertised):
        introduced = here.introduce(client)
        down += len(msgspec.msgpack.encode(introduced))
        if client not in lost.before_vector:
            reply = given[client]
            values = unpack(reply.scalars, task.bits, size) * reply.weight
            masked = clients[client].mask(task.round, introduced, values, counts_of(reply), task.word)
            up += len(msgspec.msgpack.encode(masked))
            here.add(masked)
    survivors = here.survive()
    for gone in (lost.before_shares, {*lost.before_shares, *lost.before_last_shares}):
        for client in sorted(here.missing):  # all, then if somebody was lost all again
            told = here.told(client)
            down += len(msgspec.msgpack.encode(told))
            if client not in gone:
                unmasked = clients[client].unmask(told)
                up += len(msgspec.msgpack.encode(unmasked))
                here.unmask(unmasked)
    total, counts = here.total()
    return Summed(summed(task, total, counts, survivors.clients), up, down)

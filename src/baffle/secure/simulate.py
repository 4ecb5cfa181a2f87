"""A whole round of a secure sum in one process: every message is made, and its bytes are counted.

The simulation runs it, and so do tests, with clients that drop out at any stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from baffle.core.aggregate import counts_of, number_of_counts, summed, weighted
from baffle.core.types import Aggregate, Reply, Task
from baffle.secure.client import SecureClient
from baffle.secure.server import SecureRound


@dataclass(frozen=True)
class Dropped:
    """Clients that drop out, by the message that they do not send any more.

    Attributes:
        before_advert: send nothing.
        before_vector: advertise, and send no masked vector.
        before_shares: send a masked vector, and no shares.
        before_last_shares: send shares of self-mask seeds, and none of dropped clients' mask seeds.
    """

    before_advert: Collection[int] = field(default_factory=tuple)
    before_vector: Collection[int] = field(default_factory=tuple)
    before_shares: Collection[int] = field(default_factory=tuple)
    before_last_shares: Collection[int] = field(default_factory=tuple)


@dataclass(frozen=True)
class Summed:
    """The sum of the surviving clients' replies, and its cost.

    Attributes:
        total: the sum.
        bytes_up: bytes of all messages from clients.
        bytes_down: bytes of all messages to clients.
    """

    total: Aggregate
    bytes_up: int
    bytes_down: int


def sum_together(
    task: Task, clients: Mapping[int, SecureClient], replies: Sequence[Reply], dropped: Dropped = Dropped()
) -> Summed:
    """Sum replies by the protocol.

    Args:
        task: the round's task.
        clients: the cohort.
        replies: each client's plain reply.
        dropped: clients that drop out, and when.

    Raises:
        SecureSumError: too many clients drop out.
    """
    cards = {client: secure.card for client, secure in clients.items()}
    cohort = sorted(clients)
    size = task.local_steps * task.numbers
    here = SecureRound(
        task.key, task.round, cohort, cards, size, number_of_counts(task), degree=task.secure, word=task.word
    )
    up = down = 0
    for client in cohort:
        if client not in dropped.before_advert:
            advert = clients[client].advertise(task.round, cohort, cards)
            up += len(msgspec.msgpack.encode(advert))
            here.advertise(advert)
    plain = {reply.client: reply for reply in replies}
    for client in sorted(here.advertised):
        introduced = here.introduce(client)
        down += len(msgspec.msgpack.encode(introduced))
        if client not in dropped.before_vector:
            reply = plain[client]
            masked = clients[client].mask(task.round, introduced, weighted(task, reply), counts_of(reply), task.word)
            up += len(msgspec.msgpack.encode(masked))
            here.add(masked)
    survivors = here.survive()
    for absent in (dropped.before_shares, {*dropped.before_shares, *dropped.before_last_shares}):
        for client in sorted(here.missing):  # all; then, if a client dropped out before its vector, all again
            request = here.survivors_for(client)
            down += len(msgspec.msgpack.encode(request))
            if client not in absent:
                unmasked = clients[client].unmask(request)
                up += len(msgspec.msgpack.encode(unmasked))
                here.unmask(unmasked)
    total, sums = here.total()
    return Summed(summed(task, total, sums, survivors.clients), up, down)

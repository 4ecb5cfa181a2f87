"""Malformed messages raise SecureSumError, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from baffle.errors import SecureSumError
from baffle.secure.client import SecureClient
from baffle.secure.masks import Identity, PublicKeys
from baffle.secure.messages import Introduced, Survivors
from secure_helpers import KEY, Driver, Message, make_clients, make_replies, refused, values_of

MESSAGES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
INTEGERS = st.one_of(st.integers(-5, 30), st.sampled_from([-(2**63), 2**63, 2**64 - 1, 2**70]))
BYTES = st.one_of(st.binary(max_size=80), st.sampled_from([bytes(32), b"\xff" * 32, bytes(64), bytes(10_000)]))
FIELDS: dict[str, st.SearchStrategy[object]] = {
    **dict.fromkeys(["round", "client"], INTEGERS),
    **dict.fromkeys(["mask_public", "self_commitment", "commitments", "signature", "vector", "rest"], BYTES),
    **dict.fromkeys(["sealed", "shares"], st.lists(BYTES, max_size=8).map(tuple)),
    **dict.fromkeys(["complaints", "clients"], st.lists(INTEGERS, max_size=8).map(tuple)),
    "signatures": st.lists(st.tuples(INTEGERS, BYTES), max_size=8).map(tuple),
}


def mutated(message: Message, data: st.DataObject) -> Message:
    names = data.draw(st.lists(st.sampled_from(message.__struct_fields__), min_size=1, max_size=2, unique=True))
    changes = {name: data.draw(FIELDS[name], label=name) for name in names}
    if isinstance(message, Introduced) and "sealed" in changes:
        changes["sealed"] = data.draw(BYTES)
    return msgspec.structs.replace(message, **changes)


def attempt(call: Callable[[], object]) -> None:
    """It is taken, or refused; nothing else is raised."""
    try:
        call()
    except SecureSumError:
        return


@MESSAGES
@given(st.data())
def test_malformed_messages_are_refused_and_the_round_goes_on(data: st.DataObject) -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    cohort = data.draw(st.lists(INTEGERS, max_size=6))
    attempt(lambda: clients[0].advertise(data.draw(INTEGERS), cohort, dict.fromkeys(cohort, driver.cards[0])))
    card = PublicKeys(data.draw(BYTES), data.draw(BYTES))
    attempt(lambda: clients[0].advertise(0, driver.cohort, {**driver.cards, 3: card}))
    clients[0] = SecureClient(Identity.make(), 0, KEY, minimum=2)
    driver = Driver(clients, driver.replies)
    driver.advertise()
    attempt(lambda: driver.server.advertise(mutated(driver.adverts[3], data)))
    attempt(lambda: driver.server.introduce(data.draw(INTEGERS)))
    introduced = driver.server.introduce(0)
    changed = (mutated(introduced[0], data), *introduced[1:])
    assume(changed != introduced)
    refused(clients[0].mask, 0, (introduced[0],) * 3, np.zeros(2, np.int64), (1, 0, 0))
    if data.draw(st.booleans()):  # what a client takes with other shares or commitments it only complains of
        attempt(lambda: clients[0].mask(0, changed, np.zeros(2, np.int64), (1, 0, 0)))
        return
    attempt(lambda: clients[0].mask(data.draw(INTEGERS.filter(bool)), introduced, np.zeros(2, np.int64), (1, 0, 0)))
    driver.mask([0, 3, 6])
    last = clients[9].mask(0, driver.server.introduce(9), values_of(driver.replies[3]), (1, 0, 0))
    attempt(lambda: driver.server.add(mutated(last, data)))
    attempt(lambda: clients[0].unmask(mutated(Survivors(round=0, clients=(0, 3, 6, 9)), data)))
    attempt(driver.server.survive)
    attempt(lambda: driver.server.unmask(mutated(clients[3].unmask(Survivors(round=0, clients=(0, 3, 6))), data)))
    attempt(lambda: clients[0].unmask(mutated(driver.server.survivors_for(0), data)))
    attempt(lambda: clients[6].unmask(mutated(Survivors(round=0, clients=(0, 3, 6)), data)))
    attempt(driver.server.total)

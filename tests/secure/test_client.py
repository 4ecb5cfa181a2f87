"""The client's side: what it refuses, and when it gives its shares."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from baffle.errors import SecureSumError
from baffle.secure.client import SecureClient
from baffle.secure.masks import Identity, PublicKeys
from baffle.secure.messages import Survivors
from secure_helpers import KEY, Driver, make_clients, make_replies, plain_sum, refused


def test_mask_shares_are_given_when_the_threshold_has_signed_the_same_survivors() -> None:
    clients = make_clients(5)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    driver.mask(late=[12])
    alive = (0, 3, 6, 9)
    told = driver.server.survive()
    assert told == Survivors(round=0, clients=alive)
    signed = {}
    for client in alive:
        letter = clients[client].unmask(told)
        assert [bool(share) for share in letter.shares] == [True] * 4 + [False]
        driver.server.unmask(letter)
        signed[client] = letter.signature
    assert driver.server.opened
    assert not driver.server.ready
    refused(driver.server.total)
    again = driver.server.survivors_for(0)
    assert dict(again.signatures) == signed
    for signatures in (
        (),
        again.signatures[1:3],
        again.signatures[1:2] * 8,
        tuple((client, signed[3]) for client in alive),
        (*again.signatures[:3], (12, signed[9])),
        tuple((client + 1, signature) for client, signature in again.signatures),
    ):
        refused(clients[0].unmask, Survivors(round=0, clients=alive, signatures=signatures))
    refused(clients[0].unmask, Survivors(round=0, clients=(0, 3, 6, 12), signatures=again.signatures))
    for client in alive:
        letter = clients[client].unmask(driver.server.survivors_for(client))
        assert [bool(share) for share in letter.shares] == [False] * 4 + [True]
        driver.server.unmask(letter)
        refused(clients[client].unmask, driver.server.survivors_for(client))
    assert driver.server.total()[0].tolist() == plain_sum(driver.replies, alive)[0]


def test_a_client_that_signed_one_set_of_survivors_gives_nothing_for_another() -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    driver.mask()
    clients[0].unmask(Survivors(round=0, clients=(0, 3, 6)))
    other = Survivors(round=0, clients=(0, 3, 9))
    signatures = tuple((client, clients[client].unmask(other).signature) for client in (3, 9))
    refused(clients[0].unmask, msgspec.structs.replace(other, signatures=signatures))


def test_clients_believe_no_survivors_that_they_have_not_met() -> None:
    clients = make_clients(3, minimum=3)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    driver.mask()
    refused(clients[0].unmask, Survivors(round=0, clients=(0, 3)))  # below the minimum
    refused(clients[0].unmask, Survivors(round=0, clients=(0, 3, 4)))  # invented
    refused(clients[0].unmask, Survivors(round=0, clients=(3, 6)))
    refused(clients[0].unmask, Survivors(round=0, clients=(0, 6, 3)))
    refused(clients[0].unmask, Survivors(round=0, clients=(0, 0, 3)))
    assert len(clients[0].unmask(Survivors(round=0, clients=(0, 3, 6))).shares) == 3

    clients = make_clients(5)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise([0, 3, 6, 9])
    driver.mask()
    refused(clients[0].unmask, Survivors(round=0, clients=(0, 3, 6, 9, 12)))  # the last never advertised


def test_clients_refuse_cohorts_that_give_one_client_many_shares() -> None:
    clients = make_clients(4, minimum=3)
    cards = {client: secure.card for client, secure in clients.items()}
    for cohort in ([0, 3], [0, 3, 3, 3, 6], [3, 6, 9], [0, 3, -6], [0, 3, 2**64], [0, 3, 6, 5], [0] * 5):
        refused(clients[0].advertise, 0, cohort, cards)
    refused(clients[0].advertise, 0, [0, 3, 6], {**cards, 6: cards[3]})  # one card for two
    refused(clients[0].advertise, 0, [0, 3, 6], {**cards, 0: cards[9]})  # not its own
    refused(clients[0].advertise, -1, [0, 3, 6], cards)
    refused(clients[0].advertise, 2**70, [0, 3, 6], cards)
    clients[0].advertise(0, [0, 3, 6], cards)


@pytest.mark.parametrize("degree", [-1, 0, 1, 2, 3])
def test_clients_refuse_to_have_few_neighbours(degree: int) -> None:
    """With two or three, lost clients cut the circle into parts that each have a sum of their own."""
    with pytest.raises(SecureSumError, match="neighbours at most: expected at least 4"):
        SecureClient(Identity.make(), 0, KEY, degree=degree)


def test_clients_refuse_neighbourhoods_of_too_many() -> None:
    client = SecureClient(Identity.make(), 0, KEY, degree=10_000)
    cards = {other: PublicKeys(other.to_bytes(32, "little"), client.card.sealing) for other in range(300)}
    with pytest.raises(SecureSumError, match=r"round 0: a neighbourhood of .*: expected 2 to 255"):
        client.advertise(0, range(300), {**cards, 0: client.card})


def test_a_failed_introduction_leaves_nothing_behind() -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    introduced = driver.server.introduce(0)
    forged = (*introduced[:2], msgspec.structs.replace(introduced[2], signature=bytes(64)))
    refused(clients[0].mask, 0, forged, np.zeros(2, np.int64), (1, 0, 0))
    clients[0].mask(0, introduced[1:], np.zeros(2, np.int64), (1, 0, 0))
    assert len(clients[0].unmask(Survivors(round=0, clients=(0, 6, 9))).shares) == 3
    assert clients[0].exposed == 2

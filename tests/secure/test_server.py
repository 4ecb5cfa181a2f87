"""The server's side: repeated, late and false messages are refused, and their senders named."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.errors import SecureSumError
from baffle.secure import messages
from baffle.secure.client import SecureClient
from baffle.secure.masks import Identity
from baffle.secure.messages import KeysResponse
from secure_helpers import KEY, Driver, make_clients, make_replies, plain_sum, refused


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 8), st.sampled_from([4, 100]), st.randoms(use_true_random=False))
def test_duplicated_and_reordered_messages_change_nothing(count: int, degree: int, order: random.Random) -> None:
    clients = make_clients(count, degree=degree)
    driver = Driver(clients, make_replies(clients, 3), degree=degree)
    shuffled = order.sample(driver.cohort, count)
    driver.advertise(shuffled)
    for client in order.choices(driver.cohort, k=3):
        driver.server.advertise(driver.adverts[client])  # the same again, before the round began
    driver.mask(order.sample(driver.cohort, count), late=[])
    again = order.choice(driver.cohort)
    refused(driver.server.advertise, driver.adverts[again])
    refused(driver.server.add, driver.vectors[again])
    refused(clients[again].mask, 0, driver.introduced[again], np.zeros(3, np.int64), (1, 0, 0))
    refused(driver.server.total)
    driver.unmask(order.sample(driver.cohort, count))
    refused(driver.server.unmask, driver.unmasked[again])
    refused(clients[again].unmask, driver.server.survive())
    total, counts = driver.server.total()
    assert (total.tolist(), counts) == plain_sum(driver.replies, driver.cohort)


def test_one_set_of_keys_serves_one_round_and_the_next_may_come_before_the_last_is_over() -> None:
    clients = make_clients(4)
    first, second = (Driver(clients, make_replies(clients, 2, round=r, seed=r), round=r) for r in (7, 8))
    first.advertise()
    first.mask()
    second.advertise()  # rides on the reply of the round before
    first.unmask()
    second.mask()
    second.unmask()
    for driver in (first, second):
        assert (driver.server.total()[0].tolist(), driver.server.total()[1]) == plain_sum(driver.replies, clients)
    refused(clients[0].advertise, 8, second.cohort, second.cards)
    refused(second.server.advertise, first.adverts[0])
    refused(second.server.add, first.vectors[0])
    refused(second.server.unmask, first.unmasked[0])
    assert clients[0].exposed == 4


def test_a_late_vector_is_refused() -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    driver.mask(late=[3])
    driver.unmask()
    refused(driver.server.add, driver.vectors[3])
    refused(clients[3].unmask, driver.server.survive())  # it is not among the survivors
    assert (driver.server.total()[0].tolist(), driver.server.total()[1]) == plain_sum(driver.replies, {0, 6, 9})


def round_with(advert: Callable[[KeysResponse], KeysResponse], count: int = 5) -> Driver:
    """A round in which client 3 changes its advert and signs that."""
    identity = Identity.make()
    clients = make_clients(count) | {3: SecureClient(identity, 3, KEY, minimum=2)}
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    changed = advert(driver.adverts[3])
    rest = messages.rest_of(changed.self_commitment, changed.commitments, changed.sealed)
    signed = messages.signed_advert(KEY, 0, 3, changed.mask_public, rest)
    driver.adverts[3] = msgspec.structs.replace(changed, signature=identity.signing.sign(signed))
    driver.server.advertise(driver.adverts[3])
    return driver


def garbled(advert: KeysResponse, parts: Sequence[int]) -> KeysResponse:
    sealed = [bytes(48) if i in parts else part for i, part in enumerate(advert.sealed)]
    return msgspec.structs.replace(advert, sealed=tuple(sealed))


def committed_to_others(advert: KeysResponse) -> KeysResponse:
    return msgspec.structs.replace(advert, commitments=bytes(32) + advert.commitments[32:])


@pytest.mark.parametrize("change", [lambda advert: garbled(advert, [0]), committed_to_others])
def test_holders_complain_of_shares_that_are_not_those_committed_to(
    change: Callable[[KeysResponse], KeysResponse],
) -> None:
    driver = round_with(change)
    driver.mask()
    assert driver.vectors[0].complaints == (3,)
    driver.unmask()
    assert driver.unmasked[0].shares[1] == b""
    assert driver.server.total()[0].tolist() == plain_sum(driver.replies, driver.cohort)[0]


def test_a_dealer_whose_shares_most_cannot_open_ends_the_round_and_is_named() -> None:
    driver = round_with(lambda advert: garbled(advert, [0, 2]))
    driver.mask()
    with pytest.raises(SecureSumError, match="round 0, client 3: 3 clients around it are left to unmask: expected 4"):
        driver.server.survive()


def test_a_dealer_whose_secret_does_not_fit_its_shares_is_named() -> None:
    driver = round_with(lambda advert: msgspec.structs.replace(advert, self_commitment=bytes(16)))
    driver.mask()
    driver.unmask()
    with pytest.raises(SecureSumError, match="client 3: dealt shares that do not fit its advert"):
        driver.server.total()


def test_a_mask_key_that_nobody_can_use_is_refused_at_once() -> None:
    with pytest.raises(SecureSumError, match="round 0, client 3: a public key of 32 bytes that cannot be used"):
        round_with(lambda advert: msgspec.structs.replace(advert, mask_public=bytes(32)))


def test_a_holder_that_lies_is_named_and_left_out() -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    driver.mask()
    driver.unmask([0, 3, 6])
    told = driver.server.survive()
    honest = clients[9].unmask(told)
    for shares in (honest.shares[::-1], (b"", *honest.shares[1:]), (bytes(16), *honest.shares[1:])):
        with pytest.raises(SecureSumError, match="round 0, client 9: lied about its share of client 0; it is left out"):
            driver.server.unmask(msgspec.structs.replace(honest, shares=shares))
    with pytest.raises(SecureSumError, match="client 9: did not sign the survivors"):
        driver.server.unmask(msgspec.structs.replace(honest, signature=driver.unmasked[0].signature))
    assert driver.server.missing == {9}
    assert driver.server.ready
    assert driver.server.total()[0].tolist() == plain_sum(driver.replies, driver.cohort)[0]


def test_false_complaints_cost_the_dealer_a_holder_and_no_more() -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    driver.advertise()
    driver.mask(late=[9])
    driver.server.add(msgspec.structs.replace(driver.vectors[9], complaints=(0, 3)))
    driver.survivors = driver.server.survive()
    for client in driver.cohort:
        letter = clients[client].unmask(driver.survivors)
        shares = (b"", b"", *letter.shares[2:]) if client == 9 else letter.shares
        driver.server.unmask(msgspec.structs.replace(letter, shares=shares))
    assert driver.server.total()[0].tolist() == plain_sum(driver.replies, driver.cohort)[0]

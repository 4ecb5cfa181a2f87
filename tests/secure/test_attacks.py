"""Attacks on honest clients' vectors, which fail as long as fewer than a third of a neighbourhood collude.

``Attacker`` has the whole transcript and all that colluding clients know, and tries to unmask the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from baffle.errors import SecureSumError
from baffle.secure import messages
from baffle.secure.client import SecureClient
from baffle.secure.graph import neighbourhoods, threshold
from baffle.secure.masks import mask_key, pair_mask, self_mask
from baffle.secure.messages import Survivors, commitment, context
from baffle.secure.server import COUNTS
from baffle.secure.shares import SECRET, recombine
from secure_helpers import KEY, Driver, make_clients, make_replies, plain_sum, refused, values_of


@dataclass
class Attacker:
    """The server's whole transcript of some rounds, and all secrets that the colluders had in them."""

    drivers: list[Driver] = field(default_factory=list)
    memories: dict[tuple[int, int], tuple[bytes, bytes, bytes, dict[int, bytes]]] = field(default_factory=dict)

    def corrupt(self, round: int, client: int, secure: SecureClient) -> None:
        """Copy what a client knows of a round, before it forgets."""
        keys = secure._keys[round]
        self.memories[round, client] = keys.mask_seed, keys.self_seed, keys.own, dict(keys.held)

    def shares(self, driver: Driver, dealer: int) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Of a client's mask seed and of its self-mask seed, by position: from messages and from colluders."""
        around = neighbourhoods(driver.cohort, (KEY, driver.round))[dealer]
        of_mask, of_self = dict[int, bytes](), dict[int, bytes]()
        place = sorted(driver.adverts).index(dealer)
        for said, found in ((driver.unmasked, of_self), (driver.last, of_mask)):
            for holder, letter in said.items():
                if letter.shares[place]:
                    found[around.index(holder) + 1] = letter.shares[place]
        for (round, colluder), (_, _, own, held) in self.memories.items():
            if round == driver.round:
                both = own if colluder == dealer else held[dealer]
                of_mask[around.index(colluder) + 1], of_self[around.index(colluder) + 1] = both[:SECRET], both[SECRET:]
        return of_mask, of_self

    def unmask(self, driver: Driver, client: int) -> tuple[int, list[int]]:
        """How many of a client's two secrets are right, and what its vector would be with the candidates."""
        candidates, right = list[bytes](), 0
        for shares in self.shares(driver, client):
            need = threshold(len(driver.cohort))
            positions = tuple(sorted(shares)[:need])
            candidates.append(recombine([positions], [[shares[p] for p in positions]])[0] if positions else b"")
        mask_seed, self_seed = candidates
        advert, here = driver.adverts[client], context(KEY, driver.round, client)
        right += mask_key(mask_seed).public_key().public_bytes_raw() == advert.mask_public
        right += commitment(here, self_seed) == advert.self_commitment
        vector = np.frombuffer(driver.vectors[client].vector, "<u4").astype(np.uint32)
        vector = vector - self_mask(self_seed, here, vector.size)
        for other in driver.introduced[client]:
            pair = context(KEY, driver.round, *sorted((client, other.client)))
            memory = self.memories.get((driver.round, other.client))
            if memory is not None:  # a colluder knows its masks
                mask = pair_mask(mask_key(memory[0]), advert.mask_public, pair, vector.size)
            else:
                mask = pair_mask(mask_key(mask_seed), other.mask_public, pair, vector.size)
            vector = vector - mask if client < other.client else vector + mask
        return right, vector[:-COUNTS].view(np.int32).tolist()


@pytest.mark.parametrize("more", [0, 1])
def test_an_attack_after_a_drop_out_yields_nobody_with_fewer_colluders_than_the_threshold(more: int) -> None:
    """Clients 0..24, t = 6. In round 7 one vector is late: its mask seed is recombined, and the attacker has it too."""
    clients, attacker = make_clients(9), Attacker()
    colluders = sorted(clients)[-(threshold(9) - 1 + more) :]
    honest = [client for client in clients if client not in colluders]
    for round in range(1, 8):
        driver = Driver(clients, make_replies(clients, 4, round=round, seed=round), round=round)
        driver.advertise()
        driver.mask(late=[0] if round == 7 else [])
        for client in colluders:
            attacker.corrupt(round, client, clients[client])
        driver.unmask([c for c in clients if (round, c) not in {(7, 0), (3, 3)}])  # one is lost before its shares
        attacker.drivers.append(driver)
        assert driver.survivors is not None
        assert driver.server.total()[0].tolist() == plain_sum(driver.replies, driver.survivors.clients)[0]
    for driver in attacker.drivers:
        truth = {reply.client: values_of(reply).tolist() for reply in driver.replies}
        for client in honest:
            right, vector = attacker.unmask(driver, client)
            assert right == 1 + more, (driver.round, client)
            assert (vector == truth[client]) == bool(more)


def test_no_server_gets_both_secrets_by_telling_clients_different_survivors() -> None:
    """Every division of the holders between two stories, with signatures of all that were told the same."""
    for count in (3, 4, 5, 6):
        for told_dead in range(count):
            clients = make_clients(count)
            driver = Driver(clients, make_replies(clients, 2))
            driver.advertise()
            driver.mask()
            others = driver.cohort[1:]
            liars = others[:told_dead]
            stories = {
                client: Survivors(round=0, clients=tuple(others if client in liars else driver.cohort))
                for client in driver.cohort
            }
            signed, of_self, of_mask = list[tuple[int, bytes]](), 0, 0
            for client, told in stories.items():
                try:
                    letter = clients[client].unmask(told)
                except SecureSumError:
                    assert client in liars  # too few are left for the threshold
                    continue
                assert bool(letter.shares[0]) == (client not in liars)
                of_self += client not in liars
                if client in liars:
                    signed.append((client, letter.signature))
            for client in liars:
                told = Survivors(round=0, clients=tuple(others), signatures=tuple(signed))
                try:
                    of_mask += bool(clients[client].unmask(told).shares[0])
                except SecureSumError:
                    continue
            assert min(of_self, of_mask) < threshold(count)
            assert not of_mask or of_mask == len(liars) >= threshold(count)


def test_no_server_isolates_a_client_by_lies_about_survivors() -> None:
    """Ten clients, t = 7, two of them colluders: each honest one is told that three are lost, but others each.

    So four get seven mask shares from somebody: all honest clients that the victim shares masks with.
    """
    victim, lost, others, colluders = 0, (3, 6, 9, 12), (15, 18, 21), (24, 27)
    clients = make_clients(10, minimum=3)
    driver = Driver(clients, make_replies(clients, 3))
    driver.advertise()
    given = {reply.client: values_of(reply) for reply in driver.replies}
    for client in driver.cohort:
        introduced = driver.server.introduce(client)
        if client == victim:
            introduced = tuple(other for other in introduced if other.client not in others)
        driver.introduced[client] = introduced
        driver.vectors[client] = clients[client].mask(0, introduced, given[client], (1, 0, 0))
    of_mask: dict[int, dict[int, bytes]] = {client: {} for client in driver.cohort}
    of_self: dict[int, dict[int, bytes]] = {client: {} for client in driver.cohort}
    mask_seeds: dict[int, bytes] = {}
    for client in colluders:
        keys = clients[client]._keys[0]
        mask_seeds[client] = keys.mask_seed
        for dealer, both in {**keys.held, client: keys.own}.items():
            of_mask[dealer][client], of_self[dealer][client] = both[:SECRET], both[SECRET:]
    dead = {15: (3, 6, 9), 18: (3, 6, 12), 21: (3, 9, 12), victim: others}
    for client in sorted({victim, *lost, *others}):
        story = dead.get(client, tuple(other for other in lost if other != client))
        told = Survivors(round=0, clients=tuple(other for other in driver.cohort if other not in story))
        dealers = sorted([client, *(other.client for other in driver.introduced[client])])
        letter = clients[client].unmask(told)
        signatures = tuple(  # all that a server could have for this story
            (other, clients[other]._identity.signing.sign(messages.signed_survivors(KEY, 0, told.clients)))
            for other in (client, *colluders)
        )
        for dealer, share in zip(dealers, letter.shares, strict=True):
            if share:
                assert dealer in told.clients
                of_self[dealer][client] = share
        refused(clients[client].unmask, msgspec.structs.replace(told, signatures=signatures))

    def seed(shares: Mapping[int, bytes]) -> bytes:
        holders = sorted(shares)[:7]
        return recombine([[driver.cohort.index(h) + 1 for h in holders]], [[shares[h] for h in holders]])[0]

    here = context(KEY, 0, victim)
    assert commitment(here, seed(of_self[victim])) == driver.adverts[victim].self_commitment
    vector = np.frombuffer(driver.vectors[victim].vector, "<u4").astype(np.uint32)
    vector = vector - self_mask(seed(of_self[victim]), here, vector.size)
    for other in driver.introduced[victim]:
        guess = mask_seeds.get(other.client) or seed(of_mask[other.client])
        pair = context(KEY, 0, victim, other.client)
        vector = vector - pair_mask(mask_key(guess), driver.adverts[victim].mask_public, pair, vector.size)
    assert vector[:-COUNTS].view(np.int32).tolist() != given[victim].tolist()
    assert all(len(of_mask[client]) == len(colluders) for client in lost)  # no honest client gave one

"""The secure sum: exact under every loss, masks that say nothing, an attack that fails, liars named, training the same.

``Field`` is a slow GF(2^128) to check the fast one by; ``Attacker`` has a whole transcript and all that some clients
know, and tries to unmask the others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch.nn.functional as F
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import baffle as bf
from baffle.core.aggregate import SecureSum, next_exponent, nothing
from baffle.core.method import replay
from baffle.core.state import State
from baffle.core.types import LIMIT, Aggregate, Integers, Reply, Task, pack_int32
from baffle.engines import Exchange
from baffle.errors import OptionError, PlanError, ReplyError, SecureSumError
from baffle.protocol.encoding import decode_row
from baffle.runtimes.pytorch.runtime import TorchRuntime
from baffle.secure import masks, messages
from baffle.secure.client import SecureClient
from baffle.secure.graph import neighbourhoods, threshold
from baffle.secure.masks import Card, Identity, mask_key, pair_mask, self_mask
from baffle.secure.messages import Advert, Introduced, Masked, Survivors, Unmasked, commitment, context
from baffle.secure.server import COUNTS, SecureRound
from baffle.secure.shares import SECRET, recombine, split
from baffle.secure.simulate import Lost, sum_together
from baffle.training.options import TrainConfig
from helpers import METHOD, TASK, digits_engine, initial_weights, invoke, linear

KEY = 2**63 + 5
Letter = TypeVar("Letter", bound=msgspec.Struct)
LETTERS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_clients(count: int, *, minimum: int = 2, degree: int = 100, key: int = KEY) -> dict[int, SecureClient]:
    """Clients 0, 3, 6, ...: numbers need not be dense."""
    return {3 * i: SecureClient(Identity.make(), 3 * i, key, minimum=minimum, degree=degree) for i in range(count)}


def make_task(size: int, *, round: int = 0, degree: int = 100) -> Task:
    return msgspec.structs.replace(TASK, key=KEY, round=round, num_directions=size, secure=degree)


def make_replies(clients: Collection[int], size: int, *, round: int = 0, seed: int = 0) -> list[Reply]:
    """With the largest integers of both signs."""
    rng = np.random.default_rng(seed)
    replies = []
    for client in clients:
        weight = int(rng.integers(1, 256))
        values = rng.choice([-LIMIT, -1, 0, 1, LIMIT, 77], size) * weight
        replies.append(
            Reply(
                round=round,
                client=client,
                weight=weight,
                scalars=pack_int32(values.astype(np.int64)),
                clipped=int(rng.integers(0, size + 1)),
                nonfinite=int(rng.integers(0, size + 1)),
            )
        )
    return replies


def values_of(reply: Reply) -> Integers:
    return np.frombuffer(reply.scalars, "<i4").astype(np.int64)


def plain_sum(replies: Sequence[Reply], clients: Collection[int]) -> tuple[list[int], tuple[int, int, int]]:
    chosen = [reply for reply in replies if reply.client in clients]
    total = sum((values_of(reply) for reply in chosen), np.zeros(len(replies[0].scalars) // 4, np.int64))
    counts = (sum(r.weight for r in chosen), sum(r.clipped for r in chosen), sum(r.nonfinite for r in chosen))
    return total.tolist(), counts


@dataclass
class Driver:
    """One round, message by message, each encoded and decoded as on a wire; and everything that was said."""

    clients: Mapping[int, SecureClient]
    replies: Sequence[Reply]
    round: int = 0
    degree: int = 100
    adverts: dict[int, Advert] = field(default_factory=dict)
    introduced: dict[int, tuple[Introduced, ...]] = field(default_factory=dict)
    vectors: dict[int, Masked] = field(default_factory=dict)
    survivors: Survivors | None = None
    unmasked: dict[int, Unmasked] = field(default_factory=dict)
    last: dict[int, Unmasked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cohort = sorted(self.clients)
        self.cards = {client: secure.card for client, secure in self.clients.items()}
        size = len(self.replies[0].scalars) // 4
        self.server = SecureRound(KEY, self.round, self.cohort, self.cards, size, degree=self.degree)

    def advertise(self, clients: Sequence[int] | None = None) -> None:
        for client in self.cohort if clients is None else clients:
            advert = wire(self.clients[client].advertise(self.round, self.cohort, self.cards))
            self.adverts[client] = advert
            self.server.advertise(advert)

    def mask(self, clients: Sequence[int] | None = None, *, late: Collection[int] = ()) -> None:
        """Vectors; those of ``late`` clients are made and do not reach the server in time."""
        given = {reply.client: reply for reply in self.replies}
        for client in sorted(self.adverts) if clients is None else clients:
            reply = given[client]
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
        for found in (self.unmasked, self.last) if self.server.lost else (self.unmasked,):
            for client in asked:
                if client in self.server.missing:
                    found[client] = wire(self.clients[client].unmask(wire(self.server.told(client))))
                    self.server.unmask(found[client])


def wire(letter: Letter) -> Letter:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(letter), type=type(letter))


# -- (a) the sum is exact ----------------------------------------------------------------------------------------------


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, int, Lost]:
    count = draw(st.integers(2, 9))
    degree = draw(st.sampled_from([4, 6, 100]))
    numbers = [3 * i for i in range(count)]
    few = st.lists(st.sampled_from(numbers), max_size=max(1, count // 3), unique=True)
    return count, degree, draw(st.integers(1, 5)), Lost(draw(few), draw(few), draw(few), draw(few))


def can_be_summed(cohort: Sequence[int], round: int, degree: int, lost: Lost) -> bool:
    """By sets alone: in each neighbourhood the threshold must be left at every stage."""
    around = neighbourhoods(cohort, (KEY, round), degree)
    advertised = set(cohort) - set(lost.before_advert)
    alive = advertised - set(lost.before_vector)
    opened = alive - set(lost.before_shares)
    ended = opened - set(lost.before_last_shares)

    def enough(dealer: int, left: set[int]) -> bool:
        return len(set(around[dealer]) & left) >= threshold(len(around[dealer]))

    return (
        len(alive) >= 2
        and all(enough(dealer, alive) for dealer in advertised)
        and all(enough(dealer, opened) for dealer in alive)
        and all(enough(dealer, ended) for dealer in advertised - alive)
    )


@settings(max_examples=150, deadline=None)
@given(rounds(), st.integers(0, 2**16))
def test_the_sum_is_exact_whoever_is_lost(case: tuple[int, int, int, Lost], round: int) -> None:
    count, degree, size, lost = case
    clients = make_clients(count, degree=degree)
    task, replies = make_task(size, round=round, degree=degree), make_replies(clients, size, round=round, seed=round)
    if not can_be_summed(sorted(clients), round, degree, lost):
        with pytest.raises(SecureSumError):
            sum_together(task, clients, replies, lost)
        return
    total = sum_together(task, clients, replies, lost).total
    alive = set(clients) - set(lost.before_advert) - set(lost.before_vector)
    assert total.participants == tuple(sorted(alive))
    assert (total.vectors.reshape(-1).tolist(), (total.weight_sum, total.clipped, total.nonfinite)) == plain_sum(
        replies, alive
    )


def refused(call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(SecureSumError):
        call(*arguments)


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


@pytest.mark.slow
def test_a_hundred_and_fifty_clients_in_a_graph() -> None:
    clients = make_clients(150, degree=20)
    replies = make_replies(clients, 10)
    lost = Lost(before_advert=[0], before_vector=range(3, 45, 6), before_shares=[444], before_last_shares=[300])
    total = sum_together(make_task(10, degree=20), clients, replies, lost).total
    assert total.vectors.reshape(-1).tolist() == plain_sum(replies, total.participants)[0]
    assert len(total.participants) == 142


# -- (b) masks and shares say nothing ----------------------------------------------------------------------------------

UNIFORM = (130.0, 400.0)
"""Chi-square of bytes with 255 degrees of freedom: mean 255, standard deviation 23; outside by chance once in 10^7."""


def counts_of(data: bytes) -> npt.NDArray[np.float64]:
    return np.bincount(np.frombuffer(data, np.uint8), minlength=256).astype(np.float64)


def chi_square(data: bytes) -> float:
    found, expected = counts_of(data), len(data) / 256
    return float(((found - expected) ** 2 / expected).sum())


def chi_square_of_two(a: bytes, b: bytes) -> float:
    one, two = counts_of(a), counts_of(b)
    return float(((one - two) ** 2 / (one + two)).sum())


def masked_vectors(values: Integers) -> dict[int, Masked]:
    clients = make_clients(3)
    replies = [
        Reply(round=0, client=c, weight=1, scalars=pack_int32(values), clipped=0, nonfinite=0) for c in sorted(clients)
    ]
    driver = Driver(clients, replies)
    driver.advertise()
    driver.mask()
    return driver.vectors


def test_masked_vectors_are_uniform_whatever_is_in_them() -> None:
    size = 20_000
    zeros, large = (masked_vectors(np.full(size, value, np.int64)) for value in (0, LIMIT * 255))
    for vectors in (zeros, large):
        for masked in vectors.values():
            assert UNIFORM[0] < chi_square(masked.vector) < UNIFORM[1]
    for client in zeros:
        assert UNIFORM[0] < chi_square_of_two(zeros[client].vector, large[client].vector) < UNIFORM[1]
    a, b = (np.frombuffer(zeros[c].vector, "<u4").astype(np.uint32) for c in (0, 3))
    assert UNIFORM[0] < chi_square((a - b).tobytes()) < UNIFORM[1]
    assert UNIFORM[0] < chi_square((a + b).tobytes()) < UNIFORM[1]
    plain = np.full(size, LIMIT * 255, "<i4").tobytes()
    assert chi_square(plain) > UNIFORM[1]  # the test can fail


class Field:
    """GF(2^128) on Python's integers, bit by bit."""

    @staticmethod
    def times(a: int, b: int) -> int:
        found = 0
        for bit in range(128):
            found ^= a << bit if b >> bit & 1 else 0
        for bit in range(255, 127, -1):
            found ^= (1 << 128 | 0b10000111) << bit - 128 if found >> bit & 1 else 0
        return found

    @staticmethod
    def inverse(a: int) -> int:
        """a^(2^128 - 2)."""
        found = 1
        for _ in range(127):
            a = Field.times(a, a)
            found = Field.times(found, a)
        return found

    @staticmethod
    def at(polynomial: Sequence[int], x: int) -> int:
        found = 0
        for coefficient in reversed(polynomial):
            found = Field.times(found, x) ^ coefficient
        return found


def number(share: bytes) -> int:
    return int.from_bytes(share, "big")


@pytest.mark.parametrize("need", [2, 3, 5])
def test_fewer_shares_than_the_threshold_fit_every_secret(need: int) -> None:
    """For each candidate there is one last share, and so one polynomial, that makes it the secret."""
    secret, rng = random.Random(0).randbytes(SECRET), random.Random(1)
    shares = split(secret, need, need + 2)
    for positions in (tuple(range(1, need + 1)), tuple(range(3, need + 3))):
        known = [shares[p - 1] for p in positions[:-1]]
        zero, one = bytes(SECRET), (1).to_bytes(SECRET, "big")
        with_zero = number(recombine([positions], [[*known, zero]])[0])
        factor = number(recombine([positions], [[zero] * (need - 1) + [one]])[0])
        assert factor != 0
        for candidate in [0, 1, number(secret), *(rng.getrandbits(128) for _ in range(5))]:
            last = Field.times(candidate ^ with_zero, Field.inverse(factor))
            given = [*known, last.to_bytes(SECRET, "big")]
            assert number(recombine([positions], [given])[0]) == candidate
            assert (last == number(shares[positions[-1] - 1])) == (candidate == number(secret))


def test_fewer_shares_than_the_threshold_are_uniform_whatever_the_secret() -> None:
    samples = []
    for secret in (bytes(SECRET), b"\xff" * SECRET):
        drawn = [split(secret, 4, 5) for _ in range(1500)]
        samples.append(b"".join(b"".join(shares[:3]) for shares in drawn))
        # one share, the difference of two, and what three give in the place of four
        for data in (
            b"".join(shares[0] for shares in drawn),
            b"".join((number(shares[0]) ^ number(shares[1])).to_bytes(SECRET, "big") for shares in drawn),
            b"".join(recombine([(1, 2, 3)] * len(drawn), [shares[:3] for shares in drawn])),
        ):
            assert UNIFORM[0] < chi_square(data) < UNIFORM[1]
        assert recombine([(1, 2, 3, 4)], [drawn[0][:4]]) == [secret]
    assert UNIFORM[0] < chi_square_of_two(*samples) < UNIFORM[1]


# -- (c) the attack ----------------------------------------------------------------------------------------------------


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
        """Of a client's mask seed and of its self-mask seed, by position: from letters and from colluders."""
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
    again = driver.server.told(0)
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
        letter = clients[client].unmask(driver.server.told(client))
        assert [bool(share) for share in letter.shares] == [False] * 4 + [True]
        driver.server.unmask(letter)
        refused(clients[client].unmask, driver.server.told(client))
    assert driver.server.total()[0].tolist() == plain_sum(driver.replies, alive)[0]


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
    cards = {other: Card(other.to_bytes(32, "little"), client.card.sealing) for other in range(300)}
    with pytest.raises(SecureSumError, match=r"round 0: a neighbourhood of .*: expected 2 to 255"):
        client.advertise(0, range(300), {**cards, 0: client.card})


def test_nothing_is_encrypted_twice_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a round is advertised again, and when a client starts anew with its old identity."""
    sealed, masked = Counter[bytes](), Counter[bytes]()
    cipher, stream = ChaCha20Poly1305, masks.stream

    class Watched:
        def __init__(self, key: bytes) -> None:
            self.key = key

        def encrypt(self, nonce: bytes, data: bytes, context: bytes) -> bytes:
            sealed[self.key + nonce] += 1
            return cipher(self.key).encrypt(nonce, data, context)

        def decrypt(self, nonce: bytes, data: bytes, context: bytes) -> bytes:
            return cipher(self.key).decrypt(nonce, data, context)

    def watched(key: bytes, size: int) -> npt.NDArray[np.uint32]:
        masked[key] += 1
        return stream(key, size)

    monkeypatch.setattr(masks, "ChaCha20Poly1305", Watched)
    monkeypatch.setattr(masks, "stream", watched)
    identities = {client: Identity.make() for client in range(4)}
    for _ in range(2):
        clients = {client: SecureClient(identity, client, KEY) for client, identity in identities.items()}
        for round in (1, 2):
            driver = Driver(clients, make_replies(clients, 2, round=round), round=round)
            driver.advertise()
            driver.advertise()
            driver.mask()
    assert len(sealed) == 2 * 2 * 2 * 12
    assert set(sealed.values()) == {1}
    assert Counter(masked.values()) == {2: 2 * 2 * 6, 1: 2 * 2 * 4}  # by both of a pair; by one alone


# -- liars -------------------------------------------------------------------------------------------------------------


def round_with(advert: Callable[[Advert], Advert], count: int = 5) -> Driver:
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


def garbled(advert: Advert, parts: Sequence[int]) -> Advert:
    sealed = [bytes(48) if i in parts else part for i, part in enumerate(advert.sealed)]
    return msgspec.structs.replace(advert, sealed=tuple(sealed))


def committed_to_others(advert: Advert) -> Advert:
    return msgspec.structs.replace(advert, commitments=bytes(32) + advert.commitments[32:])


@pytest.mark.parametrize("change", [lambda advert: garbled(advert, [0]), committed_to_others])
def test_holders_complain_of_shares_that_are_not_those_committed_to(change: Callable[[Advert], Advert]) -> None:
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


# -- malformed letters -------------------------------------------------------------------------------------------------

INTEGERS = st.one_of(st.integers(-5, 30), st.sampled_from([-(2**63), 2**63, 2**64 - 1, 2**70]))
BYTES = st.one_of(st.binary(max_size=80), st.sampled_from([bytes(32), b"\xff" * 32, bytes(64), bytes(10_000)]))
FIELDS: dict[str, st.SearchStrategy[object]] = {
    **dict.fromkeys(["round", "client"], INTEGERS),
    **dict.fromkeys(["mask_public", "self_commitment", "commitments", "signature", "vector", "rest"], BYTES),
    **dict.fromkeys(["sealed", "shares"], st.lists(BYTES, max_size=8).map(tuple)),
    **dict.fromkeys(["complaints", "clients"], st.lists(INTEGERS, max_size=8).map(tuple)),
    "signatures": st.lists(st.tuples(INTEGERS, BYTES), max_size=8).map(tuple),
}


def mutated(letter: Letter, data: st.DataObject) -> Letter:
    names = data.draw(st.lists(st.sampled_from(letter.__struct_fields__), min_size=1, max_size=2, unique=True))
    changes = {name: data.draw(FIELDS[name], label=name) for name in names}
    if isinstance(letter, Introduced) and "sealed" in changes:
        changes["sealed"] = data.draw(BYTES)
    return msgspec.structs.replace(letter, **changes)


def attempt(call: Callable[[], object]) -> None:
    """It is taken, or refused; nothing else is raised."""
    try:
        call()
    except SecureSumError:
        return


@LETTERS
@given(st.data())
def test_malformed_letters_are_refused_and_the_round_goes_on(data: st.DataObject) -> None:
    clients = make_clients(4)
    driver = Driver(clients, make_replies(clients, 2))
    cohort = data.draw(st.lists(INTEGERS, max_size=6))
    attempt(lambda: clients[0].advertise(data.draw(INTEGERS), cohort, dict.fromkeys(cohort, driver.cards[0])))
    card = Card(data.draw(BYTES), data.draw(BYTES))
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
    attempt(lambda: clients[0].unmask(mutated(driver.server.told(0), data)))
    attempt(lambda: clients[6].unmask(mutated(Survivors(round=0, clients=(0, 3, 6)), data)))
    attempt(driver.server.total)


# -- (d) known answers -------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.binary(min_size=SECRET, max_size=SECRET), st.integers(2, 20), st.randoms(use_true_random=False))
def test_shares_are_those_of_pycryptodome(secret: bytes, holders: int, order: random.Random) -> None:
    need = threshold(holders)
    shares = split(secret, need, holders)
    chosen = order.sample(range(1, holders + 1), need)
    assert Shamir.combine([(p, shares[p - 1]) for p in chosen], ssss=False) == secret
    theirs = dict(Shamir.split(need, holders, secret, ssss=False))
    assert recombine([chosen], [[theirs[p] for p in chosen]]) == [secret]
    others = order.sample(range(1, holders + 1), need)
    both = recombine([chosen, others], [[theirs[p] for p in chosen], [shares[p - 1] for p in others]])
    assert both == [secret, secret]


def test_shares_lie_on_a_polynomial_of_the_field() -> None:
    polynomial = [random.Random(i).getrandbits(128) for i in range(3)]
    positions = (1, 7, 255)
    given = [Field.at(polynomial, x).to_bytes(SECRET, "big") for x in positions]
    assert recombine([positions], [given]) == [polynomial[0].to_bytes(SECRET, "big")]
    assert {len(share) for share in split(bytes(SECRET), 2, 255)} == {SECRET}
    for wrong in ((bytes(15), 2, 3), (bytes(SECRET), 0, 3), (bytes(SECRET), 4, 3), (bytes(SECRET), 2, 256)):
        with pytest.raises(ValueError, match="expected 16"):
            split(*wrong)


def test_keys_and_masks_are_frozen() -> None:
    """Other implementations must find these. The stream under a key of zeros is in RFC 8439, A.1."""
    assert masks.stream(bytes(32), 4).astype("<u4").tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    one, two = mask_key(b"a" * 16), mask_key(b"b" * 16)
    public = two.public_key().public_bytes_raw()
    identity, other = Identity.make(bytes(32)), Identity.make(b"x" * 32)
    here = context(1, 2, 3)
    bound = messages.sealing(1, 2, 3, 4, public)
    found = {
        "mask key": public.hex(),
        "pair": pair_mask(one, public, context(1, 2, 3, 4), 3).tolist(),
        "self": self_mask(b"s" * 16, here, 3).tolist(),
        "signing": identity.card.signing.hex(),
        "sealing": identity.card.sealing.hex(),
        "sealed": identity.seal(other.card, bound, b"z" * 32).hex(),
        "commitment": commitment(here, b"s" * 16).hex(),
        "rest": messages.rest_of(b"c" * 16, b"d" * 64, (b"", b"e" * 48)).hex(),
        "signature": identity.signing.sign(messages.signed_survivors(1, 2, (3, 4))).hex()[:32],
        "advert": identity.signing.sign(messages.signed_advert(1, 2, 3, public, b"r" * 32)).hex()[:32],
    }
    assert other.open(identity.card, bound, bytes.fromhex(str(found["sealed"]))) == b"z" * 32
    assert pair_mask(two, one.public_key().public_bytes_raw(), context(1, 2, 3, 4), 3).tolist() == found["pair"]
    assert found == GOLDEN


GOLDEN: dict[str, object] = {
    "mask key": "3766176742903c86aa955e335000beae5bb255e17d642bf9dd1062078854024c",
    "pair": [225961031, 1350959921, 167865718],
    "self": [727219640, 420488495, 4106485047],
    "signing": "55a6b46923d3819f05a80145956c185cf42c620f37f9696b566ce0213b83a709",
    "sealing": "3d66eaf2d631124721f284e800d9b465c4cd0a19aacf320155694b41f7265813",
    "sealed": "e61f256808037d0b0789c9564113adfa5b494716e02e4eb3e219346aa302e4b445c8c9758e896a804e858334c9305e97",
    "commitment": "c4057e4759e5771cad58196fe83b83ca",
    "rest": "14975278f64dee339430156b8c76bf11724349939a3689844da4e0e1aba8c764",
    "signature": "6d75f916969c6f510e9bdae154aed315",
    "advert": "a39815148e05b813a3f3dcdea4c1102f",
}


def test_what_is_sealed_opens_in_its_context_only() -> None:
    one, two, three = (Identity.make() for _ in range(3))
    sealed = one.seal(two.card, b"here", b"secret")
    assert two.open(one.card, b"here", sealed) == b"secret"
    for card, bound, data in (
        (one.card, b"there", sealed),
        (three.card, b"here", sealed),
        (one.card, b"here", sealed[:-1]),
        (one.card, b"here", b""),
    ):
        refused(two.open, card, bound, data)
    refused(three.open, one.card, b"here", sealed)


def test_the_threshold_is_above_half_of_holders_and_colluders() -> None:
    for holders in range(2, 252):
        need, colluders = threshold(holders), -(-holders // 3) - 1  # fewer than a third
        assert need <= holders
        assert 2 * need > holders + colluders
        assert need > colluders
        assert need == max(2, int(np.ceil(2 * holders / 3 - 1e-9)))


@pytest.mark.parametrize(("count", "degree"), [(2, 100), (5, 4), (6, 4), (7, 5), (50, 6), (300, 100), (1000, 20)])
def test_the_graph_is_regular_and_connected(count: int, degree: int) -> None:
    around = neighbourhoods(range(count), (KEY, 4), degree)
    expected = count if count - 1 <= degree else 2 * (degree // 2) + 1
    assert {len(near) for near in around.values()} == {expected}
    assert all(client in near and list(near) == sorted(set(near)) for client, near in around.items())
    assert all(client in around[other] for client, near in around.items() for other in near)
    seen, front = {0}, {0}
    while front:
        front = {other for client in front for other in around[client]} - seen
        seen |= front
    assert len(seen) == count


def test_the_graph_is_another_each_round_and_the_same_on_every_machine() -> None:
    first, second = (neighbourhoods(range(12), (KEY, round), 4) for round in (0, 1))
    assert first != second
    assert first == neighbourhoods(list(range(12))[::-1], (KEY, 0), 4)
    assert [first[0], first[11]] == GRAPH


GRAPH = [(0, 1, 3, 4, 11), (0, 1, 3, 8, 11)]


# -- (e) training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"difference": "central", "family": "rademacher", "client": (bf.clip_scalars(0.5),)},
        {"local_steps": 2, "local_lr": 0.1},
        {"lattice": 2, "sigma": 1e-3},
        {"participation": 0.6, "aggregate": bf.secure_sum(neighbours=4)},
        {"aggregate": bf.secure_sum(minimum=2)},
    ],
)
def test_training_is_the_same_with_and_without(changes: dict[str, object]) -> None:
    secure = msgspec.structs.replace(METHOD, **{"aggregate": bf.secure_sum(), **changes})
    clients = 2 if secure.aggregate == bf.secure_sum(minimum=2) else 10 if "participation" in changes else 4
    plain = msgspec.structs.replace(secure, aggregate=bf.weighted_sum())
    runs = [bf.train(m, digits_engine(clients), initial_weights(), rounds=6) for m in (secure, plain)]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    assert runs[0].state.step == 6
    for with_masks, without in pairwise(run.records[1] for run in runs):
        assert (with_masks.bytes_up or 0) > (without.bytes_up or 0)
        assert (with_masks.bytes_down or 0) > (without.bytes_down or 0)


def test_one_engine_serves_one_run_after_another() -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum())
    engine = digits_engine()
    first, second = (bf.train(method, engine, initial_weights(), rounds=3) for _ in range(2))
    assert first.weights_sha256 == second.weights_sha256


def test_what_cannot_be_summed_is_refused_before_training() -> None:
    with pytest.raises(PlanError, match="secure_sum with sharing = 'per-client': scalars along different directions"):
        bf.Method(sharing="per-client", aggregate=bf.secure_sum())
    for wrong, message in (
        ({"minimum": 1}, r"secure_sum.minimum = 1: expected an integer >= 2"),
        ({"neighbours": 1}, r"secure_sum.neighbours = 1: expected an integer >= 4 and <= 250"),
        ({"neighbours": 251}, r"secure_sum.neighbours = 251"),
    ):
        with pytest.raises(OptionError, match=message):
            bf.secure_sum(**wrong)
    with pytest.raises(PlanError, match=r"2 participants with secure_sum.minimum = 3: expected at least as many"):
        bf.train(
            msgspec.structs.replace(METHOD, aggregate=bf.secure_sum()), digits_engine(2), initial_weights(), rounds=1
        )
    with pytest.raises(PlanError, match=r"their counts could reach 2\*\*32"):
        SecureSum().check(2**20, 2**12)
    SecureSum().check(2**20, 2**12 - 1)
    with pytest.raises(OptionError, match=r"secure_sum = True: expected none with backprop"):
        TrainConfig(backprop="fedsgd", secure_sum=True)


def test_a_sum_must_be_one_of_participants() -> None:
    task, cohort = make_task(2), {1: 3, 4: 5, 6: 2}
    good = Aggregate(np.array([[[-8 * LIMIT, 8 * LIMIT]]]), (1, 4), 8, 0, 0)
    assert SecureSum().combine(task, cohort, good) is good
    assert SecureSum().combine(task, cohort, nothing(task)).participants == ()
    for wrong in (
        replace(good, weight_sum=7),
        replace(good, participants=(1, 5)),
        replace(good, vectors=good.vectors + 1),
        replace(good, vectors=good.vectors[:, :, :1]),
        [],
        make_replies([1, 4], 2),
    ):
        with pytest.raises(ReplyError, match=r"round 0: .*expected"):
            SecureSum().combine(task, cohort, wrong)
    with pytest.raises(ReplyError, match="a sum: expected the clients' replies"):
        bf.weighted_sum().combine(task, cohort, good)


class LosesRounds(bf.LocalEngine):
    """So few clients are left in some rounds that no sum can be made."""

    lost: Collection[int] = ()

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        found = super().exchange(task, participants, state, rows)
        return replace(found, replies=(), total=nothing(task)) if task.round in self.lost else found


def losing(*lost: int) -> LosesRounds:
    train, _ = bf.load("digits")
    engine = LosesRounds(TorchRuntime(linear(), F.cross_entropy, threads=1), bf.partition(train, 3))
    engine.lost = lost
    return engine


def test_a_round_without_a_sum_is_void_and_the_run_goes_on(tmp_path: Path) -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum(), optimizer=bf.adam(0.01))
    _, test = bf.load("digits")
    run = bf.train(method, losing(5, 6), initial_weights(), rounds=9, test=test, out=tmp_path / "run", snapshot_every=3)
    journal = bf.Journal.open(tmp_path / "run")
    rows = [decode_row(data) for data in journal.rows]
    assert [row.round for row in rows if not row.participants] == [5, 6]
    for before, row in ((rows[4], rows[5]), (rows[5], rows[6])):
        assert not row.applied
        assert row.restores is None
        assert not row.integers.any()
        assert row.weights_sha256 == before.weights_sha256
        assert next_exponent(row) == row.exponent
    assert rows[7].applied
    assert rows[7].exponent == rows[5].exponent
    assert run.state.step == 7

    state = method.init(initial_weights())
    for row in rows:
        state = replay(state, journal.config.table, row)
    assert np.array_equal(state.weights, run.weights)
    assert np.array_equal(journal.state().weights, run.weights)
    journal.close()
    for command in ("report", "status", "replay"):
        done = invoke(tmp_path, command, tmp_path / "run")
        assert done.code == 0, (command, done)
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
    resumed = bf.resume(tmp_path / "run", losing(), test=test, rounds=11)
    assert resumed.state.step == 9


def test_a_lost_first_round_is_calibrated_again() -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum())
    run = bf.train(method, losing(0), initial_weights(), rounds=6)
    assert [record.applied for record in run.records] == [False, False, True, True, True, True, True]


def test_rounds_that_are_all_lost_leave_the_weights() -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum())
    run = bf.train(method, losing(*range(8)), initial_weights(), rounds=7)
    assert np.array_equal(run.weights, initial_weights())
    assert run.state.step == 0


def test_the_command_trains_the_same(tmp_path: Path) -> None:
    command = ["train", "--num-directions", "4", "--rounds", "3", "--json", "--clients"]
    outputs = [
        invoke(tmp_path, *command, "4", "--out", name, *extra)
        for name, extra in (("on", ["--secure-sum"]), ("off", []))
    ]
    assert [done.code for done in outputs] == [0, 0], outputs
    hashes = {msgspec.json.decode(done.out)["weights_sha256"] for done in outputs}
    assert len(hashes) == 1
    too_few = invoke(tmp_path, *command, "2", "--secure-sum", "--out", "few")
    assert too_few.code == 2
    assert "expected at least as many" in too_few.err
    assert "Traceback" not in too_few.err

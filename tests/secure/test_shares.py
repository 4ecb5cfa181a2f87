"""Shamir's shares: those of pycryptodome, on a polynomial of the field, and silent below the threshold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.secure.graph import threshold
from baffle.secure.shares import SECRET, recombine, split
from secure_helpers import UNIFORM, chi_square, chi_square_of_two


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

"""A client's side of the secure sum: keys for a round, its masked vector, its shares; each once, and never again.

What it refuses: a round that it answered before, a cohort below its minimum, adverts that their clients did not sign,
survivors that it was not introduced to, and to give both shares of anyone. It counts the scalars that it has given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from baffle.core.aggregate import FEWEST_NEIGHBOURS
from baffle.core.types import MAX_WEIGHT_SUM, Integers
from baffle.errors import SecureSumError
from baffle.secure.graph import MOST_NEIGHBOURS, neighbourhoods, threshold
from baffle.secure.masks import Card, Identity, mask_key, pack_words, pair_mask, self_mask, verify
from baffle.secure.messages import (
    Advert,
    Introduced,
    Masked,
    Survivors,
    Unmasked,
    commitment,
    context,
    rest_of,
    sealing,
    signed_advert,
    signed_survivors,
)
from baffle.secure.shares import MOST_HOLDERS, SECRET, split


@dataclass
class _Keys:
    """What a client knows of one round, until that is over."""

    cohort: frozenset[int]
    around: tuple[int, ...]
    mask_seed: bytes
    self_seed: bytes
    own: bytes
    """The client's own shares of both."""
    cards: Mapping[int, Card]
    held: dict[int, bytes] = field(default_factory=dict)
    """By client that was introduced: its two shares that this one holds; empty if they were not what it said."""
    masked: bool = False
    told: tuple[int, ...] | None = None
    """The survivors that it signed."""


class SecureClient:
    """One client of one run. ``minimum`` is the smallest cohort that it hides in.

    Examples:
        >>> client = SecureClient(Identity.make(), client=0, key=7)
        >>> client.exposed
        0
    """

    def __init__(
        self, identity: Identity, client: int, key: int, *, minimum: int = 3, degree: int = MOST_NEIGHBOURS
    ) -> None:
        if degree < FEWEST_NEIGHBOURS:
            raise SecureSumError(f"{degree} neighbours at most: expected at least {FEWEST_NEIGHBOURS}")
        self._identity, self._client, self._key = identity, client, key
        self._minimum, self._degree = minimum, degree
        self._keys: dict[int, _Keys] = {}
        self._last = -1
        self.exposed = 0
        """Scalars that went into sums so far: projections of this client's gradients, hidden in a cohort."""

    @property
    def card(self) -> Card:
        """The public half of this client's identity."""
        return self._identity.card

    def advertise(self, round: int, cohort: Sequence[int], cards: Mapping[int, Card]) -> Advert:
        """Fresh keys for a round, and shares of them for the neighbours. Raises SecureSumError if it is over."""
        self._check_new(round, cohort)
        around = neighbourhoods(cohort, (self._key, round), self._degree).get(self._client)
        if around is None or any(other not in cards for other in around):
            raise SecureSumError(f"round {round}: a cohort without this client, or without the cards of its neighbours")
        if not threshold(len(around)) <= len(around) <= MOST_HOLDERS:
            raise SecureSumError(f"round {round}: a neighbourhood of {len(around)}: expected 2 to {MOST_HOLDERS}")
        if cards[self._client] != self.card or len({cards[other] for other in around}) < len(around):
            raise SecureSumError(f"round {round}: a wrong card for this client, or one for two: expected one each")
        mask_seed, self_seed = os.urandom(SECRET), os.urandom(SECRET)
        public = mask_key(mask_seed).public_key().public_bytes_raw()
        need = threshold(len(around))
        pairs = list(zip(split(mask_seed, need, len(around)), split(self_seed, need, len(around)), strict=True))
        here = context(self._key, round, self._client)
        commitments = b"".join(commitment(here, share) for pair in pairs for share in pair)
        sealed = tuple(
            b""
            if holder == self._client
            else self._identity.seal(
                cards[holder], sealing(self._key, round, self._client, holder, public), b"".join(pair)
            )
            for holder, pair in zip(around, pairs, strict=True)
        )
        self_commitment = commitment(here, self_seed)
        rest = rest_of(self_commitment, commitments, sealed)
        own = b"".join(pairs[around.index(self._client)])
        self._keys = {r: self._keys[r] for r in sorted(self._keys)[-2:] if r >= round - 1}
        self._keys[round] = _Keys(
            frozenset(cohort), around, mask_seed, self_seed, own, {other: cards[other] for other in around}
        )
        return Advert(
            round=round,
            client=self._client,
            mask_public=public,
            self_commitment=self_commitment,
            commitments=commitments,
            sealed=sealed,
            signature=self._identity.signing.sign(signed_advert(self._key, round, self._client, public, rest)),
        )

    def mask(
        self, round: int, introduced: Sequence[Introduced], values: Integers, counts: Sequence[int], word: int = 32
    ) -> Masked:
        """The vector of weighted scalars and counts under all masks. A round is answered once."""
        keys = self._keys.get(round)
        if keys is None or keys.masked or round <= self._last:
            raise SecureSumError(f"round {round}: answered before, or never advertised: expected a new round")
        keys.held = self._meet(round, keys, introduced)
        here = context(self._key, round, self._client)
        plain = np.concatenate([values.reshape(-1), np.asarray(counts, np.int64)])
        vector = plain.astype(np.uint32) + self_mask(keys.self_seed, here, plain.size)
        private = mask_key(keys.mask_seed)
        for other in introduced:
            pair = context(self._key, round, *sorted((self._client, other.client)))
            mask = pair_mask(private, other.mask_public, pair, plain.size)
            vector = vector + mask if self._client < other.client else vector - mask
        keys.masked, self._last = True, round
        self.exposed += values.size
        return Masked(
            round=round,
            client=self._client,
            vector=pack_words(vector[: values.size], word) + vector[values.size :].astype("<u4").tobytes(),
            complaints=tuple(client for client, held in keys.held.items() if not held),
        )

    def unmask(self, told: Survivors) -> Unmasked:
        """One share of everyone around: never both. When all are given the round's keys are forgotten.

        First it gives shares of the survivors' self-masks and signs who they are, once. The others' mask keys it
        gives when it sees that the threshold around it has signed the same, so that there is one set of survivors.
        """
        keys = self._keys.get(told.round)
        if keys is None or not keys.masked:
            raise SecureSumError(f"round {told.round}: unmasked before, or never masked: expected a round in progress")
        alive = set(told.clients)
        if tuple(sorted(alive)) != told.clients or not told.clients or not 0 <= told.clients[0] <= max(alive) < 2**63:
            raise SecureSumError(
                f"round {told.round}: {len(told.clients)} survivors: expected each once, in ascending order"
            )
        if self._client not in alive or len(alive) < self._minimum:
            raise SecureSumError(
                f"round {told.round}: {len(alive)} survivors, with this client or without: expected it among at least "
                f"{self._minimum}"
            )
        known = {**keys.held, self._client: keys.own}
        if alive - keys.cohort or alive & set(keys.around) - known.keys():
            raise SecureSumError(f"round {told.round}: survivors that were not introduced: expected those that were")
        near = sum(other in alive for other in known)
        if near < threshold(len(keys.around)):
            raise SecureSumError(f"round {told.round}: {near} survivors around this client: expected the threshold")
        first, signed = keys.told is None, signed_survivors(self._key, told.round, told.clients)
        if keys.told is None:
            keys.told = told.clients
            shares = [held[SECRET:] if other in alive else b"" for other, held in sorted(known.items())]
        else:
            if told.clients != keys.told or not self._agreed(keys, told, signed):
                raise SecureSumError(
                    f"round {told.round}: told of survivors again: expected the same, signed by "
                    f"{threshold(len(keys.around))} around this client"
                )
            shares = [b"" if other in alive else held[:SECRET] for other, held in sorted(known.items())]
        if not first or alive >= known.keys():
            del self._keys[told.round]
        return Unmasked(
            round=told.round,
            client=self._client,
            shares=tuple(shares),
            signature=self._identity.signing.sign(signed),
        )

    def _agreed(self, keys: _Keys, told: Survivors, signed: bytes) -> bool:
        """Whether the threshold of survivors around this client, and itself, signed the survivors that it was told."""
        given = {c: s for c, s in told.signatures[: len(keys.around)] if c in keys.around and c in told.clients}
        agreed = {c for c, signature in given.items() if verify(keys.cards[c], signature, signed)} | {self._client}
        return len(agreed) >= threshold(len(keys.around))

    def _meet(self, round: int, keys: _Keys, introduced: Sequence[Introduced]) -> dict[int, bytes]:
        """Check who is introduced; the shares that each has for this client."""
        names = [other.client for other in introduced]
        if not set(names) <= set(keys.around) - {self._client} or names != sorted(set(names)):
            raise SecureSumError(
                f"round {round}: introduced to {len(names)} clients: expected neighbours, each once, ascending"
            )
        need = max(threshold(len(keys.around)), min(self._minimum, len(keys.around)))
        if len(names) + 1 < need:
            raise SecureSumError(f"round {round}: {len(names) + 1} clients around this one: expected at least {need}")
        held = {}
        for other in introduced:
            card = keys.cards[other.client]
            signed = signed_advert(self._key, round, other.client, other.mask_public, other.rest)
            if not verify(card, other.signature, signed):
                raise SecureSumError(f"round {round}: client {other.client}: its advert is not signed by it")
            held[other.client] = self._open(round, other, card)
        return held

    def _open(self, round: int, other: Introduced, card: Card) -> bytes:
        """Both shares; empty if they are not what their client committed to."""
        try:
            there = sealing(self._key, round, other.client, self._client, other.mask_public)
            shares = self._identity.open(card, there, other.sealed)
        except SecureSumError:
            return b""
        there = context(self._key, round, other.client)
        expected = commitment(there, shares[:SECRET]) + commitment(there, shares[SECRET:])
        return shares if len(shares) == 2 * SECRET and expected == other.commitments else b""

    def _check_new(self, round: int, cohort: Sequence[int]) -> None:
        if not self._last < round < 2**63:
            raise SecureSumError(f"round {round}: answered before, or no round: expected a new one")
        if not self._minimum <= len(cohort) <= MAX_WEIGHT_SUM:
            raise SecureSumError(
                f"round {round}: a cohort of {len(cohort)}: expected {self._minimum} to {MAX_WEIGHT_SUM} clients"
            )
        if len(set(cohort)) < len(cohort) or not 0 <= min(cohort) <= max(cohort) < 2**63:
            raise SecureSumError(f"round {round}: a cohort with a client twice, or with no number of one")

"""A client's side of a secure sum: its keys for a round, its masked vector, its shares; each of them only once.

A client refuses a round that it answered before, a cohort below its minimum, adverts without their clients' signatures
and surviving clients that it was not introduced to, and it never gives both shares of one client. It counts the
scalars that it has contributed. Stages are named as in Bonawitz et al. (CCS 2017).
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
from baffle.secure.masks import Identity, PublicKeys, mask_key, pack_words, pair_mask, self_mask, verify
from baffle.secure.messages import (
    Introduced,
    KeysResponse,
    Masked,
    Survivors,
    UnmaskResponse,
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
    """What a client knows about one round, until it is over."""

    cohort: frozenset[int]
    around: tuple[int, ...]
    """The client's neighbourhood."""
    mask_seed: bytes
    self_seed: bytes
    own: bytes
    """The client's own shares of both seeds."""
    cards: Mapping[int, PublicKeys]
    """Public keys of the neighbourhood."""
    held: dict[int, bytes] = field(default_factory=dict)
    """Introduced client -> the two shares of its seeds that this one holds; empty if they did not fit its advert."""
    masked: bool = False
    """Whether the vector was given."""
    signed: tuple[int, ...] | None = None
    """The surviving clients that it signed."""


class SecureClient:
    """One client of one run.

    Args:
        identity: the client's long-lived keys.
        client: its number.
        key: the run key.
        minimum: the smallest cohort that it hides in.
        degree: largest number of neighbours, at least 4.

    Raises:
        SecureSumError: the degree is too small.

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
        """Scalars contributed so far: projections of this client's gradients, each hidden in a cohort's sum."""

    @property
    def card(self) -> PublicKeys:
        """The public half of this client's identity."""
        return self._identity.card

    def advertise(self, round: int, cohort: Sequence[int], cards: Mapping[int, PublicKeys]) -> KeysResponse:
        """AdvertiseKeys and ShareKeys: fresh keys for a round, and shares of them sealed for the neighbours.

        Args:
            round: number of the round.
            cohort: its participants.
            cards: public keys, of the neighbourhood at least.

        Raises:
            SecureSumError: the round was answered before, or the cohort or its keys are not acceptable.
        """
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
        # keys of the round before may still be needed to unmask it; older ones are forgotten
        self._keys = {r: self._keys[r] for r in sorted(self._keys)[-2:] if r >= round - 1}
        self._keys[round] = _Keys(
            frozenset(cohort), around, mask_seed, self_seed, own, {other: cards[other] for other in around}
        )
        return KeysResponse(
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
        """MaskedInputCollection: the vector under all masks. A round is answered only once.

        Args:
            round: number of the round.
            introduced: the neighbours' adverts, as far as they are for this client.
            values: weighted scalars, int64[local_steps, K] or flat.
            counts: weight, clipped, nonfinite, magnitudes.
            word: bits of a word of the sum; only so many of each masked scalar are sent.

        Raises:
            SecureSumError: the round was answered before, or the neighbours are too few or not properly signed.
        """
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
        keys.masked, self._last = True, round  # only now: a refused introduction leaves the round open
        self.exposed += values.size
        return Masked(
            round=round,
            client=self._client,
            vector=pack_words(vector[: values.size], word) + vector[values.size :].astype("<u4").tobytes(),
            complaints=tuple(client for client, held in keys.held.items() if not held),
        )

    def unmask(self, survivors: Survivors) -> UnmaskResponse:
        """ConsistencyCheck, then Unmasking: one share of each client in the neighbourhood, never both.

        The first call signs the surviving clients, once, and gives shares of their self-mask seeds. If a client
        dropped out, a second call gives shares of the dropped clients' mask seeds, but only if the threshold of the
        neighbourhood has signed the same surviving clients; so there can be only one such set. Then the round's keys
        are forgotten.

        Args:
            survivors: the clients whose vectors the server has; in the second call, with signatures.

        Raises:
            SecureSumError: the round is not in progress, or the surviving clients are not acceptable.
        """
        round, keys = survivors.round, self._keys.get(survivors.round)
        if keys is None or not keys.masked:
            raise SecureSumError(f"round {round}: unmasked before, or never masked: expected a round in progress")
        alive, known = self._check_survivors(survivors, keys), {**keys.held, self._client: keys.own}
        first, signed = keys.signed is None, signed_survivors(self._key, round, survivors.clients)
        if keys.signed is None:
            keys.signed = survivors.clients
            shares = [held[SECRET:] if other in alive else b"" for other, held in sorted(known.items())]
        else:
            if survivors.clients != keys.signed or not self._agreed(keys, survivors, signed):
                raise SecureSumError(
                    f"round {round}: asked for shares again: expected the same survivors, signed by "
                    f"{threshold(len(keys.around))} around this client"
                )
            shares = [b"" if other in alive else held[:SECRET] for other, held in sorted(known.items())]
        if not first or alive >= known.keys():
            del self._keys[round]
        return UnmaskResponse(
            round=round,
            client=self._client,
            shares=tuple(shares),
            signature=self._identity.signing.sign(signed),
        )

    def _check_survivors(self, survivors: Survivors, keys: _Keys) -> set[int]:
        """The surviving clients, if they are well-formed, enough, and all introduced to this client."""
        round, clients, alive = survivors.round, survivors.clients, set(survivors.clients)
        if tuple(sorted(alive)) != clients or not clients or not 0 <= clients[0] <= max(alive) < 2**63:
            raise SecureSumError(f"round {round}: {len(clients)} survivors: expected each once, in ascending order")
        if self._client not in alive or len(alive) < self._minimum:
            raise SecureSumError(
                f"round {round}: {len(alive)} survivors, with this client or without: expected it among at least "
                f"{self._minimum}"
            )
        introduced = {*keys.held, self._client}
        if alive - keys.cohort or alive & set(keys.around) - introduced:
            raise SecureSumError(f"round {round}: survivors that were not introduced: expected those that were")
        near = len(alive & introduced)
        if near < threshold(len(keys.around)):
            raise SecureSumError(f"round {round}: {near} survivors around this client: expected the threshold")
        return alive

    def _agreed(self, keys: _Keys, survivors: Survivors, signed: bytes) -> bool:
        """Whether the threshold of the neighbourhood, including this client, signed the same surviving clients."""
        near = {*keys.around} & {*survivors.clients}
        # no more signatures than neighbours are looked at, so that a server cannot keep a client busy
        signatures = {c: s for c, s in survivors.signatures[: len(keys.around)] if c in near}
        agreed = {c for c, signature in signatures.items() if verify(keys.cards[c], signature, signed)} | {self._client}
        return len(agreed) >= threshold(len(keys.around))

    def _meet(self, round: int, keys: _Keys, introduced: Sequence[Introduced]) -> dict[int, bytes]:
        """Check the introduced neighbours, and open the shares that each has for this client."""
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

    def _open(self, round: int, other: Introduced, card: PublicKeys) -> bytes:
        """Both shares that a neighbour sealed for this client; empty if they do not fit its commitments."""
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

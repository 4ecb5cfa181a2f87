"""The server's side of one round of the secure sum: who is introduced to whom, who survived, and the sum.

Clients may drop out at every stage, as long as the threshold of each one's neighbours is left: without an advert they
are not in the round; without a masked vector their mask keys are recombined and their masks taken out; of those whose
vector came, the self-masks are. A share that is not the one its client committed to names its holder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from baffle.core.types import Integers, packed_size
from baffle.errors import SecureSumError
from baffle.secure.graph import MOST_NEIGHBOURS, neighbourhoods, threshold
from baffle.secure.masks import Card, Words, agree, mask_key, pair_mask, self_mask, unpack_words, verify
from baffle.secure.messages import (
    COMMITMENT,
    Advert,
    Introduced,
    Masked,
    Survivors,
    Unmasked,
    commitment,
    context,
    rest_of,
    signed_advert,
    signed_survivors,
)
from baffle.secure.shares import SECRET, recombine

COUNTS = 3
"""Numbers after the scalars of a vector: weight, clipped, nonfinite; magnitudes may follow."""


class SecureRound:
    """Sum one round's vectors of ``size`` scalars, for a cohort whose identities are known.

    Raises SecureSumError, naming the client, for what does not fit; the round goes on without it.
    """

    def __init__(
        self,
        key: int,
        round: int,
        cohort: Sequence[int],
        cards: Mapping[int, Card],
        size: int,
        counts: int = COUNTS,
        *,
        degree: int = MOST_NEIGHBOURS,
        word: int = 32,
    ) -> None:
        self._key, self._round, self._cards, self._size = key, round, cards, size
        self._counts, self._word = counts, word
        self._around = neighbourhoods(cohort, (key, round), degree)
        self._place = {client: {other: i for i, other in enumerate(near)} for client, near in self._around.items()}
        self._adverts: dict[int, Advert] = {}
        self._rests: dict[int, bytes] = {}  # hash of what each advert holds besides its mask key
        self._introduced: tuple[int, ...] | None = None
        self._vectors: dict[int, Words] = {}
        self._complaints: set[tuple[int, int]] = set()  # holder, dealer
        self._survivors: tuple[int, ...] | None = None
        self._shares: dict[int, dict[int, bytes]] = {}  # holder -> dealer -> share
        self._done: set[int] = set()  # holders that have given all
        self.signatures: dict[int, bytes] = {}
        """What clients signed of the survivors they were told of."""

    # -- adverts -----------------------------------------------------------------------------------------------------

    def advertise(self, advert: Advert) -> None:
        """Take an advert in, if its client signed it and it is whole."""
        client = advert.client
        around = self._around.get(client)
        where = f"round {self._round}, client {client}"
        if around is None or advert.round != self._round:
            raise SecureSumError(f"{where}: an advert for round {advert.round}: expected one of the cohort, for this")
        sizes = (len(advert.mask_public), len(advert.self_commitment), len(advert.commitments), len(advert.sealed))
        expected = (32, COMMITMENT, 2 * COMMITMENT * len(around), len(around))
        if sizes != expected or max(map(len, advert.sealed)) > 64:
            raise SecureSumError(f"{where}: an advert of {sizes} bytes and parts: expected {expected}")
        try:
            agree(mask_key(bytes(SECRET)), advert.mask_public, b"probe")
        except SecureSumError as error:  # its neighbours could not use it
            raise SecureSumError(f"{where}: {error}") from error
        rest = rest_of(advert.self_commitment, advert.commitments, advert.sealed)
        signed = signed_advert(self._key, self._round, client, advert.mask_public, rest)
        if client not in self._cards or not verify(self._cards[client], advert.signature, signed):
            raise SecureSumError(f"{where}: its advert is not signed by it")
        if self._introduced is not None:
            raise SecureSumError(f"{where}: an advert after the round began: expected one before")
        self._adverts[client], self._rests[client] = advert, rest

    @property
    def cards(self) -> Mapping[int, Card]:
        """The keys of the cohort, by client."""
        return self._cards

    def cards_for(self, client: int) -> dict[int, Card]:
        """The keys of a client's neighbours."""
        return {other: self._cards[other] for other in self._around[client]}

    @property
    def advertised(self) -> frozenset[int]:
        """Who has advertised."""
        return frozenset(self._adverts)

    def introduce(self, client: int) -> tuple[Introduced, ...]:
        """What a client is told of its neighbours. From the first call on the round is closed to newcomers."""
        if client not in self._adverts:
            raise SecureSumError(f"round {self._round}, client {client}: did not advertise: expected one that did")
        if self._introduced is None:
            self._introduced = tuple(sorted(self._adverts))
        return tuple(
            _introduction(self._adverts[other], self._rests[other], self._place[other][client])
            for other in self._around[client]
            if other != client and other in self._adverts
        )

    # -- vectors -----------------------------------------------------------------------------------------------------

    def add(self, masked: Masked) -> None:
        """Take a masked vector in. One that comes twice is refused."""
        where = f"round {self._round}, client {masked.client}"
        if masked.round != self._round or masked.client not in (self._introduced or ()):
            raise SecureSumError(f"{where}: a vector for round {masked.round}: expected one of those introduced")
        if masked.client in self._vectors or self._survivors is not None:
            raise SecureSumError(
                f"{where}: a second vector, or one too late: expected one, before the survivors are told"
            )
        words = packed_size(self._size, self._word)
        if len(masked.vector) != words + 4 * self._counts:
            raise SecureSumError(f"{where}: {len(masked.vector)} bytes: expected {words + 4 * self._counts}")
        strangers = set(masked.complaints) - set(self._around[masked.client])
        if strangers or masked.client in masked.complaints:
            raise SecureSumError(f"{where}: complains of {len(strangers)} strangers: expected its neighbours only")
        self._complaints |= {(masked.client, dealer) for dealer in masked.complaints}
        scalars = unpack_words(masked.vector[:words], self._word, self._size)
        counts = np.frombuffer(masked.vector[words:], "<u4").astype(np.uint32)
        self._vectors[masked.client] = np.concatenate([scalars, counts])

    @property
    def masked(self) -> frozenset[int]:
        """Whose vectors have come."""
        return frozenset(self._vectors)

    def survive(self) -> Survivors:
        """Close the round to further vectors; what to tell those that survived, at first.

        Raises SecureSumError, and leaves the round open, if some neighbourhood has too few to unmask.
        """
        if not self._vectors:
            raise SecureSumError(f"round {self._round}: no vector came: expected at least the threshold")
        if self._survivors is None:
            for dealer in self._introduced or ():
                left = [h for h in self._around[dealer] if h in self._vectors and (h, dealer) not in self._complaints]
                self._require(dealer, len(left))
            self._survivors = tuple(sorted(self._vectors))
        return Survivors(round=self._round, clients=self._survivors)

    @property
    def lost(self) -> frozenset[int]:
        """Who was introduced and did not survive: those that did are told twice, see :meth:`told`."""
        return frozenset(self._introduced or ()) - frozenset(self._survivors or ())

    def told(self, client: int) -> Survivors:
        """What to tell a survivor; once it has signed them, with the signatures around it.

        Raises SecureSumError if too few have signed.
        """
        told = self.survive()
        if client not in self.signatures:
            return told
        signed = tuple((other, self.signatures[other]) for other in self._around[client] if other in self.signatures)
        self._require(client, len(signed))
        return Survivors(round=told.round, clients=told.clients, signatures=signed)

    # -- shares ------------------------------------------------------------------------------------------------------

    def unmask(self, unmasked: Unmasked) -> None:
        """Take a survivor's shares in: first those of survivors, then those of the lost.

        Raises SecureSumError naming it if one is not what its dealer committed to.
        """
        holder, survivors = unmasked.client, self._survivors or ()
        where = f"round {self._round}, client {holder}"
        if unmasked.round != self._round or holder not in survivors or holder in self._done:
            raise SecureSumError(f"{where}: shares for round {unmasked.round}: expected a survivor's, once")
        signed = signed_survivors(self._key, self._round, survivors)
        if not verify(self._cards[holder], unmasked.signature, signed):
            raise SecureSumError(f"{where}: did not sign the survivors: expected its signature")
        dealers = [dealer for dealer in self._around[holder] if dealer in (self._introduced or ())]
        if len(unmasked.shares) != len(dealers):
            raise SecureSumError(f"{where}: {len(unmasked.shares)} shares: expected {len(dealers)}")
        found = dict(zip(dealers, unmasked.shares, strict=True))
        first = holder not in self.signatures
        for dealer, share in found.items():
            due = (dealer in survivors) == first and (holder, dealer) not in self._complaints
            if bool(share) != due or (due and not self._fits(dealer, holder, share)):
                raise SecureSumError(f"{where}: lied about its share of client {dealer}; it is left out")
        self._shares.setdefault(holder, {}).update({dealer: share for dealer, share in found.items() if share})
        self.signatures[holder] = unmasked.signature
        if not first or not self.lost & set(dealers):
            self._done.add(holder)

    @property
    def missing(self) -> frozenset[int]:
        """Survivors that have shares to give, still."""
        return frozenset(self._survivors or ()) - self._done

    @property
    def opened(self) -> bool:
        """Whether there are enough shares of all survivors, and so enough signatures around each."""
        return self._survivors is not None and self._enough(self._survivors)

    @property
    def ready(self) -> bool:
        """Whether there are enough shares of everyone."""
        return self._survivors is not None and self._enough(self._introduced or ())

    def _enough(self, dealers: Sequence[int]) -> bool:
        return all(len(self._holders(dealer)) >= threshold(len(self._around[dealer])) for dealer in dealers)

    def total(self) -> tuple[Integers, tuple[int, ...]]:
        """The sum of the survivors' scalars, int64[size], and of their weights, clipped and nonfinite scalars.

        Raises SecureSumError if there are too few shares, or a client dealt shares that do not fit together.
        """
        survivors = self._survivors
        if survivors is None:
            raise SecureSumError(f"round {self._round}: no survivors yet: expected to have told them")
        for dealer in self._introduced or ():
            self._require(dealer, len(self._holders(dealer)))
        seeds = self._recombine()
        total = np.zeros(self._size + self._counts, np.uint32)
        for client in survivors:
            here = context(self._key, self._round, client)
            total += self._vectors[client] - self_mask(seeds[client], here, total.size)
        for client in self._introduced or ():
            if client not in survivors:
                total += self._left_over(client, seeds[client], total.size)
        spare = np.uint32(32 - self._word)  # modulo 2**word; the highest bit of a word is its sign
        signed = ((total[: self._size] << spare).view(np.int32) >> np.int32(32 - self._word)).astype(np.int64)
        return signed, tuple(int(count) for count in total[self._size :])

    def _left_over(self, client: int, seed: bytes, size: int) -> Words:
        """What takes a dropped client's masks out of its neighbours' vectors."""
        private, found = mask_key(seed), np.zeros(size, np.uint32)
        for other in self._around[client]:
            if other != client and other in self._vectors:
                pair = context(self._key, self._round, *sorted((client, other)))
                mask = pair_mask(private, self._adverts[other].mask_public, pair, size)
                found = found + mask if client < other else found - mask
        return found

    def _recombine(self) -> dict[int, bytes]:
        """Self-mask seeds of survivors, mask seeds of others, by client."""
        dealers = self._introduced or ()
        holders = [self._holders(d)[: threshold(len(self._around[d]))] for d in dealers]  # equally many of each
        positions = [[self._place[d][h] + 1 for h in near] for d, near in zip(dealers, holders, strict=True)]
        shares = [[self._shares[h][d] for h in near] for d, near in zip(dealers, holders, strict=True)]
        seeds = dict(zip(dealers, recombine(positions, shares), strict=True))
        for dealer, seed in seeds.items():
            advert = self._adverts[dealer]
            if dealer in (self._survivors or ()):
                whole = commitment(context(self._key, self._round, dealer), seed) == advert.self_commitment
            else:
                whole = mask_key(seed).public_key().public_bytes_raw() == advert.mask_public
            if not whole:
                raise SecureSumError(f"round {self._round}, client {dealer}: dealt shares that do not fit its advert")
        return seeds

    def _holders(self, dealer: int) -> list[int]:
        return [h for h in self._around[dealer] if dealer in self._shares.get(h, {})]

    def _fits(self, dealer: int, holder: int, share: bytes) -> bool:
        """Whether this is the share that a dealer committed to."""
        of_self = dealer in (self._survivors or ())
        start = 2 * COMMITMENT * self._place[dealer][holder] + (COMMITMENT if of_self else 0)
        expected = self._adverts[dealer].commitments[start : start + COMMITMENT]
        return len(share) == SECRET and commitment(context(self._key, self._round, dealer), share) == expected

    def _require(self, dealer: int, left: int) -> None:
        need = threshold(len(self._around[dealer]))
        if left < need:
            raise SecureSumError(
                f"round {self._round}, client {dealer}: {left} clients around it are left to unmask: expected {need}"
            )


def _introduction(advert: Advert, rest: bytes, position: int) -> Introduced:
    return Introduced(
        client=advert.client,
        mask_public=advert.mask_public,
        rest=rest,
        signature=advert.signature,
        sealed=advert.sealed[position],
        commitments=advert.commitments[2 * COMMITMENT * position : 2 * COMMITMENT * (position + 1)],
    )

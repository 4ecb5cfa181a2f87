"""The server's side of one round of a secure sum: introductions, masked vectors, surviving clients, and the sum.

Clients may drop out at every stage, as long as the threshold of each neighbourhood is left. A client that sent no
advert is not in the round. For one that dropped out before its vector, the mask seed is recombined and its pair masks
are removed; for one whose vector arrived, the self-mask seed is recombined and its self-mask is removed. Never both:
together they would reveal a client's vector. A share that its client did not commit to names its holder. Stages are
named as in Bonawitz et al. (CCS 2017).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from baffle.core.types import Integers, packed_size
from baffle.errors import SecureSumError
from baffle.secure.graph import MOST_NEIGHBOURS, neighbourhoods, threshold
from baffle.secure.masks import PublicKeys, Words, agree, mask_key, pair_mask, self_mask, unpack_words, verify
from baffle.secure.messages import (
    COMMITMENT,
    Introduced,
    KeysResponse,
    Masked,
    Survivors,
    UnmaskResponse,
    commitment,
    context,
    rest_of,
    signed_advert,
    signed_survivors,
)
from baffle.secure.shares import SECRET, recombine

COUNTS = 3
"""Numbers that follow the scalars in a vector: weight, clipped, nonfinite; magnitudes may follow."""


class SecureRound:
    """Sum the vectors of one round. Methods are called in the order of the stages.

    A message that does not fit raises SecureSumError, which names the client, and leaves the round as it was.

    Args:
        key: the run key.
        round: number of the round.
        cohort: its participants.
        cards: their public keys.
        size: scalars in a vector: K times local steps.
        degree: largest number of neighbours.
    """

    def __init__(
        self,
        key: int,
        round: int,
        cohort: Sequence[int],
        cards: Mapping[int, PublicKeys],
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
        self._adverts: dict[int, KeysResponse] = {}
        self._rests: dict[int, bytes] = {}  # hash of all of each advert but its mask key
        self._introduced: tuple[int, ...] | None = None
        self._vectors: dict[int, Words] = {}
        self._complaints: set[tuple[int, int]] = set()  # holder, dealer
        self._survivors: tuple[int, ...] | None = None
        self._shares: dict[int, dict[int, bytes]] = {}  # holder -> dealer -> share
        self._done: set[int] = set()  # holders that have given all their shares
        self.signatures: dict[int, bytes] = {}
        """Client -> its signature of the surviving clients."""

    # -- AdvertiseKeys and ShareKeys ---------------------------------------------------------------------------------

    def advertise(self, advert: KeysResponse) -> None:
        """AdvertiseKeys and ShareKeys: accept a client's keys for the round.

        Raises:
            SecureSumError: the advert is malformed, not signed, or too late.
        """
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
    def cards(self) -> Mapping[int, PublicKeys]:
        """Client -> its public keys, for the whole cohort."""
        return self._cards

    def cards_for(self, client: int) -> dict[int, PublicKeys]:
        """Client -> its public keys, for one client's neighbourhood."""
        return {other: self._cards[other] for other in self._around[client]}

    @property
    def advertised(self) -> frozenset[int]:
        """Clients that have advertised."""
        return frozenset(self._adverts)

    def introduce(self, client: int) -> tuple[Introduced, ...]:
        """ShareKeys: for one client, its neighbours' keys and shares. The first call closes the round to new adverts.

        Raises:
            SecureSumError: the client did not advertise.
        """
        if client not in self._adverts:
            raise SecureSumError(f"round {self._round}, client {client}: did not advertise: expected one that did")
        if self._introduced is None:
            self._introduced = tuple(sorted(self._adverts))
        return tuple(
            _introduction(self._adverts[other], self._rests[other], self._place[other][client])
            for other in self._around[client]
            if other != client and other in self._adverts
        )

    # -- MaskedInputCollection ---------------------------------------------------------------------------------------

    def add(self, masked: Masked) -> None:
        """MaskedInputCollection: accept a masked vector, one per client.

        Raises:
            SecureSumError: the vector is malformed, not from an introduced client, a second one, or too late.
        """
        where = f"round {self._round}, client {masked.client}"
        if masked.round != self._round or masked.client not in (self._introduced or ()):
            raise SecureSumError(f"{where}: a vector for round {masked.round}: expected one of those introduced")
        if masked.client in self._vectors or self._survivors is not None:
            raise SecureSumError(
                f"{where}: a second vector, or one too late: expected one, before the survivors are named"
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
        """Clients whose vectors have arrived."""
        return frozenset(self._vectors)

    # -- ConsistencyCheck --------------------------------------------------------------------------------------------

    def survive(self) -> Survivors:
        """ConsistencyCheck: close the round to further vectors, and name the surviving clients.

        Raises:
            SecureSumError: some neighbourhood has too few surviving clients to unmask; the round stays open.
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
    def dropped(self) -> frozenset[int]:
        """Introduced clients without a vector. If there are any, :meth:`survivors_for` is sent twice."""
        return frozenset(self._introduced or ()) - frozenset(self._survivors or ())

    def survivors_for(self, client: int) -> Survivors:
        """ConsistencyCheck: the surviving clients, for one of them; once it has signed, with signatures around it.

        Raises:
            SecureSumError: too few neighbours have signed.
        """
        survivors = self.survive()
        if client not in self.signatures:
            return survivors
        signed = tuple((other, self.signatures[other]) for other in self._around[client] if other in self.signatures)
        self._require(client, len(signed))
        return Survivors(round=survivors.round, clients=survivors.clients, signatures=signed)

    # -- Unmasking ---------------------------------------------------------------------------------------------------

    def unmask(self, unmasked: UnmaskResponse) -> None:
        """ConsistencyCheck and Unmasking: accept a surviving client's signature and its shares.

        The first message brings shares of surviving clients' seeds, the second one those of dropped clients' seeds.

        Raises:
            SecureSumError: the signature is wrong, or a share is not the one that its dealer committed to.
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
        shares = dict(zip(dealers, unmasked.shares, strict=True))
        first = holder not in self.signatures
        for dealer, share in shares.items():
            due = (dealer in survivors) == first and (holder, dealer) not in self._complaints
            if bool(share) != due or (due and not self._fits(dealer, holder, share)):
                raise SecureSumError(f"{where}: lied about its share of client {dealer}; it is left out")
        self._shares.setdefault(holder, {}).update({dealer: share for dealer, share in shares.items() if share})
        self.signatures[holder] = unmasked.signature
        if not first or not self.dropped & set(dealers):
            self._done.add(holder)

    @property
    def missing(self) -> frozenset[int]:
        """Surviving clients that still have shares to give."""
        return frozenset(self._survivors or ()) - self._done

    @property
    def opened(self) -> bool:
        """Whether there are enough shares of all surviving clients, and so enough signatures around each."""
        return self._survivors is not None and self._enough(self._survivors)

    @property
    def ready(self) -> bool:
        """Whether there are enough shares of all introduced clients, so that :meth:`total` can be computed."""
        return self._survivors is not None and self._enough(self._introduced or ())

    def _enough(self, dealers: Sequence[int]) -> bool:
        return all(len(self._holders(dealer)) >= threshold(len(self._around[dealer])) for dealer in dealers)

    def total(self) -> tuple[Integers, tuple[int, ...]]:
        """Unmasking: recombine the seeds, and remove all masks from the sum of the vectors.

        Returns:
            The sum of the surviving clients' scalars, int64[size], and of their weight, clipped and nonfinite counts.

        Raises:
            SecureSumError: there are too few shares, or a client dealt shares that do not fit together.
        """
        survivors = self._survivors
        if survivors is None:
            raise SecureSumError(f"round {self._round}: no survivors yet: expected survive() before")
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
        """What removes a dropped client's pair masks from the sum of its neighbours' vectors."""
        private, masks = mask_key(seed), np.zeros(size, np.uint32)
        for other in self._around[client]:
            if other != client and other in self._vectors:
                pair = context(self._key, self._round, *sorted((client, other)))
                mask = pair_mask(private, self._adverts[other].mask_public, pair, size)
                masks = masks + mask if client < other else masks - mask
        return masks

    def _recombine(self) -> dict[int, bytes]:
        """Client -> its recombined seed: the self-mask seed of a surviving client, the mask seed of a dropped one."""
        dealers = self._introduced or ()
        # neighbourhoods are equally large, so cut to the threshold there are equally many holders, as recombine needs
        holders = [self._holders(d)[: threshold(len(self._around[d]))] for d in dealers]
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
        """Whether a share is the one that its dealer committed to."""
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


def _introduction(advert: KeysResponse, rest: bytes, position: int) -> Introduced:
    return Introduced(
        client=advert.client,
        mask_public=advert.mask_public,
        rest=rest,
        signature=advert.signature,
        sealed=advert.sealed[position],
        commitments=advert.commitments[2 * COMMITMENT * position : 2 * COMMITMENT * (position + 1)],
    )

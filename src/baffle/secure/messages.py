"""The messages of one round of a secure sum, with the stages of Bonawitz et al. (CCS 2017) that they belong to.

KeysResponse   client -> server   a round's mask key and sealed shares (AdvertiseKeys, ShareKeys); it can travel with
                                  the reply of the round before
Introduced     server -> client   the part of each neighbour's advert that is for this client (ShareKeys)
Masked         client -> server   the masked vector (MaskedInputCollection)
Survivors      server -> client   the surviving clients: those whose vectors have arrived (ConsistencyCheck)
UnmaskResponse client -> server   a signature of the surviving clients, and shares of their self-mask seeds

And if a client dropped out after the introductions:

Survivors      server -> client   the same, with the signatures of neighbours that signed the same (ConsistencyCheck)
UnmaskResponse client -> server   shares of the mask seeds of the dropped clients (Unmasking)
"""

from __future__ import annotations

import hashlib

import msgspec

COMMITMENT = 16
"""Bytes of a commitment to a share or a seed: a hash of 128 random bits, truncated to 128 bits."""


class PublicKeys(msgspec.Struct, frozen=True):
    """The public half of an identity.

    Attributes:
        signing: Ed25519 key, 32 bytes.
        sealing: X25519 key, 32 bytes.
    """

    signing: bytes
    sealing: bytes


class KeysResponse(msgspec.Struct, frozen=True, kw_only=True, tag="advert"):
    """One client's keys for one round, and shares of them (AdvertiseKeys and ShareKeys).

    The holders of its shares are its neighbours and itself, in ascending order.
    """

    round: int
    client: int
    mask_public: bytes
    """Public mask key: X25519, 32 bytes."""
    self_commitment: bytes
    """Commitment to the self-mask seed."""
    commitments: bytes
    """For each holder, commitments to its share of the mask seed and to its share of the self-mask seed."""
    sealed: tuple[bytes, ...]
    """For each holder, both shares encrypted for it; empty for the client itself."""
    signature: bytes
    """Signature of :func:`signed_advert`."""


class Introduced(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a neighbour's advert that is for one client (the server's half of ShareKeys)."""

    client: int
    mask_public: bytes
    rest: bytes
    """Hash of everything else that the neighbour signed, see :func:`rest_of`."""
    signature: bytes
    """Signature of :func:`signed_advert`."""
    sealed: bytes
    """Both shares, encrypted for this client."""
    commitments: bytes
    """Commitments to the two shares in ``sealed``."""


class Masked(msgspec.Struct, frozen=True, kw_only=True, tag="masked"):
    """A client's masked vector, which looks uniformly random to the server (MaskedInputCollection)."""

    round: int
    client: int
    vector: bytes
    """uint32, little-endian: weighted scalars modulo 2^32, then weight, clipped, nonfinite; plus masks."""
    complaints: tuple[int, ...] = ()
    """Neighbours whose shares were not those that they had committed to."""


class Survivors(msgspec.Struct, frozen=True, kw_only=True, tag="survivors"):
    """The surviving clients: those whose masked vectors the server has (ConsistencyCheck)."""

    round: int
    clients: tuple[int, ...]
    signatures: tuple[tuple[int, bytes], ...] = ()
    """Client and signature of each neighbour that signed the same clients; empty at first."""


class UnmaskResponse(msgspec.Struct, frozen=True, kw_only=True, tag="unmasked"):
    """One share of each introduced neighbour and of the client itself, in ascending order of clients.

    The first message has the shares of the surviving clients' self-mask seeds, the second one those of the dropped
    clients' mask seeds.
    """

    round: int
    client: int
    shares: tuple[bytes, ...]
    """Empty where this message has no share of a client."""
    signature: bytes
    """Signature of :func:`signed_survivors`: the surviving clients as the server named them to this client."""


def commitment(context: bytes, secret: bytes) -> bytes:
    """Commit to 128 random bits: the commitment does not reveal them, and no other bits fit it."""
    return hashlib.sha256(b"commitment" + context + secret).digest()[:COMMITMENT]


def context(key: int, round: int, *clients: int) -> bytes:
    """Bytes that bind a key or a signature to its run, round and clients.

    Examples:
        >>> len(context(1, 2, 3)), context(1, 2, 3) == context(1, 3, 2)
        (24, False)
    """
    return b"".join(number.to_bytes(8, "little") for number in (key, round, *clients))


def sealing(key: int, round: int, dealer: int, holder: int, mask_public: bytes) -> bytes:
    """Bytes that bind sealed shares to their advert: the mask key differs even if a client advertises a round twice."""
    return context(key, round, dealer, holder) + mask_public


def rest_of(self_commitment: bytes, commitments: bytes, sealed: tuple[bytes, ...]) -> bytes:
    """Hash of all of an advert but its mask key, so that neighbours can check the signature without the rest."""
    digest = hashlib.sha256(self_commitment + commitments)
    for part in sealed:
        digest.update(hashlib.sha256(part).digest())
    return digest.digest()


def signed_advert(key: int, round: int, client: int, mask_public: bytes, rest: bytes) -> bytes:
    """The bytes of an advert that its client signs."""
    return b"baffle advert\0" + context(key, round, client) + mask_public + rest


def signed_survivors(key: int, round: int, clients: tuple[int, ...]) -> bytes:
    """The bytes that clients sign to confirm the set of surviving clients."""
    return b"baffle survivors\0" + context(key, round, *clients)

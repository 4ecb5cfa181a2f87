"""What clients and server of a secure sum say to each other in a round.

Advert     client -> server   a round's mask key and sealed shares; rides on the reply of the round before
Introduced server -> client   what the others advertised, as far as it is for this client
Masked     client -> server   the masked vector
Survivors  server -> client   whose vectors have come
Unmasked   client -> server   shares of the self-masks of these, and a signature of who they are

And if somebody was lost after the introductions:

Survivors  server -> client   the same, with the signatures of those that were told the same
Unmasked   client -> server   shares of the mask keys of the lost
"""

from __future__ import annotations

import hashlib

import msgspec

COMMITMENT = 16
"""Bytes of a commitment to a share or a seed: a hash of 128 random bits, cut to 128."""


class PublicKeys(msgspec.Struct, frozen=True):
    """The public half of an identity: 32 bytes each."""

    signing: bytes
    sealing: bytes


class KeysResponse(msgspec.Struct, frozen=True, kw_only=True, tag="advert"):
    """One client's keys for one round. Holders are its neighbours and itself, in ascending order."""

    round: int
    client: int
    mask_public: bytes
    """X25519, 32 bytes."""
    self_commitment: bytes
    """To the self-mask seed."""
    commitments: bytes
    """For each holder: to its share of the mask seed, to its share of the self-mask seed."""
    sealed: tuple[bytes, ...]
    """For each holder: both shares, encrypted for it; empty for the client itself."""
    signature: bytes
    """Of :func:`signed_advert`."""


class Introduced(msgspec.Struct, frozen=True, kw_only=True):
    """What another client's advert holds for this one."""

    client: int
    mask_public: bytes
    rest: bytes
    """Hash of what else was signed, see :func:`rest_of`."""
    signature: bytes
    sealed: bytes
    commitments: bytes
    """To the two shares in ``sealed``."""


class Masked(msgspec.Struct, frozen=True, kw_only=True, tag="masked"):
    """A client's vector, of which the server learns nothing before the sum."""

    round: int
    client: int
    vector: bytes
    """uint32, little-endian: weighted scalars modulo 2^32, then weight, clipped, nonfinite; plus masks."""
    complaints: tuple[int, ...] = ()
    """Clients whose shares were not what they had committed to."""


class Survivors(msgspec.Struct, frozen=True, kw_only=True, tag="survivors"):
    """Whose masked vectors the server has."""

    round: int
    clients: tuple[int, ...]
    signatures: tuple[tuple[int, bytes], ...] = ()
    """Client and signature, of neighbours that were told the same; empty at first."""


class UnmaskResponse(msgspec.Struct, frozen=True, kw_only=True, tag="unmasked"):
    """One share of each neighbour that was introduced, and of the client itself, by ascending number."""

    round: int
    client: int
    shares: tuple[bytes, ...]
    """At first of the self-mask seeds of survivors, then of the mask seeds of others; empty where there is none."""
    signature: bytes
    """Of :func:`signed_survivors`: what this client was told."""


def commitment(context: bytes, secret: bytes) -> bytes:
    """To 128 random bits; they cannot be found from it, and no others fit."""
    return hashlib.sha256(b"commitment" + context + secret).digest()[:COMMITMENT]


def context(key: int, round: int, *clients: int) -> bytes:
    """What binds a key or a signature to its run, round and clients.

    Examples:
        >>> len(context(1, 2, 3)), context(1, 2, 3) == context(1, 3, 2)
        (24, False)
    """
    return b"".join(number.to_bytes(8, "little") for number in (key, round, *clients))


def sealing(key: int, round: int, dealer: int, holder: int, mask_public: bytes) -> bytes:
    """What binds shares to their advert: its mask key is new in each, also if a round is advertised again."""
    return context(key, round, dealer, holder) + mask_public


def rest_of(self_commitment: bytes, commitments: bytes, sealed: tuple[bytes, ...]) -> bytes:
    """Hash of what an advert holds besides its mask key."""
    digest = hashlib.sha256(self_commitment + commitments)
    for part in sealed:
        digest.update(hashlib.sha256(part).digest())
    return digest.digest()


def signed_advert(key: int, round: int, client: int, mask_public: bytes, rest: bytes) -> bytes:
    """What a client signs of its advert."""
    return b"baffle advert\0" + context(key, round, client) + mask_public + rest


def signed_survivors(key: int, round: int, clients: tuple[int, ...]) -> bytes:
    """What clients sign when they are told who survived."""
    return b"baffle survivors\0" + context(key, round, *clients)

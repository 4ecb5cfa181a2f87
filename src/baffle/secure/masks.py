"""Keys and masks: X25519, HKDF and ChaCha20 of ``cryptography``, entropy of the operating system.

Long-lived keys (:class:`Identity`) only sign and seal. What masks are made of is fresh each round and forgotten with
it: a mask key, whose agreement with a neighbour's gives the mask that both add, one with a minus; and a self-mask
seed, whose mask only this client adds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from baffle.errors import MissingExtraError, SecureSumError
from baffle.secure.messages import Card as Card

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise MissingExtraError("a secure sum needs cryptography: pip install 'baffle[secure]'") from error

Words = npt.NDArray[np.uint32]
"""Integers modulo 2^32."""
_ZERO = bytes(12)  # nonce: each key encrypts once, for contexts are new


@dataclass(frozen=True)
class Identity:
    """A client's long-lived keys."""

    signing: Ed25519PrivateKey
    sealing: X25519PrivateKey

    @staticmethod
    def make(secret: bytes | None = None) -> Identity:
        """From a secret of the client's own, such as its node key, or new from the operating system's entropy."""
        secret = os.urandom(32) if secret is None else secret
        return Identity(
            Ed25519PrivateKey.from_private_bytes(derive(secret, b"signing")),
            X25519PrivateKey.from_private_bytes(derive(secret, b"sealing")),
        )

    @property
    def card(self) -> Card:
        """What others need to check and to seal."""
        return Card(self.signing.public_key().public_bytes_raw(), self.sealing.public_key().public_bytes_raw())

    def seal(self, card: Card, context: bytes, data: bytes) -> bytes:
        """Encrypt for another client; ``context`` must never be used again with it."""
        return self._cipher(card, context).encrypt(_ZERO, data, context)

    def open(self, card: Card, context: bytes, data: bytes) -> bytes:
        """The inverse of :meth:`seal` by the other client. Raises SecureSumError if it is not from it."""
        try:
            return self._cipher(card, context).decrypt(_ZERO, data, context)
        except InvalidTag as error:
            raise SecureSumError(
                "a sealed share that cannot be opened: expected one of its sender for this round"
            ) from error

    def _cipher(self, card: Card, context: bytes) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(agree(self.sealing, card.sealing, b"seal" + context))


def derive(secret: bytes, context: bytes) -> bytes:
    """32 bytes of a secret for one purpose: HKDF with SHA-256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), 32, None, b"baffle secure sum\0" + context).derive(secret)


def mask_key(seed: bytes) -> X25519PrivateKey:
    """A round's mask key, made of the seed that is shared out."""
    return X25519PrivateKey.from_private_bytes(derive(seed, b"mask key"))


def agree(private: X25519PrivateKey, public: bytes, context: bytes) -> bytes:
    """32 bytes that only the holders of two keys know (X25519, RFC 7748). Raises SecureSumError for a bad key."""
    try:
        return derive(private.exchange(X25519PublicKey.from_public_bytes(public)), context)
    except ValueError as error:
        raise SecureSumError(f"a public key of {len(public)} bytes that cannot be used: expected X25519") from error


def pair_mask(private: X25519PrivateKey, public: bytes, context: bytes, size: int) -> Words:
    """The mask that two clients share: uint32[size]."""
    return stream(agree(private, public, b"pair" + context), size)


def self_mask(seed: bytes, context: bytes, size: int) -> Words:
    """The mask that only one client adds: uint32[size]."""
    return stream(derive(seed, b"self" + context), size)


def stream(key: bytes, size: int) -> Words:
    """The first words of ChaCha20 (RFC 8439) under a key that is used for nothing else: uint32[size], uniform."""
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * size)), "<u4").astype(np.uint32)


@lru_cache(maxsize=4096)
def usable(card: Card) -> bool:
    """Whether others can seal for the holder of a card, and check what it signed."""
    try:
        agree(X25519PrivateKey.generate(), card.sealing, b"")
        Ed25519PublicKey.from_public_bytes(card.signing)
    except (SecureSumError, ValueError):
        return False
    return True


def verify(card: Card, signature: bytes, data: bytes) -> bool:
    """Whether the holder of a card signed this."""
    try:
        Ed25519PublicKey.from_public_bytes(card.signing).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def pack_words(words: Words, bits: int) -> bytes:
    """The lowest ``bits`` of each word without gaps, lowest bit first.

    A sum modulo 2**32 of uniform masks is uniform in its lowest bits, too: what is cut off is not needed to add.

    Examples:
        >>> pack_words(np.array([0xFFFFFF1, 0x2], np.uint32), 12).hex()
        'f12f00'
    """
    if bits == 32:
        return words.astype("<u4").tobytes()
    spread = words[:, None] >> np.arange(bits, dtype=np.uint32) & np.uint32(1)
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack_words(data: bytes, bits: int, count: int) -> Words:
    """The inverse of :func:`pack_words`, with 0 where bits were cut off: uint32[count]."""
    if bits == 32:
        return np.frombuffer(data, "<u4").astype(np.uint32)
    every = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    words: Words = (every.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    return words

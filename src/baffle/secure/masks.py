"""Keys and masks: X25519, HKDF and ChaCha20 from ``cryptography``, entropy from the operating system.

Long-lived keys (:class:`Identity`) only sign and seal. The secrets that masks are derived from are fresh in each round
and forgotten after it: a mask key, which with a neighbour's key agrees on the pair mask that one of the two adds and
the other subtracts; and a self-mask seed, whose mask this client alone adds (Bonawitz et al. call this double masking).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from baffle.core.types import lowest_bits
from baffle.errors import MissingExtraError, SecureSumError
from baffle.secure.messages import PublicKeys as PublicKeys

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
"""Integers modulo 2^32: uint32."""
_ZERO = bytes(12)  # a constant nonce is safe: a new context makes a new key, so each key encrypts once


@dataclass(frozen=True)
class Identity:
    """A client's long-lived keys.

    Attributes:
        signing: signs adverts and surviving clients.
        sealing: agrees with other clients' keys on those that shares are encrypted with.

    Examples:
        >>> ada, bob = Identity.make(), Identity.make()
        >>> bob.open(ada.card, b"round 1", ada.seal(bob.card, b"round 1", b"for bob"))
        b'for bob'
    """

    signing: Ed25519PrivateKey
    sealing: X25519PrivateKey

    @staticmethod
    def make(secret: bytes | None = None) -> Identity:
        """Derive an identity from a client's own secret, such as its node key; without one, draw a new one."""
        secret = os.urandom(32) if secret is None else secret
        return Identity(
            Ed25519PrivateKey.from_private_bytes(derive(secret, b"signing")),
            X25519PrivateKey.from_private_bytes(derive(secret, b"sealing")),
        )

    @property
    def card(self) -> PublicKeys:
        """The public half: what other clients need to check signatures and to seal shares."""
        return PublicKeys(self.signing.public_key().public_bytes_raw(), self.sealing.public_key().public_bytes_raw())

    def seal(self, card: PublicKeys, context: bytes, data: bytes) -> bytes:
        """Encrypt data for another client.

        ``context`` selects the key, and must never be used for that client again.
        """
        return self._cipher(card, context).encrypt(_ZERO, data, context)

    def open(self, card: PublicKeys, context: bytes, data: bytes) -> bytes:
        """Decrypt what another client sealed for this one.

        Raises:
            SecureSumError: it was not sealed by that client, for this one, in this context.
        """
        try:
            return self._cipher(card, context).decrypt(_ZERO, data, context)
        except InvalidTag as error:
            raise SecureSumError(
                "a sealed share that cannot be opened: expected one of its sender for this round"
            ) from error

    def _cipher(self, card: PublicKeys, context: bytes) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(agree(self.sealing, card.sealing, b"seal" + context))


def derive(secret: bytes, context: bytes) -> bytes:
    """Derive 32 bytes from a secret, for one purpose: HKDF with SHA-256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), 32, None, b"baffle secure sum\0" + context).derive(secret)


def mask_key(seed: bytes) -> X25519PrivateKey:
    """A round's mask key, derived from the seed that is split into shares."""
    return X25519PrivateKey.from_private_bytes(derive(seed, b"mask key"))


def agree(private: X25519PrivateKey, public: bytes, context: bytes) -> bytes:
    """32 bytes that only the owners of two keys can compute (X25519, RFC 7748).

    Raises:
        SecureSumError: the public key cannot be used.
    """
    try:
        return derive(private.exchange(X25519PublicKey.from_public_bytes(public)), context)
    except ValueError as error:
        raise SecureSumError(f"a public key of {len(public)} bytes that cannot be used: expected X25519") from error


def pair_mask(private: X25519PrivateKey, public: bytes, context: bytes, size: int) -> Words:
    """The mask that two clients share, uint32[size]: one adds it, the other subtracts it."""
    return stream(agree(private, public, b"pair" + context), size)


def self_mask(seed: bytes, context: bytes, size: int) -> Words:
    """The mask that one client alone adds, uint32[size]: it still hides a vector whose pair masks were removed."""
    return stream(derive(seed, b"self" + context), size)


def stream(key: bytes, size: int) -> Words:
    """Uniform words, uint32[size]: the ChaCha20 stream (RFC 8439) of a key that is used for nothing else."""
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * size)), "<u4").astype(np.uint32)


@lru_cache(maxsize=4096)
def usable(card: PublicKeys) -> bool:
    """Whether public keys are well-formed: others can seal for their owner and check its signatures."""
    try:
        agree(X25519PrivateKey.generate(), card.sealing, b"")
        Ed25519PublicKey.from_public_bytes(card.signing)
    except (SecureSumError, ValueError):
        return False
    return True


def verify(card: PublicKeys, signature: bytes, data: bytes) -> bool:
    """Whether the owner of some public keys signed this data."""
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
    return lowest_bits(words, bits)


def unpack_words(data: bytes, bits: int, count: int) -> Words:
    """The inverse of :func:`pack_words`, with 0 where bits were cut off: uint32[count]."""
    if bits == 32:
        return np.frombuffer(data, "<u4").astype(np.uint32)
    every = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    words: Words = (every.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    return words

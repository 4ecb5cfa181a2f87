"""Keys and masks: uniform, used once, frozen as known answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from baffle.core.types import DEFAULT_BITS, MAX_WEIGHT, Integers, Reply, limit_of, pack
from baffle.secure import masks, messages
from baffle.secure.client import SecureClient
from baffle.secure.masks import Identity, mask_key, pair_mask, self_mask
from baffle.secure.messages import Masked, commitment, context
from secure_helpers import KEY, UNIFORM, Driver, chi_square, chi_square_of_two, make_clients, make_replies, refused

LARGEST = limit_of(DEFAULT_BITS)


def masked_vectors(values: Integers) -> dict[int, Masked]:
    clients = make_clients(3)
    replies = [
        Reply(
            round=0,
            client=c,
            weight=MAX_WEIGHT,
            scalars=pack(values, DEFAULT_BITS),
            magnitudes=(0,),
            clipped=0,
            nonfinite=0,
        )
        for c in sorted(clients)
    ]
    driver = Driver(clients, replies)
    driver.advertise()
    driver.mask()
    return driver.vectors


def test_masked_vectors_are_uniform_whatever_is_in_them() -> None:
    size = 20_000
    zeros, large = (masked_vectors(np.full(size, value, np.int64)) for value in (0, LARGEST))
    for vectors in (zeros, large):
        for masked in vectors.values():
            assert UNIFORM[0] < chi_square(masked.vector) < UNIFORM[1]
    for client in zeros:
        assert UNIFORM[0] < chi_square_of_two(zeros[client].vector, large[client].vector) < UNIFORM[1]
    a, b = (np.frombuffer(zeros[c].vector, "<u4").astype(np.uint32) for c in (0, 3))
    assert UNIFORM[0] < chi_square((a - b).tobytes()) < UNIFORM[1]
    assert UNIFORM[0] < chi_square((a + b).tobytes()) < UNIFORM[1]
    plain = np.full(size, LARGEST * MAX_WEIGHT, "<i4").tobytes()
    assert chi_square(plain) > UNIFORM[1]  # the test can fail


@pytest.mark.parametrize("bits", [2, 10, 13, 24, 31, 32])
def test_words_of_fewer_bits_add_up_to_the_same_and_stay_uniform(bits: int) -> None:
    """What is cut off a masked word is not needed to add it, and the rest of it hides as much."""
    rng = np.random.default_rng(bits)
    plain = rng.integers(-(2 ** (bits - 2)), 2 ** (bits - 2), (2, 5000)) if bits > 2 else np.full((2, 5000), -1)
    pads = rng.integers(0, 2**32, 5000, dtype=np.uint32)
    vectors = plain[0].astype(np.uint32) + pads, plain[1].astype(np.uint32) - pads
    sent = [masks.pack_words(vector, bits) for vector in vectors]
    assert [len(data) for data in sent] == [-(-5000 * bits // 8)] * 2
    received = [masks.unpack_words(data, bits, 5000) for data in sent]
    lowest = np.uint32(2**bits - 1)
    for vector, words in zip(vectors, received, strict=True):
        assert (words == vector & lowest).all()
    total = (received[0] + received[1]).astype(np.int64) & int(lowest)
    assert (np.where(total >> (bits - 1), total - 2**bits, total) == plain.sum(axis=0)).all()


@pytest.mark.parametrize("word", [10, 24])
def test_masked_words_of_few_bits_are_uniform(word: int) -> None:
    size = 20_000
    clients = make_clients(3)
    driver = Driver(clients, make_replies(clients, size))
    driver.advertise()
    introduced = driver.server.introduce(0)
    masked = clients[0].mask(0, introduced, np.zeros(size, np.int64), (0, 0, 0), word)
    assert len(masked.vector) == size * word // 8 + 12
    assert UNIFORM[0] < chi_square(masked.vector) < UNIFORM[1]


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

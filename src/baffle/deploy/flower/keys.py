"""A node's key, as Flower and OpenSSH write it."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from baffle.errors import OptionError


def read_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node's private key: ECDSA, as ``ssh-keygen -t ecdsa -b 384 -N ''`` or openssl make it.

    Raises:
        OptionError: The file cannot be read, has a passphrase, or has another kind of key.
    """
    expected = "a private key without a passphrase, of 'ssh-keygen -t ecdsa -b 384'"
    try:
        data = file.read_bytes()
        load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
        key = load(data, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise OptionError("key", str(file), f"{expected} ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise OptionError("key", str(file), f"{expected}, not another kind of key")
    return key


def secret_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as 66 bytes: a node's other long-lived keys are derived from them."""
    return key.private_numbers().private_value.to_bytes(66, "big")

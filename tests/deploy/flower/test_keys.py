"""A node's key as OpenSSL and as ssh-keygen write it."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from baffle.deploy.certificates import private_bytes
from baffle.deploy.flower.keys import read_key


def test_keys_of_openssl_and_of_ssh_are_read(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "pem").write_bytes(private_bytes(key))
    form, none = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    (tmp_path / "ssh").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    assert {read_key(tmp_path / name).private_numbers() for name in ("pem", "ssh")} == {key.private_numbers()}

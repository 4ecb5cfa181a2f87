"""Certificates for one machine fit together, are made once, and secrets are their owner's."""

from __future__ import annotations

import stat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from baffle.deploy.certificates import make_certificates, private_bytes, write_secret
from baffle.deploy.flower.keys import read_key


def test_the_authority_signed_the_servers_certificate_for_its_hosts(tmp_path: Path) -> None:
    authority = x509.load_pem_x509_certificate(make_certificates(tmp_path, ("fl.example.org", "10.0.0.1")).read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]


def test_certificates_that_are_there_are_kept(tmp_path: Path) -> None:
    before = make_certificates(tmp_path).read_bytes()
    assert make_certificates(tmp_path).read_bytes() == before


def test_a_secret_is_read_by_its_owner_only(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(tmp_path / "node.key", private_bytes(key))
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert read_key(tmp_path / "node.key").private_numbers() == key.private_numbers()

"""Nodes as processes: which of them are let in, and that an app that is not trusted does not run."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from baffle.deploy.certificates import make_certificates
from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.deploy.flower.fleet import Fleet
from baffle.deploy.flower.keys import read_key
from baffle.errors import FederationError
from deploy_helpers import (
    OPTIONS,
    check_run,
    members,
    one_line,
    site,
    until,
)


@dataclass(frozen=True)
class Impostor:
    """Says that it has a key that it does not have."""

    claimed: ec.EllipticCurvePrivateKey
    own: ec.EllipticCurvePrivateKey

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self.claimed.public_key()

    def sign(self, data: bytes, algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        return self.own.sign(data, algorithm)


def altered_app(folder: Path) -> Path:
    """The app with other code at the client, which leaves a file where it runs."""
    app = folder / "altered"
    shutil.copytree(app_folder(), app, ignore=shutil.ignore_patterns("__pycache__"))
    marker = folder / "it-ran"
    file = app / "federation/client_app.py"
    file.write_text(file.read_text() + f"\n__import__('pathlib').Path({str(marker)!r}).touch()\n")
    return app


def test_who_may_not_get_in_does_not_and_an_app_that_is_not_trusted_does_not_run(tmp_path: Path) -> None:
    with site(tmp_path, secure=True) as here:
        fed, data = here.fed, here.files[0]
        fed.start_node("good", data)
        fed.start_node("wary", data, "--trust", "0" * 64)
        fed.start_node("stranger", data, register=False)
        start: list[str | Path] = [
            sys.executable,
            "-m",
            "baffle",
            "node",
            "--superlink",
            fed.address,
            "--data",
            data,
            "--name",
        ]
        fed.nodes["plain"] = fed.start_process("plain", [*start, "plain", "--insecure", "--key", fed.make_key("plain")])
        (tmp_path / "elsewhere").mkdir()
        other = make_certificates(tmp_path / "elsewhere")
        lost = fed.nodes["lost"] = fed.start_process(
            "lost", [*start, "lost", "--root-certificates", other, "--key", fed.make_key("lost")]
        )
        assert lost.wait(120) == 2
        one_line(here.log("lost"), "error: superlink = ", "certificate verify failed", "--root-certificates")
        until(lambda: "refuses (412)" in here.log("stranger"), 120, here.tails)
        until(lambda: "trying again" in here.log("plain"), 120, here.tails)
        own = ec.generate_private_key(ec.SECP384R1())
        impostor = Impostor(read_key(tmp_path / "good.key"), own)
        liar = Fleet(fed.address, fed.certificates, impostor)  # type: ignore[arg-type]  # it has not the key
        with liar, pytest.raises(FederationError, match=r"refuses \(401\)"):
            liar.connect()
        until(lambda: "connected as node" in here.log("good"), 120, here.tails)
        until(lambda: "connected as node" in here.log("wary"), 120, here.tails)

        twin: list[str | Path] = [*start, "twin", "--root-certificates", tmp_path / "ca.crt"]
        fed.nodes["twin"] = fed.start_process("twin", [*twin, "--key", tmp_path / "good.key"])
        until(lambda: "refuses (412)" in here.log("twin"), 120, here.tails)  # its key is registered, and in use
        here.kill_node("twin")

        altered = altered_app(tmp_path)
        run = fed.submit(altered, clients=1, patience=6.0, out=str(tmp_path / "altered-run"))
        until(lambda: "is not trusted here; nothing was done" in here.log("good"), 120, here.tails)
        assert app_sha256(altered) in here.log("good")

        here.submit(OPTIONS | {"rounds": 4}, clients=1)
        here.finish()
        check_run(here.out, 4)
        assert members(here.out) == ["good"]
        assert f"app {app_sha256(app_folder())} is not trusted" in here.log("wary")
        until(lambda: fed.status(run).startswith("finished:failed"), 120, here.tails)
        assert "0 of 1 clients joined within 6 s" in here.fed.flwr("log", str(run), "local", "--show")
        assert not (tmp_path / "it-ran").exists()
        assert "expected a registered key" in here.log("stranger")
        for name in ("stranger", "plain"):
            assert "connected as node" not in here.log(name)
            assert "Traceback" not in here.log(name)

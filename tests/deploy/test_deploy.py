"""Federations of real processes: who gets in, what is trusted, and what of a run survives when they are killed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

import baffle as bf
from baffle.client.examples import load_arrays
from baffle.client.participant import Participant
from baffle.core.types import pack_int32
from baffle.deploy.certificates import make_certificates, private_bytes
from baffle.deploy.client_model import builder
from baffle.deploy.federation import free_port
from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.deploy.flower.fleet import Fleet
from baffle.deploy.flower.keys import read_key
from baffle.engines.remote.flower import reply_to, to_records
from baffle.errors import FederationError
from baffle.protocol.messages import TrainResponse, decode_response, encode
from baffle.training.build import assemble_server
from baffle.training.options import train_config
from deploy_helpers import OPTIONS, Site, check_run, members, one_line, peak_mb, site, until
from helpers import BIN, invoke

ROUNDS = 24


def locally(config: Path, rounds: int) -> list[str]:
    """Hashes of the weights after each round of the same training in one process."""
    options = train_config(config, {"threads": 1})
    server = assemble_server(options)
    engine = bf.LocalEngine(server.runtime, bf.partition(server.train, clients=3), together=False)
    run = bf.train(options.method(), engine, server.initial, rounds=rounds, seed=options.seed)
    return [record.weights_sha256 for record in run.records]


def test_a_secure_federation_trains_as_one_process_does_whatever_is_killed(tmp_path: Path) -> None:
    with site(tmp_path, secure=True) as here:
        here.start_nodes()
        here.submit(OPTIONS | {"rounds": ROUNDS})
        here.reach(6)
        here.kill_node("client-1")
        until(lambda: "late" in here.outcomes("client-1"), 60, "a round that closes without the client")
        here.reach(here.outcomes("client-1").index("late") + 1)  # it counts: else the round is repeated, and its line
        here.fed.restart_node("client-1")
        here.kill_server_app()
        until(lambda: here.log("client-1").count("connected as node") == 2, 60, here.told)
        here.submit(OPTIONS | {"rounds": ROUNDS})
        here.finish()
        digest = check_run(here.out, ROUNDS)
        assert members(here.out) == ["client-0", "client-1", "client-2"]
        alone = here.outcomes("client-1").index("late")
        hashes = [record.weights_sha256 for record in bf.Journal.open(here.out).records]
        assert hashes[:alone] == locally(tmp_path / "train.toml", ROUNDS)[:alone]
        assert hashes[-1] == digest
        [closed] = [log for log in here.logs() if log.round == alone]
        assert [visit.outcome for visit in closed.visits] == ["ok", "late", "ok"]
        assert 4 <= closed.seconds < 10  # its deadline
        assert here.outcomes("client-1")[-5:] == ["ok"] * 5
        down = [[visit.bytes_down for visit in log.visits if visit.outcome == "ok"] for log in here.logs()]
        assert max(map(max, down[-5:])) <= 2 * max(map(max, down[3:alone]))  # by rows again
        until(lambda: here.fed.status(here.submitted[-1]) == "finished:completed", 30, "completion")
        assert "refuses" in here.log("client-1")  # the key was still online


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
        assert lost.wait(60) == 2
        one_line(here.log("lost"), "error: superlink = ", "certificate verify failed", "--root-certificates")
        until(lambda: "refuses (412)" in here.log("stranger"), 30, here.told)
        until(lambda: "trying again" in here.log("plain"), 30, here.told)
        own = ec.generate_private_key(ec.SECP384R1())
        impostor = Impostor(read_key(tmp_path / "good.key"), own)
        liar = Fleet(fed.address, fed.certificates, impostor)  # type: ignore[arg-type]  # it has not the key
        with liar, pytest.raises(FederationError, match=r"refuses \(401\)"):
            liar.connect()
        until(lambda: "connected as node" in here.log("good"), 30, here.told)
        until(lambda: "connected as node" in here.log("wary"), 30, here.told)

        altered = altered_app(tmp_path)
        run = fed.submit(altered, clients=1, patience=6.0, out=str(tmp_path / "altered-run"))
        until(lambda: "is not trusted here; nothing was done" in here.log("good"), 60, here.told)
        assert app_sha256(altered) in here.log("good")

        here.submit(OPTIONS | {"rounds": 4}, clients=1)
        here.finish()
        check_run(here.out, 4)
        assert members(here.out) == ["good"]
        assert f"app {app_sha256(app_folder())} is not trusted" in here.log("wary")
        until(lambda: fed.status(run).startswith("finished:failed"), 60, here.told)
        assert "0 of 1 clients joined within 6 s" in here.fed.flwr("log", str(run), "local", "--show")
        assert not (tmp_path / "it-ran").exists()
        assert "expected a registered key" in here.log("stranger")
        for name in ("stranger", "plain"):
            assert "connected as node" not in here.log(name)
            assert "Traceback" not in here.log(name)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, keys and certificates to use badly."""
    folder = tmp_path_factory.mktemp("things")
    np.savez(folder / "data.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2, np.int64))
    (folder / "ok.key").write_bytes(private_bytes(ec.generate_private_key(ec.SECP384R1())))
    (folder / "nonsense").write_text("nonsense")
    return folder


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["Missing option '--superlink'"]),
        (["--superlink", "a:1"], ["Missing option '--data'"]),
        (["--superlink", "a:1", "--data", "data.npz"], ["root-certificates = ", "--insecure"]),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--insecure", "--root-certificates", "nonsense"],
            ["root-certificates = 'nonsense'", "--insecure"],
        ),
        (["--superlink", "a:1", "--data", "none.npz", "--insecure"], ["none.npz", "expected an .npz file"]),
        (["--superlink", "a:1", "--data", "nonsense", "--insecure"], ["nonsense", "expected an .npz file"]),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--root-certificates", "none.crt"],
            ["root-certificates = 'none.crt'", "PEM", "No such file"],
        ),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--root-certificates", "nonsense"],
            ["root-certificates = 'nonsense'", "PEM"],
        ),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--insecure", "--key", "none.key"],
            ["key = 'none.key'", "ssh-keygen", "No such file"],
        ),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--insecure", "--key", "nonsense"],
            ["key = 'nonsense'", "ssh-keygen"],
        ),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--insecure", "--trust", "12ab"],
            ["trust = '12ab'", "64 hexadecimal digits"],
        ),
        (
            ["--superlink", "a:1", "--data", "data.npz", "--insecure", "--bundle", "none.zip"],
            ["none.zip"],
        ),
        (["--superlink", "a:1", "--data", "data.npz", "--insecure", "--threads", "0"], ["--threads"]),
        (["--superlink", "nonsense", "--data", "data.npz", "--insecure"], ["superlink = 'nonsense'", "HOST:PORT"]),
        (["--superlink", "a:b", "--data", "data.npz", "--insecure"], ["superlink = 'a:b'", "HOST:PORT"]),
    ],
)
def test_bad_usage_of_node_is_told_in_one_line(things: Path, arguments: list[str], parts: list[str]) -> None:
    found = invoke(things, "node", *arguments)
    assert found.code == 2
    assert found.out == ""
    one_line(found.err, "error: ", *parts)


def test_bad_usage_of_app_is_told_in_one_line(tmp_path: Path) -> None:
    found = invoke(tmp_path, "app", "somewhere")
    assert found.code == 2
    one_line(found.err, "error: ")


def test_app_tells_the_hash_that_clients_trust(tmp_path: Path) -> None:
    told = msgspec.json.decode(invoke(tmp_path, "app", "--json").out)
    assert told == {"app": str(app_folder()), "sha256": app_sha256(app_folder())}
    assert invoke(tmp_path, "app").out.split() == list(told.values())


# -- the fault matrix: minutes ---------------------------------------------------------------------------------------

LONG = 60
"""Rounds that outlast a fault and the return."""


def stop(process: subprocess.Popen[bytes] | None, seconds: float) -> None:
    """SIGSTOP, and SIGCONT after some seconds."""
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def back(here: Site, name: str, times: int = 2) -> None:
    """Wait until a client has connected so many times."""
    until(lambda: here.log(name).count("connected as node") >= times, 90, here.told)


def a_client_is_killed(here: Site) -> None:
    here.kill_node("client-1")
    here.fed.restart_node("client-1")
    back(here, "client-1")


def all_clients_are_killed(here: Site) -> None:
    for name in here.fed.nodes:
        here.kill_node(name)
    for name in here.fed.nodes:
        here.fed.restart_node(name)
    for name in here.fed.nodes:
        back(here, name)


def the_server_app_is_killed(here: Site) -> None:
    here.kill_server_app()
    here.submit(OPTIONS | {"rounds": LONG})


def the_superlink_is_killed(here: Site) -> None:
    [server] = here.fed.server_apps()
    assert here.fed.superlink is not None
    here.fed.superlink.kill()
    here.fed.superlink.wait()
    time.sleep(5)  # an outage
    here.fed.start_superlink()
    assert here.fed.server_apps() == [server]


def a_client_stands_still(here: Site) -> None:
    stop(here.fed.nodes["client-1"], 30)


def nobody_reaches_the_superlink(here: Site) -> None:
    stop(here.fed.superlink, 30)


FAULTS = [
    a_client_is_killed,
    all_clients_are_killed,
    the_server_app_is_killed,
    the_superlink_is_killed,
    a_client_stands_still,
    nobody_reaches_the_superlink,
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_by(tmp_path: Path, fault: Callable[[Site], None]) -> None:
    with site(tmp_path) as here:
        here.start_nodes()
        here.submit(OPTIONS | {"rounds": LONG})
        here.reach(5)
        fault(here)
        here.finish()
        check_run(here.out, LONG)
        assert members(here.out) == ["client-0", "client-1", "client-2"]
        assert sum(log.refused for log in here.logs()) == 0
        here.submit(OPTIONS | {"rounds": LONG + 4})  # whoever was away is back, and the run goes on
        here.reach(LONG + 5)
        until(lambda: "Traceback" in here.told() or len(here.logs()) == LONG + 5, 30, here.told)
        for name in here.fed.nodes:
            assert here.outcomes(name)[-1] == "ok"


# -- a registered node that lies -------------------------------------------------------------------------------------


LIES: list[tuple[Callable[[TrainResponse], bytes], str]] = [
    (lambda a: _changed(a, scalars=a.reply.scalars[:-4]), "bytes of scalars"),
    (lambda a: _changed(a, scalars=a.reply.scalars * 2), "bytes of scalars"),
    (lambda a: _changed(a, round=a.reply.round - 1), "reply to round"),
    (lambda a: _changed(a, client=(a.reply.client + 1) % 3), "a reply of client"),
    (lambda a: _changed(a, weight=10**6), "weight = 1000000"),
    (lambda a: _changed(a, nonfinite=10**6), "nonfinite = 1000000"),
    (lambda a: _changed(a, scalars=pack_int32(np.full((1, 6), 2**31 - 1, np.int64))), "scalar 2147483647"),
    (lambda a: _changed(a, scalars=np.full(6, np.nan, "<f4").tobytes()), "scalar "),
    (lambda a: encode(TrainResponse(a.reply, b"x" * 32)), "evaluated at state"),
    (lambda a: encode(TrainResponse(a.reply)), "evaluated at state"),
    (lambda a: b"\xc1garbage", "malformed response"),
    (lambda a: b"", "malformed response"),
    (lambda a: bytes(100_000_000), "bytes: expected at most"),
]


def _changed(answer: TrainResponse, **changes: object) -> bytes:
    return encode(TrainResponse(msgspec.structs.replace(answer.reply, **changes), answer.state_sha256))


def lie(fleet: Fleet, participant: Participant, done: threading.Event) -> None:
    """Answer as a client does, but every second task with the next lie, and the honest ones twice."""
    lies = iter(LIES)
    honest = False
    while not done.wait(0.1):
        try:
            message = fleet.receive()
            if message is None:
                continue
            reply = reply_to(message, participant)
            response = decode_response(_data(reply))
            honest = not honest
            if isinstance(response, TrainResponse) and not honest and (told := next(lies, None)) is not None:
                reply = Message(to_records(told[0](response), {}), reply_to=message)
            fleet.send(reply)
            if honest:
                with contextlib.suppress(FederationError):
                    fleet.send(Message(to_records(encode(response), {}), reply_to=message))
            fleet.confirm(message)
        except FederationError:
            fleet.connect()


def _data(message: Message) -> bytes:
    """The first record's bytes."""
    record = next(iter(message.content.config_records.values()))
    data = record["data"]
    assert isinstance(data, bytes)
    return data


@pytest.mark.slow
def test_replies_that_do_not_fit_are_refused_counted_and_named(tmp_path: Path) -> None:
    with site(tmp_path, secure=True) as here:
        for n in (0, 1):
            here.fed.start_node(f"client-{n}", here.files[n])
        key = read_key(here.fed.make_key("liar"))
        done = threading.Event()
        with Fleet(here.fed.address, here.fed.certificates, key) as fleet:
            fleet.connect()
            participant = Participant("liar", builder(load_arrays(here.files[2])))
            thread = threading.Thread(target=lie, args=(fleet, participant, done))
            thread.start()
            try:
                here.submit(OPTIONS | {"rounds": LONG}, deadline=20.0)
                here.finish(300)
            finally:
                done.set()
                thread.join(60)
            identity = fleet.identity
        check_run(here.out, LONG)
        assert sum(log.refused for log in here.logs()) >= len(LIES)
        liar = here.number("liar")
        reasons = [v.reason or "" for log in here.logs() for v in log.visits if v.outcome == "refused"]
        assert {v.client for log in here.logs() for v in log.visits if v.outcome == "refused"} == {liar}
        printed = here.server_log()
        for _, reason in LIES:
            assert any(reason in told for told in reasons), (reason, reasons)
            assert any(
                f"node {identity[:12]}" in line and reason in line for line in printed.splitlines() if "refused" in line
            )


# -- other clients ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clients_of_flower_itself_take_part(tmp_path: Path) -> None:
    with site(tmp_path, clients=2) as here:
        here.fed.start_node("warm", here.files[0])
        command: list[str | Path] = [BIN / "flower-supernode", "--superlink", here.fed.address, "--insecure"]
        command += ["--port", str(free_port()), "--node-config", f'data="{here.files[1]}" name="stock"']
        here.fed.nodes["stock"] = here.fed.start_process("stock", command)
        here.submit(OPTIONS | {"rounds": 3}, deadline=60.0)
        here.finish()
        check_run(here.out, 3)
        assert members(here.out) == ["stock", "warm"]
        assert here.outcomes("stock") == here.outcomes("warm") == ["ok"] * 4


@pytest.mark.slow
def test_a_client_that_infers_is_small_and_has_no_pytorch(tmp_path: Path) -> None:
    with site(tmp_path, clients=2) as here:
        here.start_nodes()
        here.submit(OPTIONS | {"rounds": 10, "runtime": "ort", "model": "lenet-small", "batch-size": 16})
        here.finish()
        check_run(here.out, 10)
        for process in here.fed.nodes.values():
            assert peak_mb(process.pid) < 190
            assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()

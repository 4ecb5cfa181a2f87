"""Federations of real processes: what of a run survives when they are killed, and clients that lie."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

import baffle as bf
from baffle.client.examples import load_arrays
from baffle.client.participant import Participant
from baffle.core.types import pack
from baffle.deploy.certificates import private_bytes
from baffle.deploy.client_model import builder
from baffle.deploy.federation import free_port
from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.deploy.flower.fleet import Fleet
from baffle.deploy.flower.keys import read_key
from baffle.engines.remote.flower import reply_to, to_records
from baffle.errors import FederationError
from baffle.protocol.messages import TrainResponse, decode_response, encode
from deploy_helpers import (
    OPTIONS,
    WAITS_FOR_ALL,
    Site,
    check_run,
    hashes_in_one_process,
    members,
    one_line,
    participants,
    peak_mb,
    site,
    until,
    weights_hashes,
)
from helpers import BIN, invoke

ENDLESS = 10_000
"""Rounds of a run that is killed before it is done."""


def test_a_secure_federation_trains_as_one_process_does_whatever_is_killed(tmp_path: Path) -> None:
    with site(tmp_path, secure=True) as here:
        here.start_nodes()
        options = OPTIONS | {"schedule": "constant"}  # so that rounds do not depend on how many there will be
        here.submit(options | {"rounds": ENDLESS})
        here.reach(6)
        before = here.rounds()
        here.kill_node("client-1")

        def missed() -> list[int]:
            """Rounds since the kill that are done and lack the client."""
            return [round for round, visit in here.visits("client-1") if round >= before and visit.outcome != "ok"]

        until(missed, 300, "a round that closes without the client")
        alone = missed()[-1]
        here.fed.restart_node("client-1")
        here.kill_server_app()
        until(lambda: here.log("client-1").count("connected as node") >= 2, 300, here.tails)
        continued = len(bf.Journal.open(here.out).rows)
        rounds = continued + 8
        here.submit(options | {"rounds": rounds}, deadline=WAITS_FOR_ALL)
        here.finish()
        digest = check_run(here.out, rounds)
        assert members(here.out) == ["client-0", "client-1", "client-2"]
        there = participants(here.out)
        assert there[alone] == {0, 2}
        assert weights_hashes(here.out) == hashes_in_one_process(here, there)
        assert weights_hashes(here.out)[-1] == digest
        back = [(round, visit) for round, visit in here.visits("client-1") if round >= continued]
        assert {round for round, visit in back if visit.outcome == "ok"} == {
            round for round in range(continued, len(there)) if 1 in there[round]
        }
        by_rows = min(visit.bytes_down for log in here.logs()[:before] for visit in log.visits if visit.outcome == "ok")
        assert min(visit.bytes_down for _, visit in back if visit.outcome == "ok") <= 2 * by_rows  # by rows again
        until(lambda: here.fed.status(here.submitted[-1]) == "finished:completed", 300, "completion")


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
    """Wait until a client has connected ``times`` times."""
    until(lambda: here.log(name).count("connected as node") >= times, 300, here.tails)


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
        here.submit(OPTIONS | {"rounds": LONG + 4}, deadline=WAITS_FOR_ALL)  # clients that were away are back
        here.reach(LONG + 5)
        until(lambda: "Traceback" in here.tails() or len(here.logs()) == LONG + 5, 120, here.tails)
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
    (lambda a: _changed(a, scalars=pack(np.full((1, 6), 2**31 - 1, np.int64), 32)), "scalar 2147483647"),
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
    """TrainResponse as a client does, but every second task with the next lie, and the honest ones twice."""
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
                here.submit(OPTIONS | {"rounds": LONG}, deadline=WAITS_FOR_ALL)
                here.finish()
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
            assert any(reason in given for given in reasons), (reason, reasons)
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
        here.submit(OPTIONS | {"rounds": 3}, deadline=WAITS_FOR_ALL)
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

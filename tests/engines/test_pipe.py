"""Clients in separate processes train as simulated ones do, also if processes end, hang, or answer wrongly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.client.calibrate import LADDER
from baffle.engines import pipe
from baffle.engines.pipe import PipeEngine, write_clients
from baffle.errors import DataError, ModelError, OptionError, ReplyError
from baffle.protocol.messages import CalibrateResponse, FailedResponse
from baffle.protocol.pipes import (
    MARK,
    MOST_BYTES,
    Hello,
    Message,
    receive,
    send,
    skip_to_mark,
)
from edge_helpers import (
    CLIENTS,
    INF,
    METHOD,
    NAN,
    Fleet,
    answer,
    assert_trains_as_simulated,
    hello,
    make_fleet,
    without_torch,
)
from helpers import TASK


@pytest.fixture(scope="module", autouse=True)
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In every process that the tests start, importing PyTorch fails."""
    with without_torch(tmp_path_factory.mktemp("blocked")):
        yield


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return make_fleet(tmp_path_factory.mktemp("fleet"), "fp32")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return make_fleet(tmp_path_factory.mktemp("int8"), "int8")


@pytest.fixture(scope="module")
def engine(fleet: Fleet) -> Iterator[PipeEngine]:
    """Processes that serve many runs: a client keeps nothing between rounds."""
    with fleet.engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def int8_engine(int8: Fleet) -> Iterator[PipeEngine]:
    with int8.engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> bf.Run:
    return bf.train(METHOD, fleet.simulation(), fleet.bundle.initial, rounds=5)


def gone(pid: int) -> bool:
    """Neither running nor a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_clients_cannot_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "no PyTorch on this machine" in done.stderr


VARIANTS = {
    "forward": METHOD,
    "central": msgspec.structs.replace(METHOD, difference="central"),
    "gaussian": msgspec.structs.replace(METHOD, family="gaussian"),
    "a direction of one's own": msgspec.structs.replace(METHOD, sharing="per-client"),
    "local steps": msgspec.structs.replace(METHOD, local_steps=2, optimizer=bf.sgd(0.05)),
    "some take part": msgspec.structs.replace(METHOD, participation=0.4),
    "all examples": msgspec.structs.replace(METHOD, batch_size=None),
    "clipped": msgspec.structs.replace(METHOD, client=(bf.clip_scalars(0.5),)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_over_pipes_gives_the_weights_of_the_simulation(fleet: Fleet, engine: PipeEngine, name: str) -> None:
    assert_trains_as_simulated(fleet, engine, VARIANTS[name])


@pytest.mark.parametrize("lattice", [0, 3])
def test_an_int8_bundle_trains_as_simulated_on_the_lattice_too(
    int8: Fleet, int8_engine: PipeEngine, lattice: int
) -> None:
    method = msgspec.structs.replace(METHOD, difference="central", sigma=0.02, lattice=lattice)
    over_pipes = bf.train(method, int8_engine, int8.bundle.initial, rounds=3)
    simulated = bf.train(method, int8.simulation(), int8.bundle.initial, rounds=3)
    assert over_pipes.weights_sha256 == simulated.weights_sha256


def test_a_sigma_that_clients_measure_is_one_that_could_have_been_given(fleet: Fleet, engine: PipeEngine) -> None:
    measured = bf.train(msgspec.structs.replace(METHOD, sigma="auto"), engine, fleet.bundle.initial, rounds=3)
    [sigma] = {record.sigma for record in measured.records}
    assert sigma in LADDER
    assert 1e-4 < sigma < 1e-1
    given_method = msgspec.structs.replace(METHOD, sigma=sigma)
    given_run = bf.train(given_method, fleet.simulation(), fleet.bundle.initial, rounds=3)
    assert measured.weights_sha256 == given_run.weights_sha256
    first, second, *_ = measured.records
    assert first.forward_passes == CLIENTS * (len(LADDER) * 17 + 7)
    assert first.samples_forwarded == CLIENTS * (len(LADDER) * 17 * 64 + 7 * 8)
    assert first.bytes_down is not None
    assert second.bytes_down is not None
    assert first.bytes_down > 1.9 * second.bytes_down  # the weights went there twice


def test_the_lattices_sigma_is_measured_over_pipes(int8: Fleet, int8_engine: PipeEngine) -> None:
    method = msgspec.structs.replace(METHOD, difference="central", sigma="auto", lattice=2)
    over_pipes = bf.train(method, int8_engine, int8.bundle.initial, rounds=1)
    simulated = bf.train(method, int8.simulation(), int8.bundle.initial, rounds=1)
    assert over_pipes.weights_sha256 == simulated.weights_sha256
    assert over_pipes.records[0].sigma == simulated.records[0].sigma


def test_clients_of_two_engines_train_together(fleet: Fleet) -> None:
    pytest.importorskip("openvino")
    commands = [fleet.commands[0], [*fleet.commands[1], "--runtime", "openvino"]]
    with PipeEngine(fleet.bundle, commands, fleet.runtime()) as engine:
        run = bf.train(METHOD, engine, fleet.bundle.initial, rounds=2, test=fleet.clients[2])
    simulation = bf.LocalEngine(fleet.runtime(), fleet.clients[:2])
    simulated = bf.train(METHOD, simulation, fleet.bundle.initial, rounds=2, test=fleet.clients[2])
    assert run.loss == pytest.approx(simulated.loss, rel=1e-2)
    assert np.abs(run.weights - simulated.weights).max() < 0.2  # Adam: a sign may differ where a gradient is near 0


def test_bytes_are_the_lengths_of_the_frames(fleet: Fleet, tmp_path: Path) -> None:
    """Anything that carries bytes can be the pipe: here two copies of tee, whose files are measured."""
    commands = []
    for number, command in enumerate(fleet.commands):
        reason = " ".join(f"'{part}'" for part in command)
        commands.append(["sh", "-c", f"tee '{tmp_path}/down{number}' | {reason} | tee '{tmp_path}/up{number}'"])
    with PipeEngine(fleet.bundle, commands, fleet.runtime()) as engine:
        run = bf.train(
            msgspec.structs.replace(METHOD, sigma="auto", participation=0.7), engine, fleet.bundle.initial, rounds=4
        )
    down, up = 0, 0
    for number in range(CLIENTS):
        down += (tmp_path / f"down{number}").stat().st_size
        with (tmp_path / f"up{number}").open("rb") as file:
            skip_to_mark(file)
            receive(file, MOST_BYTES)  # the greeting
            up += (tmp_path / f"up{number}").stat().st_size - file.tell()
    assert sum(record.bytes_down or 0 for record in run.records) == down
    assert sum(record.bytes_up or 0 for record in run.records) == up


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_client_stays_small(fleet: Fleet, engine: PipeEngine) -> None:
    method = msgspec.structs.replace(METHOD, num_directions=100, batch_size=32, sigma="auto")
    bf.train(method, engine, fleet.bundle.initial, rounds=3)
    for pid in engine.pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        [peak] = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
        assert 20 < peak < 90  # MiB
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_run_continues_with_new_processes(
    fleet: Fleet, engine: PipeEngine, undisturbed: bf.Run, tmp_path: Path
) -> None:
    bf.train(METHOD, engine, fleet.bundle.initial, rounds=2, out=tmp_path / "run")
    with fleet.engine() as another:
        resumed = bf.resume(tmp_path / "run", another, rounds=5)
    assert resumed.weights_sha256 == undisturbed.weights_sha256
    assert (tmp_path / "run/summary.json").exists()


def test_a_killed_client_ends_the_run_with_one_error_and_it_can_go_on(
    fleet: Fleet, engine: PipeEngine, undisturbed: bf.Run, tmp_path: Path
) -> None:
    mortal = fleet.engine()

    def kill(record: Any) -> None:
        if record.round == 2:
            os.kill(mortal.pids[1], signal.SIGKILL)

    started = time.monotonic()
    with mortal, pytest.raises(ReplyError) as raised:
        bf.train(METHOD, mortal, fleet.bundle.initial, rounds=5, out=tmp_path / "run", progress=kill)
    assert time.monotonic() - started < 20
    assert str(raised.value) == "client 1 ended with code -9: expected an answer; what it said is above"
    assert all(gone(pid) for pid in mortal.pids)
    journal = bf.Journal.open(tmp_path / "run")
    assert (journal.damage, len(journal.rows)) == (None, 3)
    assert bf.resume(tmp_path / "run", engine).weights_sha256 == undisturbed.weights_sha256


def test_an_engine_is_closed_at_once(fleet: Fleet) -> None:
    engine = fleet.engine()
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10
    assert all(gone(pid) for pid in engine.pids)
    engine.close()  # again is fine
    with pytest.raises(ReplyError, match="client 0 ended with code 0"):
        engine.calibrate(TASK, [0], METHOD.init(fleet.bundle.initial))


def test_clients_that_hang_are_killed_together(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_PATIENCE", 0.3)
    engine = fleet.engine()
    for pid in engine.pids:
        os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10
    assert all(gone(pid) for pid in engine.pids)


def test_a_client_with_another_bundle_is_refused(fleet: Fleet, int8: Fleet) -> None:
    with pytest.raises(ReplyError, match=r"client 1 has bundle \w{12}\.\.\.: expected \w{12}\.\.\."):
        PipeEngine(fleet.bundle, [fleet.commands[0], int8.commands[1]], fleet.runtime())


def test_clients_that_cannot_be_started_are_told(
    fleet: Fleet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError, match="at least one client"):
        PipeEngine(fleet.bundle, [], fleet.runtime())
    with pytest.raises(OptionError, match="no-such-program"):
        PipeEngine(fleet.bundle, [fleet.commands[0], ["no-such-program", "x"]], fleet.runtime())
    command = [*fleet.commands[1][:-1], str(tmp_path / "missing.npz")]
    with pytest.raises(ReplyError, match="client 1 ended with code 2: expected an answer; what it said is above"):
        PipeEngine(fleet.bundle, [fleet.commands[0], command], fleet.runtime())
    assert "missing.npz: expected an .npz file" in capfd.readouterr().err


def test_clients_do_not_augment_so_they_are_not_written(fleet: Fleet, tmp_path: Path) -> None:
    augmented, _ = bf.load("digits", augmented=True)
    with pytest.raises(DataError, match="augmented"):
        write_clients(fleet.bundle, [augmented], tmp_path)


def says(folder: Path, *messages: Message | bytes) -> list[str]:
    """The command of a process that says this after the mark, whatever it is asked."""
    file = folder / f"says{len(list(folder.iterdir()))}"
    with file.open("wb") as stream:
        stream.write(MARK)
        for message in messages:
            if isinstance(message, bytes):
                stream.write(message)
            else:
                send(stream, message)
    return ["sh", "-c", f"cat '{file}'; exec cat >/dev/null"]


GREETINGS: dict[str, tuple[Callable[[Fleet], list[Message | bytes]], str]] = {
    "text": (lambda fleet: [b"Welcome to this machine!\n"], "begins with b'Welc'.*does something else write here"),
    "a huge length": (lambda fleet: [b"\xff\xff\xff\x7f"], "begins with"),
    "an answer": (lambda fleet: [answer()], "began with TrainResponse: expected its greeting"),
    "no message": (lambda fleet: [b"\x03\x00\x00\x00abc"], "malformed message"),
    "no examples": (lambda fleet: [hello(fleet, examples=0)], "0 examples: expected at least one"),
    "fewer than none": (lambda fleet: [hello(fleet, examples=-7)], "-7 examples"),
    "as many as there are not": (lambda fleet: [hello(fleet, examples=2**63)], "expected at least one"),
    "a failure": (lambda fleet: [FailedResponse("no\nroom\x1b!")], "no room !"),
}


@pytest.mark.parametrize("name", GREETINGS)
def test_a_greeting_that_is_none_is_refused_at_once(fleet: Fleet, tmp_path: Path, name: str) -> None:
    messages, reason = GREETINGS[name]
    with pytest.raises((ReplyError, ModelError), match=f"client 0.*{reason}"):
        PipeEngine(fleet.bundle, [says(tmp_path, *messages(fleet))], fleet.runtime())


def test_a_client_that_closes_its_output_and_lives_on_is_ended(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_PATIENCE", 0.2)
    with pytest.raises(ReplyError, match="client 0 ended with code -9"):
        PipeEngine(fleet.bundle, [["sh", "-c", "exec sleep 60 >&-"]], fleet.runtime())


BAD_ANSWERS: dict[str, tuple[list[Message | bytes], str]] = {
    "of another client": ([answer(client=1)], "client 0 sent TrainResponse: expected its own reply"),
    "of another round": ([answer(round=3)], "reply to round 3"),
    "with another weight": ([answer(weight=101)], "weight = 101: expected 100"),
    "too short": ([answer(scalars=b"")], "0 bytes of scalars"),
    "too large": ([answer(scalars=b"\x00\x40" + bytes(10))], "scalar 16384: expected at most 16383"),
    "with bits behind the last": ([answer(scalars=b"\xff" * 12)], "bits behind the last integer: expected 0"),
    "without magnitudes": ([answer(magnitudes=())], "expected 1 of 0 to 16777216 x its weight"),
    "longer than any": ([answer(scalars=bytes(10**5))], "begins with"),
    "another message": ([CalibrateResponse((), (), 0, 0)], "client 0 sent CalibrateResponse"),
    "a greeting": ([Hello(1, "", {})], "client 0 sent Hello"),
    "the end": ([b"\x05\x00\x00\x00\x00"], "the stream ended within a message, after 5 bytes"),
    "a failure": ([FailedResponse("no memory")], "client 0: no memory"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_does_not_fit_ends_the_run_before_anything_is_written(
    fleet: Fleet, tmp_path: Path, name: str
) -> None:
    messages, reason = BAD_ANSWERS[name]
    command = says(tmp_path, hello(fleet), *messages)
    with (
        PipeEngine(fleet.bundle, [command], fleet.runtime()) as engine,
        pytest.raises((ReplyError, ModelError), match=reason),
    ):
        bf.train(METHOD, engine, fleet.bundle.initial, rounds=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


BAD_LADDERS: dict[str, CalibrateResponse] = {
    "none": CalibrateResponse((), (), 0, 0),
    "sigmas of its own": CalibrateResponse((1e9,) * 7, (0.1,) * 7, 1, 1),
    "errors missing": CalibrateResponse(LADDER, (0.1,) * 6, 1, 1),
    "NaN": CalibrateResponse(LADDER, (NAN,) * 7, 1, 1),
    "negative": CalibrateResponse(LADDER, (-1.0,) * 7, 1, 1),
}


@pytest.mark.parametrize("name", BAD_LADDERS)
def test_a_client_cannot_choose_the_sigma_by_a_ladder_of_its_own(fleet: Fleet, tmp_path: Path, name: str) -> None:
    command = says(tmp_path, hello(fleet), BAD_LADDERS[name])
    method = msgspec.structs.replace(METHOD, sigma="auto")
    with (
        PipeEngine(fleet.bundle, [command], fleet.runtime()) as engine,
        pytest.raises(ReplyError, match="client 0 measured errors"),
    ):
        bf.train(method, engine, fleet.bundle.initial, rounds=1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, INF, NAN])
def test_a_client_cannot_make_the_lattices_sigma_absurd(fleet: Fleet, tmp_path: Path, sigma: float) -> None:
    command = says(tmp_path, hello(fleet), CalibrateResponse((sigma,), (INF,), 1, 1))
    method = msgspec.structs.replace(METHOD, sigma="auto", difference="central", lattice=1)
    with (
        PipeEngine(fleet.bundle, [command], fleet.runtime()) as engine,
        pytest.raises(ReplyError, match="client 0 measured errors"),
    ):
        bf.train(method, engine, fleet.bundle.initial, rounds=1)


def test_after_one_clients_failure_the_others_answers_are_not_taken_for_later_ones(
    fleet: Fleet, engine: PipeEngine
) -> None:
    task = msgspec.structs.replace(TASK, num_directions=3, batch_size=4, sigma=0.01, round=1)
    state = METHOD.init(fleet.bundle.initial)
    wrong = METHOD.init(np.zeros(3, np.float32))
    with pytest.raises(ModelError, match="client 0: weights of 12 bytes"):
        engine.exchange(task, range(CLIENTS), wrong, [])
    later = msgspec.structs.replace(task, round=2)
    replies = engine.exchange(later, range(CLIENTS), state, []).replies
    assert replies == fleet.simulation().exchange(later, range(CLIENTS), state, []).replies


def test_what_never_begins_is_no_client(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Welcome to this machine!\n" * 10000)
    with pytest.raises(ReplyError, match=r"client 0: .* that begin with b'Welcome to .*: expected a client"):
        PipeEngine(fleet.bundle, [["cat", str(tmp_path / "text")]], fleet.runtime())
    with pytest.raises(ReplyError, match="client 0 ended with code 0: expected an answer"):
        PipeEngine(fleet.bundle, [["echo", "Welcome"]], fleet.runtime())

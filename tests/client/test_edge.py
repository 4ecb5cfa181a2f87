"""Clients that can only infer: processes without PyTorch at the other end of pipes, and what may come through these."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import baffle as bf
from baffle.client import edge
from baffle.client.calibrate import LADDER
from baffle.client.examples import load_examples
from baffle.client.respond import draw, respond
from baffle.core.types import Reply, Weights
from baffle.engines import pipe
from baffle.engines.pipe import PipeEngine, write_clients
from baffle.errors import DataError, ModelError, OptionError, ReplyError
from baffle.protocol.messages import CalibrateResponse, FailedResponse, TrainResponse
from baffle.protocol.pipes import (
    MARK,
    MOST_BYTES,
    Hello,
    Message,
    WorkRequest,
    decode,
    receive,
    receive_frame,
    send,
    skip_to_mark,
)
from baffle.runtimes.onnx.bundle import Precision
from helpers import TASK

CLIENTS = 3
METHOD = bf.Method(num_directions=6, batch_size=8, sigma=1e-3, optimizer=bf.adam(0.05))
encode = msgspec.msgpack.encode


@dataclass(frozen=True)
class Fleet:
    """A bundle, the clients' data, and the commands that start them."""

    bundle: bf.Bundle
    clients: tuple[bf.Dataset, ...]
    commands: list[list[str]]
    folder: Path

    def engine(self) -> PipeEngine:
        return PipeEngine(self.bundle, self.commands, self.runtime())

    def runtime(self) -> bf.OrtRuntime:
        return bf.OrtRuntime(self.bundle, 1)

    def simulation(self) -> bf.LocalEngine:
        return bf.LocalEngine(self.runtime(), self.clients, together=False)


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Hardswish(), nn.Linear(16, 10))


@pytest.fixture(scope="module", autouse=True)
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In every process that the tests start, importing PyTorch fails."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text("raise ImportError('no PyTorch on this machine')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


def make_fleet(folder: Path, precision: Precision) -> Fleet:
    train, _ = bf.load("digits")
    bundle, clients = bf.export(small(), F.cross_entropy, train, precision=precision), bf.partition(train, CLIENTS)
    return Fleet(bundle, clients, write_clients(bundle, clients, folder), folder)


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


# --- training


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
    initial = fleet.bundle.initial
    over_pipes = bf.train(VARIANTS[name], engine, initial, rounds=3, seed=5)
    simulated = bf.train(VARIANTS[name], fleet.simulation(), initial, rounds=3, seed=5)
    assert over_pipes.weights_sha256 == simulated.weights_sha256
    assert (over_pipes.weights != initial).any()
    for ours, theirs in zip(over_pipes.records, simulated.records, strict=True):
        assert ours.forward_passes == theirs.forward_passes
        assert ours.samples_forwarded == theirs.samples_forwarded


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
        told = " ".join(f"'{part}'" for part in command)
        commands.append(["sh", "-c", f"tee '{tmp_path}/down{number}' | {told} | tee '{tmp_path}/up{number}'"])
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


# --- processes that end, hang, or are others


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


def test_a_client_whose_server_has_gone_ends(fleet: Fleet) -> None:
    with Client(fleet) as client:
        client.process.stdin.close()
        assert client.process.wait(30) == 0


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


# --- answers that no honest client gives


def hello(fleet: Fleet, **changes: object) -> Hello:
    return msgspec.structs.replace(Hello(100, fleet.bundle.sha256, {"runtime": "ort"}), **changes)


def answer(**changes: object) -> TrainResponse:
    zeros = Reply(round=0, client=0, weight=100, scalars=bytes(4 * 6), clipped=0, nonfinite=0)
    return TrainResponse(msgspec.structs.replace(zeros, **changes))


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
    messages, told = GREETINGS[name]
    with pytest.raises((ReplyError, ModelError), match=f"client 0.*{told}"):
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
    "too large": ([answer(scalars=b"\xff\xff\xff\x7f" * 6)], "at most 16383 x its weight"),
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
    messages, told = BAD_ANSWERS[name]
    command = says(tmp_path, hello(fleet), *messages)
    with (
        PipeEngine(fleet.bundle, [command], fleet.runtime()) as engine,
        pytest.raises((ReplyError, ModelError), match=told),
    ):
        bf.train(METHOD, engine, fleet.bundle.initial, rounds=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


NAN, INF = float("nan"), float("inf")
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


# --- requests that no honest server sends


class Client:
    """A client's process, spoken to directly."""

    def __init__(self, fleet: Fleet, *, env: dict[str, str] | None = None, command: Sequence[str] = ()) -> None:
        self.process: Any = subprocess.Popen(
            command or fleet.commands[0],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        with self.process:
            self.process.kill()

    def ask(self, request: Message | bytes) -> Message:
        if isinstance(request, bytes):
            self.process.stdin.write(len(request).to_bytes(4, "little") + request)
            self.process.stdin.flush()
        else:
            send(self.process.stdin, request)
        return self.hear()

    def greeting(self) -> Message:
        skip_to_mark(self.process.stdout)
        return self.hear()

    def hear(self) -> Message:
        found = receive(self.process.stdout, 2**20)
        assert found is not None
        return found[0]


def work(weights: Weights, client: int = 0, **changes: object) -> WorkRequest:
    task = msgspec.structs.replace(TASK, **{"batch_size": 4, "sigma": 0.01, **changes})
    return WorkRequest(client, task, weights.astype("<f4").tobytes())


@dataclass(frozen=True)
class Request:
    """What is sent instead of a task, and what the client says to that."""

    message: Callable[[Weights], Message | bytes]
    told: str


def edited(weights: Weights, **changes: object) -> bytes:
    """An encoded task with changes that types would not allow."""
    found = msgspec.msgpack.decode(encode(work(weights)))
    found["task"] |= changes
    return encode(found)


REQUESTS: dict[str, Request] = {
    "nothing": Request(lambda w: b"", "malformed message"),
    "random bytes": Request(lambda w: bytes(range(200)), "malformed message"),
    "a number": Request(lambda w: encode(5), "malformed message"),
    "an unknown kind": Request(lambda w: encode({"type": "update", "code": "rm"}), "Invalid value 'update'"),
    "no kind": Request(lambda w: encode({"client": 1}), "`type`"),
    "a broken text": Request(lambda w: encode({"type": "failed"})[:-1] + b"\xff", "malformed message"),
    "a text that is none": Request(lambda w: b"\x82\xa4type\xa6failed\xa6reason\xa2\xff\xfe", "malformed message"),
    "a deep nest": Request(lambda w: b"\x82\xa4type\xa6failed\xa3abc" + b"\x91" * 50000 + b"\x00", "recursion"),
    "two messages": Request(lambda w: encode(work(w)) * 2, "malformed message"),
    "a greeting": Request(lambda w: Hello(1, "x", {}), "Hello: expected a task"),
    "an answer": Request(lambda w: answer(), "TrainResponse: expected a task"),
    "short weights": Request(lambda w: work(w[:-1]), "expected 4840, for the tensors"),
    "long weights": Request(lambda w: work(np.append(w, w[:1])), "weights of 4844 bytes"),
    "half a number": Request(lambda w: WorkRequest(0, TASK, bytes(4839)), "weights of 4839 bytes"),
    "no weights": Request(lambda w: WorkRequest(0, TASK, b""), "weights of 0 bytes"),
    "NaN": Request(lambda w: work(np.full_like(w, np.nan)), "weights with NaN or infinity"),
    "infinity": Request(lambda w: work(np.append(w[1:], np.float32(-np.inf))), "weights with NaN or infinity"),
    "no directions": Request(lambda w: work(w, num_directions=0), "num_directions = 0"),
    "fewer than none": Request(lambda w: work(w, num_directions=-3), "num_directions = -3"),
    "endless directions": Request(lambda w: work(w, num_directions=2**40), f"num_directions = {2**40}"),
    "endless steps": Request(lambda w: work(w, local_steps=2**40), f"local_steps = {2**40}"),
    "sigma 0": Request(lambda w: edited(w, sigma=0.0), "sigma = 0.0"),
    "sigma NaN": Request(lambda w: edited(w, sigma=NAN), "sigma = nan"),
    "an empty batch": Request(lambda w: work(w, batch_size=0), "batch_size = 0"),
    "a negative batch": Request(lambda w: work(w, batch_size=-1), "batch_size = -1"),
    "a negative round": Request(lambda w: work(w, round=-1), ""),
    "a client that is none": Request(lambda w: work(w, client=-5, sharing="per-client"), ""),
    "a family that is none": Request(lambda w: edited(w, family="uniform"), "Invalid enum value 'uniform'"),
    "a key that is none": Request(lambda w: edited(w, key=-1), "malformed message"),
    "no quantum": Request(lambda w: work(w, quantum=0), ""),
    "an exponent beyond all": Request(lambda w: work(w, exponent=2**40), ""),
}


def test_what_is_no_task_is_told_and_the_next_one_answered(fleet: Fleet) -> None:
    weights, runtime, data = fleet.bundle.initial, fleet.runtime(), fleet.clients[0]
    good = work(weights, num_directions=3)
    expected = respond(good.task, runtime, weights, lambda step: draw(good.task, data, 0, step), 0, len(data))
    with Client(fleet) as client:
        assert client.greeting() == Hello(len(data), fleet.bundle.sha256, runtime.plan)
        for name, request in REQUESTS.items():
            found = client.ask(request.message(weights))
            assert isinstance(found, FailedResponse), name
            assert request.told in found.reason, (name, found.reason)
            assert client.ask(good) == TrainResponse(expected), name
        client.process.stdin.close()
        assert client.process.wait(30) == 0
        assert client.process.stderr.read() == b""


def test_a_failure_has_a_short_reason(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("x" * 10**6)

    monkeypatch.setattr(edge, "respond", fail)
    requests, answers = io.BytesIO(), io.BytesIO()
    send(requests, work(fleet.bundle.initial))
    edge.serve(fleet.runtime(), fleet.bundle, fleet.clients[0], io.BytesIO(requests.getvalue()), answers)
    answers.seek(0)
    skip_to_mark(answers)
    receive(answers, MOST_BYTES)
    found = receive(answers, MOST_BYTES)
    assert found is not None
    assert isinstance(found[0], FailedResponse)
    assert found[0].reason.startswith("RuntimeError: xxx")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"hello, who is there?\n", "begins with b'hell'"),
        (b"\xff\xff\xff\xff", "begins with"),
        (b"\x00\x00\x02\x00", "begins with"),  # longer than the weights can be
        (b"\x05\x00", "ended within a message, after 2 bytes"),
        (b"\x05\x00\x00\x00abc", "ended within a message, after 7 bytes"),
    ],
)
def test_what_is_no_frame_ends_the_client_with_one_line(fleet: Fleet, data: bytes, told: str) -> None:
    done = subprocess.run(fleet.commands[0], input=data, capture_output=True, check=False)
    error = done.stderr.decode()
    assert done.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error
    greeting = receive(io.BytesIO(done.stdout.removeprefix(MARK)), MOST_BYTES)
    assert greeting is not None
    assert len(MARK) + greeting[1] == len(done.stdout)


# --- what else writes to standard output

LOUD = """
import os, subprocess, sys
import baffle.client.edge as edge

def loud(*arguments, real=edge.respond):
    print("a library says something", flush=True)
    os.write(1, b"and so does C\\n")
    subprocess.run(["echo", "or a program"])
    return real(*arguments)

edge.respond = loud
sys.exit(edge.main(sys.argv[1:]))
"""


def test_what_a_client_prints_does_not_get_between_its_answers(
    fleet: Fleet, engine: PipeEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site = "import os, sys\nos.write(1, b'hello from the system\\n')\nprint('hello from the site')\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
        patch.setenv("PYTHONUNBUFFERED", "1")
        loud = [sys.executable, "-c", LOUD, *fleet.commands[1][3:]]
        with PipeEngine(fleet.bundle, [fleet.commands[0], loud, fleet.commands[2]], fleet.runtime()) as noisy:
            found = bf.train(METHOD, noisy, fleet.bundle.initial, rounds=1)
    quiet = bf.train(METHOD, engine, fleet.bundle.initial, rounds=1)
    assert found.weights_sha256 == quiet.weights_sha256
    out, err = capfd.readouterr()
    assert out == ""
    for words in ("a library says something", "and so does C", "or a program"):
        assert words in err


def test_what_never_begins_is_no_client(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Welcome to this machine!\n" * 10000)
    with pytest.raises(ReplyError, match=r"client 0: .* that begin with b'Welcome to .*: expected a client"):
        PipeEngine(fleet.bundle, [["cat", str(tmp_path / "text")]], fleet.runtime())
    with pytest.raises(ReplyError, match="client 0 ended with code 0: expected an answer"):
        PipeEngine(fleet.bundle, [["echo", "Welcome"]], fleet.runtime())


# --- frames


MESSAGES: list[Message] = [
    Hello(3, "ab", {"runtime": "ort", "threads": 1}),
    WorkRequest(2, TASK, b"\0\1\2\3", True),
    answer(scalars=b"\1\0\0\0"),
    CalibrateResponse((0.1, 0.2), (INF, 0.5), 3, 4),
    FailedResponse("because"),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(MESSAGES)))
def test_frames_come_out_as_they_went_in(messages: list[Message]) -> None:
    stream = io.BytesIO()
    sizes = [send(stream, message) for message in messages]
    assert sum(sizes) == len(stream.getvalue())
    stream.seek(0)
    assert [receive(stream, 1000) for _ in messages] == list(zip(messages, sizes, strict=True))
    assert receive(stream, 1000) is None


@settings(deadline=None)
@given(st.binary(max_size=50).filter(lambda noise: MARK not in noise))
def test_what_comes_before_the_mark_is_skipped(noise: bytes) -> None:
    stream = io.BytesIO(noise + MARK + b"rest")
    skip_to_mark(stream)
    assert stream.read() == b"rest"


@settings(deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_frame_that_is_cut_short_is_an_error(message: Message, data: st.DataObject) -> None:
    stream = io.BytesIO()
    size = send(stream, message)
    kept = data.draw(st.integers(1, size - 1))
    with pytest.raises(ReplyError, match=f"ended within a message, after {kept} bytes"):
        receive(io.BytesIO(stream.getvalue()[:kept]), 1000)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_a_message_or_an_error(noise: bytes, framed: bool) -> None:
    data = len(noise).to_bytes(4, "little") + noise if framed else noise
    try:
        found = receive(io.BytesIO(data), 1000)
    except ReplyError:
        return
    assert (found is None) == (data == b"")


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_message_with_a_changed_byte_is_a_message_or_an_error(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ReplyError):
        decode(bytes(frame))


def test_a_length_alone_takes_no_memory() -> None:
    reading, writing = os.pipe()
    os.write(writing, (2**31 - 1).to_bytes(4, "little") + bytes(1000))
    os.close(writing)
    tracemalloc.start()
    try:
        with os.fdopen(reading, "rb") as stream, pytest.raises(ReplyError, match="after 1004 bytes"):
            receive(stream, 2**31)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_frames_that_come_in_pieces_are_put_together() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(3, size or 0))

    stream = io.BytesIO()
    size = send(stream, MESSAGES[0])
    assert receive(Slow(stream.getvalue()), 1000) == (MESSAGES[0], size)
    assert receive_frame(Slow(stream.getvalue()), size - 4) == encode(MESSAGES[0])
    with pytest.raises(ReplyError, match=f"at most {size - 5} bytes"):
        receive_frame(Slow(stream.getvalue()), size - 5)


# --- files and options


def arrays(fleet: Fleet) -> dict[str, Any]:
    return {"x": np.asarray(fleet.clients[0].x)[:20].copy(), "y": np.asarray(fleet.clients[0].y)[:20].copy()}


def replaced(array: Any, where: Any, value: float) -> Any:
    array[where] = value
    return array


def compressed(path: Path, found: dict[str, Any]) -> None:
    np.savez_compressed(path, **found)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 40] = bytes(40)
    path.write_bytes(data)


def one_array(path: Path, found: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, found["x"])


BAD_DATA: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "no file": (lambda path, a: None, "No such file"),
    "a folder": (lambda path, a: path.mkdir(), "directory"),
    "empty": (lambda path, a: path.write_bytes(b""), "expected an .npz file"),
    "text": (lambda path, a: path.write_text("x, y\n"), "expected an .npz file"),
    "one array": (one_array, "expected an .npz file"),
    "other names": (lambda path, a: np.savez(path, images=a["x"], labels=a["y"]), "images, labels: expected"),
    "no labels": (lambda path, a: np.savez(path, x=a["x"]), "arrays x: expected"),
    "objects": (lambda path, a: np.savez(path, x=np.array([{}, {}]), y=a["y"]), "Object arrays"),
    "damaged": (compressed, "expected an .npz file"),
    "no examples": (lambda path, a: np.savez(path, x=a["x"][:0], y=a["y"][:0]), "no examples"),
    "unequal": (lambda path, a: np.savez(path, x=a["x"], y=a["y"][1:]), "20 examples and y has 19"),
    "NaN": (lambda path, a: np.savez(path, x=replaced(a["x"], (3, 0, 1, 1), np.nan), y=a["y"]), "x[3, 0, 1, 1]"),
    "infinity": (lambda path, a: np.savez(path, x=replaced(a["x"], 0, np.inf), y=a["y"]), "= inf"),
    "flat": (
        lambda path, a: np.savez(path, x=a["x"].reshape(20, 64), y=a["y"]),
        "expected float32 [examples, 1, 8, 8]",
    ),
    "bytes": (lambda path, a: np.savez(path, x=a["x"].astype(np.uint8), y=a["y"]), "expected float32 [examples"),
    "text in it": (lambda path, a: np.savez(path, x=np.array(["a"] * 20), y=a["y"]), "<U1"),
    "soft labels": (lambda path, a: np.savez(path, x=a["x"], y=np.ones((20, 10))), "expected int64 [examples]"),
    "a label too large": (lambda path, a: np.savez(path, x=a["x"], y=replaced(a["y"], 7, 10)), "example 7.y[0] = 10"),
    "a negative label": (lambda path, a: np.savez(path, x=a["x"], y=replaced(a["y"], 9, -1)), "example 9.y[0] = -1"),
}


def main(*arguments: str | Path) -> int:
    """``python -m baffle.client.edge`` in this process, which keeps its standard output."""
    kept = os.dup(1)
    try:
        return edge.main(list(map(str, arguments)))
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def one_line(captured: Any, *words: str) -> None:
    assert captured.out == ""
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    for word in words:
        assert word in captured.err


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_do_not_fit_are_one_line(
    fleet: Fleet, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write, told = BAD_DATA[name]
    write(tmp_path / "mine.npz", arrays(fleet))
    assert main(fleet.folder / "client.zip", tmp_path / "mine.npz") == 2
    one_line(capfd.readouterr(), "mine.npz", told)


BAD_BUNDLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a client bundle"),
    "cut": (lambda data: data[: len(data) // 2], "not a client bundle"),
    "text": (lambda data: b"hello\n", "not a client bundle"),
    "edited": (lambda data: data[: len(data) // 2] + b"\0" * 9 + data[len(data) // 2 + 9 :], "client.zip: "),
}


@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_a_damaged_bundle_is_one_line(
    fleet: Fleet, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, told = BAD_BUNDLES[name]
    (tmp_path / "client.zip").write_bytes(damage((fleet.folder / "client.zip").read_bytes()))
    assert main(tmp_path / "client.zip", fleet.folder / "client-0.npz") == 2
    one_line(capfd.readouterr(), "client.zip", told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--precision", "int8"), "precision = 'int8': expected fp32, which the bundle was exported for"),
        (("--runtime", "openvino", "--precision", "int8"), "precision = 'int8': expected fp32"),
        (("--runtime", "openvino", "--precision", "fp31"), "'fp31': expected one of fp32, bf16"),
        (("--runtime", "tflite"), "--runtime: invalid choice: 'tflite'"),
        (("--threads", "0"), "threads = 0: expected an integer >= 1"),
        (("--threads", "many"), "--threads: invalid int value: 'many'"),
        (("--nosuch",), "--nosuch"),
        (("one", "more"), "one more"),
    ],
)
def test_bad_options_are_one_line(
    fleet: Fleet, options: tuple[str, ...], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if "openvino" in options:
        pytest.importorskip("openvino")
    assert main(fleet.folder / "client.zip", fleet.folder / "client-0.npz", *options) == 2
    one_line(capfd.readouterr(), told)


def test_missing_arguments_and_files_are_one_line(fleet: Fleet, capfd: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    one_line(capfd.readouterr(), "BUNDLE", "DATA.npz")
    assert main("no.zip", fleet.folder / "client-0.npz") == 2
    one_line(capfd.readouterr(), "no.zip", "No such file")


def test_a_process_of_its_own_says_the_same(fleet: Fleet, tmp_path: Path) -> None:
    commands: list[tuple[list[str], str]] = [
        ([*fleet.commands[0][:-1], str(tmp_path / "no.npz")], "no.npz: expected an .npz file"),
        (["sh", "-c", '"$@" >&-', "sh", *fleet.commands[0]], "standard input or output is closed"),
        (["sh", "-c", '"$@" <&-', "sh", *fleet.commands[0]], "standard input or output is closed"),
    ]
    for command, told in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert told in done.stderr


def test_a_reader_that_goes_away_is_no_error(fleet: Fleet) -> None:
    with Client(fleet) as client:
        client.greeting()
        client.process.stdout.close()
        send(client.process.stdin, work(fleet.bundle.initial))
        assert client.process.wait(30) == 130
        assert client.process.stderr.read() == b""


def test_stored_pixels_are_scaled_as_the_bundle_says(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    data = bf.Dataset(pixels, np.arange(30) % 10, "pixels", bf.data.Scaling((0.4,), (0.2,)))
    bundle = bf.export(small(), F.cross_entropy, data)
    commands = write_clients(bundle, bf.partition(data, 2), tmp_path)
    with np.load(tmp_path / "client-0.npz") as file:
        assert file["x"].dtype == np.uint8
    with PipeEngine(bundle, commands, bf.OrtRuntime(bundle, 1)) as engine:
        over_pipes = bf.train(METHOD, engine, bundle.initial, rounds=1)
    simulation = bf.LocalEngine(bf.OrtRuntime(bundle, 1), bf.partition(data, 2), together=False)
    assert over_pipes.weights_sha256 == bf.train(METHOD, simulation, bundle.initial, rounds=1).weights_sha256
    floats = bf.Dataset(data.inputs(), data.y)
    np.savez(tmp_path / "scaled.npz", x=floats.x, y=floats.y)
    assert (load_examples(tmp_path / "scaled.npz", bundle).inputs() == data.inputs()).all()

"""The stateless client as a process: requests that no honest server sends, foreign output, files and options."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.client import edge
from baffle.client.respond import draw, respond
from baffle.core.types import Weights
from baffle.engines.pipe import PipeEngine
from baffle.protocol.messages import FailedResponse, TrainResponse
from baffle.protocol.pipes import (
    MARK,
    MOST_BYTES,
    Hello,
    Message,
    WorkRequest,
    receive,
    send,
    skip_to_mark,
)
from edge_helpers import METHOD, NAN, Fleet, answer, encode, main, make_fleet, one_line, without_torch, work
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
def engine(fleet: Fleet) -> Iterator[PipeEngine]:
    """Processes that serve many runs: a client keeps nothing between rounds."""
    with fleet.engine() as engine:
        yield engine


def test_a_client_whose_server_has_gone_ends(fleet: Fleet) -> None:
    with Client(fleet) as client:
        client.process.stdin.close()
        assert client.process.wait(30) == 0


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
        received = receive(self.process.stdout, 2**20)
        assert received is not None
        return received[0]


@dataclass(frozen=True)
class Request:
    """What is sent instead of a task, and what the client says to that."""

    message: Callable[[Weights], Message | bytes]
    reason: str


def edited(weights: Weights, **changes: object) -> bytes:
    """An encoded task with changes that types would not allow."""
    message = msgspec.msgpack.decode(encode(work(weights)))
    message["task"] |= changes
    return encode(message)


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
    "an exponent beyond all": Request(lambda w: work(w, exponents=(2**40,)), ""),
}


def test_what_is_no_task_is_told_and_the_next_one_answered(fleet: Fleet) -> None:
    weights, runtime, data = fleet.bundle.initial, fleet.runtime(), fleet.clients[0]
    good = work(weights, num_directions=3)
    expected = respond(good.task, runtime, weights, lambda step: draw(good.task, data, 0, step), 0, len(data))
    with Client(fleet) as client:
        assert client.greeting() == Hello(len(data), fleet.bundle.sha256, runtime.plan)
        for name, request in REQUESTS.items():
            response = client.ask(request.message(weights))
            assert isinstance(response, FailedResponse), name
            assert request.reason in response.reason, (name, response.reason)
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
    response = receive(answers, MOST_BYTES)
    assert response is not None
    assert isinstance(response[0], FailedResponse)
    assert response[0].reason.startswith("RuntimeError: xxx")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello, who is there?\n", "begins with b'hell'"),
        (b"\xff\xff\xff\xff", "begins with"),
        (b"\x00\x00\x02\x00", "begins with"),  # longer than the weights can be
        (b"\x05\x00", "ended within a message, after 2 bytes"),
        (b"\x05\x00\x00\x00abc", "ended within a message, after 7 bytes"),
    ],
)
def test_what_is_no_frame_ends_the_client_with_one_line(fleet: Fleet, data: bytes, reason: str) -> None:
    done = subprocess.run(fleet.commands[0], input=data, capture_output=True, check=False)
    error = done.stderr.decode()
    assert done.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error
    greeting = receive(io.BytesIO(done.stdout.removeprefix(MARK)), MOST_BYTES)
    assert greeting is not None
    assert len(MARK) + greeting[1] == len(done.stdout)


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
            run = bf.train(METHOD, noisy, fleet.bundle.initial, rounds=1)
    quiet = bf.train(METHOD, engine, fleet.bundle.initial, rounds=1)
    assert run.weights_sha256 == quiet.weights_sha256
    out, err = capfd.readouterr()
    assert out == ""
    for words in ("a library says something", "and so does C", "or a program"):
        assert words in err


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
    damage, reason = BAD_BUNDLES[name]
    (tmp_path / "client.zip").write_bytes(damage((fleet.folder / "client.zip").read_bytes()))
    assert main(tmp_path / "client.zip", fleet.folder / "client-0.npz") == 2
    one_line(capfd.readouterr(), "client.zip", reason)


@pytest.mark.parametrize(
    ("options", "reason"),
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
    fleet: Fleet, options: tuple[str, ...], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if "openvino" in options:
        pytest.importorskip("openvino")
    assert main(fleet.folder / "client.zip", fleet.folder / "client-0.npz", *options) == 2
    one_line(capfd.readouterr(), reason)


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
    for command, reason in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert reason in done.stderr


def test_a_reader_that_goes_away_is_no_error(fleet: Fleet) -> None:
    with Client(fleet) as client:
        client.greeting()
        client.process.stdout.close()
        send(client.process.stdin, work(fleet.bundle.initial))
        assert client.process.wait(30) == 130
        assert client.process.stderr.read() == b""

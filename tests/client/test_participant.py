"""A client that keeps the state: it catches up from rows, proves it, and takes nothing for it that is not it."""

from __future__ import annotations

import hashlib
import tracemalloc
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.client.calibrate import LADDER
from baffle.client.participant import Memory, Participant, catch_up
from baffle.core.state import State, state_sha256
from baffle.core.types import Task
from baffle.errors import DataError, ModelError, ReplyError
from baffle.protocol.encoding import decode_row, encode_message
from baffle.protocol.messages import (
    SETUP,
    STATE,
    WEIGHTS,
    AnyResponse,
    BehindResponse,
    CalibrateResponse,
    EnrolRequest,
    EnrolResponse,
    FailedResponse,
    Setup,
    TrainRequest,
    TrainResponse,
    decode_response,
    encode,
)
from baffle.protocol.states import pack_state, pack_weights
from baffle.runtimes import Runtime
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import TASK, initial_weights, linear
from remote_helpers import METHOD, RUNTIME, SETUP_OF_DIGITS, TRAIN

DATA = TRAIN.take(np.arange(60))
SETUP_BYTES = encode(SETUP_OF_DIGITS)
SHA256 = hashlib.sha256(SETUP_BYTES).hexdigest()
TABLE = RUNTIME.table


class Story:
    """A run's rows, and the state before each of them by the slow way: all rows from the start, with the average."""

    def __init__(self, out: Path) -> None:
        bf.train(
            METHOD, bf.LocalEngine(RUNTIME, [DATA, DATA]), initial_weights(), rounds=7, snapshot_every=100, out=out
        )
        journal = bf.Journal.open(out)
        self.rows = journal.rows
        self.states = [METHOD.init(journal.initial), *journal.states()]

    def task(self, round: int) -> Task:
        return msgspec.structs.replace(
            TASK, round=round, num_directions=4, sigma=1e-3, batch_size=8, state_sha256=state_sha256(self.states[round])
        )

    def ask(self, round: int, rows: Sequence[bytes] = (), *, calibrate: bool = False) -> bytes:
        return encode(TrainRequest(setup=SHA256, task=self.task(round), rows=tuple(rows), calibrate=calibrate))

    def attachment(self, round: int) -> dict[str, bytes]:
        return {STATE: pack_state(self.states[round])}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("story") / "run")


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def client(memory: Memory) -> Participant:
    return member(memory)


def member(memory: Memory | None = None, name: str = "hospital") -> Participant:
    """A client that has the setup."""
    participant = Participant(name, lambda setup: (RUNTIME, DATA), memory)
    assert isinstance(say(participant, encode(EnrolRequest(SHA256)), {SETUP: SETUP_BYTES}), EnrolResponse)
    return participant


def say(
    client: Participant, request: bytes, attachments: Mapping[str, bytes] | None = None, number: int = 0
) -> AnyResponse:
    return decode_response(client.answer(request, attachments or {}, number))


def reason(response: AnyResponse) -> str:
    assert isinstance(response, FailedResponse)
    return response.reason


def same(memory: Memory, state: State) -> bool:
    """Whether that is remembered: the same round, the same bits."""
    remembered = memory.state
    return (
        remembered is not None
        and (remembered.round, remembered.step) == (state.round, state.step)
        and remembered.weights.tobytes() == state.weights.tobytes()
        and memory.state_sha256 == state_sha256(state) == state_sha256(remembered)
    )


# Catching up


@pytest.mark.parametrize("start", range(8))
def test_rows_lead_from_any_state_to_any_later_one(story: Story, memory: Memory, start: int) -> None:
    for end in range(start, 9):
        client = member(memory)
        assert isinstance(say(client, story.ask(start), story.attachment(start)), TrainResponse)
        assert same(memory, story.states[start])
        answer = say(client, story.ask(end, story.rows[start:end]))
        assert isinstance(answer, TrainResponse)
        assert answer.state_sha256 == state_sha256(story.states[end])
        assert same(memory, story.states[end])


def test_rows_that_it_has_are_passed_over(story: Story, client: Participant, memory: Memory) -> None:
    say(client, story.ask(4), story.attachment(4))
    assert isinstance(say(client, story.ask(6, story.rows[1:6])), TrainResponse)
    assert same(memory, story.states[6])
    assert isinstance(say(client, story.ask(6, story.rows[4:6])), TrainResponse)
    assert same(memory, story.states[6])


def test_a_state_and_rows_come_together(story: Story, client: Participant, memory: Memory) -> None:
    assert isinstance(say(client, story.ask(6, story.rows[2:6]), story.attachment(2)), TrainResponse)
    assert same(memory, story.states[6])


def test_a_gap_leaves_what_is_there(story: Story, client: Participant, memory: Memory) -> None:
    say(client, story.ask(2), story.attachment(2))
    for rows in (story.rows[3:6], [], story.rows[:1], [story.rows[2], story.rows[4]]):
        assert say(client, story.ask(6, rows)) == BehindResponse(2, state_sha256(story.states[2]), True)
        assert same(memory, story.states[2])


def test_rows_to_another_state_than_the_tasks_are_not_kept(story: Story, client: Participant, memory: Memory) -> None:
    say(client, story.ask(2), story.attachment(2))
    other = msgspec.structs.replace(decode_row(story.rows[2]), clip_factor=0.5)
    assert say(client, story.ask(3, [encode_message(other)])) == BehindResponse(0, b"", True)
    assert memory.state is None
    assert isinstance(say(client, story.ask(3), story.attachment(3)), TrainResponse)


def test_a_state_of_another_hash_is_not_answered_from(story: Story, client: Participant) -> None:
    assert say(client, story.ask(3), story.attachment(2)) == BehindResponse(2, state_sha256(story.states[2]), True)
    wrong = replace(story.states[3], weights=story.states[3].weights + np.float32(1))
    assert isinstance(say(client, story.ask(3), {STATE: pack_state(wrong)}), BehindResponse)


def test_a_task_of_the_past_is_not_answered(story: Story, client: Participant, memory: Memory) -> None:
    say(client, story.ask(5), story.attachment(5))
    assert isinstance(say(client, story.ask(3, story.rows[1:3])), BehindResponse)
    assert same(memory, story.states[5])


@pytest.mark.parametrize("row", [b"", b"\xc1", b"\x91" * 100_000, b"\x81\xa5round\x02", b"\x81\xa1\xff\x01"])
def test_a_malformed_row_is_told(story: Story, client: Participant, memory: Memory, row: bytes) -> None:
    say(client, story.ask(2), story.attachment(2))
    assert reason(say(client, story.ask(3, [row])))
    assert same(memory, story.states[2])


def test_a_row_that_returns_leads_nowhere(story: Story) -> None:
    row = msgspec.structs.replace(decode_row(story.rows[2]), restores=0)
    assert catch_up(story.states[2], TABLE, [encode_message(row)]) is None
    assert catch_up(story.states[2], TABLE, []) is story.states[2]
    with pytest.raises(ReplyError, match="malformed row"):
        catch_up(story.states[2], TABLE, [b"\xc1"])


# Answers


def test_the_same_task_gets_the_same_bytes(story: Story, client: Participant) -> None:
    first = client.answer(story.ask(2), story.attachment(2), 1)
    assert client.answer(story.ask(2), {}, 1) == first
    assert client.answer(story.ask(2), {}, 2) != first  # another client's batch
    assert client.answer(story.ask(2), {}, 1) == first
    restarted = member(name="other")
    assert restarted.answer(story.ask(2, story.rows[:2]), story.attachment(0), 1) == first


def test_participants_that_share_a_memory_catch_up_once(story: Story, memory: Memory) -> None:
    one, two = member(memory, "one"), member(memory, "two")
    say(one, story.ask(3), story.attachment(3))
    answer = say(two, story.ask(3), number=1)
    assert isinstance(answer, TrainResponse)
    assert answer.reply.client == 1
    say(two, story.ask(4, story.rows[3:4]), number=1)
    assert isinstance(say(one, story.ask(4, story.rows[3:4])), TrainResponse)
    assert same(memory, story.states[4])


def test_weights_are_answered_from_and_not_kept(story: Story, client: Participant, memory: Memory) -> None:
    weights = {WEIGHTS: pack_weights(story.states[3].weights)}
    answer, by_state = say(client, story.ask(3), weights), say(member(), story.ask(3), story.attachment(3))
    assert isinstance(answer, TrainResponse)
    assert isinstance(by_state, TrainResponse)
    assert (answer.reply, answer.state_sha256) == (by_state.reply, b"")
    assert memory.state is None


def test_sigma_is_measured_where_that_is_asked(story: Story, client: Participant) -> None:
    measured = say(client, story.ask(0, calibrate=True), story.attachment(0))
    assert isinstance(measured, CalibrateResponse)
    assert measured.sigmas == LADDER
    assert min(measured.errors) < 0.2
    assert isinstance(say(client, story.ask(0, calibrate=True)), CalibrateResponse)


def test_nobody_who_has_nothing_answers(story: Story) -> None:
    stranger = Participant("x", lambda setup: (RUNTIME, DATA))
    assert say(stranger, story.ask(2)) == BehindResponse(0, b"", False)
    assert say(stranger, encode(EnrolRequest(SHA256))) == BehindResponse(0, b"", False)
    assert isinstance(say(stranger, story.ask(2), story.attachment(2) | {SETUP: SETUP_BYTES}), TrainResponse)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_directions": 0},
        {"num_directions": 2**40},
        {"local_steps": 0},
        {"sigma": float("nan")},
        {"sigma": -1.0},
        {"batch_size": 0},
        {"quantum": 0},
        {"exponents": (2**62,)},
    ],
)
def test_tasks_that_no_server_sends_are_told(story: Story, client: Participant, changes: dict[str, object]) -> None:
    say(client, story.ask(2), story.attachment(2))
    task = msgspec.structs.replace(story.task(2), **changes)
    assert reason(say(client, encode(TrainRequest(setup=SHA256, task=task, rows=()))))
    assert isinstance(say(client, story.ask(2)), TrainResponse)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_that_no_client_has_is_told(story: Story, client: Participant, number: int) -> None:
    assert reason(say(client, story.ask(2), story.attachment(2), number))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 100_000, encode(FailedResponse("no")), bytes(10**7)])
def test_no_request_makes_it_raise(client: Participant, data: bytes) -> None:
    assert "malformed request" in reason(say(client, data))


# Parcels


@pytest.mark.parametrize("kind", [STATE, WEIGHTS])
@pytest.mark.parametrize("bad", [b"", b"?", pack_weights(initial_weights()[:5]), pack_weights(initial_weights())[:-2]])
def test_attachments_of_nonsense_are_told_and_what_is_known_stays(
    story: Story, client: Participant, memory: Memory, kind: str, bad: bytes
) -> None:
    say(client, story.ask(2), story.attachment(2))
    assert reason(say(client, story.ask(3), {kind: bad}))
    assert same(memory, story.states[2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_told(story: Story, client: Participant, value: float) -> None:
    state = story.states[3]
    bad = replace(state, slots={"momentum": np.full_like(state.weights, value)})
    assert "momentum with NaN or infinity" in reason(say(client, story.ask(3), {STATE: pack_state(bad)}))
    weights = pack_weights(np.full_like(state.weights, value))
    assert "weights with NaN or infinity" in reason(say(client, story.ask(3), {WEIGHTS: weights}))


def test_a_small_attachment_cannot_swell(story: Story, client: Participant) -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    assert len(bomb) < 250_000
    tracemalloc.start()
    try:
        for kind in (STATE, WEIGHTS):
            assert "malformed attachment" in reason(say(client, story.ask(3), {kind: bomb}))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# Setups


def test_who_it_is(story: Story, client: Participant) -> None:
    first = say(client, encode(EnrolRequest(SHA256)))
    assert first == EnrolResponse(name="hospital", examples=60, plan=RUNTIME.plan, state_sha256=b"", round=0)
    say(client, story.ask(5), story.attachment(5))
    assert say(client, encode(EnrolRequest(SHA256))) == msgspec.structs.replace(
        first, state_sha256=state_sha256(story.states[5]), round=5
    )


def test_a_setup_of_another_hash_is_refused() -> None:
    client = Participant("x", lambda setup: (RUNTIME, DATA))
    assert "another hash" in reason(say(client, encode(EnrolRequest(SHA256)), {SETUP: SETUP_BYTES + b" "}))
    assert say(client, encode(EnrolRequest(SHA256))) == BehindResponse(0, b"", False)


def test_a_setup_that_is_none_is_told() -> None:
    client = Participant("x", lambda setup: (RUNTIME, DATA))
    for data in (b"", b"\xc1", b"\x91" * 100_000):
        assert "malformed setup" in reason(
            say(client, encode(EnrolRequest(hashlib.sha256(data).hexdigest())), {SETUP: data})
        )


@pytest.mark.parametrize("kind", ["tensors", "frozen"])
def test_another_model_than_the_servers_is_refused(kind: str) -> None:
    def build(setup: Setup) -> tuple[Runtime, bf.Dataset]:
        return TorchRuntime(linear(), F.cross_entropy, threads=1), DATA

    fields: dict[str, object] = {"table": TABLE[:1]} if kind == "tensors" else {"frozen": "ab" * 32}
    data = encode(msgspec.structs.replace(SETUP_OF_DIGITS, **fields))
    client = Participant("x", build)
    request = encode(EnrolRequest(hashlib.sha256(data).hexdigest()))
    assert "expected the same model" in reason(say(client, request, {SETUP: data}))
    assert isinstance(say(client, request), BehindResponse)


@pytest.mark.parametrize("error", [DataError("no\ndata \ud800 " + "x" * 5000), ModelError("no"), OSError("gone")])
def test_what_a_client_will_not_do_is_told(error: Exception) -> None:
    def build(setup: Setup) -> tuple[Runtime, bf.Dataset]:
        raise error

    text = reason(say(Participant("x", build), encode(EnrolRequest(SHA256)), {SETUP: SETUP_BYTES}))
    assert text.isprintable()
    assert 2 <= len(text) <= 2000


def test_a_setup_is_built_once_and_a_state_belongs_to_it(story: Story, memory: Memory) -> None:
    built = list[str]()

    def build(setup: Setup) -> tuple[Runtime, bf.Dataset]:
        built.append(str(setup.options.get("seed")))
        return RUNTIME, DATA

    client = Participant("x", build, memory)
    other = encode(msgspec.structs.replace(SETUP_OF_DIGITS, options={"seed": 1}))
    request = encode(EnrolRequest(hashlib.sha256(other).hexdigest()))
    say(client, story.ask(3), story.attachment(3) | {SETUP: SETUP_BYTES})
    say(client, story.ask(3), {SETUP: SETUP_BYTES})
    assert say(client, request) == BehindResponse(
        3, state_sha256(story.states[3]), False
    )  # it has a setup, not this one
    assert isinstance(say(client, request, {SETUP: other}), EnrolResponse)
    assert memory.state is None
    assert say(client, story.ask(3)) == BehindResponse(0, b"", False)
    assert built == ["None", "1"]


def test_a_shared_memory_is_not_taken_for_that_of_another_setup(story: Story, memory: Memory) -> None:
    one, two = member(memory), Participant("two", lambda setup: (RUNTIME, DATA), memory)
    other = encode(msgspec.structs.replace(SETUP_OF_DIGITS, options={"seed": 1}))
    say(one, story.ask(3), story.attachment(3))
    say(two, encode(EnrolRequest(hashlib.sha256(other).hexdigest())), {SETUP: other})
    memory.keep(story.states[4], state_sha256(story.states[4]))  # as the other run's
    assert say(one, story.ask(4)) == BehindResponse(0, b"", True)

"""Answers that do not fit are refused, counted and logged, and change nothing else."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from baffle.client.calibrate import LADDER
from baffle.core.types import pack
from baffle.engines.remote.memory import Twist
from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.messages import (
    AnyResponse,
    BehindResponse,
    CalibrateResponse,
    EnrolRequest,
    FailedResponse,
    TrainRequest,
    TrainResponse,
    decode_request,
    encode,
)
from baffle.runfolder.clients import Roster, read_rounds
from remote_helpers import (
    BAD,
    DEADLINE,
    METHOD,
    Federation,
    federation,
    local,
    saying,
)


def changed(**fields: object) -> Twist:
    """A reply with other values in it."""
    return saying(
        lambda answer: encode(TrainResponse(msgspec.structs.replace(answer.reply, **fields), answer.state_sha256))
    )


def spoken(response: AnyResponse) -> Twist:
    return saying(lambda answer: encode(response))


def raw(data: bytes) -> Twist:
    return saying(lambda answer: data)


def _scalars(*values: int) -> bytes:
    return pack(np.array(values), METHOD.bits)


_LOWEST = (0x4000).to_bytes(8, "little")
"""-(2**14) as the first of four integers of 15 bits: it has no positive counterpart, so no client sends it."""


LIES = {
    "K": (changed(scalars=_scalars(1, 2, 3)), "6 bytes of scalars: expected 8"),
    "round": (changed(round=77), "reply to round 77"),
    "client": (changed(client=0), "reply of client 0"),
    "no client": (changed(client=2**60), "reply of client"),
    "weight": (changed(weight=256), "weight = 256"),
    "weight 0": (changed(weight=0), "weight = 0"),
    "one too much": (changed(scalars=_LOWEST), "scalar 16384: expected at most 16383"),
    "bits behind the last": (changed(scalars=b"\xff" * 8), "bits behind the last integer: expected 0"),
    "no magnitude": (changed(magnitudes=()), "magnitudes (): expected 1 of 0 to 16777216 x its weight"),
    "magnitudes": (changed(magnitudes=(1, 1)), "magnitudes (1, 1): expected 1"),
    "huge magnitude": (changed(magnitudes=(255 * 2**24 + 1,)), "magnitudes (4278190081,): expected 1"),
    "negative magnitude": (changed(magnitudes=(-1,)), "magnitudes (-1,): expected 1"),
    "negative count": (changed(clipped=-1), "clipped = -1"),
    "huge count": (changed(nonfinite=2**60), "nonfinite = 1152921504606846976"),
    "hash": (saying(lambda answer: encode(TrainResponse(answer.reply, bytes(32)))), "evaluated at state 000000"),
    "no hash": (saying(lambda answer: encode(TrainResponse(answer.reply))), "evaluated at state : expected"),
    "garbage": (raw(b"\xc1\xff\x00"), "malformed response"),
    "nothing": (raw(b""), "malformed response"),
    "text": (raw(b"\x82\xa4type\xa6failed\xa6reason\xa2\xff\xfe"), "malformed response"),
    "deep": (raw(b"\x82\xa4type\xa6failed\xa1x" + b"\x91" * 60_000), "malformed response"),
    "integer of 128 bits": (raw(b"\x82\xa4type\xa6behind\xa5round\xcf" + b"\xff" * 16), "malformed response"),
    "large": (raw(bytes(100_000_000)), "100000000 bytes: expected at most"),
    "found": (spoken(CalibrateResponse(LADDER, (0.1,) * len(LADDER), 1, 1)), "CalibrateResponse: expected an answer"),
    "present": (spoken(BAD), "EnrolResponse: expected an answer"),
    "behind": (spoken(BehindResponse(2**63, b"\xff" * 32, False)), "behind after 4 requests"),
    "behind at a known round": (spoken(BehindResponse(1, b"", True)), "behind after 4 requests"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_liar_is_refused_and_told_and_counts_as_absent(
    fed: Federation, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twist, reason = LIES[name]
    liar = fed.nodes[1]
    liar.twist = twist
    rounds = 1 if name == "large" else 3
    run = fed.train(tmp_path / "run", rounds=rounds)
    assert run.weights_sha256 == local(fed.data, rounds=rounds, answers=lambda r, client: client != 1).weights_sha256
    for log in read_rounds(tmp_path / "run"):
        assert (log.refused, log.late, [v.outcome for v in log.visits]) == (1, 0, ["ok", "refused", "ok"])
        assert reason in (log.visits[1].reason or "")
        assert log.seconds < DEADLINE / 2  # nobody waits for it
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == rounds + 1
    assert all(reason in line and f"client 1, node {liar.identity[:12]}" in line for line in warnings)
    assert all(line.isprintable() and len(line) < 400 for line in warnings)


def test_weights_that_are_sent_do_not_ask_for_a_hash_but_for_all_else(fed: Federation, tmp_path: Path) -> None:
    fed.nodes[1].twist = changed(scalars=_scalars(1))
    run = fed.train(tmp_path / "run", engine=fed.engine(downlink="weights", roster=Roster(tmp_path / "run")))
    assert run.weights_sha256 == local(fed.data, answers=lambda round, client: client != 1).weights_sha256
    assert [log.refused for log in read_rounds(tmp_path / "run")] == [1] * 7


def test_what_a_client_cannot_do_is_told_and_its_words_are_cleaned(
    fed: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed.nodes[1].twist = spoken(FailedResponse("no \x1b[31mdata\nrefused: node b " + "x" * 5000))
    run = fed.train(tmp_path / "run", rounds=2)
    assert run.weights_sha256 == local(fed.data, rounds=2, answers=lambda round, client: client != 1).weights_sha256
    for log in read_rounds(tmp_path / "run"):
        assert (log.refused, log.visits[1].outcome) == (0, "failed")
        assert (log.visits[1].reason or "").startswith("no [31mdata refused: node b xxx")
    assert all(len(record.getMessage()) < 2100 and record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize(
    "found",
    [
        CalibrateResponse((), (), 0, 0),
        CalibrateResponse((1.0,), (0.1,), 1, 1),
        CalibrateResponse(LADDER, (math.nan,) * len(LADDER), 1, 1),
        CalibrateResponse(LADDER, (-1.0,) * len(LADDER), 1, 1),
        CalibrateResponse(LADDER, (0.1,), 1, 1),
        CalibrateResponse((math.inf,) * len(LADDER), (0.1,) * len(LADDER), 1, 1),
    ],
)
def test_a_liar_has_no_say_in_sigma(fed: Federation, found: CalibrateResponse) -> None:
    method = msgspec.structs.replace(METHOD, sigma="auto")
    honest = fed.nodes[0]

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        message = decode_request(request.message)
        return [replace(arrival, response=encode(found))] if isinstance(message, TrainRequest) else [arrival]

    honest.twist = twist
    lied = fed.train(method=method, rounds=2)
    sane = federation()
    sane.nodes[0].twist = lambda request, arrival: (
        [arrival] if isinstance(decode_request(request.message), EnrolRequest) else [replace(arrival, response=b"")]
    )
    assert lied.weights_sha256 == sane.train(method=method, rounds=2).weights_sha256

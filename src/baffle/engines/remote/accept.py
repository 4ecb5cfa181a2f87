"""Decides about clients' answers: accept, count as late, or refuse with a reason.

An answer that does not fit its request (wrong length, wrong round, another state, nonsense) is refused, counted and
logged, and changes nothing else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from baffle.client.calibrate import check_measurement
from baffle.core.aggregate import check_reply
from baffle.engines.remote.downlink import ClientStates, Downlink
from baffle.engines.remote.mailbox import Pending
from baffle.engines.remote.membership import Membership
from baffle.engines.remote.round import MOST_ATTEMPTS, Round
from baffle.errors import ReplyError
from baffle.protocol.messages import (
    AnyResponse,
    BehindResponse,
    CalibrateResponse,
    FailedResponse,
    MaskedTrainResponse,
    TrainResponse,
    printable,
)
from baffle.runfolder.clients import Roster
from baffle.secure.messages import KeysResponse, UnmaskResponse

_log = logging.getLogger("baffle")


@dataclass(frozen=True)
class Acceptance:
    """Applies decisions about answers to what the engine knows of its clients."""

    states: ClientStates
    membership: Membership
    roster: Roster
    downlink: Downlink

    def accept(self, current: Round, client: int, request: Pending, response: AnyResponse, seconds: float) -> None:
        """Accept an answer to a request of the current round and stage. Raises ReplyError if it does not fit."""
        if isinstance(response, BehindResponse):
            if current.attempts.get(client, 0) >= MOST_ATTEMPTS:
                raise ReplyError(f"behind after {MOST_ATTEMPTS} requests: expected an answer to the task")
            self.states.behind(client, response)
            current.behind[client] = response
            return
        if isinstance(response, FailedResponse):
            current.give_up(client, "failed", response.reason, seconds)
            _log.warning("%s: %s", request.name, printable(response.reason))
            return
        self._check(current, client, request, response)
        if client in current.responses:  # it was asked twice
            self.count_late(client, request, response)
            return
        current.responses[client] = response
        self.states.answered(client, reached=request.stage not in ("advert", "shares", "dropped"), whole=request.whole)
        self.membership.stragglers.discard(client)
        current.record(client, outcome="ok", seconds=seconds)

    def count_late(self, client: int, request: Pending, response: AnyResponse) -> None:
        """Count an answer that comes after its round was closed: it is not used, but its client is back."""
        self.membership.stragglers.discard(client)
        if isinstance(response, TrainResponse | MaskedTrainResponse):
            self.states.answered_late(client, request.round, response.state_sha256)
        self.roster.count_late()
        _log.info("%s answered round %d too late (%s)", request.name, request.round, type(response).__name__)

    def refuse(self, current: Round | None, client: int | None, reason: str) -> None:
        """Refuse an answer; of a client that answers the current round, no other answer is asked for."""
        self.roster.count_refused()
        _log.warning("refused: %s", printable(reason, 300))
        if client is not None and current is not None and client not in current.responses:
            current.give_up(client, "refused", reason)

    def _check(self, current: Round, client: int, request: Pending, response: AnyResponse) -> None:
        """Check an answer, and hand it to the secure sum if it is a part of one. Raises ReplyError."""
        stage, secure = request.stage, current.secure
        if isinstance(response, TrainResponse) and stage == "train":
            _check_owner(client, response.reply.client)
            self._check_state(current, response.state_sha256)
            check_reply(current.task, current.cohort, response.reply)
        elif isinstance(response, CalibrateResponse) and stage == "calibrate":
            others = [r for r in current.responses.values() if isinstance(r, CalibrateResponse)]
            check_measurement(current.task, client, response, others)
        elif secure is None or client in current.responses:
            raise ReplyError(f"{type(response).__name__}: expected an answer to the task")
        elif isinstance(response, MaskedTrainResponse) and stage == "vector":
            _check_owner(client, response.masked.client)
            self._check_state(current, response.state_sha256)
            secure.add(response)
        elif (isinstance(response, KeysResponse) and stage == "advert") or (
            isinstance(response, UnmaskResponse) and stage in ("shares", "dropped")
        ):
            _check_owner(client, response.client)
            secure.add(response)
        else:
            raise ReplyError(f"{type(response).__name__}: expected an answer to the task")

    def _check_state(self, current: Round, sha256: bytes) -> None:
        expected = current.task.state_sha256
        if self.downlink == "replay" and sha256 != expected:
            raise ReplyError(f"evaluated at state {sha256.hex()[:12]}: expected {expected.hex()[:12]}")


def _check_owner(client: int, owner: int) -> None:
    if owner != client:
        raise ReplyError(f"a reply of client {owner}: expected its own")

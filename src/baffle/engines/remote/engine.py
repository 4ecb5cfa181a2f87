"""Train with clients on other machines, over any transport.

A round is asked of the participants that are connected. It closes when all of them have answered, or at its deadline
with a quorum. A client that misses a deadline is still asked, but the round no longer waits for it until it answers.

The engine owns the order of events; each part of what it knows is in a module of its own: pending requests
(``mailbox``), clients and nodes (``membership``), the clients' states (``downlink``), the round in progress
(``round``), decisions about answers (``accept``) and the stages of a secure sum (``secure``).
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Collection, Sequence

from baffle.client.calibrate import Calibration, agree
from baffle.client.respond import passes_of
from baffle.core.aggregate import nothing
from baffle.core.checks import require_between, require_count, require_positive
from baffle.core.scalars import weight_of
from baffle.core.state import State
from baffle.core.types import Aggregate, Table, Task, Weights
from baffle.data import Dataset
from baffle.engines import Exchange
from baffle.engines.remote.accept import Acceptance
from baffle.engines.remote.downlink import ClientStates, Downlink
from baffle.engines.remote.mailbox import Mailbox, Pending, Stage, Stray
from baffle.engines.remote.membership import Membership
from baffle.engines.remote.round import Round
from baffle.engines.remote.secure import EarlyKeys, SecureSum, secure_quorum, usable_keys
from baffle.engines.remote.transport import Arrival, Clock, Request, Transport
from baffle.errors import FederationError, ReplyError, SecureSumError, require_choice
from baffle.protocol.messages import (
    INTRODUCED,
    MOST_BYTES,
    STATE,
    WEIGHTS,
    AnyRequest,
    CalibrateResponse,
    Setup,
    TrainResponse,
    decode_response,
    encode,
    printable,
)
from baffle.runfolder.clients import Roster, RoundLog
from baffle.runtimes import Evaluation, Runtime

_log = logging.getLogger("baffle")
_POLL, _SLOWEST_POLL = 0.05, 0.5  # seconds between looks for answers


class RemoteEngine:
    """Train with clients on other machines.

    Args:
        transport: carries requests and answers.
        runtime: evaluates on the server's own data.
        setup: what clients evaluate.
        clients: number that must have joined before training starts; more may join later.
        downlink: ``replay`` sends rows; ``weights`` sends the weights each round, to clients that keep nothing.
        quorum: share of a round's participants that must answer.
        deadline: seconds until a round closes without the remaining participants.
        patience: seconds without a quorum until the engine gives up; the run can be resumed.
        roster: remembers which node is which client, and records what each round cost each client.
        clock: tells the time; for tests.

    Raises:
        FederationError: if too few clients join, or answer, for longer than ``patience``.
        OptionError: for an option out of range.

    Examples:
        See :class:`baffle.engines.remote.memory.MemoryTransport`, which needs no network.
    """

    def __init__(
        self,
        transport: Transport,
        runtime: Runtime,
        setup: Setup,
        *,
        clients: int = 2,
        downlink: Downlink = "replay",
        quorum: float = 0.5,
        deadline: float = 60.0,
        patience: float = 3600.0,
        roster: Roster | None = None,
        clock: Clock = time,
    ) -> None:
        require_count("clients", clients)
        require_choice("downlink", downlink, ["replay", "weights"])
        require_between("quorum", quorum, 0, 1)
        require_positive("deadline", deadline)
        require_positive("patience", patience)
        self._runtime, self._clock, self._roster = runtime, clock, roster or Roster(None)
        self._downlink, self._quorum, self._deadline, self._patience = downlink, quorum, deadline, patience
        encoded = encode(setup)
        self._setup_sha256 = hashlib.sha256(encoded).hexdigest()
        self._mailbox = Mailbox(transport, max(600.0, 10 * deadline), clock)
        self._membership = Membership(transport, self._mailbox, self._roster, encoded, deadline, clock)
        self._states = ClientStates(downlink, encoded)
        self._acceptance = Acceptance(self._states, self._membership, self._roster, downlink)
        self._early_keys = EarlyKeys()
        self._round: Round | None = None
        self._up = self._down = 0  # bytes outside of rounds; they count for the next one
        self._pace = 0.0  # seconds until the first answer of the last round arrived
        self._gather(clients)

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._runtime.table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of examples of each client, as reported when it joined."""
        return tuple(member.examples for member in self._roster.members)

    @property
    def plan(self) -> dict[str, str | int]:
        """How the first client evaluates passes."""
        frozen = {k: v for k, v in self._runtime.plan.items() if k == "frozen"}
        return self._membership.plan | frozen | {"clients": "remote", "downlink": self._downlink}

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Evaluate on the server's own test data, in this process."""
        return self._runtime.evaluate(weights, data)

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        """Let each participant measure; sigma is chosen by the median of their errors."""
        current = self._begin(task, participants, [], "calibrate")
        self._ask_all(current, state, [], self._need(participants))
        self._close(current)
        return agree([r for r in current.responses.values() if isinstance(r, CalibrateResponse)])

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Ask the participants and wait for a quorum.

        Bytes are those of whole messages, both ways. Those of joining clients and of a calibration count for the
        following round.
        """
        current = self._begin(task, participants, rows, "advert" if task.secure else "train")
        total = self._sum(current, state, rows) if task.secure else None
        if total is None:
            self._ask_all(current, state, rows, self._need(participants))
        replies = tuple(r.reply for r in current.responses.values() if isinstance(r, TrainResponse))
        answered = [reply.client for reply in replies] if total is None else list(total.participants)
        self._close(current)
        visits = self._roster.last.visits if self._roster.last is not None else ()
        up, down, self._up, self._down = self._up, self._down, 0, 0
        passes, sizes = passes_of(task, self.table), self.sizes
        return Exchange(
            replies,
            passes * len(answered),
            passes * sum(min(task.batch_size or sizes[client], sizes[client]) for client in answered),
            up + sum(visit.bytes_up for visit in visits),
            down + sum(visit.bytes_down for visit in visits),
            total,
        )

    # -- clients -----------------------------------------------------------------------------------------------------

    def _gather(self, wanted: int) -> None:
        """Wait until the run's first clients have joined; they are numbered by name."""
        if self._roster.members:  # a resumed run
            return
        logged = -math.inf
        give_up = self._clock.monotonic() + self._patience
        while self._membership.joining < wanted:
            now, joined = self._clock.monotonic(), self._membership.joining
            if now > give_up:
                raise FederationError(
                    f"{joined} of {wanted} clients joined within {self._patience:g} s: expected more "
                    "'baffle node', or a smaller number of clients"
                )
            if now - logged > 10:
                logged = now
                _log.info("waiting for clients: %d of %d", joined, wanted)
            self._down += self._membership.look_around()
            if not self._receive():
                self._clock.sleep(2 * _POLL)
        self._admit()

    def _admit(self) -> None:
        for client, response in self._membership.admit():
            self._states.joined(client, response)

    # -- a round -----------------------------------------------------------------------------------------------------

    def _need(self, participants: Collection[int]) -> int:
        """Number of participants that must answer."""
        return max(1, math.ceil(self._quorum * len(participants)))

    def _begin(self, task: Task, participants: Sequence[int], rows: Sequence[bytes], stage: Stage) -> Round:
        self._states.read(rows)
        self._admit()
        self._roster.save()
        sizes = self.sizes
        cohort = {client: weight_of(sizes[client], task.quantum) for client in participants}
        self._round = Round(task, cohort, stage, self._clock.monotonic(), tuple(cohort))
        return self._round

    def _sum(self, current: Round, state: State, rows: Sequence[bytes]) -> Aggregate:
        """Sum securely; an empty aggregate if that fails, since clients answer a round only once."""
        task, need = current.task, secure_quorum(current.cohort, self._need(current.cohort))
        identities = {client: self._roster.members[client].card for client in current.cohort}
        keys = usable_keys(task, identities, need)
        try:
            current.secure = SecureSum(task, current.cohort, keys, need, self._early_keys)
            for stage, clients, answers in current.secure.stages():
                current.enter(stage, clients)
                self._ask_all(current, state, rows, answers)
            return current.secure.total()
        except SecureSumError as error:
            _log.warning("no sum: %s", error)
            return nothing(task)

    def _ask_all(self, current: Round, state: State, rows: Sequence[bytes], need: int) -> None:
        """Ask until all awaited clients have answered, or until the deadline if ``need`` clients have.

        Raises:
            FederationError: after the patience.
            SecureSumError: if a secure sum can no longer be made.
        """
        began = self._clock.monotonic()
        deadline, wait = began + self._deadline, max(_POLL, min(_SLOWEST_POLL, 0.6 * self._pace))
        first = math.inf
        while True:
            self._down += self._membership.look_around()
            self._ask(current, state, rows)
            self._clock.sleep(wait)
            received = self._receive()
            now = self._clock.monotonic()
            first = min(first, now - began) if received else first
            wait = min(_SLOWEST_POLL, max(_POLL, 0.1 * (now - began)), max(_POLL, deadline - now))
            enough = current.enough(need)
            connected = self._membership.connected(current.clients)
            waiting = bool(current.awaited(self._pending_clients(current), connected, self._membership.stragglers))
            if enough and (now >= deadline or not waiting):
                break
            if current.secure is not None and not waiting and current.any_failed:
                raise SecureSumError(
                    f"round {current.task.round}: {len(current.responses)} of {need} clients can go on"
                )
            if now >= deadline:
                self._extend(current, need, now - began)
                deadline = now + self._deadline
        self._pace = first

    def _extend(self, current: Round, need: int, waited: float) -> None:
        """The deadline has passed without a quorum: ask again, or give up."""
        round, answers = current.task.round, len(current.responses)
        if current.stage in ("shares", "dropped") and waited >= 2 * self._deadline:
            raise SecureSumError(f"round {round}: too few shares to unmask the sum")
        if waited >= self._patience:
            raise FederationError(
                f"round {round}: {answers} of the {need} replies it needs within "
                f"{self._patience:g} s: expected more clients, or a smaller quorum; the rounds before are saved"
            )
        _log.warning("round %d: %d of %d replies: asking again", round, answers, need)
        current.attempts.clear()
        self._mailbox.repeat()

    def _close(self, current: Round) -> None:
        connected, silent = self._membership.connected(current.cohort), self._mailbox.silent(current.task.round)
        late, visits = current.settle(connected, silent)
        for client in late:
            if client not in self._membership.stragglers:
                self._membership.stragglers.add(client)
                _log.warning("client %d missed the deadline of round %d", client, current.task.round)
        if current.stage == "calibrate":
            self._up += sum(visit.bytes_up for visit in visits)
            self._down += sum(visit.bytes_down for visit in visits)
        else:
            seconds = self._clock.monotonic() - current.began
            self._roster.close(RoundLog(round=current.task.round, seconds=seconds, visits=visits))
        self._round = None

    # -- requests and answers ----------------------------------------------------------------------------------------

    def _pending_clients(self, current: Round) -> set[int]:
        return self._mailbox.pending_clients(current.task.round, current.stage, self._membership.address)

    def _ask(self, current: Round, state: State, rows: Sequence[bytes]) -> None:
        """Send the stage's request to every client that is connected, has not answered and is not being asked."""
        clients = current.to_ask(self._pending_clients(current), self._membership.connected(current.clients))
        if not clients:
            return
        requests: list[Request] = []
        pending: list[Pending] = []
        for client in clients:
            message, attachments = self._request(current, client, state, rows)
            node = self._membership.address(client)
            assert node is not None, "only connected clients are asked"
            requests.append(Request(node, encode(message), attachments, client))
            whole = not attachments.keys().isdisjoint((STATE, WEIGHTS))
            identity = self._roster.members[client].identity
            pending.append(Pending(client, identity, node, current.task.round, current.stage, whole))
        for client, sent in zip(clients, self._mailbox.send(requests, pending), strict=False):
            current.attempts[client] = current.attempts.get(client, 0) + 1
            if sent.id:
                current.behind.pop(client, None)
                current.record(client, bytes_down=sent.size)

    def _request(
        self, current: Round, client: int, state: State, rows: Sequence[bytes]
    ) -> tuple[AnyRequest, dict[str, bytes]]:
        """Make the stage's request to a client, with its attachments."""
        secure, stage = current.secure, current.stage
        if secure is not None and stage != "vector":
            return secure.request(stage, client, self._setup_sha256)
        request, attachments = self._states.request(
            current.task,
            client,
            state,
            rows,
            current.behind.get(client),
            self._mailbox.newest_whole,
            calibrate=stage == "calibrate",
        )
        if secure is not None:
            attachments[INTRODUCED] = secure.introductions(client)
        return request, attachments

    def _receive(self) -> bool:
        """Handle what has arrived; False if nothing has."""
        arrived = self._mailbox.receive()
        for item in arrived:
            if isinstance(item, Stray):
                self._acceptance.refuse(self._round, None, item.reason)
            else:
                self._handle(item.request, item.arrival)
        return bool(arrived)

    def _handle(self, request: Pending, arrival: Arrival) -> None:
        """Handle the answer to a request, which may be of this round, of an earlier one, or of a joining node."""
        client, current = request.client, self._round
        if current is not None and (request.round, request.stage) != (current.task.round, current.stage):
            current = None
        if client is not None and current is not None:
            current.record(client, bytes_up=arrival.size)
        else:
            self._up += arrival.size
        if arrival.response is None:
            _log.warning("%s: %s", request.name, printable(arrival.error or "no answer", 200))
            return
        try:
            longest = MOST_BYTES + (0 if self._round is None else self._round.reply_bytes)
            if len(arrival.response) > longest:
                raise ReplyError(f"{len(arrival.response)} bytes: expected at most {longest}")
            response = decode_response(arrival.response)
            if client is None:
                self._membership.welcome(request, response)
            elif current is None:
                self._acceptance.count_late(client, request, response)
            else:
                seconds = self._clock.monotonic() - request.sent_at
                self._acceptance.accept(current, client, request, response, seconds)
        except ReplyError as error:
            if client is None:
                self._membership.reject(request)
            self._acceptance.refuse(current, client, f"{request.name}: {error}")

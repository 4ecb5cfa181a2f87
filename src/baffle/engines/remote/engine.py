"""Clients on other machines, over any transport: who takes part, who has which state, who is waited for.

A round is asked of the participants that are connected and closes when all of them have answered, or at its deadline
with a quorum. Whoever misses a deadline is asked further but not waited for, until it answers again. What does not fit
its question (wrong length, wrong round, another state, nonsense) is refused, counted and told, and changes nothing.

Replay downlink: a client gets the rows that it lacks (DeComFL, arXiv 2405.15861, sends scalars down, too), or the
whole state where that is shorter, and proves by a hash that it arrived where the server is.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from baffle.client.calibrate import Calibration, agree, check_found
from baffle.client.respond import passes_of
from baffle.core.aggregate import check_reply, nothing, summed
from baffle.core.checks import require_between, require_count, require_positive
from baffle.core.scalars import weight_of
from baffle.core.state import State
from baffle.core.types import Aggregate, Cohort, Table, Task, Weights
from baffle.data import Dataset
from baffle.engines import Exchange
from baffle.engines.remote.downlink import History
from baffle.engines.remote.transport import Arrival, Letter, Sent, Transport
from baffle.errors import FederationError, ReplyError, SecureSumError, require_choice
from baffle.protocol.messages import (
    CARDS,
    INTRODUCED,
    LONGEST,
    SETUP,
    STATE,
    WEIGHTS,
    Advertise,
    Answer,
    Ask,
    Behind,
    Concealed,
    Enrol,
    Failed,
    Found,
    Present,
    Question,
    Response,
    Setup,
    Unmask,
    decode_response,
    encode,
    printable,
)
from baffle.protocol.states import pack_state, pack_weights
from baffle.runfolder.clients import Member, Outcome, Roster, RoundLog, Visit
from baffle.runtimes import Evaluation, Runtime
from baffle.secure.graph import threshold
from baffle.secure.messages import Advert, Card, Unmasked

if TYPE_CHECKING:
    from baffle.secure.server import SecureRound

Downlink = Literal["replay", "weights"]
Stage = Literal["enrol", "calibrate", "answer", "advert", "vector", "shares", "lost"]
"""What is being asked; the last four are those of a secure sum."""

_log = logging.getLogger("baffle")
_MOST_EXAMPLES = 2**40
_MOST_ATTEMPTS = 4  # questions to one client until the deadline, each answered by what it lacks
_POLL, _SLOWEST_POLL = 0.05, 0.5  # seconds between looks for answers
_LOOK_AROUND = 1.0  # seconds between looks at who is connected


@dataclass
class _Open:
    """A letter that was not answered yet."""

    client: int | None  # None: a stranger that was asked who it is
    identity: str
    node: int
    round: int
    at: float
    stage: Stage = "enrol"
    whole: bool = False
    """It brought all that a client needs that keeps nothing."""
    again: bool = False
    """The same was asked anew; an answer to this one still counts."""


@dataclass
class _Round:
    """What is known of the round in progress."""

    task: Task
    cohort: Cohort
    stage: Stage
    began: float
    asked: Collection[int]
    """Whom this stage asks."""
    secure: SecureRound | None = None
    found: dict[int, Response] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    behind: dict[int, Behind] = field(default_factory=dict)
    visits: dict[int, Visit] = field(default_factory=dict)

    def enough(self, need: int) -> bool:
        """Whether the stage can be closed: so many have answered, or the shares that are there suffice."""
        if self.secure is not None and self.stage in ("shares", "lost"):
            return self.secure.opened if self.stage == "shares" else self.secure.ready
        return len(self.found) >= need


class RemoteEngine:
    """Train with clients on other machines. ``clients`` is how many must be there at the start; more may join later.

    * ``downlink``: ``replay`` sends rows, ``weights`` the weights each round to clients that keep nothing.
    * ``quorum``: share of a round's participants that must answer.
    * ``deadline``: seconds until a round closes without the others.
    * ``patience``: seconds without a quorum until the engine gives up (the run can be continued).

    ``roster`` remembers who is which client, and records what each round cost whom. Raises FederationError if clients
    are too few for longer than ``patience``.
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
    ) -> None:
        require_count("clients", clients)
        require_choice("downlink", downlink, ["replay", "weights"])
        require_between("quorum", quorum, 0, 1)
        require_positive("deadline", deadline)
        require_positive("patience", patience)
        self._transport, self._runtime = transport, runtime
        self._setup = encode(setup)
        self._setup_sha256 = hashlib.sha256(self._setup).hexdigest()
        self._downlink, self._quorum, self._deadline, self._patience = downlink, quorum, deadline, patience
        self._roster = roster or Roster(None)
        self._history = History()
        self._open: dict[str, _Open] = {}
        self._nodes: Mapping[str, int] = {}
        self._looked = -math.inf
        self._pace = 0.0  # seconds until the first answer of the last round came
        self._known: dict[int, int] = {}  # client -> rows that its state is made of
        self._heard: set[int] = set()  # clients that have said since the engine began what they have
        self._forgot: dict[int, int] = {}  # client -> how often in a row it lacked what it had before
        self._suspects: set[int] = set()
        self._declined: dict[str, int] = {}  # strangers that cannot take part, at which address
        self._plans: dict[str, str | int] = {}
        self._adverts: dict[tuple[int, tuple[int, ...]], list[Advert]] = {}  # for a round and cohort still to come
        self._newcomers: list[tuple[str, Present]] = []
        self._round: _Round | None = None
        self._before = (0, 0)  # bytes up and down between rounds, until they are counted
        self._packed: tuple[int, bytes, str, bytes] | None = None
        self._gather(clients)

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._runtime.table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each client, as they said when they joined."""
        return tuple(member.examples for member in self._roster.members)

    @property
    def plan(self) -> dict[str, str | int]:
        """How the first client evaluates passes."""
        frozen = {k: v for k, v in self._runtime.plan.items() if k == "frozen"}
        return self._plans | frozen | {"clients": "remote", "downlink": self._downlink}

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Evaluate on the server's own test data, in this process."""
        return self._runtime.evaluate(weights, data)

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        """Let each participant measure; the sigma is chosen by the median of their errors."""
        this = self._begin(task, participants, [], "calibrate")
        self._ask_all(this, state, [], self._need(participants))
        self._close(this)
        return agree([f for f in this.found.values() if isinstance(f, Found)])

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Ask the participants, wait for a quorum. Bytes are those of whole messages, both ways.

        Those of newcomers and of a calibration count for the round that follows.
        """
        this = self._begin(task, participants, rows, "advert" if task.secure else "answer")
        total = self._sum(this, state, rows) if task.secure else None
        if total is None:
            self._ask_all(this, state, rows, self._need(participants))
        replies = tuple(f.reply for f in this.found.values() if isinstance(f, Answer))
        answered = [r.client for r in replies] if total is None else list(total.participants)
        self._close(this)
        visits = self._roster.last.visits if self._roster.last is not None else ()
        up, down = self._before
        self._before = 0, 0
        passes, sizes = passes_of(task, self.table), self.sizes
        return Exchange(
            replies,
            passes * len(answered),
            passes * sum(min(task.batch_size or sizes[client], sizes[client]) for client in answered),
            up + sum(v.bytes_up for v in visits),
            down + sum(v.bytes_down for v in visits),
            total,
        )

    # -- who is there ------------------------------------------------------------------------------------------------

    def _gather(self, wanted: int) -> None:
        """Wait until the run's first clients have joined; they are numbered by name."""
        if self._roster.members:  # a run that is continued
            return
        told = -math.inf
        give_up = time.monotonic() + self._patience
        while len(self._newcomers) < wanted:
            now = time.monotonic()
            if now > give_up:
                raise FederationError(
                    f"{len(self._newcomers)} of {wanted} clients joined within {self._patience:g} s: expected more "
                    "'baffle node', or a smaller number of clients"
                )
            if now - told > 10:
                told = now
                _log.info("waiting for clients: %d of %d", len(self._newcomers), wanted)
            self._look_around()
            if not self._receive():
                time.sleep(2 * _POLL)
        self._admit()

    def _look_around(self) -> None:
        """See who is connected, and ask strangers who they are."""
        if time.monotonic() - self._looked < _LOOK_AROUND:
            return
        self._looked = time.monotonic()
        try:
            self._nodes = self._transport.nodes()
        except FederationError as error:
            _log.warning("who is connected is not known: %s", error)
            return
        asked = {
            letter.identity
            for letter in self._open.values()
            if letter.client is None
            and letter.node == self._nodes.get(letter.identity)
            and time.monotonic() - letter.at < self._deadline
        }
        came = {identity for identity, _ in self._newcomers}
        strangers = [
            (identity, node)
            for identity, node in self._nodes.items()
            if identity not in asked | came
            and self._roster.number(identity) is None
            and self._declined.get(identity) != node
        ]
        if not strangers:
            return
        question = encode(Enrol(self._setup_sha256))
        letters = [Letter(node, question, {SETUP: self._setup}) for _, node in strangers]
        for (identity, node), sent in zip(strangers, self._send(letters), strict=False):
            if not sent.id:
                continue
            self._open[sent.id] = _Open(None, identity, node, -1, time.monotonic())
            self._before = self._before[0], self._before[1] + sent.size

    def _admit(self) -> None:
        """Number those that have come."""
        for identity, present in sorted(self._newcomers, key=lambda new: (new[1].name, new[0])):
            name = printable(present.name, 64)
            client = self._roster.add(Member(name, identity, present.examples, _hex(present.card)))
            self._heard.add(client)
            # what a resume compares is for the server to say
            self._plans = self._plans or {k: v for k, v in present.plan.items() if k not in ("data", "frozen")}
            if present.state_sha256 and self._history.hash_after(present.round) == present.state_sha256:
                self._known[client] = present.round
            _log.info("client %d joined: %s, %d examples", client, name, present.examples)
        self._newcomers.clear()

    def _welcome(self, letter: _Open, response: Response) -> None:
        """Let a stranger in. Raises ReplyError if that is nobody."""
        if isinstance(response, Failed):
            self._declined[letter.identity] = letter.node
            _log.warning("node %s cannot take part: %s", letter.identity[:12], printable(response.reason))
            return
        if not isinstance(response, Present) or not 1 <= response.examples <= _MOST_EXAMPLES:
            raise ReplyError(f"{response!r:.200}: expected who it is, with 1 to {_MOST_EXAMPLES} examples")
        came = {identity for identity, _ in self._newcomers}
        if letter.identity not in came and self._roster.number(letter.identity) is None:
            self._newcomers.append((letter.identity, response))

    # -- a round -----------------------------------------------------------------------------------------------------

    @property
    def _ttl(self) -> float:
        return max(600.0, 10 * self._deadline)

    def _need(self, participants: Collection[int]) -> int:
        return max(1, math.ceil(self._quorum * len(participants)))

    def _begin(self, task: Task, participants: Sequence[int], rows: Sequence[bytes], stage: Stage) -> _Round:
        if len(rows) < self._history.rows:  # another run
            self._history, self._known = History(), {}
        self._history.read(rows)
        self._admit()
        self._roster.save()
        sizes = self.sizes
        cohort = {client: weight_of(sizes[client], task.quantum) for client in participants}
        self._round = _Round(task, cohort, stage, time.monotonic(), tuple(cohort))
        return self._round

    def _ask_all(self, this: _Round, state: State, rows: Sequence[bytes], need: int) -> None:
        """Ask until all that are expected have answered, or at the deadline as many as are needed.

        Raises FederationError after the patience, SecureSumError if a secure sum can no longer be made.
        """
        began = time.monotonic()
        deadline, wait = began + self._deadline, max(_POLL, min(_SLOWEST_POLL, 0.6 * self._pace))
        first = math.inf
        while True:
            self._look_around()
            self._ask(this, state, rows)
            time.sleep(wait)
            came = self._receive()
            now = time.monotonic()
            first = min(first, now - began) if came else first
            wait = min(_SLOWEST_POLL, max(_POLL, 0.1 * (now - began)), max(_POLL, deadline - now))
            enough = this.enough(need)
            waiting = bool(self._expected(this))
            if enough and (now >= deadline or not waiting):
                break
            if this.secure is not None and not waiting and any(v.outcome == "failed" for v in this.visits.values()):
                raise SecureSumError(f"round {this.task.round}: {len(this.found)} of {need} clients can go on")
            if now >= deadline:
                self._extend(this, need, now - began)
                deadline = now + self._deadline
        self._pace = first

    def _sum(self, this: _Round, state: State, rows: Sequence[bytes]) -> Aggregate:
        """A secure sum: keys of those that have sent none yet, masked vectors, shares. Nothing if it cannot be made.

        A client answers a round once, so one that failed is not asked again: the run goes on with the next.
        """
        from baffle.secure.masks import usable  # needs cryptography, which plain sums do without
        from baffle.secure.server import SecureRound

        task = this.task
        told = {client: bytes.fromhex(self._roster.members[client].card) for client in this.cohort}
        cards = {c: card for c, data in told.items() if data and usable(card := Card(data[:32], data[32:]))}
        need = max(self._need(this.cohort), threshold(len(this.cohort)))
        if len(cards) < need:
            raise FederationError(
                f"round {task.round}: {len(cards)} of {len(this.cohort)} clients have keys for a secure sum: expected "
                f"{need} of 'baffle node'"
            )
        try:
            size, counts = task.local_steps * task.numbers, 3 + len(task.sizes)
            this.secure = SecureRound(
                task.key, task.round, tuple(cards), cards, size, counts, degree=task.secure, word=task.word
            )
            for advert in self._adverts.pop((task.round, tuple(cards)), []):
                with contextlib.suppress(SecureSumError):  # it is asked for another
                    this.secure.advertise(advert)
            self._enter(this, "advert", cards.keys() - this.secure.advertised)
            if this.asked:
                self._ask_all(this, state, rows, need - len(this.secure.advertised))
            self._enter(this, "vector", this.secure.advertised)
            self._ask_all(this, state, rows, need)
            self._enter(this, "shares", this.secure.survive().clients)
            self._ask_all(this, state, rows, need)
            if this.secure.lost:
                self._enter(this, "lost", this.secure.missing & this.secure.signatures.keys())
                self._ask_all(this, state, rows, need)
            vectors, sums = this.secure.total()
            survivors = this.secure.survive().clients
            expected = sum(this.cohort[client] for client in survivors)
            if sums[0] != expected or int(np.abs(vectors).max(initial=0)) > task.limit * expected:
                raise SecureSumError(f"round {task.round}: weights of {sums[0]}, expected {expected}: one sent another")
        except SecureSumError as error:
            _log.warning("no sum: %s", error)
            return nothing(task)
        return summed(task, vectors, sums, survivors)

    def _enter(self, this: _Round, stage: Stage, asked: Collection[int]) -> None:
        """Go on to another stage of a round."""
        this.stage, this.asked = stage, tuple(sorted(asked))
        this.found, this.attempts, this.behind = {}, {}, {}
        for client in this.asked:
            if client in this.visits:
                this.visits[client] = msgspec.structs.replace(this.visits[client], outcome="late")

    def _extend(self, this: _Round, need: int, waited: float) -> None:
        """The deadline has come without a quorum: ask again, or give up."""
        if this.stage in ("shares", "lost") and waited >= 2 * self._deadline:
            raise SecureSumError(f"round {this.task.round}: too few shares to unmask the sum")
        if waited >= self._patience:
            raise FederationError(
                f"round {this.task.round}: {len(this.found)} of the {need} replies it needs within "
                f"{self._patience:g} s: expected more clients, or a smaller quorum; the rounds before are saved"
            )
        _log.warning("round %d: %d of %d replies: asking again", this.task.round, len(this.found), need)
        this.attempts.clear()
        for letter in self._open.values():
            letter.again = letter.client is not None

    def _expected(self, this: _Round) -> list[int]:
        """Participants that the round waits for: connected, neither refused nor known to be slow."""
        asked = self._asked(this)
        return [
            client
            for client in this.asked
            if client not in this.found
            and client not in self._suspects
            and self._roster.members[client].identity in self._nodes
            and (this.attempts.get(client, 0) < _MOST_ATTEMPTS or client in asked)
        ]

    def _asked(self, this: _Round) -> set[int]:
        """Participants that have a question of this round, where they are now."""
        return {
            letter.client
            for letter in self._open.values()
            if letter.client is not None
            and (letter.round, letter.stage, letter.again) == (this.task.round, this.stage, False)
            and letter.node == self._nodes.get(letter.identity)
        }

    def _ask(self, this: _Round, state: State, rows: Sequence[bytes]) -> None:
        """Send the task to every participant that is connected, has not answered and is not being asked."""
        asked = self._asked(this)
        letters: list[Letter] = []
        to: list[int] = []
        for client in this.asked:
            identity = self._roster.members[client].identity
            exhausted = this.attempts.get(client, 0) >= _MOST_ATTEMPTS
            if client in this.found or client in asked or identity not in self._nodes or exhausted:
                continue
            question, parcels = self._question(this, client, state, rows)
            letters.append(Letter(self._nodes[identity], encode(question), parcels, client))
            to.append(client)
        if not letters:
            return
        for client, letter, sent in zip(to, letters, self._send(letters), strict=False):
            this.attempts[client] = this.attempts.get(client, 0) + 1
            if not sent.id:
                continue
            this.behind.pop(client, None)
            whole = not letter.parcels.keys().isdisjoint((STATE, WEIGHTS))
            identity = self._roster.members[client].identity
            self._open[sent.id] = _Open(
                client, identity, letter.node, this.task.round, time.monotonic(), this.stage, whole
            )
            self._visit(this, client, bytes_down=sent.size)

    def _send(self, letters: Sequence[Letter]) -> list[Sent]:
        """Send letters; none of them if that fails for now: they are written again."""
        try:
            return self._transport.send(letters, self._ttl)
        except FederationError as error:
            _log.warning("not sent: %s", error)
            return []

    def _question(
        self, this: _Round, client: int, state: State, rows: Sequence[bytes]
    ) -> tuple[Question, dict[str, bytes]]:
        """What this stage asks of a client."""
        task, secure = this.task, this.secure
        if secure is None or this.stage == "vector":
            ask, parcels = self._task(this, client, state, rows)
            if secure is not None:
                parcels[INTRODUCED] = msgspec.msgpack.encode(secure.introduce(client))
            return ask, parcels
        if this.stage in ("shares", "lost"):
            return Unmask(setup=self._setup_sha256, key=task.key, survivors=secure.told(client)), {}
        advertise = Advertise(
            setup=self._setup_sha256,
            key=task.key,
            round=task.round,
            neighbours=task.secure,
            cohort=tuple(secure.cards),
        )
        return advertise, {CARDS: msgspec.msgpack.encode(secure.cards_for(client))}

    def _task(self, this: _Round, client: int, state: State, rows: Sequence[bytes]) -> tuple[Ask, dict[str, bytes]]:
        """The task, and what leads to its state from the one that a client has, as far as is known."""
        told = this.behind.get(client)
        parcels: dict[str, bytes] = {}
        if (told is not None and not told.setup) or self._forgot.get(client, 0) > 1:
            parcels[SETUP] = self._setup
        pending: Sequence[bytes] = ()
        if self._downlink == "weights":
            parcels[WEIGHTS] = self._pack(this.task.state_sha256, WEIGHTS, state)
        else:
            has = self._known[client] if client in self._known else self._under_way(client)
            if told is not None:
                has = told.round if self._history.hash_after(told.round) == told.state_sha256 else None
                if told.round == 0 and told.state_sha256 == this.task.state_sha256:
                    has = 0
            elif self._forgot.get(client, 0) > 1:
                has = None
            elif has is None and client not in self._heard:  # of a run that is continued: it may have much of it
                return Ask(setup=self._setup_sha256, task=this.task, rows=()), parcels
            whole = sum(values.nbytes for values in (state.weights, *state.slots.values()))
            if has is None or not self._history.leads_from(has) or self._history.bytes_after(has) > whole:
                parcels[STATE] = self._pack(this.task.state_sha256, STATE, state)
            else:
                pending = rows[has:]
        ask = Ask(
            setup=self._setup_sha256,
            task=this.task,
            rows=tuple(pending),
            calibrate=this.stage == "calibrate",
        )
        return ask, parcels

    def _under_way(self, client: int) -> int | None:
        """The newest state that was sent to a client that has not answered yet: it takes questions in their order."""
        sent = [letter.round for letter in self._open.values() if letter.client == client and letter.whole]
        return max(sent, default=None)

    def _pack(self, sha256: bytes, kind: str, state: State) -> bytes:
        key = state.round, sha256, kind
        if self._packed is None or self._packed[:3] != key:
            self._packed = *key, pack_state(state) if kind == STATE else pack_weights(state.weights)
        return self._packed[3]

    def _receive(self) -> bool:
        """Take in what has come; False if nothing has."""
        now = time.monotonic()
        self._open = {id: letter for id, letter in self._open.items() if now - letter.at < self._ttl}
        try:
            arrivals = self._transport.receive(list(self._open)) if self._open else []
        except FederationError as error:
            _log.warning("no answers: %s", error)
            return False
        for arrival in arrivals:
            letter = self._open.get(arrival.id)
            if letter is None:
                self._refuse(None, f"an answer to no question, {arrival.size} bytes, from node {arrival.node}")
            elif arrival.response is not None and arrival.node != letter.node:  # the right one may still come
                where = f"{self._name(letter)}: an answer from node {arrival.node}"
                self._refuse(None, f"{where}: expected one from node {letter.node}")
            else:
                del self._open[arrival.id]
                self._take(letter, arrival)
        return bool(arrivals)

    def _take(self, letter: _Open, arrival: Arrival) -> None:
        this, client = self._round, letter.client
        asked = None if this is None else (this.task.round, this.stage)
        current = client is not None and (letter.round, letter.stage) == asked
        if current and this is not None and client is not None:
            self._visit(this, client, bytes_up=arrival.size)
        else:
            self._before = self._before[0] + arrival.size, self._before[1]
        if arrival.response is None:
            _log.warning("%s: %s", self._name(letter), printable(arrival.error or "no answer", 200))
            return
        try:
            longest = LONGEST + (0 if this is None else 4 * this.task.local_steps * this.task.numbers)
            if len(arrival.response) > longest:
                raise ReplyError(f"{len(arrival.response)} bytes: expected at most {longest}")
            response = decode_response(arrival.response)
            if client is None:
                self._welcome(letter, response)
            elif not current or this is None:
                self._late(client, letter, response)
            else:
                self._judge(this, client, letter, response)
        except ReplyError as error:
            if client is None:
                self._declined[letter.identity] = letter.node
            self._refuse(client if current else None, f"{self._name(letter)}: {error}")

    def _judge(self, this: _Round, client: int, letter: _Open, response: Response) -> None:
        """Accept what fits the round. Raises ReplyError if it does not."""
        seconds = time.monotonic() - letter.at
        if isinstance(response, Behind):
            if this.attempts.get(client, 0) >= _MOST_ATTEMPTS:
                raise ReplyError(f"behind after {_MOST_ATTEMPTS} questions: expected an answer to the task")
            if self._known.pop(client, None) is not None and not response.state_sha256:  # it had one when it answered
                self._forgot[client] = self._forgot.get(client, 0) + 1
            this.behind[client] = response
            self._heard.add(client)
            return
        if isinstance(response, Failed):
            self._visit(this, client, outcome="failed", seconds=seconds, reason=printable(response.reason, 200))
            this.attempts[client] = _MOST_ATTEMPTS + 1
            _log.warning("%s: %s", self._name(letter), printable(response.reason))
            return
        secure = this.secure
        if isinstance(response, Answer) and letter.stage == "answer":
            self._check(this, client, response)
        elif secure is not None and client not in this.found and self._conceals(this, secure, client, letter, response):
            pass
        elif isinstance(response, Found) and letter.stage == "calibrate":
            check_found(this.task, client, response, [f for f in this.found.values() if isinstance(f, Found)])
        else:
            raise ReplyError(f"{type(response).__name__}: expected an answer to the task")
        if client in this.found:  # it was asked twice
            self._late(client, letter, response)
            return
        this.found[client] = response
        if self._downlink == "replay" and letter.stage not in ("advert", "shares", "lost"):
            self._known[client] = self._history.rows
        if not letter.whole:
            self._forgot.pop(client, None)
        self._suspects.discard(client)
        self._visit(this, client, outcome="ok", seconds=seconds)

    def _conceals(self, this: _Round, secure: SecureRound, client: int, letter: _Open, response: Response) -> bool:
        """Take in what a stage of a secure sum asked for; False if this is something else. Raises ReplyError."""
        try:
            if isinstance(response, Advert) and letter.stage == "advert":
                _check_owner(client, response.client)
                secure.advertise(response)
            elif isinstance(response, Concealed) and letter.stage == "vector":
                _check_owner(client, response.masked.client)
                self._check_state(this, response.state_sha256)
                secure.add(response.masked)
                if response.advert is not None:
                    following = this.task.round + 1, this.task.next_cohort
                    self._adverts = {k: v for k, v in self._adverts.items() if k[0] > this.task.round}
                    self._adverts.setdefault(following, []).append(response.advert)
            elif isinstance(response, Unmasked) and letter.stage in ("shares", "lost"):
                _check_owner(client, response.client)
                secure.unmask(response)
            else:
                return False
        except SecureSumError as error:
            raise ReplyError(str(error)) from error
        return True

    def _check(self, this: _Round, client: int, answer: Answer) -> None:
        _check_owner(client, answer.reply.client)
        self._check_state(this, answer.state_sha256)
        check_reply(this.task, this.cohort, answer.reply)

    def _check_state(self, this: _Round, found: bytes) -> None:
        if self._downlink == "replay" and found != this.task.state_sha256:
            raise ReplyError(f"evaluated at state {found.hex()[:12]}: expected {this.task.state_sha256.hex()[:12]}")

    def _late(self, client: int, letter: _Open, response: Response) -> None:
        """An answer after its round was closed: not used, but its client is back."""
        self._suspects.discard(client)
        if isinstance(response, Answer | Concealed) and self._history.hash_after(letter.round) == response.state_sha256:
            self._known[client] = letter.round
        self._roster.count_late()
        _log.info("%s answered round %d too late (%s)", self._name(letter), letter.round, type(response).__name__)

    def _refuse(self, client: int | None, reason: str) -> None:
        self._roster.count_refused()
        _log.warning("refused: %s", printable(reason, 300))
        if client is not None and self._round is not None and client not in self._round.found:
            self._round.attempts[client] = _MOST_ATTEMPTS + 1
            self._visit(self._round, client, outcome="refused", reason=printable(reason, 200))

    def _visit(
        self,
        this: _Round,
        client: int,
        *,
        outcome: Outcome | None = None,
        seconds: float | None = None,
        bytes_up: int = 0,
        bytes_down: int = 0,
        reason: str | None = None,
    ) -> None:
        """Add to what a participant did in this round."""
        old = this.visits.get(client) or Visit(client=client, outcome="late")
        this.visits[client] = msgspec.structs.replace(
            old,
            outcome=outcome or old.outcome,
            seconds=old.seconds if seconds is None else seconds,
            bytes_up=old.bytes_up + bytes_up,
            bytes_down=old.bytes_down + bytes_down,
            reason=reason or old.reason,
        )

    def _close(self, this: _Round) -> None:
        silent = {letter.client for letter in self._open.values() if letter.round == this.task.round}
        for client in this.cohort:
            visit = this.visits.get(client)
            if client in this.found:
                continue
            if visit is None or (visit.outcome == "late" and self._roster.members[client].identity not in self._nodes):
                visit = visit or Visit(client=client, outcome="offline")
                this.visits[client] = msgspec.structs.replace(visit, outcome="offline")
            elif visit.outcome == "late" and client in silent - self._suspects:
                self._suspects.add(client)
                _log.warning("client %d missed the deadline of round %d", client, this.task.round)
        visits = tuple(this.visits[client] for client in sorted(this.visits))
        if this.stage == "calibrate":
            self._before = (
                self._before[0] + sum(v.bytes_up for v in visits),
                self._before[1] + sum(v.bytes_down for v in visits),
            )
        else:
            self._roster.close(RoundLog(round=this.task.round, seconds=time.monotonic() - this.began, visits=visits))
        self._round = None

    def _name(self, letter: _Open) -> str:
        who = "node" if letter.client is None else f"client {letter.client}, node"
        return f"{who} {letter.identity[:12]}"


def _hex(card: Card | None) -> str:
    usable = card is not None and len(card.signing) == len(card.sealing) == 32
    return (card.signing + card.sealing).hex() if usable and card is not None else ""


def _check_owner(client: int, told: int) -> None:
    if told != client:
        raise ReplyError(f"a reply of client {told}: expected its own")

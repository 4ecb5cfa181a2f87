"""Clients on other machines, over any transport: who takes part, who has which state, who is waited for.

A round is asked of the participants that are connected and closes when all of them have answered, or at its deadline
with a quorum. Whoever misses a deadline is asked further but not waited for, until it answers again. What does not fit
its question (wrong length, wrong round, another state, nonsense) is refused, counted and told, and changes nothing.

Replay downlink: a client gets the rows that it lacks (DeComFL, arXiv 2405.15861, sends scalars down, too), or the
whole state where that is shorter, and proves by a hash that it arrived where the server is.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from baffle.aggregate import check_reply
from baffle.calibrate import Calibration, agree, check_found
from baffle.checks import require_between, require_count, require_positive
from baffle.client import perturbations, weight_of
from baffle.data import Dataset
from baffle.engines import Exchange
from baffle.errors import FederationError, ReplyError, require_choice
from baffle.messages import (
    LONGEST,
    SETUP,
    STATE,
    WEIGHTS,
    Answer,
    Ask,
    Behind,
    Enrol,
    Failed,
    Found,
    Present,
    Response,
    Setup,
    decode_response,
    encode,
    printable,
)
from baffle.method import State
from baffle.parcels import pack_state, pack_weights
from baffle.roster import Member, Outcome, Roster, RoundLog, Visit
from baffle.runtimes import Evaluation, Runtime
from baffle.types import Cohort, Reply, Table, Task, Weights
from baffle.wire import decode_row

Downlink = Literal["replay", "weights"]

_log = logging.getLogger("baffle")
_MOST_EXAMPLES = 2**40
_MOST_ATTEMPTS = 4  # questions to one client until the deadline, each answered by what it lacks
_POLL, _SLOWEST_POLL = 0.05, 0.25  # seconds between looks for answers
_LOOK_AROUND = 1.0  # seconds between looks at who is connected


@dataclass(frozen=True)
class Letter:
    """A question to a node, with its parcels."""

    node: int
    question: bytes
    parcels: Mapping[str, bytes] = field(default_factory=dict)
    client: int = 0
    """The number that the node has in this run. All else is the same for all that are asked the same."""


@dataclass(frozen=True)
class Sent:
    """A letter on its way: what its answer will refer to, and its bytes. Without an ``id`` it was not taken."""

    id: str
    size: int


@dataclass(frozen=True)
class Arrival:
    """An answer to the letter ``id``, or the transport's word that there will be none."""

    id: str
    node: int | None
    """Who sent it; None: the transport itself."""
    response: bytes | None
    error: str | None
    size: int


class Transport(Protocol):
    """Carries letters. Sizes are bytes of whole messages, as they are sent."""

    def nodes(self) -> Mapping[str, int]:
        """Who is connected: identity -> address."""
        ...

    def send(self, letters: Sequence[Letter], ttl: float) -> list[Sent]:
        """Send letters that may be answered within ``ttl`` seconds. Raises FederationError if now is not the time."""
        ...

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        """The answers that have come to some of these letters; each once."""
        ...


@dataclass
class _Open:
    """A letter that was not answered yet."""

    client: int | None  # None: a stranger that was asked who it is
    identity: str
    node: int
    round: int
    at: float
    size: int
    calibrate: bool = False
    whole: bool = False
    """It brought all that a client needs that keeps nothing."""
    again: bool = False
    """The same was asked anew; an answer to this one still counts."""


@dataclass
class _Round:
    """What is known of the round in progress."""

    task: Task
    cohort: Cohort
    calibrate: bool
    found: dict[int, Answer | Found] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    behind: dict[int, Behind] = field(default_factory=dict)
    visits: dict[int, Visit] = field(default_factory=dict)


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
        self._history = _History()
        self._open: dict[str, _Open] = {}
        self._nodes: Mapping[str, int] = {}
        self._looked = -math.inf
        self._pace = 0.0  # seconds until the first answer of the last round came
        self._known: dict[int, int] = {}  # client -> rows that its state is made of
        self._forgot: dict[int, int] = {}  # client -> how often in a row it lacked what it had before
        self._suspects: set[int] = set()
        self._declined: dict[str, int] = {}  # strangers that cannot take part, at which address
        self._plans: dict[str, str | int] = {}
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
        found = self._ask_all(task, participants, state, [], calibrate=True)
        return agree([f for f in found.values() if isinstance(f, Found)])

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Ask the participants, wait for a quorum. Bytes are those of whole messages, both ways.

        Those of newcomers and of a calibration count for the round that follows.
        """
        found = self._ask_all(task, participants, state, rows, calibrate=False)
        replies = tuple(f.reply for f in found.values() if isinstance(f, Answer))
        visits = self._roster.last.visits if self._roster.last is not None else ()
        up, down = self._before
        self._before = 0, 0
        passes = task.local_steps * len(perturbations(task, self.table, 0))
        examples = sum(min(task.batch_size or self.sizes[r.client], self.sizes[r.client]) for r in replies)
        return Exchange(
            replies,
            passes * len(replies),
            passes * examples,
            up + sum(v.bytes_up for v in visits),
            down + sum(v.bytes_down for v in visits),
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
                time.sleep(_SLOWEST_POLL / 2)
        self._admit()

    def _look_around(self) -> None:
        """See who is connected, and ask strangers who they are."""
        if time.monotonic() - self._looked < _LOOK_AROUND:
            return
        self._nodes = self._transport.nodes()
        self._looked = time.monotonic()
        asked = {
            letter.identity
            for letter in self._open.values()
            if letter.client is None and letter.node == self._nodes.get(letter.identity)
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
            self._open[sent.id] = _Open(None, identity, node, -1, time.monotonic(), sent.size)
            self._before = self._before[0], self._before[1] + sent.size

    def _admit(self) -> None:
        """Number those that have come."""
        for identity, present in sorted(self._newcomers, key=lambda new: (new[1].name, new[0])):
            client = self._roster.add(Member(printable(present.name, 64), identity, present.examples))
            # what a resume compares is for the server to say
            self._plans = self._plans or {k: v for k, v in present.plan.items() if k not in ("data", "frozen")}
            if present.state_sha256 and self._history.hash_after(present.round) == present.state_sha256:
                self._known[client] = present.round
            _log.info("client %d joined: %s, %d examples", client, printable(present.name, 64), present.examples)
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

    def _ask_all(
        self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes], *, calibrate: bool
    ) -> dict[int, Answer | Found]:
        """Ask until all that are expected have answered, or a quorum at the deadline."""
        if len(rows) < self._history.rows:  # another run
            self._history, self._known = _History(), {}
        self._history.read(rows)
        self._admit()
        self._roster.save()
        sizes = self.sizes
        cohort = {client: weight_of(sizes[client], task.quantum) for client in participants}
        this = self._round = _Round(task, cohort, calibrate)
        need = max(1, math.ceil(self._quorum * len(participants)))
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
            wait = _POLL if came else min(_SLOWEST_POLL, wait * 1.2)
            enough = len(this.found) >= need
            if enough and (now >= deadline or not self._expected(this)):
                break
            if now >= deadline:
                self._extend(this, need, now - began)
                deadline = now + self._deadline
        self._pace = first
        self._close(this, began)
        return this.found

    def _extend(self, this: _Round, need: int, waited: float) -> None:
        """The deadline has come without a quorum: ask again, or give up."""
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
            for client in this.cohort
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
            and (letter.round, letter.calibrate, letter.again) == (this.task.round, this.calibrate, False)
            and letter.node == self._nodes.get(letter.identity)
        }

    def _ask(self, this: _Round, state: State, rows: Sequence[bytes]) -> None:
        """Send the task to every participant that is connected, has not answered and is not being asked."""
        asked = self._asked(this)
        letters: list[Letter] = []
        to: list[int] = []
        for client in this.cohort:
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
                client, identity, letter.node, this.task.round, time.monotonic(), sent.size, this.calibrate, whole
            )
            self._visit(this, client, bytes_down=sent.size)

    def _send(self, letters: Sequence[Letter]) -> list[Sent]:
        """Send letters; none of them if that fails for now: they are written again."""
        try:
            return self._transport.send(letters, self._ttl)
        except FederationError as error:
            _log.warning("not sent: %s", error)
            return []

    def _question(self, this: _Round, client: int, state: State, rows: Sequence[bytes]) -> tuple[Ask, dict[str, bytes]]:
        """The task, and what leads to its state from the one that a client has, as far as is known."""
        told = this.behind.get(client)
        parcels: dict[str, bytes] = {}
        if (told is not None and not told.setup) or self._forgot.get(client, 0) > 1:
            parcels[SETUP] = self._setup
        pending: Sequence[bytes] = ()
        if self._downlink == "weights":
            parcels[WEIGHTS] = self._pack(this.task.state_sha256, WEIGHTS, state)
        else:
            has = self._known.get(client, self._under_way(client))
            if told is not None:
                has = told.round if self._history.hash_after(told.round) == told.state_sha256 else None
                if told.round == 0 and told.state_sha256 == this.task.state_sha256:
                    has = 0
            elif self._forgot.get(client, 0) > 1:
                has = None
            whole = sum(values.nbytes for values in (state.weights, *state.slots.values()))
            if has is None or not self._history.leads_from(has) or self._history.bytes_after(has) > whole:
                parcels[STATE] = self._pack(this.task.state_sha256, STATE, state)
            else:
                pending = rows[has:]
        ask = Ask(
            setup=self._setup_sha256,
            task=this.task,
            rows=tuple(pending),
            calibrate=this.calibrate,
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
        arrivals = self._transport.receive(list(self._open)) if self._open else []
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
        asked = None if this is None else (this.task.round, this.calibrate)
        current = client is not None and (letter.round, letter.calibrate) == asked
        if current and this is not None and client is not None:
            self._visit(this, client, bytes_up=arrival.size)
        else:
            self._before = self._before[0] + arrival.size, self._before[1]
        if arrival.response is None:
            _log.warning("%s: %s", self._name(letter), printable(arrival.error or "no answer", 200))
            return
        try:
            longest = LONGEST + (0 if this is None else 4 * this.task.local_steps * this.task.num_directions)
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
            return
        if isinstance(response, Failed):
            self._visit(this, client, outcome="failed", seconds=seconds, reason=printable(response.reason, 200))
            this.attempts[client] = _MOST_ATTEMPTS + 1
            _log.warning("%s: %s", self._name(letter), printable(response.reason))
            return
        if isinstance(response, Answer) and not letter.calibrate:
            self._check(this, client, response)
        elif isinstance(response, Found) and letter.calibrate:
            check_found(this.task, client, response, [f for f in this.found.values() if isinstance(f, Found)])
        else:
            raise ReplyError(f"{type(response).__name__}: expected an answer to the task")
        if client in this.found:  # it was asked twice
            self._late(client, letter, response)
            return
        this.found[client] = response
        if self._downlink == "replay":
            self._known[client] = self._history.rows
        if not letter.whole:
            self._forgot.pop(client, None)
        self._suspects.discard(client)
        self._visit(this, client, outcome="ok", seconds=seconds)

    def _check(self, this: _Round, client: int, answer: Answer) -> None:
        reply: Reply = answer.reply
        if reply.client != client:
            raise ReplyError(f"a reply of client {reply.client}: expected its own")
        if self._downlink == "replay" and answer.state_sha256 != this.task.state_sha256:
            raise ReplyError(
                f"evaluated at state {answer.state_sha256.hex()[:12]}: expected {this.task.state_sha256.hex()[:12]}"
            )
        check_reply(this.task, this.cohort, reply)

    def _late(self, client: int, letter: _Open, response: Response) -> None:
        """An answer after its round was closed: not used, but its client is back."""
        self._suspects.discard(client)
        if isinstance(response, Answer) and self._history.hash_after(letter.round) == response.state_sha256:
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

    def _close(self, this: _Round, began: float) -> None:
        for client in this.cohort:
            if client in this.found:
                continue
            visit = this.visits.get(client)
            if visit is None:
                this.visits[client] = Visit(client=client, outcome="offline")
            elif visit.outcome == "late" and client not in self._suspects:
                self._suspects.add(client)
                _log.warning("client %d missed the deadline of round %d", client, this.task.round)
        visits = tuple(this.visits[client] for client in sorted(this.visits))
        if this.calibrate:
            self._before = (
                self._before[0] + sum(v.bytes_up for v in visits),
                self._before[1] + sum(v.bytes_down for v in visits),
            )
        else:
            self._roster.close(RoundLog(round=this.task.round, seconds=time.monotonic() - began, visits=visits))
        self._round = None

    def _name(self, letter: _Open) -> str:
        who = "node" if letter.client is None else f"client {letter.client}, node"
        return f"{who} {letter.identity[:12]}"


class _History:
    """What rows lead from where: lengths, hashes, and returns to an earlier state, which no client keeps."""

    def __init__(self) -> None:
        self._ends = [0]
        self._hashes: list[bytes] = []
        self._return = 0  # rows up to and with the newest return

    @property
    def rows(self) -> int:
        return len(self._hashes)

    def read(self, rows: Sequence[bytes]) -> None:
        """Take in rows that are new."""
        for data in rows[len(self._hashes) :]:
            row = decode_row(data)
            self._hashes.append(row.state_sha256)
            self._ends.append(self._ends[-1] + len(data))
            if row.restores is not None:
                self._return = len(self._hashes)

    def hash_after(self, rows: int) -> bytes | None:
        """Hash of the state that so many rows lead to, if any do."""
        return self._hashes[rows - 1] if 1 <= rows <= len(self._hashes) else None

    def leads_from(self, rows: int) -> bool:
        """Whether the state after so many rows leads to the newest."""
        return self._return <= rows <= len(self._hashes)

    def bytes_after(self, rows: int) -> int:
        """Bytes of the rows behind."""
        return self._ends[-1] - self._ends[rows]

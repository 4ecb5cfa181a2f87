"""A client that keeps the replay state between rounds: it catches up from rows, proves it by a hash, then answers.

What it has may be of any age, or nothing: if the rows in a question do not lead to the state that the task names, it
says what it has (``Behind``) and is asked again with what it lacks. The same task asked twice gets the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from baffle.client.calibrate import EXAMPLES, calibrate
from baffle.client.respond import check_task, draw, respond
from baffle.core.aggregate import counts_of
from baffle.core.method import replay
from baffle.core.state import State, state_sha256
from baffle.core.types import Reply, Table, Task, Weights, table_size, unpack
from baffle.data import Dataset
from baffle.errors import BaffleError, PlanError, ReplyError, SecureSumError
from baffle.protocol.encoding import decode_row, encode_message
from baffle.protocol.messages import (
    CARDS,
    INTRODUCED,
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
    Response,
    Setup,
    Unmask,
    decode_cards,
    decode_introductions,
    decode_question,
    decode_setup,
    encode,
    printable,
)
from baffle.protocol.states import unpack_state, unpack_weights
from baffle.runtimes import Runtime
from baffle.secure.messages import Card

if TYPE_CHECKING:
    from baffle.secure.client import SecureClient
    from baffle.secure.masks import Identity

_REASON = 2000  # letters

Build: TypeAlias = Callable[[Setup], tuple[Runtime, Dataset]]
"""What a setup makes of a client: how it evaluates, on which examples. Raises BaffleError if it cannot, or will not."""


@dataclass
class Memory:
    """What a process keeps between questions. Participants may share one: they hold the same state."""

    setup: str = ""
    state: State | None = None
    state_sha256: bytes = b""

    def keep(self, state: State | None, sha256: bytes = b"") -> None:
        """Remember a state, or that there is none."""
        self.state, self.state_sha256 = state, sha256 if state is not None else b""


class Participant:
    """Answers questions about one client's data.

    ``build`` is called with each new setup. No question makes it raise: what goes wrong is told to the server.
    With an ``identity`` it takes part in secure sums, in cohorts of at least ``minimum``; with ``only_secure`` it
    refuses to give its scalars in any other way.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, _ = bf.load("digits")
        >>> runtime = bf.TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        >>> client = Participant("hospital", lambda setup: (runtime, train))
        >>> client.answer(b"?", {})[:13]
        b'\\x82\\xa4type\\xa6failed'
    """

    def __init__(
        self,
        name: str,
        build: Build,
        memory: Memory | None = None,
        *,
        identity: Identity | None = None,
        minimum: int = 3,
        only_secure: bool = False,
    ) -> None:
        self._name, self._build, self._memory = name, build, memory or Memory()
        self._identity, self._minimum, self._only_secure = identity, minimum, only_secure
        self._cards: dict[int, Card] = {}
        self._secure: dict[tuple[int, int], SecureClient] = {}  # by run key and number; a run's rounds are not repeated
        self._ready: tuple[str, Runtime, Dataset] | None = None
        self._last: tuple[bytes, bytes] | None = None  # a task, and what was answered

    def answer(self, question: bytes, parcels: Mapping[str, bytes], client: int = 0) -> bytes:
        """What to say, as client number ``client``, to a question, encoded."""
        try:
            asked = decode_question(question)
            if isinstance(asked, Enrol):
                response: Response | bytes = self._enrol(asked, parcels)
            elif isinstance(asked, Advertise):
                response = self._advertise(asked, parcels, client)
            elif isinstance(asked, Unmask):
                response = self._once(question, lambda: self._sums(asked.key, client).unmask(asked.survivors))
            else:
                response = self._work(asked, parcels, client)
            return response if isinstance(response, bytes) else encode(response)
        except BaffleError as error:
            return encode(Failed(printable(str(error), _REASON)))
        except Exception as error:  # of numbers that no server sends
            return encode(Failed(printable(f"{type(error).__name__}: {error}", _REASON)))

    def _enrol(self, asked: Enrol, parcels: Mapping[str, bytes]) -> Response:
        ready = self._set_up(asked.setup, parcels)
        if ready is None:
            return self._behind(asked.setup)
        runtime, data = ready
        state = self._memory.state
        return Present(
            name=self._name,
            examples=len(data),
            plan=runtime.plan,
            state_sha256=self._memory.state_sha256,
            round=0 if state is None else state.round,
            card=None if self._identity is None else self._identity.card,
        )

    def _work(self, asked: Ask, parcels: Mapping[str, bytes], client: int) -> Response | bytes:
        ready = self._set_up(asked.setup, parcels)
        if ready is None:
            return self._behind(asked.setup)
        runtime, data = ready
        check_task(asked.task)
        weights = self._weights(asked, parcels, runtime.table)
        if weights is None:
            return self._behind(asked.setup)
        kept = b"" if WEIGHTS in parcels else asked.task.state_sha256
        if asked.calibrate:
            return self._calibrate(asked.task, runtime, data, weights, client)
        task = asked.task
        if self._only_secure and not task.secure:
            raise PlanError("a plain sum: this client takes part in secure sums only")
        introduced = parcels.get(INTRODUCED, b"")

        def answer() -> Response:
            sums = self._sums(task.key, client) if task.secure else None
            reply = respond(task, runtime, weights, lambda step: draw(task, data, client, step), client, len(data))
            return Answer(reply, kept) if sums is None else self._conceal(sums, task, reply, introduced, kept)

        start = hashlib.sha256(weights.tobytes()).digest()
        return self._once(encode_message(task) + start + client.to_bytes(8, "big") + introduced, answer)

    def _once(self, key: bytes, answer: Callable[[], Response]) -> bytes:
        """What the same question was answered, or an answer to it."""
        if self._last is None or self._last[0] != key:
            self._last = key, encode(answer())
        return self._last[1]

    def _advertise(self, asked: Advertise, parcels: Mapping[str, bytes], client: int) -> Response:
        if self._identity is None:
            raise PlanError("a secure sum: this client has no keys for one")
        if CARDS in parcels:
            self._cards |= decode_cards(parcels[CARDS])
        if any(key == asked.key and number != client for key, number in self._secure):
            raise PlanError(f"client number {client}: expected the one that this client had in this run before")
        if (asked.key, client) not in self._secure:
            from baffle.secure.client import SecureClient  # needs cryptography, which plain sums do without

            self._secure[asked.key, client] = SecureClient(
                self._identity, client, asked.key, minimum=self._minimum, degree=asked.neighbours
            )
        return self._secure[asked.key, client].advertise(asked.round, asked.cohort, self._cards)

    def _sums(self, key: int, client: int) -> SecureClient:
        found = self._secure.get((key, client))
        if found is None:
            raise ReplyError("a secure sum that this client has made no keys for")
        return found

    def _conceal(
        self, sums: SecureClient, task: Task, reply: Reply, introduced: bytes, state_sha256: bytes
    ) -> Concealed:
        """The reply under masks, and keys for the next round, so that it takes one exchange less."""
        others = decode_introductions(introduced)
        values = unpack(reply.scalars, task.bits, task.local_steps * task.numbers) * reply.weight
        masked = sums.mask(task.round, others, values, counts_of(reply), task.word)
        try:
            advert = sums.advertise(task.round + 1, task.next_cohort, self._cards)
        except SecureSumError:  # not in that cohort, or with neighbours whose cards are not here
            advert = None
        return Concealed(masked=masked, advert=advert, state_sha256=state_sha256)

    def _calibrate(self, task: Task, runtime: Runtime, data: Dataset, weights: Weights, client: int) -> Found:
        batch = draw(msgspec.structs.replace(task, batch_size=EXAMPLES), data, client, 0)
        found = calibrate(task, runtime, weights, batch, client=client)
        errors = tuple(float(e) for e in found.errors)
        return Found(found.sigmas, errors, found.forward_passes, found.samples_forwarded)

    def _set_up(self, wanted: str, parcels: Mapping[str, bytes]) -> tuple[Runtime, Dataset] | None:
        """What the setup makes, built once; None if it is not here."""
        if self._ready is not None and self._ready[0] == wanted:
            self._remember_for(wanted)
            return self._ready[1:]
        if SETUP not in parcels:
            return None
        if hashlib.sha256(parcels[SETUP]).hexdigest() != wanted:
            raise ReplyError("a setup of another hash than the question says")
        setup = decode_setup(parcels[SETUP])
        runtime, data = self._build(setup)
        if runtime.table != setup.table or runtime.plan.get("frozen", "") != setup.frozen:
            raise ReplyError(
                "this client's model has other tensors, or other values in those that are not trained, than the "
                "server's: expected the same model"
            )
        self._remember_for(wanted)
        self._ready = wanted, runtime, data
        return runtime, data

    def _remember_for(self, setup: str) -> None:
        """A state belongs to its setup."""
        if self._memory.setup != setup:
            self._memory.setup = setup
            self._memory.keep(None)

    def _weights(self, asked: Ask, parcels: Mapping[str, bytes], table: Table) -> Weights | None:
        """The weights that the task starts from; None if what is here does not lead to them."""
        size = table_size(table)
        if WEIGHTS in parcels:
            return unpack_weights(parcels[WEIGHTS], size)
        memory, wanted = self._memory, asked.task.state_sha256
        if STATE in parcels:
            state = unpack_state(parcels[STATE], size)
            memory.keep(state, state_sha256(state))
        if memory.state is None:
            return None
        after = catch_up(memory.state, table, asked.rows) or memory.state
        if after is not memory.state:
            found = state_sha256(after)
            memory.keep(after if found == wanted else None, found)
        if memory.state_sha256 != wanted:
            return None
        memory.keep(replace(after, round=asked.task.round), wanted)  # rows that changed nothing were not sent
        return after.weights

    def _behind(self, setup: str) -> Behind:
        state = self._memory.state
        ready = self._ready is not None and self._ready[0] == setup
        return Behind(0 if state is None else state.round, self._memory.state_sha256, ready)


def catch_up(state: State, table: Table, rows: Sequence[bytes]) -> State | None:
    """The state after those of the rows that are not in it yet.

    None if there is a gap, or one returns to a state that is no longer here. Raises ReplyError if it is no row.
    """
    for data in rows:
        try:
            row = decode_row(data)
        except msgspec.DecodeError as error:
            raise ReplyError(f"malformed row: {error}") from error
        if row.round < state.round:
            continue
        if row.round > state.round or row.restores is not None:
            return None
        after = replay(state, table, row)
        state = replace(after, ema_weights=after.weights)
    return state

"""A stateful client: it keeps the replay state between rounds, catches up from rows and proves it by a hash.

Its state may be of any age, or missing. If the rows in a request do not lead to the state that the task names, it
reports the state that it has (``BehindResponse``) and is request again with what it lacks. The same task request twice
gets the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from baffle.client.calibrate import measure
from baffle.client.respond import check_task, draw, respond
from baffle.core.aggregate import counts_of, weighted
from baffle.core.method import replay
from baffle.core.state import State, state_sha256
from baffle.core.types import Reply, Table, Task, Weights, table_size
from baffle.data import Dataset
from baffle.errors import BaffleError, PlanError, ReplyError, SecureSumError
from baffle.protocol.encoding import decode_row, encode_message
from baffle.protocol.messages import (
    INTRODUCED,
    PUBLIC_KEYS,
    SETUP,
    STATE,
    WEIGHTS,
    AnyResponse,
    BehindResponse,
    EnrolRequest,
    EnrolResponse,
    FailedResponse,
    KeysRequest,
    MaskedTrainResponse,
    Setup,
    TrainRequest,
    TrainResponse,
    UnmaskRequest,
    decode_introductions,
    decode_public_keys,
    decode_request,
    decode_setup,
    encode,
    printable,
)
from baffle.protocol.states import unpack_state, unpack_weights
from baffle.runtimes import Runtime
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.secure.messages import PublicKeys

if TYPE_CHECKING:
    from baffle.secure.client import SecureClient
    from baffle.secure.masks import Identity

_REASON = 2000  # characters

Build: TypeAlias = Callable[[Setup], tuple[Runtime, Dataset]]
"""Makes a client's runtime and examples from a setup. Raises BaffleError if it cannot, or refuses to."""


@dataclass
class Memory:
    """The state that a process keeps between requests. Participants may share it, since they hold the same state."""

    setup: str = ""
    state: State | None = None
    state_sha256: bytes = b""

    def keep(self, state: State | None, sha256: bytes = b"") -> None:
        """Remember a state, or that there is none."""
        self.state, self.state_sha256 = state, sha256 if state is not None else b""


class Participant:
    """Answers a server's requests with one client's data.

    No request makes it raise: errors are reported to the server.

    Args:
        name: shown to the operator of the server.
        build: called with each new setup.
        memory: to share with other participants of this process; by default its own.
        identity: keys for secure sums; without them it takes part in plain sums only.
        minimum: smallest cohort of a secure sum that it takes part in.
        only_secure: refuse plain sums.

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
        self._public_keys: dict[int, PublicKeys] = {}
        self._secure: dict[tuple[int, int], SecureClient] = {}  # by run key and client number
        self._ready: tuple[str, Runtime, Dataset] | None = None
        self._last: tuple[bytes, bytes] | None = None  # a request, and its answer

    def answer(self, request: bytes, attachments: Mapping[str, bytes], client: int = 0) -> bytes:
        """Answer a request.

        Args:
            request: encoded, see ``baffle.protocol.messages``.
            attachments: of the request, by name.
            client: this client's number in the run.

        Returns:
            The encoded response.
        """
        try:
            message = decode_request(request)
            if isinstance(message, EnrolRequest):
                response: AnyResponse | bytes = self._enrol(message, attachments)
            elif isinstance(message, KeysRequest):
                response = self._make_keys(message, attachments, client)
            elif isinstance(message, UnmaskRequest):
                response = self._once(request, lambda: self._sums(message.key, client).unmask(message.survivors))
            else:
                response = self._train(message, attachments, client)
            return response if isinstance(response, bytes) else encode(response)
        except BaffleError as error:
            return encode(FailedResponse(printable(str(error), _REASON)))
        except Exception as error:  # for values that no server sends
            return encode(FailedResponse(printable(f"{type(error).__name__}: {error}", _REASON)))

    def _enrol(self, request: EnrolRequest, attachments: Mapping[str, bytes]) -> AnyResponse:
        ready = self._set_up(request.setup, attachments)
        if ready is None:
            return self._behind(request.setup)
        runtime, data = ready
        state = self._memory.state
        return EnrolResponse(
            name=self._name,
            examples=len(data),
            plan=runtime.plan,
            state_sha256=self._memory.state_sha256,
            round=0 if state is None else state.round,
            card=None if self._identity is None else self._identity.card,
        )

    def _train(self, request: TrainRequest, attachments: Mapping[str, bytes], client: int) -> AnyResponse | bytes:
        ready = self._set_up(request.setup, attachments)
        if ready is None:
            return self._behind(request.setup)
        runtime, data = ready
        check_task(request.task, runtime.table)
        weights = self._weights(request, attachments, runtime.table)
        if weights is None:
            return self._behind(request.setup)
        sha256 = b"" if WEIGHTS in attachments else request.task.state_sha256
        if request.calibrate:
            return measure(request.task, runtime, weights, data, client)
        task = request.task
        if self._only_secure and not task.secure:
            raise PlanError("a plain sum: this client takes part in secure sums only")
        introduced = attachments.get(INTRODUCED, b"")

        def answer() -> AnyResponse:
            sums = self._sums(task.key, client) if task.secure else None
            reply = respond(task, runtime, weights, lambda step: draw(task, data, client, step), client, len(data))
            return TrainResponse(reply, sha256) if sums is None else self._mask(sums, task, reply, introduced, sha256)

        start = hashlib.sha256(weights.tobytes()).digest()
        return self._once(encode_message(task) + start + client.to_bytes(8, "big") + introduced, answer)

    def _once(self, key: bytes, answer: Callable[[], AnyResponse]) -> bytes:
        """Answer a request, or repeat the answer if it is the last one again."""
        if self._last is None or self._last[0] != key:
            self._last = key, encode(answer())
        return self._last[1]

    def _make_keys(self, request: KeysRequest, attachments: Mapping[str, bytes], client: int) -> AnyResponse:
        if self._identity is None:
            raise PlanError("a secure sum: this client has no keys for one")
        if PUBLIC_KEYS in attachments:
            self._public_keys |= decode_public_keys(attachments[PUBLIC_KEYS])
        if any(key == request.key and number != client for key, number in self._secure):
            raise PlanError(f"client number {client}: expected the one that this client had in this run before")
        if (request.key, client) not in self._secure:
            from baffle.secure.client import SecureClient  # needs cryptography, which plain sums do without

            self._secure[request.key, client] = SecureClient(
                self._identity, client, request.key, minimum=self._minimum, degree=request.neighbours
            )
        return self._secure[request.key, client].advertise(request.round, request.cohort, self._public_keys)

    def _sums(self, key: int, client: int) -> SecureClient:
        sums = self._secure.get((key, client))
        if sums is None:
            raise ReplyError("a secure sum that this client has made no keys for")
        return sums

    def _mask(
        self, sums: SecureClient, task: Task, reply: Reply, introduced: bytes, state_sha256: bytes
    ) -> MaskedTrainResponse:
        """Mask the reply, and add keys for the next round, which saves an exchange."""
        others = decode_introductions(introduced)
        masked = sums.mask(task.round, others, weighted(task, reply), counts_of(reply), task.word)
        try:
            advert = sums.advertise(task.round + 1, task.next_cohort, self._public_keys)
        except SecureSumError:  # not in that cohort, or a neighbour's public keys are unknown
            advert = None
        return MaskedTrainResponse(masked=masked, advert=advert, state_sha256=state_sha256)

    def _set_up(self, wanted: str, attachments: Mapping[str, bytes]) -> tuple[Runtime, Dataset] | None:
        """Build what a setup describes, once; None if the setup is not here."""
        if self._ready is not None and self._ready[0] == wanted:
            self._remember_for(wanted)
            return self._ready[1:]
        if SETUP not in attachments:
            return None
        if hashlib.sha256(attachments[SETUP]).hexdigest() != wanted:
            raise ReplyError("a setup of another hash than the request says")
        setup = decode_setup(attachments[SETUP])
        runtime, data = self._build(setup)
        if runtime.table != setup.table or EvaluationPlan.of(runtime.plan).frozen != setup.frozen:
            raise ReplyError(
                "this client's model has other tensors, or other values in those that are not trained, than the "
                "server's: expected the same model"
            )
        self._remember_for(wanted)
        self._ready = wanted, runtime, data
        return runtime, data

    def _remember_for(self, setup: str) -> None:
        """Drop the state if it belongs to another setup."""
        if self._memory.setup != setup:
            self._memory.setup = setup
            self._memory.keep(None)

    def _weights(self, request: TrainRequest, attachments: Mapping[str, bytes], table: Table) -> Weights | None:
        """Reach the weights that the task starts from; None if that is impossible with what is here."""
        size = table_size(table)
        if WEIGHTS in attachments:
            return unpack_weights(attachments[WEIGHTS], size)
        memory, wanted = self._memory, request.task.state_sha256
        if STATE in attachments:
            state = unpack_state(attachments[STATE], size)
            memory.keep(state, state_sha256(state))
        if memory.state is None:
            return None
        after = catch_up(memory.state, table, request.rows) or memory.state
        if after is not memory.state:
            reached = state_sha256(after)
            memory.keep(after if reached == wanted else None, reached)
        if memory.state_sha256 != wanted:
            return None
        memory.keep(replace(after, round=request.task.round), wanted)  # rows that changed nothing were not sent
        return after.weights

    def _behind(self, setup: str) -> BehindResponse:
        state = self._memory.state
        ready = self._ready is not None and self._ready[0] == setup
        return BehindResponse(0 if state is None else state.round, self._memory.state_sha256, ready)


def catch_up(state: State, table: Table, rows: Sequence[bytes]) -> State | None:
    """Replay rows that are not part of a state yet.

    Args:
        state: to start from.
        table: the trainable tensors.
        rows: encoded, in order; those before the state's round are skipped.

    Returns:
        The state after the last row. None if rows are missing, or one returns to a state that is no longer here.

    Raises:
        ReplyError: for a malformed row.
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

"""Which state each client has, and what to send so that it reaches the state of the task.

Replay downlink: a client gets the rows that it lacks (DeComFL, arXiv 2405.15861, sends scalars down, too), or the
whole state where that is shorter, and proves by a hash that it reached the server's state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

from baffle.core.state import State
from baffle.core.types import Task
from baffle.engines.history import History
from baffle.protocol.messages import SETUP, STATE, WEIGHTS, BehindResponse, EnrolResponse, TrainRequest
from baffle.protocol.states import pack_state, pack_weights

Downlink = Literal["replay", "weights"]
"""What clients get each round: the rows that they lack, or the weights, which suits clients that keep nothing."""


class ClientStates:
    """What is known of the states of a run's clients.

    Args:
        downlink: ``replay`` or ``weights``.
        setup: encoded; for clients that turn out to lack it.
    """

    def __init__(self, downlink: Downlink, setup: bytes) -> None:
        self._downlink, self._setup = downlink, setup
        self._setup_sha256 = hashlib.sha256(setup).hexdigest()
        self._history = History()
        self._known: dict[int, int] = {}  # client -> rows that lead to its state
        self._reported: set[int] = set()  # clients that have reported their state since the engine started
        self._losses: dict[int, int] = {}  # client -> how often in succession it lacked the state that it had before
        self._packed: tuple[int, bytes, str, bytes] | None = None

    def read(self, rows: Sequence[bytes]) -> None:
        """Take note of new rows; fewer rows than before are those of another run."""
        if len(rows) < self._history.rows:
            self._history, self._known = History(), {}
        self._history.read(rows)

    def joined(self, client: int, response: EnrolResponse) -> None:
        """Take note of the state that a new client reported."""
        self._reported.add(client)
        self._note(client, response.round, response.state_sha256)

    def behind(self, client: int, response: BehindResponse) -> None:
        """Take note that a client lacks something."""
        if self._known.pop(client, None) is not None and not response.state_sha256:
            self._losses[client] = self._losses.get(client, 0) + 1
        self._reported.add(client)

    def answered(self, client: int, *, reached: bool, whole: bool) -> None:
        """Take note that a client answered.

        Args:
            client: its number.
            reached: it showed that it has the task's state.
            whole: the request carried everything a stateless client needs.
        """
        if self._downlink == "replay" and reached:
            self._known[client] = self._history.rows
        if not whole:
            self._losses.pop(client, None)

    def answered_late(self, client: int, round: int, sha256: bytes) -> None:
        """Take note of the state at which a client evaluated an earlier round's task."""
        self._note(client, round, sha256)

    def _note(self, client: int, round: int, sha256: bytes) -> None:
        if sha256 and self._history.hash_after(round) == sha256:
            self._known[client] = round

    def request(
        self,
        task: Task,
        client: int,
        state: State,
        rows: Sequence[bytes],
        behind: BehindResponse | None,
        under_way: Callable[[int], int | None],
        *,
        calibrate: bool,
    ) -> tuple[TrainRequest, dict[str, bytes]]:
        """Make the request that brings a task to a client.

        Args:
            task: of the round.
            client: its number.
            state: the task's state.
            rows: all encoded rows that lead to it.
            behind: what the client said of its state in this round, if anything.
            under_way: the newest state that was sent to a client that has not answered since.
            calibrate: ask for a measurement of sigma.

        Returns:
            The request and its attachments.
        """
        attachments: dict[str, bytes] = {}
        stateless = self._losses.get(client, 0) > 1
        if (behind is not None and not behind.setup) or stateless:
            attachments[SETUP] = self._setup
        pending: Sequence[bytes] = ()
        if self._downlink == "weights":
            attachments[WEIGHTS] = self._pack(task.state_sha256, WEIGHTS, state)
        else:
            has = self._known[client] if client in self._known else under_way(client)
            if behind is not None:
                has = behind.round if self._history.hash_after(behind.round) == behind.state_sha256 else None
                if behind.round == 0 and behind.state_sha256 == task.state_sha256:
                    has = 0
            elif stateless:
                has = None
            elif has is None and client not in self._reported:  # of a resumed run: it may have most of the state
                return TrainRequest(setup=self._setup_sha256, task=task, rows=()), attachments
            whole = sum(values.nbytes for values in (state.weights, *state.slots.values()))
            if has is None or not self._history.leads_from(has) or self._history.bytes_after(has) > whole:
                attachments[STATE] = self._pack(task.state_sha256, STATE, state)
            else:
                pending = rows[has:]
        request = TrainRequest(setup=self._setup_sha256, task=task, rows=tuple(pending), calibrate=calibrate)
        return request, attachments

    def _pack(self, sha256: bytes, kind: str, state: State) -> bytes:
        """Pack a state once for all clients."""
        key = state.round, sha256, kind
        if self._packed is None or self._packed[:3] != key:
            self._packed = *key, pack_state(state) if kind == STATE else pack_weights(state.weights)
        return self._packed[3]

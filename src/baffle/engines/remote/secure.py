"""The secure sum of a round over the network: its stages, what each asks of clients, and the sum.

A client answers a round once, so a round that failed is not repeated: the run goes on with the next one.
The cryptography is in ``baffle.secure.server``; docs/secure-sum.md describes the protocol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from baffle.core.aggregate import number_of_counts, summed
from baffle.core.types import Aggregate, Cohort, Task
from baffle.engines.remote.mailbox import Stage
from baffle.errors import FederationError, ReplyError, SecureSumError
from baffle.protocol.messages import PUBLIC_KEYS as ATTACHED_KEYS
from baffle.protocol.messages import KeysRequest, MaskedTrainResponse, UnmaskRequest
from baffle.secure.graph import threshold
from baffle.secure.messages import KeysResponse, PublicKeys, UnmaskResponse

if TYPE_CHECKING:
    from baffle.secure.server import SecureRound


class EarlyKeys:
    """Keys for a later round, which clients send with their masked vectors to save an exchange."""

    def __init__(self) -> None:
        self._keys: dict[tuple[int, tuple[int, ...]], list[KeysResponse]] = {}  # by round and cohort

    def keep(self, task: Task, keys: KeysResponse) -> None:
        """Keep keys that came with a reply to a task, and drop those of earlier rounds."""
        self._keys = {key: early for key, early in self._keys.items() if key[0] > task.round}
        self._keys.setdefault((task.round + 1, task.next_cohort), []).append(keys)

    def pop(self, round: int, cohort: tuple[int, ...]) -> list[KeysResponse]:
        """Take out the keys for a round and its cohort."""
        return self._keys.pop((round, cohort), [])


def usable_keys(task: Task, identities: Mapping[int, str], need: int) -> dict[int, PublicKeys]:
    """Find the clients that can take part in a secure sum.

    Args:
        task: of the round.
        identities: each participant's keys as in ``clients.json``: hexadecimal, empty if it has none.
        need: number of clients that have to answer.

    Raises:
        FederationError: if fewer clients have keys.
    """
    from baffle.secure.masks import usable  # needs cryptography, which plain sums do without

    stored = {client: bytes.fromhex(text) for client, text in identities.items()}
    keys = {c: both for c, data in stored.items() if data and usable(both := PublicKeys(data[:32], data[32:]))}
    if len(keys) < need:
        raise FederationError(
            f"round {task.round}: {len(keys)} of {len(identities)} clients have keys for a secure sum: expected "
            f"{need} of 'baffle node'"
        )
    return keys


def secure_quorum(cohort: Collection[int], need: int) -> int:
    """Number of clients that a secure sum needs: those of a plain sum, or the threshold where that is larger."""
    return max(need, threshold(len(cohort)))


class SecureSum:
    """One round's secure sum.

    Args:
        task: of the round.
        cohort: the participants' weights.
        keys: public keys of those that can take part.
        need: number of clients that have to answer each stage.
        early: keys that came in earlier rounds; those for the next round are added.

    Raises:
        SecureSumError: if the cohort is too small.
    """

    def __init__(self, task: Task, cohort: Cohort, keys: Mapping[int, PublicKeys], need: int, early: EarlyKeys) -> None:
        from baffle.secure.server import SecureRound  # needs cryptography, which plain sums do without

        self._task, self._cohort, self._need, self._early = task, cohort, need, early
        size, counts = task.local_steps * task.numbers, number_of_counts(task)
        self._round: SecureRound = SecureRound(
            task.key, task.round, tuple(keys), keys, size, counts, degree=task.secure, word=task.word
        )
        for response in early.pop(task.round, tuple(keys)):
            with contextlib.suppress(SecureSumError):  # its client is asked for other keys
                self._round.advertise(response)

    def stages(self) -> Iterator[tuple[Stage, Collection[int], int]]:
        """Iterate over the stages: the stage, the clients to ask, the number of answers that it needs.

        The caller asks the clients and hands their answers to :meth:`add` before it goes on.

        Raises:
            SecureSumError: if too few clients are left.
        """
        secure, need = self._round, self._need
        missing = secure.cards.keys() - secure.advertised
        if missing:
            yield "advert", missing, need - len(secure.advertised)
        yield "vector", secure.advertised, need
        yield "shares", secure.survive().clients, need
        if secure.dropped:
            yield "dropped", secure.missing & secure.signatures.keys(), need

    def enough(self, stage: Stage) -> bool | None:
        """Whether enough shares arrived to close a stage; None if the stage asks for something else."""
        if stage == "shares":
            return self._round.opened
        return self._round.ready if stage == "dropped" else None

    def introductions(self, client: int) -> bytes:
        """What accompanies the task to a client: its neighbours' keys, and the shares that they sealed for it."""
        return msgspec.msgpack.encode(self._round.introduce(client))

    def request(self, stage: Stage, client: int, setup: str) -> tuple[KeysRequest | UnmaskRequest, dict[str, bytes]]:
        """Make the request of a stage other than ``vector``, with its attachments."""
        task, secure = self._task, self._round
        if stage in ("shares", "dropped"):
            return UnmaskRequest(setup=setup, key=task.key, survivors=secure.survivors_for(client)), {}
        request = KeysRequest(
            setup=setup, key=task.key, round=task.round, neighbours=task.secure, cohort=tuple(secure.cards)
        )
        return request, {ATTACHED_KEYS: msgspec.msgpack.encode(secure.cards_for(client))}

    def add(self, response: KeysResponse | MaskedTrainResponse | UnmaskResponse) -> None:
        """Add a client's answer to its stage. Raises ReplyError if it is not valid."""
        try:
            if isinstance(response, KeysResponse):
                self._round.advertise(response)
            elif isinstance(response, UnmaskResponse):
                self._round.unmask(response)
            else:
                self._round.add(response.masked)
                if response.advert is not None:
                    self._early.keep(self._task, response.advert)
        except SecureSumError as error:
            raise ReplyError(str(error)) from error

    def total(self) -> Aggregate:
        """Unmask the sum. Raises SecureSumError if that fails, or if a client's vector cannot be an honest one."""
        task = self._task
        vectors, counts = self._round.total()
        survivors = self._round.survive().clients
        expected = sum(self._cohort[client] for client in survivors)
        if counts[0] != expected or int(np.abs(vectors).max(initial=0)) > task.limit * expected:
            raise SecureSumError(f"round {task.round}: weights of {counts[0]}, expected {expected}: one sent another")
        return summed(task, vectors, counts, survivors)

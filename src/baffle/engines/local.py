"""All clients in this process: simulate a federation with the same messages as over a network.

With shared directions and one local step every participant evaluates the same perturbed models, so their
batches go through each model together. Otherwise several clients are evaluated side by side, each on one lane of the
runtime. Apart from its forward passes, the cost of a round grows with the participants, not with all clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from baffle.client.calibrate import EXAMPLES, Calibration, calibrate
from baffle.client.respond import draw, numbers_of, passes_of, perturbations, reply, respond
from baffle.core.checks import require_count
from baffle.core.credit import is_plain
from baffle.core.rebuild import FAST, Execution
from baffle.core.scalars import encode, weight_of
from baffle.core.state import State
from baffle.core.types import Reply, Table, Task, Weights
from baffle.data import Dataset, concatenate
from baffle.engines import Exchange
from baffle.engines.history import History
from baffle.errors import DataError, OptionError
from baffle.protocol.encoding import encode_message
from baffle.runtimes import Evaluation, Evaluator, Runtime

if TYPE_CHECKING:
    from baffle.secure.client import SecureClient
    from baffle.secure.simulate import Summed


_TOGETHER = 2**24
"""Upper limit of the inputs, and of the losses, that go through the models together: 64 MiB in float32."""


def require_examples(clients: Sequence[Dataset]) -> None:
    """Raise DataError if there are no clients, or one has no examples."""
    if not clients:
        raise DataError("clients: an empty list: expected at least one data set")
    for i, data in enumerate(clients):
        if len(data) == 0:
            raise DataError(f"client {i} has no examples: expected at least one")


class LocalEngine:
    """Simulate clients on one runtime.

    Clients with the same directions and one local step go through each perturbed model together, as many at a time as
    have 64 MiB of inputs, or of losses. Otherwise ``workers`` clients are evaluated side by side, each on one lane
    (thread) of the runtime; a single worker uses all lanes. Replies do not depend on the number of workers, except
    for the last bits where PyTorch stacks directions, since the size of a stack does.

    Bytes are counted as a deployment would send them: the encoded length of each reply and each task, plus what
    the participant needs to catch up: the rows since it last took part, or the full state (weights and
    optimizer slots) where that is shorter, as at first contact.

    Args:
        runtime: evaluates the clients' passes, and the server's own data.
        clients: one data set per client; the index is the client's number.
        together: evaluate clients together where the task allows it.
        workers: clients evaluated side by side; by default one per lane of the runtime.
        execution: how directions are rebuilt on this machine, for several local steps.

    Raises:
        DataError: if a client has no examples.
        OptionError: for more workers than lanes.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> from baffle.data import load, partition
        >>> from baffle.runtimes.pytorch.runtime import TorchRuntime
        >>> train, test = load("digits")
        >>> runtime = TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        >>> LocalEngine(runtime, partition(train, 4)).sizes
        (360, 360, 359, 359)
    """

    def __init__(
        self,
        runtime: Runtime,
        clients: Sequence[Dataset],
        *,
        together: bool = True,
        workers: int | None = None,
        execution: Execution = FAST,
    ) -> None:
        require_examples(clients)
        self._runtime, self._clients, self._together, self._execution = runtime, tuple(clients), together, execution
        self._sizes = tuple(len(data) for data in clients)
        self._lanes: Sequence[Evaluator] = getattr(runtime, "lanes", ()) or (runtime,)
        if workers is not None:
            require_count("workers", workers)
            if workers > len(self._lanes):
                lanes = f"{len(self._lanes)}, the lanes of the runtime"
                raise OptionError("workers", workers, f"at most {lanes}; give the runtime as many threads for more")
        self._workers = workers or len(self._lanes)
        self._downloads = _Downloads(len(clients))
        self._secure: _Secure | None = None

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._runtime.table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of examples of each client."""
        return self._sizes

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated, and a digest of the clients' data."""
        together = "together" if self._together else "one by one"
        return self._runtime.plan | {"clients": together, "numpy": np.__version__, "data": self._digest}

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for data in self._clients:
            kind = (data.x.shape, data.y.shape, data.scaling, data.augmented)
            digest.update(repr(kind).encode() + data.x.tobytes() + data.y.tobytes())
        return digest.hexdigest()

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Evaluate on the server's own test data."""
        return self._runtime.evaluate(weights, data)

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        """Measure on the first batches of the participants, up to 64 examples."""
        batches: list[Dataset] = []
        for client in participants:
            batches.append(self.batch(task, client, 0))
            if sum(map(len, batches)) >= EXAMPLES:
                break
        data = concatenate(batches)
        return calibrate(task, self._runtime, state.weights, data.take(np.arange(min(len(data), EXAMPLES))))

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Let each participant answer the task."""
        if self._together and task.sharing == "shared" and task.local_steps == 1:
            replies = self._answer_together(task, participants, state.weights)
        else:
            replies = self._answer_apart(task, participants, state.weights)
        secure = self._sum(task, replies) if task.secure else None
        passes = passes_of(task, self.table)
        examples = sum(self._batch_size(task, client) for client in participants)
        state_bytes = sum(a.nbytes for a in (state.weights, *state.slots.values()))
        caught_up = self._downloads.catch_up(participants, state_bytes, rows)
        return Exchange(
            replies=tuple(replies) if secure is None else (),
            forward_passes=passes * len(participants),
            samples_forwarded=passes * examples,
            bytes_up=sum(len(encode_message(r)) for r in replies) if secure is None else secure.bytes_up,
            bytes_down=len(encode_message(task)) * len(participants)
            + caught_up
            + (0 if secure is None else secure.bytes_down),
            total=None if secure is None else secure.total,
        )

    def batch(self, task: Task, client: int, step: int) -> Dataset:
        """The mini-batch that a client draws for a local step of a task."""
        return draw(task, self._clients[client], client, step)

    def _sum(self, task: Task, replies: Sequence[Reply]) -> Summed:
        """Sum securely, as clients of a deployment do; each run has new clients."""
        if self._secure is None or self._secure.key != task.key or self._secure.last >= task.round:
            self._secure = _Secure(task.key)
        return self._secure.sum(task, replies)

    def _batch_size(self, task: Task, client: int) -> int:
        return min(task.batch_size or self._sizes[client], self._sizes[client])

    def _answer_apart(self, task: Task, participants: Sequence[int], weights: Weights) -> list[Reply]:
        """Evaluate each participant by itself, ``workers`` of them side by side."""
        workers = min(self._workers, len(participants)) if is_plain(self.table) else 1  # lanes give losses alone
        free: SimpleQueue[Evaluator] = SimpleQueue()
        for lane in self._lanes[:workers] if workers > 1 else (self._runtime,):
            free.put(lane)

        def answer(client: int) -> Reply:
            lane = free.get()
            try:
                return respond(
                    task,
                    self._runtime,
                    weights,
                    lambda step: self.batch(task, client, step),
                    client,
                    self._sizes[client],
                    self._execution,
                    lane,
                )
            finally:
                free.put(lane)

        if workers == 1:
            return [answer(client) for client in participants]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(answer, participants))

    def _answer_together(self, task: Task, participants: Sequence[int], weights: Weights) -> list[Reply]:
        replies: list[Reply] = []
        for group in self._groups(task, participants, len(perturbations(task, self.table, 0))):
            batches = [self.batch(task, client, 0) for client in group]
            numbers = numbers_of(task, self.table, self._runtime, weights, batches)
            replies += [
                reply(task, client, weight_of(self._sizes[client], task.quantum), [encode(task, own)])
                for client, own in zip(group, numbers, strict=True)
            ]
        return replies

    def _groups(self, task: Task, participants: Sequence[int], passes: int) -> Iterator[list[int]]:
        """Yield participants in their order, in groups that fit the memory limit."""
        group: list[int] = []
        room = _TOGETHER
        for client in participants:
            numbers = self._batch_size(task, client) * max(passes, self._clients[client].x[:1].size)
            if group and numbers > room:
                yield group
                group, room = [], _TOGETHER
            group.append(client)
            room -= numbers
        if group:
            yield group


class _Secure:
    """The clients' side of a run's secure sums; a client is made when it first takes part."""

    def __init__(self, key: int) -> None:
        self.key, self.last = key, -1
        self._clients: dict[int, SecureClient] = {}

    def sum(self, task: Task, replies: Sequence[Reply]) -> Summed:
        from baffle.secure.client import SecureClient  # needs cryptography, which plain sums do without
        from baffle.secure.masks import Identity
        from baffle.secure.simulate import sum_together

        self.last = task.round
        cohort = [answer.client for answer in replies]
        for client in set(cohort) - self._clients.keys():  # Method.plan has checked the minimum
            self._clients[client] = SecureClient(Identity.make(), client, self.key, minimum=2, degree=task.secure)
        return sum_together(task, {client: self._clients[client] for client in cohort}, replies)


class _Downloads:
    """Bytes that clients need to catch up. Computed from the journal's rows alone, so a resumed run counts the same."""

    def __init__(self, clients: int) -> None:
        self._history = History()
        self._has: list[int | None] = [None] * clients  # rows that a client has replayed

    def catch_up(self, participants: Sequence[int], state_bytes: int, rows: Sequence[bytes]) -> int:
        """Bytes of the rows that the participants lack, or of the whole state where that is shorter."""
        if len(rows) < self._history.rows:  # another run
            self._history, self._has = History(), [None] * len(self._has)
        first = self._history.rows
        for index, row in enumerate(self._history.read(rows), first):
            for client in row.participants:
                self._has[client] = index
        return sum(self._bytes(self._has[client], state_bytes) for client in participants)

    def _bytes(self, has: int | None, state_bytes: int) -> int:
        if has is None or not self._history.leads_from(has):
            return state_bytes
        return min(state_bytes, self._history.bytes_after(has))

"""All clients in this process: the simulation of a federation over the same messages as the network.

With shared directions and one local step every participant evaluates the same perturbed models, so their
batches go through each of them together; otherwise several clients side by side, each on one lane of the runtime.
What a round costs besides its forward passes grows with the participants, not with the clients.
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
from baffle.client.respond import draw, measure, passes_of, perturbations, reply, respond
from baffle.core.checks import require_count
from baffle.core.rebuild import FAST, Execution
from baffle.core.scalars import encode, weight_of
from baffle.core.state import State
from baffle.core.types import Reply, Table, Task, Weights
from baffle.data import Dataset, concatenate
from baffle.engines import Exchange
from baffle.errors import DataError, OptionError
from baffle.protocol.encoding import decode_row, encode_message
from baffle.runtimes import Evaluation, Evaluator, Runtime

if TYPE_CHECKING:
    from baffle.secure.client import SecureClient
    from baffle.secure.simulate import Summed


_TOGETHER = 2**24
"""Numbers, of inputs or of losses, in batches that go through the models together: 64 MiB in float32."""


def require_examples(clients: Sequence[Dataset]) -> None:
    """Raise DataError if there are no clients, or one has no examples."""
    if not clients:
        raise DataError("clients: an empty list: expected at least one data set")
    for i, data in enumerate(clients):
        if len(data) == 0:
            raise DataError(f"client {i} has no examples: expected at least one")


class LocalEngine:
    """Simulate clients that hold ``clients`` data sets, on one runtime.

    ``together``: clients with the same directions and one local step go through each perturbed model together, as
    many as 64 MiB of inputs, or of losses, hold. Where they cannot, ``workers`` of them are evaluated side by side,
    each on one lane (thread) of the runtime, by default as many as it has lanes; a single one is given all of them.
    Replies do not depend on the number of workers, but for the last bits where PyTorch stacks directions, since
    stacks do. Raises DataError if a client has no examples, OptionError for more workers than lanes.

    Bytes are counted as a deployment would send them: each reply's and each task's encoded length, plus what
    the participant needs to catch up: the rows since it last took part, or the full state (weights and
    optimizer slots) where that is shorter, as at first contact.

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
        self._history = _History(len(clients))
        self._secure: _Secure | None = None

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._runtime.table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each client."""
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
        """Measure on the first batches of as many participants as make up 64 examples."""
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
        caught_up = self._history.catch_up(participants, state_bytes, rows)
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
        """Sum securely, as clients of a deployment do; each run has new ones."""
        if self._secure is None or self._secure.key != task.key or self._secure.last >= task.round:
            self._secure = _Secure(task.key)
        return self._secure.sum(task, replies)

    def _batch_size(self, task: Task, client: int) -> int:
        return min(task.batch_size or self._sizes[client], self._sizes[client])

    def _answer_apart(self, task: Task, participants: Sequence[int], weights: Weights) -> list[Reply]:
        """Each participant by itself, as many side by side as there are workers."""
        workers = min(self._workers, len(participants))
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
            numbers = measure(task, self.table, self._runtime, weights, batches)
            replies += [
                reply(task, client, weight_of(self._sizes[client], task.quantum), [encode(task, own)])
                for client, own in zip(group, numbers, strict=True)
            ]
        return replies

    def _groups(self, task: Task, participants: Sequence[int], passes: int) -> Iterator[list[int]]:
        """Participants in their order, as many at a time as memory is granted to."""
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
    """The clients' halves of a run's secure sums, made when they first take part."""

    def __init__(self, key: int) -> None:
        self.key, self.last = key, -1
        self._clients: dict[int, SecureClient] = {}

    def sum(self, task: Task, replies: Sequence[Reply]) -> Summed:
        from baffle.secure.client import SecureClient  # needs cryptography, which plain sums do without
        from baffle.secure.masks import Identity
        from baffle.secure.simulate import sum_together

        self.last = task.round
        cohort = [answered.client for answered in replies]
        for client in set(cohort) - self._clients.keys():  # the method's minimum was checked by its plan
            self._clients[client] = SecureClient(Identity.make(), client, self.key, minimum=2, degree=task.secure)
        return sum_together(task, {client: self._clients[client] for client in cohort}, replies)


class _History:
    """Bytes of rows that each client lacks, from the journal's rows alone (so it survives a resume)."""

    def __init__(self, clients: int) -> None:
        self._ends = [0]  # cumulative bytes of rows
        self._has: list[int | None] = [None] * clients  # rounds that a client has replayed

    def catch_up(self, participants: Sequence[int], state_bytes: int, rows: Sequence[bytes]) -> int:
        if len(rows) < len(self._ends) - 1:  # another run
            self._ends, self._has = [0], [None] * len(self._has)
        for index in range(len(self._ends) - 1, len(rows)):
            self._ends.append(self._ends[-1] + len(rows[index]))
            row = decode_row(rows[index])
            if row.restores is not None:  # clients keep no earlier states: everyone needs this one
                self._has = [None] * len(self._has)
                continue
            for client in row.participants:
                self._has[client] = index
        total = 0
        for client in participants:
            has = self._has[client]
            total += state_bytes if has is None else min(state_bytes, self._ends[len(rows)] - self._ends[has])
        return total

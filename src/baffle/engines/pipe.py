"""Stateless clients in separate processes, over pipes: each runs ``python -m baffle.client.edge`` or an equivalent.

The weights travel with every task, so a client keeps nothing between rounds and can be replaced at any time.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, cast

import numpy as np

from baffle.client.calibrate import Calibration, agree, check_measurement
from baffle.client.respond import passes_of
from baffle.core.state import State
from baffle.core.types import Reply, Table, Task, Weights
from baffle.data import Dataset
from baffle.engines import Exchange
from baffle.errors import DataError, ModelError, OptionError, ReplyError
from baffle.protocol.messages import CalibrateResponse, FailedResponse, TrainResponse, printable
from baffle.protocol.pipes import MOST_BYTES, Hello, Message, WorkRequest, receive, send, skip_to_mark
from baffle.runtimes import Evaluation, Runtime
from baffle.runtimes.onnx.bundle import Bundle

_PATIENCE = 3.0  # seconds until clients that have not ended are killed
_MOST_EXAMPLES = 2**40


class PipeEngine:
    """Start one process per client and carry tasks to them. Close it, or use it in a ``with`` statement.

    Args:
        bundle: that the clients evaluate.
        commands: one command line per client, such as those of :func:`write_clients`.
        runtime: evaluates on the server's own data.

    Raises:
        OptionError: if there are no commands, or one cannot be started.
        ReplyError: if a client answers wrongly, or ends.

    Examples:
        >>> import tempfile, torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, test = bf.load("digits")
        >>> bundle = bf.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, train)
        >>> folder = Path(tempfile.mkdtemp())
        >>> commands = write_clients(bundle, bf.partition(train, clients=2), folder)
        >>> with PipeEngine(bundle, commands, bf.OrtRuntime(bundle)) as engine:
        ...     run = bf.train(bf.Method(num_directions=10), engine, bundle.initial, rounds=3, test=test)
        >>> engine.sizes, run.summary()["rounds"]
        ((719, 719), 3)
    """

    def __init__(self, bundle: Bundle, commands: Sequence[Sequence[str]], runtime: Runtime) -> None:
        if not commands:
            raise OptionError("commands", list(commands), "at least one client")
        self._bundle, self._runtime = bundle, runtime
        self._clients: list[_Client] = []
        self._up = self._down = 0  # bytes of a calibration, until they are counted
        try:
            for number, command in enumerate(commands):
                self._clients.append(_Client(number, command))
            self._hellos = [client.hello() for client in self._clients]
            for number, hello in enumerate(self._hellos):
                if hello.bundle != bundle.sha256:
                    raise ReplyError(
                        f"client {number} has bundle {hello.bundle[:12]}...: expected {bundle.sha256[:12]}..."
                    )
                if not 1 <= hello.examples <= _MOST_EXAMPLES:
                    raise ReplyError(f"client {number} has {hello.examples} examples: expected at least one")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PipeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the clients' processes: at once if they are idle, within seconds if they are working."""
        for client in self._clients:
            client.hang_up()
        deadline = time.monotonic() + _PATIENCE
        for client in self._clients:
            client.end(deadline - time.monotonic())

    @property
    def pids(self) -> tuple[int, ...]:
        """The clients' process numbers."""
        return tuple(client.pid for client in self._clients)

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._bundle.manifest.table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of examples of each client, as reported at the start."""
        return tuple(hello.examples for hello in self._hellos)

    @property
    def plan(self) -> dict[str, str | int]:
        """How the first client evaluates passes."""
        return self._hellos[0].plan | {"clients": "pipes"}

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Evaluate on the server's own test data, in this process."""
        return self._runtime.evaluate(weights, data)

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        """Let each participant measure; sigma is chosen by the median of their errors."""
        measured: list[CalibrateResponse] = []
        for client, (answer, received, sent) in self._ask(task, participants, state.weights, calibrate=True).items():
            if not isinstance(answer, CalibrateResponse):
                raise ReplyError(f"client {client} sent {type(answer).__name__}: expected errors by sigma")
            check_measurement(task, client, answer, measured)
            measured.append(answer)
            self._up, self._down = self._up + received, self._down + sent
        return agree(measured)

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        """Send the task and the weights, and wait for the replies.

        Bytes are those on the pipes. Those of a calibration count for the following round.
        """
        replies: list[Reply] = []
        up, down, self._up, self._down = self._up, self._down, 0, 0
        for client, (answer, received, sent) in self._ask(task, participants, state.weights, calibrate=False).items():
            if not isinstance(answer, TrainResponse) or answer.reply.client != client:
                raise ReplyError(f"client {client} sent {type(answer).__name__}: expected its own reply")
            replies.append(answer.reply)
            up, down = up + received, down + sent
        passes = passes_of(task, self.table)
        examples = sum(min(task.batch_size or self.sizes[c], self.sizes[c]) for c in participants)
        return Exchange(tuple(replies), passes * len(participants), passes * examples, up, down)

    def _ask(
        self, task: Task, participants: Sequence[int], weights: Weights, *, calibrate: bool
    ) -> dict[int, tuple[Message, int, int]]:
        """Ask all participants and gather their answers.

        All answers are read before a failure is raised, so that none is left in a pipe for the next request.

        Returns:
            By client: the message, its bytes, the bytes of the request.
        """
        data = weights.astype("<f4", copy=False).tobytes()
        longest = MOST_BYTES if calibrate else MOST_BYTES + 4 * task.local_steps * task.numbers
        sent: dict[int, int] = {}
        answers: dict[int, tuple[Message, int, int]] = {}
        failures: list[ReplyError | ModelError] = []
        for c in participants:
            try:
                sent[c] = self._clients[c].send(WorkRequest(c, task, data, calibrate))
            except ReplyError as error:
                failures.append(error)
        for c, size in sent.items():
            try:
                answers[c] = (*self._clients[c].receive(longest), size)
            except (ReplyError, ModelError) as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return answers


class _Client:
    """One process."""

    def __init__(self, number: int, command: Sequence[str]) -> None:
        self.number = number
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise OptionError("commands", " ".join(command), f"a program that can be started ({error})") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in: IO[bytes] = self._process.stdin
        self._out: IO[bytes] = self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def hello(self) -> Hello:
        message, _ = self.receive(MOST_BYTES, first=True)
        if not isinstance(message, Hello):
            raise ReplyError(f"client {self.number} began with {type(message).__name__}: expected its greeting")
        return message

    def send(self, message: Message) -> int:
        try:
            return send(cast(BinaryIO, self._in), message)
        except (OSError, ValueError) as error:  # broken, or closed on this side
            raise ReplyError(self._ended()) from error

    def receive(self, longest: int, *, first: bool = False) -> tuple[Message, int]:
        out = cast(BinaryIO, self._out)
        try:
            if first:
                skip_to_mark(out)
            received = receive(out, longest)
        except ReplyError as error:
            raise ReplyError(f"client {self.number}: {error}") from error
        if received is None:
            raise ReplyError(self._ended())
        if isinstance(received[0], FailedResponse):
            raise ModelError(f"client {self.number}: {printable(received[0].reason)}")
        return received

    def hang_up(self) -> None:
        for stream in (self._in, self._out):
            with contextlib.suppress(OSError):  # unsent bytes have no reader any more
                stream.close()

    def end(self, patience: float) -> int:
        """Wait for the process to end, kill it after ``patience`` seconds; returns the exit code."""
        try:
            return self._process.wait(max(0.0, patience))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _ended(self) -> str:
        code = self.end(_PATIENCE)
        return f"client {self.number} ended with code {code}: expected an answer; what it said is above"


def write_clients(bundle: Bundle, clients: Sequence[Dataset], folder: Path) -> list[list[str]]:
    """Write the bundle and each client's data into a folder.

    Returns:
        One command line per client, for :class:`PipeEngine`.

    Raises:
        DataError: for augmented data, since clients take batches as they are.
    """
    bundle.save(folder / "client.zip")
    commands = []
    for number, data in enumerate(clients):
        if data.augmented:
            raise DataError(
                f"{data.name}: augmented: expected plain examples; an edge client takes batches as they are"
            )
        path = folder / f"client-{number}.npz"
        np.savez(path, x=data.x, y=data.y)
        commands.append([sys.executable, "-m", "baffle.client.edge", str(folder / "client.zip"), str(path)])
    return commands

"""Many simulated clients: memory, what a round touches, groups that go together, workers side by side."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.core.types import Losses, Reply, Table, Task, Weights, make_table
from baffle.data import Dataset, Scaling, partition
from baffle.engines import local
from baffle.errors import ModelError, OptionError
from baffle.models import build
from baffle.runtimes import Evaluation
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

INPUTS = 6


def squares(weights: Weights, data: Dataset) -> Losses:
    x, y = data.x.astype(np.float32), data.y.astype(np.float32)
    found: Losses = np.square((x * weights).sum(axis=1) - y)
    return found


class OneThread:
    """A linear regression, a row of the batch at a time, so that a loss has the same bits in any batch."""

    def __init__(self, meet: Callable[[], object] = lambda: None) -> None:
        self.calls, self.most, self._meet = 0, 0, meet
        self._busy = threading.Lock()

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        assert self._busy.acquire(blocking=False), "a lane serves one thread at a time"
        try:
            self._meet()
            self.calls, self.most = self.calls + 1, max(self.most, len(batch))
            passes = perturbations.weights(weights, np.empty(INPUTS, np.float32))
            return np.stack([squares(w, batch) for w in passes])
        finally:
            self._busy.release()


class Regression(OneThread):
    """A runtime of it, without lanes."""

    @property
    def table(self) -> Table:
        return make_table({"w": (2, 3)})

    @property
    def plan(self) -> dict[str, str | int]:
        return {}

    def initial_weights(self) -> Weights:
        return np.linspace(-1, 1, INPUTS).astype(np.float32)

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        return Evaluation(squares(weights, data), None)


class Laned(Regression):
    """The same with lanes."""

    def __init__(self, lanes: int, meet: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.lanes = tuple(OneThread(meet) for _ in range(lanes))


def examples(count: int = 50) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(rng.standard_normal((count, INPUTS), np.float32), rng.standard_normal(count, np.float32))


SHARED = bf.Method(num_directions=9, batch_size=4, sigma=0.01, optimizer=bf.sgd(0.1))
APART = {
    "per-client": msgspec.structs.replace(SHARED, sharing="per-client"),
    "per-client, central": msgspec.structs.replace(SHARED, sharing="per-client", difference="central"),
    "local steps": msgspec.structs.replace(SHARED, local_steps=3),
}


def replies(engine: bf.LocalEngine, method: bf.Method = SHARED) -> tuple[Reply, ...]:
    """All clients' replies to the first task."""
    state = method.init(Regression().initial_weights())
    task, cohort = method.plan(state, engine.table, engine.sizes, 3, None)
    return engine.exchange(task, tuple(cohort), state, []).replies


@pytest.mark.parametrize("method", APART.values(), ids=APART)
def test_replies_do_not_depend_on_the_number_of_workers(method: bf.Method) -> None:
    clients = partition(examples(), 5)
    alone = replies(bf.LocalEngine(Regression(), clients), method)
    assert [reply.client for reply in alone] == list(range(5))
    for lanes, workers in ((1, 1), (2, None), (3, 1), (3, 2), (3, 3), (8, None)):
        assert replies(bf.LocalEngine(Laned(lanes), clients, workers=workers), method) == alone


@pytest.mark.parametrize("method", APART.values(), ids=APART)
def test_lanes_of_pytorch_give_the_same_replies(method: bf.Method) -> None:
    train, _ = bf.load("digits")
    runtime = TorchRuntime(build("lenet-small", (1, 8, 8), 10), F.cross_entropy, threads=3)
    engines = [bf.LocalEngine(runtime, partition(train, 7), workers=workers) for workers in (1, 2, 3)]
    state = method.init(runtime.initial_weights())
    task, cohort = method.plan(state, runtime.table, engines[0].sizes, 3, None)
    one, two, three = (engine.exchange(task, tuple(cohort), state, []) for engine in engines)
    assert one == two == three


def test_workers_take_lanes_side_by_side_and_a_single_one_the_whole_runtime() -> None:
    meeting = threading.Barrier(2, timeout=60)
    both, clients = Laned(3, meeting.wait), partition(examples(), 4)
    replies(bf.LocalEngine(both, clients, workers=2), APART["per-client"])  # the barrier opens for two at once
    assert both.calls == 0
    assert [lane.calls > 0 for lane in both.lanes] == [True, True, False]
    for runtime, workers, count in ((Laned(3), 1, 4), (Laned(3), None, 1)):
        replies(bf.LocalEngine(runtime, clients[:count], workers=workers), APART["per-client"])
        assert runtime.calls == count
        assert not any(lane.calls for lane in runtime.lanes)
    shared = Laned(3)
    replies(bf.LocalEngine(shared, clients))
    assert (shared.calls, shared.most) == (1, 16)


@pytest.mark.parametrize(
    ("runtime", "workers", "message"),
    [
        (Laned(2), 3, "workers = 3: expected at most 2, the lanes of the runtime; give the runtime as many threads"),
        (Regression(), 2, "workers = 2: expected at most 1"),
        (Laned(2), 0, "workers = 0: expected an integer >= 1"),
    ],
)
def test_more_workers_than_lanes_are_refused(runtime: Regression, workers: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bf.LocalEngine(runtime, [examples()], workers=workers)


def test_what_fails_in_a_worker_is_raised_and_leaves_the_engine_usable() -> None:
    failing = [True]

    def meet() -> None:
        if failing:
            failing.pop()
            raise ModelError("no")

    engine = bf.LocalEngine(Laned(2, meet), partition(examples(), 4))
    with pytest.raises(ModelError, match="no"):
        replies(engine, APART["per-client"])
    assert len(replies(engine, APART["per-client"])) == 4


@pytest.mark.parametrize("batch_size", [4, None])
def test_batches_that_go_together_are_bounded_by_memory(
    monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    clients, method = partition(examples(70), 7), msgspec.structs.replace(SHARED, batch_size=batch_size)
    whole = Regression()
    expected = replies(bf.LocalEngine(whole, clients), method)
    assert whole.calls == 1
    size = batch_size or 10
    for fit, calls in ((1, 7), (2, 4), (3, 3), (7, 1)):
        monkeypatch.setattr(local, "_TOGETHER", fit * size * 10 + 1)  # ten passes are more than six inputs
        runtime = Regression()
        assert replies(bf.LocalEngine(runtime, clients), method) == expected
        assert (runtime.calls, runtime.most) == (calls, fit * size)
    monkeypatch.setattr(local, "_TOGETHER", 1)  # a single client always fits
    assert replies(bf.LocalEngine(Regression(), clients), method) == expected


def allocated(make: Callable[[], object]) -> int:
    """Bytes that what is made takes."""
    tracemalloc.start()
    try:
        kept = make()
        size = tracemalloc.get_traced_memory()[0]
        del kept
        return size
    finally:
        tracemalloc.stop()


WAYS: dict[str, Callable[[Dataset, int], tuple[Dataset, ...]]] = {
    "iid": partition,
    "dirichlet": lambda train, clients: partition(train, clients, alpha=0.3),
    "shards": lambda train, clients: partition(train, clients, shards=1),
}


@pytest.mark.parametrize("split", WAYS.values(), ids=WAYS)
def test_memory_hardly_grows_with_the_number_of_clients(split: Callable[[Dataset, int], tuple[Dataset, ...]]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20_000, 1, 28, 28), dtype=np.uint8)
    train = Dataset(pixels, rng.integers(0, 10, len(pixels)), scaling=Scaling((0.1307,), (0.3081,)))
    split(train.view(0, 100), 2)  # what numpy loads when it is first asked does not count
    few = allocated(lambda: bf.LocalEngine(Regression(), split(train, 10)))
    many = allocated(lambda: bf.LocalEngine(Regression(), split(train, 10_000)))
    assert few < 1.05 * (train.x.nbytes + train.y.nbytes)
    assert many - few < 10_000 * 600  # names and views; not examples, of which each client has two


def test_clients_of_a_partition_are_views_of_one_copy() -> None:
    train = examples()
    parts = partition(train, 5)
    owners = {id(part.x.base) for part in parts} | {id(part.y.base) for part in parts}
    assert len(owners) == 2
    assert not any(np.shares_memory(part.x, train.x) for part in parts)


def test_ten_thousand_clients_of_which_a_round_touches_a_hundred() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30_000, INPUTS), np.float32)
    train = Dataset(x, x @ np.array([1, -2, 0.5, 0, 1, 3], np.float32))
    touched: list[int] = []

    class Noting(bf.LocalEngine):
        def batch(self, task: Task, client: int, step: int) -> Dataset:
            touched.append(client)
            return super().batch(task, client, step)

    engine = Noting(Regression(), partition(train, 10_000))
    method = bf.Method(num_directions=20, batch_size=2, participation=0.01, sigma=1e-3, optimizer=bf.adam(0.1))
    assert engine.plan["data"] is engine.plan["data"]  # all data are read once
    assert engine.sizes is engine.sizes
    seen: list[int] = []
    run = bf.train(
        method,
        engine,
        Regression().initial_weights(),
        rounds=60,
        test=train.view(0, 1000),
        evaluate_every=60,
        progress=lambda record: seen.append(len(touched)),
    )
    assert {record.participants for record in run.records} == {100}
    assert seen == [100 * (i + 1) for i in range(61)]
    assert len(set(touched)) > 4000  # 61 draws of 100 in 10,000
    assert run.loss is not None
    assert run.loss < 0.5 < float(np.square(train.y).mean())

"""What a round costs a client: as it is when the round is run."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.client.costs import costs_of
from baffle.core.method import Method
from baffle.runtimes.pytorch.credit import CreditRuntime
from credited import data, model

CLIENT = data(24)


@pytest.mark.parametrize("credit", ["local", "feature", "global"])
@pytest.mark.parametrize(
    "method",
    [
        Method(num_directions=3, slices=2, bits=8, batch_size=8, sigma=1e-3),
        Method(num_directions=2, slices=4, bits=4, batch_size=8, sigma=1e-3, difference="central"),
        Method(num_directions=2, bits=5, batch_size=8, sigma=1e-3, local_steps=2, optimizer=bf.sgd(0.1)),
    ],
)
def test_costs_are_those_of_a_round(credit: str, method: Method) -> None:
    runtime = CreditRuntime(model(), F.cross_entropy, CLIENT, credit=credit, threads=1)
    engine = bf.LocalEngine(runtime, [CLIENT])
    state = method.init(runtime.initial_weights())
    task, cohort = method.plan(state, runtime.table, engine.sizes, 1, None)
    exchange = engine.exchange(task, tuple(cohort), state, [])
    costs = costs_of(method, runtime.table)
    [reply] = exchange.replies
    assert exchange.forward_passes == costs.passes
    assert exchange.samples_forwarded == costs.passes * 8
    assert len(reply.scalars) == costs.bytes
    assert sum(costs.numbers_of.values()) == costs.numbers == task.numbers * method.local_steps
    assert set(costs.units) == {spec.credit.kind for spec in runtime.table}

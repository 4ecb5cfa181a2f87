"""The tensor table of a credited model."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from baffle.core.credit import model_table, units_of
from baffle.core.types import table_size
from baffle.runtimes.pytorch.chain import find_chain
from baffle.runtimes.pytorch.credit_table import credited, examples_like, plan_of
from baffle.runtimes.pytorch.runtime import TorchRuntime
from credited import data, model


def test_local_heads_lie_behind_the_models_own_tensors_and_are_the_same_on_every_machine() -> None:
    inner = TorchRuntime(model(), F.cross_entropy, threads=1)
    chain = find_chain(model(), examples_like(torch.from_numpy(data(1).x)), True)
    table, weights = credited(inner.table, inner.initial_weights(), chain)
    own = table_size(inner.table)
    assert model_table(table) == inner.table
    assert (weights[:own] == inner.initial_weights()).all()
    heads = table[len(inner.table) :]
    assert all(spec.credit.auxiliary and spec.credit.kind == "exact" for spec in heads)
    again = credited(inner.table, inner.initial_weights(), chain)[1]
    assert weights.tobytes() == again.tobytes()
    weight = heads[0]
    assert np.abs(weights[weight.slice]).max() <= weight.shape[1] ** -0.5


def test_a_plan_names_every_unit_of_rows_once() -> None:
    inner = TorchRuntime(model(), F.cross_entropy, threads=1)
    chain = find_chain(model(), examples_like(torch.from_numpy(data(1).x)), True)
    table, _ = credited(inner.table, inner.initial_weights(), chain)
    plan, units = plan_of(chain, table), units_of(table)
    assert sorted(rows.unit for rows in plan.rows) == [i for i, unit in enumerate(units) if unit.kind == "rows"]
    assert [table[head.weight].credit.kind for head in plan.heads] == ["exact"] * len(plan.heads)
    assert not table[plan.heads[-1].weight].credit.auxiliary  # the model's own comes last

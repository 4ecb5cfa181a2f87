"""Training with a secure sum: the same weights as without, void rounds, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.core.aggregate import SecureSum, next_exponents, nothing
from baffle.core.method import replay
from baffle.core.state import State
from baffle.core.types import Task
from baffle.engines import Exchange
from baffle.errors import OptionError, PlanError
from baffle.protocol.encoding import decode_row
from baffle.runtimes.pytorch.runtime import TorchRuntime
from baffle.training.options import TrainConfig
from helpers import METHOD, digits_engine, initial_weights, invoke, linear


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"difference": "central", "family": "rademacher", "client": (bf.clip_scalars(0.5),)},
        {"local_steps": 2, "local_lr": 0.1},
        {"lattice": 2, "sigma": 1e-3},
        {"participation": 0.6, "aggregate": bf.secure_sum(neighbours=4)},
        {"aggregate": bf.secure_sum(minimum=2)},
        {"slices": 2},
        {"bits": 4},
        {"bits": 1, "slices": 4},
        {"bits": 8, "local_steps": 2, "local_lr": 0.1},
    ],
)
def test_training_is_the_same_with_and_without(changes: dict[str, object]) -> None:
    secure = msgspec.structs.replace(METHOD, **{"aggregate": bf.secure_sum(), **changes})
    clients = 2 if secure.aggregate == bf.secure_sum(minimum=2) else 10 if "participation" in changes else 4
    plain = msgspec.structs.replace(secure, aggregate=bf.weighted_sum())
    runs = [bf.train(m, digits_engine(clients), initial_weights(), rounds=6) for m in (secure, plain)]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    assert runs[0].state.step == (6 if secure.bits == 15 else 5)  # the first scale is far off for few bits
    for with_masks, without in pairwise(run.records[1] for run in runs):
        assert (with_masks.bytes_up or 0) > (without.bytes_up or 0)
        assert (with_masks.bytes_down or 0) > (without.bytes_down or 0)


def test_one_engine_serves_one_run_after_another() -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum())
    engine = digits_engine()
    first, second = (bf.train(method, engine, initial_weights(), rounds=3) for _ in range(2))
    assert first.weights_sha256 == second.weights_sha256


def test_what_cannot_be_summed_is_refused_before_training() -> None:
    with pytest.raises(PlanError, match="secure_sum with sharing = 'per-client': scalars along different directions"):
        bf.Method(sharing="per-client", aggregate=bf.secure_sum())
    for wrong, message in (
        ({"minimum": 1}, r"secure_sum.minimum = 1: expected an integer >= 2"),
        ({"neighbours": 1}, r"secure_sum.neighbours = 1: expected an integer >= 4 and <= 250"),
        ({"neighbours": 251}, r"secure_sum.neighbours = 251"),
    ):
        with pytest.raises(OptionError, match=message):
            bf.secure_sum(**wrong)
    with pytest.raises(PlanError, match=r"2 participants with secure_sum.minimum = 3: expected at least as many"):
        bf.train(
            msgspec.structs.replace(METHOD, aggregate=bf.secure_sum()), digits_engine(2), initial_weights(), rounds=1
        )
    with pytest.raises(PlanError, match=r"their counts could reach 2\*\*32"):
        SecureSum().check(2**20, 2**12)
    SecureSum().check(2**20, 2**12 - 1)
    with pytest.raises(OptionError, match=r"secure_sum = True: expected none with backprop"):
        TrainConfig(backprop="fedsgd", secure_sum=True)


class LosesRounds(bf.LocalEngine):
    """So few clients are left in some rounds that no sum can be made."""

    lost: Collection[int] = ()

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        found = super().exchange(task, participants, state, rows)
        return replace(found, replies=(), total=nothing(task)) if task.round in self.lost else found


def losing(*lost: int) -> LosesRounds:
    train, _ = bf.load("digits")
    engine = LosesRounds(TorchRuntime(linear(), F.cross_entropy, threads=1), bf.partition(train, 3))
    engine.lost = lost
    return engine


def test_a_round_without_a_sum_is_void_and_the_run_goes_on(tmp_path: Path) -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum(), optimizer=bf.adam(0.01))
    _, test = bf.load("digits")
    run = bf.train(method, losing(5, 6), initial_weights(), rounds=9, test=test, out=tmp_path / "run", snapshot_every=3)
    journal = bf.Journal.open(tmp_path / "run")
    rows, table = [decode_row(data) for data in journal.rows], journal.config.table
    assert [row.round for row in rows if not row.participants] == [5, 6]
    for before, row in ((rows[4], rows[5]), (rows[5], rows[6])):
        assert not row.applied
        assert row.restores is None
        assert not row.integers.any()
        assert row.weights_sha256 == before.weights_sha256
        assert next_exponents(table, method.bits, row) == row.exponents
    assert rows[7].applied
    assert rows[7].exponents == rows[5].exponents
    assert run.state.step == 7

    state = method.init(initial_weights())
    for row in rows:
        state = replay(state, table, row)
    assert np.array_equal(state.weights, run.weights)
    assert np.array_equal(journal.state().weights, run.weights)
    journal.close()
    for command in ("report", "status", "replay"):
        done = invoke(tmp_path, command, tmp_path / "run")
        assert done.code == 0, (command, done)
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
    resumed = bf.resume(tmp_path / "run", losing(), test=test, rounds=11)
    assert resumed.state.step == 9


def test_a_lost_first_round_is_calibrated_again() -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum())
    run = bf.train(method, losing(0), initial_weights(), rounds=6)
    assert [record.applied for record in run.records] == [False, False, True, True, True, True, True]


def test_rounds_that_are_all_lost_leave_the_weights() -> None:
    method = msgspec.structs.replace(METHOD, aggregate=bf.secure_sum())
    run = bf.train(method, losing(*range(8)), initial_weights(), rounds=7)
    assert np.array_equal(run.weights, initial_weights())
    assert run.state.step == 0


def test_the_command_trains_the_same(tmp_path: Path) -> None:
    command = ["train", "--num-directions", "4", "--rounds", "3", "--json", "--clients"]
    outputs = [
        invoke(tmp_path, *command, "4", "--out", name, *extra)
        for name, extra in (("on", ["--secure-sum"]), ("off", []))
    ]
    assert [done.code for done in outputs] == [0, 0], outputs
    hashes = {msgspec.json.decode(done.out)["weights_sha256"] for done in outputs}
    assert len(hashes) == 1
    too_few = invoke(tmp_path, *command, "2", "--secure-sum", "--out", "few")
    assert too_few.code == 2
    assert "expected at least as many" in too_few.err
    assert "Traceback" not in too_few.err

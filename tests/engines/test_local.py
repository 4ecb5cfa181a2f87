"""The local engine: one seam, two strategies, counted passes and bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.core.aggregate import word_bits
from baffle.core.scalars import MAGNITUDE_UNITS
from baffle.core.state import weights_sha256
from baffle.core.types import unpack
from baffle.data import Dataset
from baffle.errors import DataError, ModelError
from baffle.protocol.encoding import encode_message
from baffle.runtimes.pytorch.runtime import TorchRuntime


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def engine(clients: int = 4, *, together: bool = True) -> bf.LocalEngine:
    train, _ = bf.load("digits")
    return bf.LocalEngine(
        TorchRuntime(linear(), F.cross_entropy, threads=1), bf.partition(train, clients), together=together
    )


def initial(size: int = 650) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=size) * 0.1).astype(np.float32)


def test_together_and_one_by_one_agree() -> None:
    method = bf.Method(num_directions=7)
    state = method.init(initial())
    task, cohort = method.plan(state, engine().table, engine().sizes, 3, None)
    joint = engine().exchange(task, tuple(cohort), state, [])
    apart = engine(together=False).exchange(task, tuple(cohort), state, [])
    for a, b in zip(joint.replies, apart.replies, strict=True):
        assert (a.client, a.weight, a.clipped, a.nonfinite) == (b.client, b.weight, b.clipped, b.nonfinite)
        gap = unpack(a.scalars, task.bits, 7) - unpack(b.scalars, task.bits, 7)
        assert np.abs(gap).max() <= 1  # one unit: kernels may round differently for another batch size
        assert np.abs(np.subtract(a.magnitudes, b.magnitudes)).max() <= MAGNITUDE_UNITS * a.weight
    assert joint.forward_passes == apart.forward_passes == 4 * 8
    assert joint.samples_forwarded == apart.samples_forwarded == 4 * 8 * 32


@pytest.mark.parametrize(("difference", "passes"), [("forward", 8), ("central", 14)])
@pytest.mark.parametrize("steps", [1, 3])
def test_passes_samples_and_bytes_are_counted(difference: str, passes: int, steps: int) -> None:
    method = msgspec.structs.replace(
        bf.Method(num_directions=7, local_steps=steps, optimizer=bf.sgd(0.1), batch_size=400), difference=difference
    )
    here = engine()
    state = method.init(initial())
    task, _ = method.plan(state, here.table, here.sizes, 3, None)
    exchange = here.exchange(task, (0, 2), state, [])
    assert exchange.forward_passes == 2 * passes * steps
    assert exchange.samples_forwarded == passes * steps * (360 + 359)  # whole clients: fewer than 400 examples
    assert exchange.bytes_up == sum(len(encode_message(r)) for r in exchange.replies)
    assert all(len(r.scalars) == -(-15 * 7 * steps // 8) for r in exchange.replies)
    assert exchange.bytes_down == 2 * (len(encode_message(task)) + 4 * 650)  # first contact: the weights


@pytest.mark.parametrize("bits", [1, 4, 15])
@pytest.mark.parametrize("slices", [1, 3])
def test_a_secure_sum_trains_the_same_weights_with_slices_and_bits(slices: int, bits: int) -> None:
    """The rows are the same, too, but for nothing: the masks leave no trace, however short the words."""
    plain = bf.Method(num_directions=6, slices=slices, bits=bits, sigma=1e-3, batch_size=9, optimizer=bf.sgd(0.05))
    secure = msgspec.structs.replace(plain, aggregate=bf.secure_sum())
    ends = {}
    for method in (plain, secure):
        here = engine()
        state, last, rows = method.init(initial()), None, list[bytes]()
        for _ in range(6):
            task, cohort = method.plan(state, here.table, here.sizes, 3, last)
            assert task.word == (word_bits(bits, sum(cohort.values())) if method is secure else 32)
            exchange = here.exchange(task, tuple(cohort), state, rows)
            assert (exchange.total is not None) == (method is secure)
            replies = exchange.replies if exchange.total is None else exchange.total
            last, state = method.absorb(state, here.table, task, cohort, replies, last)
            rows.append(encode_message(last))
        assert last is not None
        assert last.applied
        ends[method] = weights_sha256(state.weights), rows
        assert bf.train(method, engine(), initial(), rounds=5, seed=3).state.step > 1
    assert ends[plain] == ends[secure]


def test_a_reply_has_as_many_bits_as_the_method_says() -> None:
    """Scalars of all slices, one after another, and one magnitude."""
    here = engine()
    for bits in (1, 4, 15, 32):
        method = bf.Method(num_directions=7, slices=4, bits=bits)
        state = method.init(initial())
        task, _ = method.plan(state, here.table, here.sizes, 3, None)
        exchange = here.exchange(task, (0, 2), state, [])
        assert exchange.forward_passes == 2 * 8
        assert exchange.samples_forwarded == 2 * 8 * 32
        for reply in exchange.replies:
            assert len(reply.scalars) == -(-28 * bits // 8)
            assert len(reply.magnitudes) == 1
            assert reply.magnitudes[0] > 0


def test_absent_clients_catch_up_by_rows_or_by_state() -> None:
    method = bf.Method(num_directions=3, optimizer=bf.sgd(0.01))
    here = engine()
    state, last = method.init(initial()), None
    rows: list[bytes] = []
    down: list[int] = []
    for participants in ((0, 1), (0,), (0,), (0, 1, 2)):
        task, cohort = method.plan(state, here.table, here.sizes, 3, last)
        exchange = here.exchange(task, participants, state, rows)
        down.append(exchange.bytes_down - len(encode_message(task)) * len(participants))
        last, state = method.absorb(state, here.table, task, cohort, exchange.replies, last)
        rows.append(encode_message(last))
    length = [len(r) for r in rows]
    weights = 4 * 650
    assert down == [2 * weights, length[0], length[1], length[2] + sum(length[:3]) + weights]
    fresh = engine()  # as after a resume: the rows tell it who has what
    task, _ = method.plan(state, here.table, here.sizes, 3, last)
    assert fresh.exchange(task, (0, 1), state, rows).bytes_down == 2 * (len(encode_message(task)) + length[3])


def test_batches_differ_by_client_round_and_step_and_repeat() -> None:
    method = bf.Method(num_directions=2, local_steps=2, batch_size=5, optimizer=bf.sgd(0.1))
    here = engine()
    state = method.init(initial())
    task, _ = method.plan(state, here.table, here.sizes, 3, None)
    batches = {
        (round_, client, step): here.batch(msgspec.structs.replace(task, round=round_), client, step).x.tobytes()
        for round_ in (0, 1)
        for client in (0, 1)
        for step in (0, 1)
    }
    assert len(set(batches.values())) == 8
    assert here.batch(task, 0, 0).x.tobytes() == batches[0, 0, 0]


def test_clients_without_data_are_named() -> None:
    train, _ = bf.load("digits")
    empty = Dataset(np.zeros((0, 1, 8, 8)), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="client 1 has no examples"):
        bf.LocalEngine(TorchRuntime(linear(), F.cross_entropy), [train, empty])
    with pytest.raises(DataError, match="expected at least one data set"):
        bf.LocalEngine(TorchRuntime(linear(), F.cross_entropy), [])


def test_the_core_imports_without_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nimport baffle\n"
        "heavy = [m for m in ('torch', 'typer', 'rich', 'matplotlib', 'sklearn', 'flwr') if sys.modules.get(m)]\n"
        "assert not heavy, heavy\n"
        "try:\n    baffle.TorchRuntime\nexcept baffle.BaffleError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'baffle[torch]'" in done.stdout


def test_an_engine_serves_one_run_after_another() -> None:
    here, method = engine(), bf.Method(num_directions=3)
    first, second = (bf.train(method, here, initial(), rounds=4).summary() for _ in range(2))
    assert first["bytes_down"] == second["bytes_down"]


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    data = Dataset(np.zeros((20, 1, 8, 8)), np.full(20, 77))
    with pytest.raises(ModelError, match="77 is out of bounds"):
        bf.fit(linear(), bf.partition(data, 2), loss=F.cross_entropy, rounds=3, out=tmp_path / "run")
    with pytest.raises(ModelError, match=r"initial weights of shape \(3,\): expected \(650,\)"):
        bf.train(bf.Method(), engine(), np.zeros(3, np.float32), rounds=3, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []

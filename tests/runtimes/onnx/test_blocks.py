"""Blocks of a bundle: the engines' own concerns, and the manifest's."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from baffle.core.directions import Directions
from baffle.errors import BundleError
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.perturb import Perturbations
from credited import bundle, data, numbers, runtime


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_threads_change_no_bit(engine: str) -> None:
    one, two = (runtime(engine, "fp32", "local", threads) for threads in (1, 2))
    assert numbers(one, one).tobytes() == numbers(two, two).tobytes()


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_weights_that_are_not_finite_give_numbers_that_are_not(engine: str) -> None:
    made = runtime(engine, "fp32", "local")
    weights = made.initial_weights()
    weights[0] = np.nan
    asked = Perturbations(Directions(made.table, "rank1", (3, 1)), 1, (1e-3,), baseline=0)
    assert np.isnan(made.credits(weights, asked, data(), np.zeros(20, np.int64), (0, 20))).all()


def test_blocks_survive_the_archive_and_do_not_fit_another_table() -> None:
    made = bundle("local")
    assert Bundle.decode(made.encode()).sha256 == made.sha256
    assert made.manifest.blocks is not None
    blocks = made.manifest.blocks
    one, rows, heads = msgspec.structs.replace, blocks.rows, blocks.heads
    for changed, expected in (
        (one(blocks, heads=heads[:-1]), "files|blocks of units"),
        (one(blocks, rows=rows[:-1]), "files|blocks of units"),
        (one(blocks, rows=(one(rows[0], reads=("y",)), *rows[1:])), "rows 0 read y"),
        (one(blocks, rows=(one(rows[0], owners=(9999,)), *rows[1:])), "owners"),
        (one(blocks, heads=(one(heads[0], weight="no"), *heads[1:])), "head 0: weight no"),
    ):
        edited = Bundle(msgspec.structs.replace(made.manifest, blocks=changed), made.files)
        with pytest.raises(BundleError, match=expected):
            Bundle.decode(edited.encode())

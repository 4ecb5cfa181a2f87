"""Clients without PyTorch that return numbers of rows: processes at the other end of pipes, against a simulation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import baffle as bf
from baffle.engines.pipe import PipeEngine
from edge_helpers import Fleet, assert_trains_as_simulated, make_fleet, without_torch

ROWS = bf.Method(num_directions=3, slices=2, bits=8, batch_size=8, sigma=1e-3, optimizer=bf.adam(0.02))
VARIANTS = {
    "forward": ROWS,
    "central": msgspec.structs.replace(ROWS, difference="central"),
    "gaussian": msgspec.structs.replace(ROWS, family="gaussian"),
    "signs alone": msgspec.structs.replace(ROWS, bits=1),
    "a direction of one's own": msgspec.structs.replace(ROWS, sharing="per-client"),
    "local steps": msgspec.structs.replace(ROWS, local_steps=2, optimizer=bf.sgd(0.05)),
    "some take part": msgspec.structs.replace(ROWS, participation=0.4),
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return make_fleet(tmp_path_factory.mktemp("rows"), "fp32", credit="local")


@pytest.fixture(scope="module")
def engine(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipeEngine]:
    with without_torch(tmp_path_factory.mktemp("none")), fleet.engine() as made:
        yield made


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_over_pipes_give_the_weights_of_the_simulation(fleet: Fleet, engine: PipeEngine, name: str) -> None:
    assert_trains_as_simulated(fleet, engine, VARIANTS[name])


def test_an_int8_bundle_trains_rows_on_the_lattice(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path, "int8", credit="local")
    method = msgspec.structs.replace(ROWS, difference="central", lattice=3, batch_size=32)
    (tmp_path / "none").mkdir()
    with without_torch(tmp_path / "none"), fleet.engine() as engine:
        run = bf.train(method, engine, fleet.bundle.initial, rounds=25, test=bf.load("digits")[1])
    assert run.accuracy is not None
    assert run.accuracy > 0.6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_client_that_returns_rows_stays_small(fleet: Fleet, engine: PipeEngine) -> None:
    bf.train(msgspec.structs.replace(ROWS, batch_size=32, sigma="auto"), engine, fleet.bundle.initial, rounds=3)
    for pid in engine.pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        [peak] = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
        assert 20 < peak < 90  # MiB
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()

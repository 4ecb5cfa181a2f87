"""Pruned tensors: what was not kept is neither perturbed nor trained, and the journal knows what that is."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import baffle as bf
from baffle.core.directions import Directions
from baffle.core.rebuild import Execution, combine, combine_slowly
from baffle.core.state import state_sha256
from baffle.core.types import Family, Integers, ParamSpec, Table, Weights, make_table
from baffle.errors import CorruptRunError, ModelError, PlanError
from baffle.models import build
from baffle.protocol.encoding import decode_row
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import copy_run

Mask = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

FAMILIES: list[Family] = ["rank1", "rademacher", "gaussian"]
DIMENSION = st.integers(1, 9)
SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([1, 7, 8, 9, 257, 600])),
    st.tuples(DIMENSION, DIMENSION),
    st.tuples(DIMENSION, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(20, 30), (0,), (0, 3)]),
)
SCALARS = st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=20).map(lambda v: np.array(v, np.int64))


@st.composite
def directions(draw: st.DrawFn) -> Directions:
    """Of a table in which some tensors are pruned: a little, by half, whole."""
    shapes: dict[str, tuple[int, ...]] = {
        f"t{i}": shape for i, shape in enumerate(draw(st.lists(SHAPE, min_size=1, max_size=4)))
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = {name: draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])) for name in shapes}
    masks = {name: rng.random(shapes[name]) < share for name, share in shares.items() if share is not None}
    masks = {name: np.asarray(mask) for name, mask in masks.items()}
    key = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**32))
    return Directions(make_table(shapes, masks), draw(st.sampled_from(FAMILIES)), key, draw(st.integers(0, 9)))


def whole(pruned: Directions) -> Directions:
    """The same, without masks."""
    table = tuple(msgspec.structs.replace(spec, kept=b"") for spec in pruned.table)
    return Directions(table, pruned.family, pruned.key, pruned.client, pruned.step)


def keeps(spec: ParamSpec) -> Mask:
    return np.ones(spec.size, np.bool_) if spec.mask is None else spec.mask


# The table


def test_bits_by_hand() -> None:
    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]], np.bool_)
    plain, pruned = make_table({"b": (2,), "w": (2, 6)}, {"w": mask})
    assert (plain.kept, plain.mask) == (b"", None)
    assert pruned.kept == bytes([0b00101101, 0b1111])
    assert pruned.mask is not None
    assert pruned.mask.dtype == np.bool_
    assert pruned.mask.tolist() == mask.reshape(-1).tolist()
    assert pruned.offset == 2


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_come_back_as_they_were(bits: list[bool]) -> None:
    spec = make_table({"w": (len(bits),)}, {"w": np.array(bits, np.bool_)})[0]
    assert len(spec.kept) == -(-len(bits) // 8)
    assert spec.mask is not None
    assert spec.mask.tolist() == bits
    again = msgspec.json.decode(msgspec.json.encode(spec), type=ParamSpec)
    assert again == spec
    assert msgspec.json.decode(msgspec.json.encode(spec))["kept"] == base64.b64encode(spec.kept).decode()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"v": np.ones(6, np.bool_)}, r"mask of v: bool\[6\]: expected one of w, b"),
        ({"w": np.ones((3, 2), np.bool_)}, r"mask of w: bool\[3, 2\]: expected bool\[2, 3\]"),
        ({"w": np.ones(6, np.bool_)}, r"mask of w: bool\[6\]: expected bool\[2, 3\]"),
        ({"w": np.ones((2, 3), np.uint8)}, r"mask of w: uint8\[2, 3\]: expected bool\[2, 3\]"),
        ({"w": np.ones((2, 3), np.bool_), "b": np.ones(3)}, r"mask of b: float64\[3\]: expected bool\[4\]"),
    ],
)
def test_masks_that_do_not_fit_are_named(masks: Mapping[str, Mask], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_table({"w": (2, 3), "b": (4,)}, masks)


# Directions


@settings(deadline=None, max_examples=80)
@given(directions(), st.data())
def test_masked_entries_are_zero_and_the_others_are_what_they_were(drawn: Directions, data: st.DataObject) -> None:
    unpruned = whole(drawn)
    for i, spec in enumerate(drawn.table):
        entries, expected = drawn.entries(i, slice(1, 4)), unpruned.entries(i, slice(1, 4))
        assert entries.dtype == np.int16
        assert not entries[:, ~keeps(spec)].any()
        assert np.array_equal(entries[:, keeps(spec)], expected[:, keeps(spec)])
        start, stop = sorted((data.draw(st.integers(0, spec.size)), data.draw(st.integers(0, spec.size))))
        assert np.array_equal(drawn.entries(i, slice(1, 4), start, stop), entries[:, start:stop])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_range_outside_is_refused_of_pruned_tensors_too(family: Family) -> None:
    table = make_table({"w": (2, 3)}, {"w": np.ones((2, 3), np.bool_)})
    with pytest.raises(ValueError, match="expected a range within 0:6"):
        Directions(table, family, (1, 2)).entries(0, slice(0, 1), 2, 7)


@settings(deadline=None, max_examples=120)
@given(directions(), SCALARS, st.integers(1, 2), st.sampled_from([1, 255, 256, 2**16]))
def test_fast_sums_equal_slow_ones(drawn: Directions, scalars: Integers, threads: int, block: int) -> None:
    fast = combine(drawn, scalars, Execution(threads, block))
    assert fast.tobytes() == combine_slowly(drawn, scalars).tobytes()
    kept = np.concatenate([keeps(spec) for spec in drawn.table])
    assert not fast[~kept].any()
    assert np.array_equal(fast[kept], combine(whole(drawn), scalars)[kept])


# Perturbed weights


@settings(deadline=None, max_examples=80)
@given(directions(), st.floats(1e-6, 10), st.sampled_from([0, 3]))
def test_perturbed_weights_keep_their_zeros(drawn: Directions, sigma: float, codes: int) -> None:
    lattice = 0 if drawn.family == "gaussian" else codes
    kept = np.concatenate([keeps(spec) for spec in drawn.table])
    weights = np.where(kept, np.random.default_rng(0).standard_normal(len(kept)), 0).astype(np.float32)
    asked = Perturbations(drawn, 2, (sigma, -sigma), baseline=True, lattice=lattice)
    unpruned = Perturbations(whole(drawn), 2, (sigma, -sigma), baseline=True, lattice=lattice)
    expected = [w.copy() for w in unpruned.weights(weights, np.empty_like(weights))]
    for got, other in zip(asked.weights(weights, np.full_like(weights, np.nan)), expected, strict=True):
        assert not got[~kept].view(np.uint32).any()  # no -0 either
        assert np.array_equal(got[kept], other[kept])


def test_a_branch_of_a_pruned_tensor_is_refused() -> None:
    """A product of two vectors cannot leave entries out."""
    table = make_table({"v": (2, 2), "w": (2, 2)}, {"w": np.array([[True, False], [True, True]])})
    asked = Perturbations(Directions(table, "rank1", (1, 2)), 1, (0.1, -0.1), baseline=False)
    weights, branch = np.zeros(8, np.float32), (np.empty(2, np.float32), np.empty(2, np.float32))
    assert len(list(asked.weights(weights, np.empty_like(weights), {0: branch}))) == 2
    with pytest.raises(PlanError, match="w: pruned, with a rank-1 branch"):
        next(asked.weights(weights, np.empty_like(weights), {1: branch}))


# The estimate


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_falls_with_the_square_root_of_what_is_kept(family: Family) -> None:
    """|g_hat - g| / |g| is sqrt((n - 1) / K) for signs and sqrt((n + 1) / K) for Gaussians, with n the kept entries."""
    rng, count, rounds = np.random.default_rng(4), 64, 100
    gradient = rng.standard_normal(16 * 25 + 100)
    for share in (1.0, 0.25, 0.0625):
        masks = {name: rng.permutation(size) < share * size for name, size in (("w", 400), ("b", 100))}
        table = make_table({"w": (16, 25), "b": (100,)}, {"w": masks["w"].reshape(16, 25), "b": masks["b"]})
        kept = np.concatenate(list(masks.values()))
        squared = np.mean([squared_error(table, family, gradient, kept, count, r) for r in range(rounds)])
        expected = (kept.sum() + (1 if family == "gaussian" else -1)) / count
        assert math.sqrt(squared) == pytest.approx(math.sqrt(expected), rel=0.07)


def squared_error(table: Table, family: Family, gradient: Float64, kept: Mask, count: int, round_: int) -> float:
    """Of one estimate of a gradient that is known, relative; what was pruned does not count."""
    drawn = Directions(table, family, (99, round_))
    entries = np.concatenate([drawn.entries(i, slice(0, count)) for i in range(len(table))], axis=1)
    slopes = entries.astype(np.float64) @ gradient * drawn.unit
    found = combine(drawn, np.rint(slopes * 2**16).astype(np.int64)) * drawn.unit / (2**16 * count)
    assert not found[~kept].any()
    gap = (found - gradient)[kept]
    return float(gap @ gap / (gradient[kept] @ gradient[kept]))


# Training

TRAIN, TEST = bf.load("digits")


def mlp_masks(seed: int = 0, share: float = 0.3) -> dict[str, Mask]:
    """Two of the three matrices are pruned, and one bias."""
    rng, shapes = np.random.default_rng(seed), {spec.name: spec.shape for spec in masked_engine(None)[0].table}
    return {name: rng.random(shapes[name]) < share for name in ("1.weight", "1.bias", "4.weight")}


def masked_engine(masks: Mapping[str, Mask] | None) -> tuple[bf.LocalEngine, Weights]:
    runtime = TorchRuntime(build("mlp", (1, 8, 8), 10), F.cross_entropy, 1, masks=masks)
    return bf.LocalEngine(runtime, bf.partition(TRAIN, 3)), runtime.initial_weights()


def zeros(table: Table) -> Mask:
    return ~np.concatenate([keeps(spec) for spec in table])


METHODS: dict[str, bf.Method] = {
    "sgd": bf.Method(num_directions=5, batch_size=8, optimizer=bf.sgd(0.05, weight_decay=0.1)),
    "momentum": bf.Method(
        num_directions=5, batch_size=8, family="rademacher", optimizer=bf.sgd(0.02, momentum=0.9, weight_decay=0.1)
    ),
    "adam": bf.Method(num_directions=5, batch_size=8, family="gaussian", optimizer=bf.adam(0.01, weight_decay=0.1)),
    "adamw": bf.Method(num_directions=5, batch_size=8, optimizer=bf.adamw(0.01, weight_decay=0.1)),
    "local steps": bf.Method(num_directions=5, batch_size=8, local_steps=2, optimizer=bf.sgd(0.05)),
    "per client": bf.Method(num_directions=5, batch_size=8, sharing="per-client", optimizer=bf.adam(0.01)),
    "lattice": bf.Method(num_directions=5, batch_size=8, difference="central", lattice=2, optimizer=bf.adam(0.01)),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_keeps_the_zeros_and_a_resumed_run_is_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    engine, initial = masked_engine(mlp_masks())
    gone = zeros(engine.table)
    assert not initial[gone].any()
    straight = bf.train(METHODS[name], engine, initial, rounds=6)
    for values in (straight.weights, straight.average, *straight.state.slots.values()):
        assert not values[gone].any()
    moved = straight.weights != initial
    assert moved[~gone].mean() > 0.99
    assert not moved[gone].any()
    assert np.all(straight.weights[~gone] != 0)

    bf.train(METHODS[name], engine, initial, rounds=3, out=tmp_path / "run", snapshot_every=2)
    again = bf.resume(tmp_path / "run", masked_engine(mlp_masks())[0], rounds=6)
    assert again.weights_sha256 == straight.weights_sha256
    assert np.array_equal(again.average, straight.average)
    states = list(bf.Journal.open(tmp_path / "run").states())
    assert state_sha256(states[-1]) == state_sha256(straight.state)
    assert all(not state.weights[gone].any() and not state.ema_weights[gone].any() for state in states)


def test_pruned_models_learn() -> None:
    engine, initial = masked_engine(mlp_masks())
    method = bf.Method(num_directions=100, batch_size=16, optimizer=bf.adam(0.02, schedule=bf.cosine(80)))
    run = bf.train(method, engine, initial, rounds=80, test=TEST)
    assert (run.accuracy or 0) > 0.85


def test_weights_that_are_not_zero_where_they_are_pruned_are_refused(tmp_path: Path) -> None:
    engine, initial = masked_engine(mlp_masks())
    dense = masked_engine(None)[1]
    kept = ~zeros(engine.table)
    assert np.array_equal(initial[kept], dense[kept])
    with pytest.raises(ModelError, match=r"initial weights of 1\.weight: a number where it is pruned: expected 0"):
        bf.train(METHODS["sgd"], engine, dense, rounds=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The journal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a pruned model. Never changed: tests take copies."""
    folder = tmp_path_factory.mktemp("masks") / "run"
    engine, initial = masked_engine(mlp_masks())
    bf.train(METHODS["sgd"], engine, initial, rounds=2, out=folder)
    return folder


def one_bit_more(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    changed = {name: mask.copy() for name, mask in masks.items()}
    first = tuple(np.argwhere(~changed["1.weight"])[0])
    changed["1.weight"][first] = True
    return changed


@pytest.mark.parametrize("masks", [None, one_bit_more(mlp_masks()), mlp_masks(seed=1)], ids=["none", "bit", "other"])
def test_a_run_is_not_continued_with_another_mask(run: Path, masks: Mapping[str, Mask] | None, tmp_path: Path) -> None:
    before = (run / "rows.bin").read_bytes()
    with pytest.raises(PlanError, match="trains other tensors than this model has: expected the same model"):
        bf.resume(run, masked_engine(masks)[0], rounds=4)
    assert (run / "rows.bin").read_bytes() == before
    # nor if all else were made to fit: the chain of checksums starts from the mask
    engine, _ = masked_engine(masks)
    copy = copy_run(run, tmp_path / "copy")
    config = msgspec.json.decode((copy / "config.json").read_bytes())
    config["table"] = msgspec.to_builtins(engine.table)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptRunError, match=r"round 0 fails its checksum: config\.json or initial\.safetensors"):
        bf.resume(copy, engine, rounds=4)


def test_the_folder_says_what_was_pruned(run: Path) -> None:
    journal = bf.Journal.open(run)
    masks = mlp_masks()
    assert {spec.name for spec in journal.config.table if spec.kept} == set(masks)
    for spec in journal.config.table:
        if spec.mask is not None:
            assert np.array_equal(spec.mask.reshape(spec.shape), masks[spec.name])
    assert [decode_row(row).round for row in journal.rows] == [0, 1, 2]

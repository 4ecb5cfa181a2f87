"""Structured pruning: which channels are removed, and that the rest computes the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baffle as bf
from baffle.data import Dataset
from baffle.errors import BaffleError, DataError, MissingExtraError, ModelError, OptionError
from baffle.models import MODELS, build
from baffle.models.parts import NORMS
from pruned import SHAPE, assert_trains, assert_unchanged, batch, examples, outputs, snapshot, with_weights


@pytest.mark.parametrize("name", MODELS)
def test_packaged_models_export_when_shrunk_and_pruned(name: str) -> None:
    data = batch()
    model = bf.shrink(build(name, SHAPE, 10), 0.5, data)
    masks = bf.prune(model, 0.5, "inputs", data)
    reference = bf.TorchRuntime(model, F.cross_entropy, threads=1, masks=masks)
    bundle = bf.export(model, F.cross_entropy, data, masks=masks)
    assert bundle.manifest.table == reference.table
    expected = assert_trains(reference, data).losses
    assert np.allclose(assert_trains(bf.OrtRuntime(bundle, threads=1), data).losses, expected, atol=1e-4)


def test_a_pruned_and_shrunk_model_learns() -> None:
    train, test = bf.load("digits")
    model = bf.shrink(build("mlp", SHAPE, 10), 0.5, train)
    masks = bf.prune(model, 0.5, "inputs", train.take(np.arange(64)))
    runtime = bf.TorchRuntime(model, F.cross_entropy, threads=1, masks=masks)
    weights = runtime.initial_weights()
    method = bf.Method(num_directions=40, batch_size=32, optimizer=bf.adam(0.01))
    run = bf.train(method, bf.LocalEngine(runtime, bf.partition(train, 4)), weights, rounds=40)
    before, after = (runtime.evaluate(w, test).losses.mean() for w in (weights, run.weights))
    assert after < 0.9 * before
    for spec in runtime.table:
        assert spec.mask is None or not run.weights[spec.slice][~spec.mask].any()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "share", "expected"),
    [
        ("lenet", 0.5, {"0.weight": (8, 1, 5, 5), "0.bias": (8,), "4.weight": (32, 8, 5, 5), "9.weight": (10, 32)}),
        ("lenet", 0.25, {"0.weight": (12, 1, 5, 5), "4.weight": (48, 12, 5, 5), "9.weight": (10, 48)}),
        ("lenet-small", 0.5, {"0.weight": (8, 1, 5, 5), "4.weight": (32, 8, 5, 5), "9.weight": (10, 32 * 4)}),
        ("mlp", 0.5, {"1.weight": (100, 64), "4.weight": (32, 100), "7.weight": (10, 32), "7.bias": (10,)}),
        (
            "wrn-10-2",
            0.5,
            {
                "0.weight": (8, 1, 3, 3),
                "1.residual.2.weight": (16, 8, 3, 3),
                "1.residual.5.weight": (16, 16, 3, 3),
                "1.shortcut.2.weight": (16, 8, 1, 1),
                "2.residual.2.weight": (32, 16, 3, 3),
                "3.residual.5.weight": (64, 64, 3, 3),
                "3.shortcut.2.weight": (64, 32, 1, 1),
                "8.weight": (10, 64),
            },
        ),
        (
            "transformer",
            0.5,
            {
                "embed.weight": (64, 1, 2, 2),
                "positions": (16, 64),
                "blocks.0.qkv.weight": (192, 64),
                "blocks.1.perceptron.1.weight": (64, 64),
                "blocks.1.perceptron.1.bias": (64,),
                "blocks.1.perceptron.3.weight": (64, 64),
                "head.weight": (10, 64),
            },
        ),
    ],
)
def test_packaged_models_shrink_to_these_shapes(
    name: str, share: float, expected: dict[str, tuple[int, ...]], norm: str
) -> None:
    model, data = build(name, SHAPE, 10, norm=norm), batch()
    before, training = snapshot(model), [module.training for module in model.modules()]
    small = bf.shrink(model, share, data)
    assert_unchanged(model, before)
    assert shapes(small).keys() == shapes(model).keys()
    assert {n: shape for n, shape in shapes(small).items() if n in expected} == expected
    assert [module.training for module in small.modules()] == training
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in small.parameters())
    assert_trains(bf.TorchRuntime(small, F.cross_entropy, threads=1), data)
    assert_unchanged(bf.shrink(model, share, data), snapshot(small))  # the same again


@pytest.mark.parametrize("share", [0.3, 0.999])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_any_share_leaves_a_model_that_runs(name: str, norm: str, share: float) -> None:
    data = batch((3, 8, 8))
    model = build(name, (3, 8, 8), 7, norm=norm)
    small = bf.shrink(model, share, data)
    assert np.isfinite(outputs(small, data)).all()
    assert outputs(small, data).shape == (20, 7)
    for (name, before), after in zip(model.named_modules(), small.modules(), strict=True):
        if isinstance(before, nn.GroupNorm) and isinstance(after, nn.GroupNorm):
            assert after.num_groups == before.num_groups
            assert after.num_channels >= 2 * after.num_groups
        if isinstance(before, nn.Linear) and isinstance(after, nn.Linear) and "perceptron.1" in name:
            assert after.out_features == before.out_features - math.floor(share * before.out_features)


def kept_rows(large: nn.Module, small: nn.Module, name: str, inputs: Tensor | None = None) -> Tensor:
    """Which outputs of a layer are left, told by their weights."""
    before = large.get_parameter(f"{name}.weight").detach()
    before = before if inputs is None else before[:, inputs]
    after = small.get_parameter(f"{name}.weight").detach()
    same = (before[:, None] == after[None]).flatten(2).all(2)  # [rows before, rows after]
    assert (same.sum(0) == 1).all()
    kept = same.int().argmax(0)
    assert (kept.diff() > 0).all()
    return kept


def silence(layer: nn.Module, kept: Tensor) -> None:
    """Set all other outputs to zero."""

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        dim = 1 if isinstance(module, nn.Conv2d) else -1
        return torch.zeros_like(output).index_copy(dim, kept, output.index_select(dim, kept))

    layer.register_forward_hook(keep)


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize(("name", "layers"), [("mlp", (1, 4)), ("lenet", (0, 4)), ("lenet-small", (0, 4))])
def test_what_is_left_computes_as_with_the_lost_channels_at_zero(
    name: str, layers: tuple[int, int], share: float
) -> None:
    model, data = build(name, SHAPE, 10), batch()
    small = bf.shrink(model, share, data)
    first = kept_rows(model, small, str(layers[0]))
    second = kept_rows(model, small, str(layers[1]), first)
    silence(model.get_submodule(str(layers[0])), first)
    silence(model.get_submodule(str(layers[1])), second)
    assert np.allclose(outputs(small, data), outputs(model, data), atol=1e-6)


def test_residual_streams_shrink_together() -> None:
    model, data = build("wrn-10-2", SHAPE, 10, norm="none"), batch()
    small = bf.shrink(model, 0.5, data)
    stream = kept_rows(model, small, "0")
    silence(model.get_submodule("0"), stream)
    for unit in ("1", "2", "3"):
        inner = kept_rows(model, small, f"{unit}.residual.2", stream)
        shortcut = kept_rows(model, small, f"{unit}.shortcut.2", stream)
        stream = kept_rows(model, small, f"{unit}.residual.5", inner)
        assert torch.equal(stream, shortcut)
        for name, kept in (("residual.2", inner), ("residual.5", stream), ("shortcut.2", stream)):
            silence(model.get_submodule(f"{unit}.{name}"), kept)
    assert np.allclose(outputs(small, data), outputs(model, data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [None, 9])
def test_perceptrons_of_a_transformer_shrink(vocabulary: int | None) -> None:
    data = examples("transformer", vocabulary)
    model = build("transformer", data.x.shape[1:], 10, vocabulary=vocabulary)
    small = bf.shrink(model, 0.5, data)
    for block in ("blocks.0", "blocks.1"):
        silence(model.get_submodule(f"{block}.perceptron.1"), kept_rows(model, small, f"{block}.perceptron.1"))
    assert np.allclose(outputs(small, data), outputs(model, data), atol=1e-5)
    changed = {n for n, shape in shapes(small).items() if shape != shapes(model)[n]}
    assert {n.split(".", 2)[2] for n in changed} == {"perceptron.1.weight", "perceptron.1.bias", "perceptron.3.weight"}


def test_the_smallest_go_by_hand() -> None:
    rows = [[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]  # squares 9, 1, 2, 4
    readers = [[0.0, 2.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]]  # of their readers 0, 8, 1, 1
    model = with_weights(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2), weights=[rows, readers])
    small = bf.shrink(model, 0.5, batch((2,)))
    assert small.get_parameter("0.weight").tolist() == [[3.0, 0.0], [0.0, 1.0]]
    assert small.get_parameter("2.weight").tolist() == [[0.0, 2.0], [0.0, 2.0]]
    assert torch.equal(small.get_parameter("0.bias"), model.get_parameter("0.bias")[:2])
    assert torch.equal(small.get_parameter("2.bias"), model.get_parameter("2.bias"))


def test_groups_of_a_norm_lose_as_many_each() -> None:
    rows = [[1.0], [2.0], [3.0], [4.0], [9.0], [8.0], [7.0], [6.0]]
    model = with_weights(
        nn.Linear(1, 8), nn.GroupNorm(2, 8), nn.Linear(8, 2), weights=[rows, torch.ones(2, 8).tolist()]
    )
    small = bf.shrink(model, 0.5, batch((1,)))
    assert small.get_parameter("0.weight").tolist() == [[3.0], [4.0], [9.0], [8.0]]
    assert small.get_parameter("1.weight").shape == (4,)


class Merged(nn.Module):
    """Two convolutions side by side, their channels put together, and gated by what they are on average."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat([self.a(x), self.b(x)], 1))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


class Normalised(nn.Module):
    """A norm over two layers' outputs: each alone would take from some of its groups only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.last = (
            nn.Linear(12, 16),
            nn.Linear(12, 16),
            nn.GroupNorm(4, 32),
            nn.Linear(32, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


def pooled(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (seeded(Merged), (3, 8, 8), {"squeeze.weight": (3, 6, 1, 1), "head.weight": (10, 6)}),
        (
            pooled(
                nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1),
                channels=8,
            ),
            (3, 8, 8),
            {"1.weight": (8, 1, 3, 3), "2.weight": (8,), "3.weight": (4, 8, 1, 1)},
        ),
        (
            pooled(
                nn.Conv2d(3, 16, 1), nn.GroupNorm(2, 16), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
                nn.ConvTranspose2d(16, 8, 2), channels=8,
            ),
            (3, 8, 8),
            {"0.weight": (8, 3, 1, 1), "2.weight": (8, 2, 3, 3), "4.weight": (8, 4, 2, 2), "7.weight": (10, 4)},
        ),
        (
            nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10)),
            (12,),
            {"0.weight": (8, 12), "1.weight": (8,), "1.bias": (8,), "3.weight": (10, 8)},
        ),
        (
            nn.Sequential(nn.Linear(5, 24), nn.GroupNorm(2, 24), nn.ReLU(), nn.GroupNorm(3, 24), nn.Linear(24, 10)),
            (5,),
            {"0.weight": (12, 5), "4.weight": (10, 12)},
        ),
        (
            nn.Sequential(
                nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Flatten(), nn.Linear(96, 10)
            ),
            (6, 16),
            {"0.linear1.weight": (16, 16), "0.linear2.weight": (16, 16), "2.weight": (10, 96)},
        ),
    ],
    ids=["merged", "depthwise", "grouped", "layer norm", "norms", "encoder"],
)  # fmt: skip
def test_other_models_shrink(model: nn.Module, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> None:
    data = batch(shape)
    small = bf.shrink(model, 0.5, data)
    assert {n: after for n, after in shapes(small).items() if n in expected} == expected
    assert outputs(small, data).shape == (20, 10)
    assert np.isfinite(outputs(small, data)).all()


def test_frozen_layers_shrink_and_stay_frozen_and_modes_stay() -> None:
    model = build("lenet", SHAPE, 10)
    model.get_submodule("0").requires_grad_(False)
    model.get_submodule("4").eval()
    small = bf.shrink(model, 0.5, batch())
    assert shapes(small)["0.weight"] == (8, 1, 5, 5)
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]
    assert [n for n, module in small.named_modules() if not module.training] == ["4"]


def test_a_share_of_nothing_is_a_copy() -> None:
    model = build("mlp", SHAPE, 10)
    copied = bf.shrink(model, 0.0, batch())
    assert_unchanged(copied, snapshot(model))
    assert all(a is not b for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_inference_mode_around_it_leaves_a_model_that_autograd_can_train() -> None:
    model, data = build("mlp", SHAPE, 10), batch()
    with torch.inference_mode():
        small = bf.shrink(model, 0.5, data)
    assert not any(p.is_inference() for p in small.parameters())
    small(torch.from_numpy(data.x)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


class Own(nn.Module):
    """A hidden layer and a function between it and the last one."""

    def __init__(self, between: Callable[[Tensor], Tensor], inner: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(12, 16), between, nn.Linear(inner, 12)
        if tied:
            self.last.weight = nn.Parameter(self.first.weight.detach().T.contiguous())
            self.other = nn.Linear(16, 16)
            self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.between(self.first(x))))


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * b


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Own(lambda x: x.softmax(-1)), "first: the rest would not compute the same without some of its outputs"),
        (Own(lambda x: x + x.mean(-1, keepdim=True)), "first: the rest would not compute the same"),
        (Own(lambda x: x.flip(-1)), "first: the rest would not compute the same"),
        (Own(halves, 8), "first: its own outputs are tied to each other"),
        (Own(F.glu, 8), "first: torch-pruning cannot follow its outputs"),
        (Own(lambda x: x + torch.arange(16.0)), r"first: the cut fails \(The size of tensor a \(8\)"),
        (Normalised(), "a: groups of a GroupNorm would lose different numbers of channels; b: groups of"),
        (Own(F.relu, tied=True), "first: weights that several layers share would come apart"),
        (nn.Linear(12, 10), "model: its outputs are the model's"),
        (nn.Flatten(), "no convolution or linear layer"),
    ],
)
def test_models_that_cannot_be_shrunk_are_explained(model: nn.Module, reason: str) -> None:
    before = snapshot(model)
    with pytest.raises(ModelError, match=rf"the model cannot be shrunk by 0\.5: .*{reason}"):
        bf.shrink(model, 0.5, batch((12,)))
    assert_unchanged(model, before)


def test_weights_that_start_at_zero_hide_nothing() -> None:
    model = Own(lambda x: x.softmax(-1))
    nn.init.zeros_(model.last.weight)
    with pytest.raises(ModelError, match="first: the rest would not compute the same"):
        bf.shrink(model, 0.5, batch((12,)))


def test_layers_too_small_for_a_share_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 12), nn.GroupNorm(4, 12), nn.Linear(12, 3))
    with pytest.raises(ModelError, match=r"0: 12 outputs in 4 groups are too few to lose 0\.2 of them"):
        bf.shrink(model, 0.2, batch((2,)))


@pytest.mark.parametrize(
    ("share", "data", "kind", "message"),
    [
        (1.0, batch(), OptionError, r"share = 1.0: expected a number >= 0 and < 1"),
        (math.nan, batch(), OptionError, r"share = nan"),
        (0.5, batch(examples=0), DataError, "data: no examples: expected at least one"),
        (0.5, batch((3, 8, 8)), ModelError, r"cannot be traced on inputs \(4, 3, 8, 8\) of torch.float32: .*channels"),
    ],
)
def test_what_shrink_refuses(share: float, data: Dataset, kind: type[BaffleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        bf.shrink(build("lenet", SHAPE, 10), share, data)


def test_one_example_is_enough() -> None:
    assert shapes(bf.shrink(build("mlp", SHAPE, 10), 0.5, batch(examples=1)))["1.weight"] == (100, 64)


def test_without_torch_pruning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'baffle\[prune\]'"):
        bf.shrink(build("mlp", SHAPE, 10), 0.5, batch())

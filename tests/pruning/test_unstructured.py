"""Unstructured pruning: scores, masks, and training under them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import baffle as bf
from baffle.core.types import Masks
from baffle.data import Dataset
from baffle.errors import BaffleError, DataError, ModelError, OptionError
from baffle.models import MODELS, build
from baffle.pruning.unstructured import input_norms, lamp, ranks_in_rows
from pruned import SHAPE, assert_trains, assert_unchanged, batch, examples, snapshot, with_weights

SCORES = ("magnitude", "inputs")


def perceptron(sizes: list[tuple[int, int]], seed: int, round_to: float) -> nn.Sequential:
    """Layers one beside another; with ``round_to`` many weights are alike or zero."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in sizes))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.data = (p.data / round_to).round() * round_to if round_to else p.data
    return model


Float64 = npt.NDArray[np.float64]


def lost(masks: Masks) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def test_magnitude_by_hand_compares_tensors_of_any_scale() -> None:
    weights = [[[3.0, -4.0]], [[1000.0, -2000.0, 2000.0]]]  # scores 9/25, 1; 1/9, 4/8, 1
    for share, expected in [
        (0.2, {"1.weight": [[False, True, True]]}),
        (0.4, {"0.weight": [[False, True]], "1.weight": [[False, True, True]]}),
        (0.6, {"0.weight": [[False, True]], "1.weight": [[False, False, True]]}),
    ]:
        model = with_weights(nn.Linear(2, 1), nn.Linear(3, 1), weights=weights)
        masks = bf.prune(model, share)
        assert {name: mask.tolist() for name, mask in masks.items()} == expected
    assert model.get_parameter("0.weight").tolist() == [[0.0, -4.0]]
    assert model.get_parameter("1.weight").tolist() == [[0.0, 0.0, 2000.0]]
    with pytest.raises(OptionError, match=r"share = 0.8: expected at most 0\.6: 2 tensors keep one each"):
        bf.prune(with_weights(nn.Linear(2, 1), nn.Linear(3, 1), weights=weights), 0.8)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_lamp_follows_its_definition(values: list[int]) -> None:
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    scores = lamp(np.array(values, np.float64))
    for place, i in enumerate(order[:-1]):
        rest = sum(values[j] ** 2 for j in order[place:])
        assert scores[i] == (values[i] ** 2 / rest if rest else 0)
    assert scores[order[-1]] == math.inf


def test_inputs_by_hand_compare_within_a_row() -> None:
    model = with_weights(nn.Linear(2, 2), weights=[[[1.0, 4.0], [1.0, 6.0]]])
    data = Dataset(np.array([[3.0, 0.0], [4.0, 1.0]]), np.zeros(2))  # norms 5 and 1: scores 5, 4 and 5, 6
    assert bf.prune(model, 0.5, "inputs", data)["0.weight"].tolist() == [[True, False], [False, True]]
    assert model.get_parameter("0.weight").tolist() == [[1.0, 0.0], [0.0, 6.0]]


def patches_slowly(layer: nn.Conv2d, x: Float64) -> Float64:
    """The norm of what each weight [out, in / groups, height, width] is multiplied with, one product at a time."""
    padding = layer.padding if isinstance(layer.padding, tuple) else None
    if padding is not None:
        left, right = padding, padding
    elif layer.padding == "valid":
        left, right = (0, 0), (0, 0)
    else:
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        left, right = (total[0] // 2, total[1] // 2), (total[0] - total[0] // 2, total[1] - total[1] // 2)
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
    widths = ((0, 0), (0, 0), (left[0], right[0]), (left[1], right[1]))
    x = np.pad(x, widths, mode=mode)  # type: ignore[call-overload]  # numpy types modes as literals
    out, channels, height, width = layer.weight.shape
    squares = np.zeros(layer.weight.shape)
    steps = [
        range(0, size - d * (k - 1), s)
        for size, d, k, s in zip(x.shape[2:], layer.dilation, layer.kernel_size, layer.stride, strict=True)
    ]
    for o, c, h, w in itertools.product(range(out), range(channels), range(height), range(width)):
        plane = x[:, o // (out // layer.groups) * channels + c]
        for i, j in itertools.product(*steps):
            squares[o, c, h, w] += (plane[:, i + h * layer.dilation[0], j + w * layer.dilation[1]] ** 2).sum()
    found: Float64 = np.sqrt(squares).reshape(out, -1)
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, dilation=2),
        nn.Conv2d(4, 2, (2, 4), padding="same"),
        nn.Conv2d(4, 2, 3, padding="valid", stride=3),
        *(nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
    ],
    ids=str,
)
def test_norms_of_patches_follow_slow_loops(layer: nn.Conv2d) -> None:
    data = batch((4, 6, 7), 70)  # two passes
    norms = input_norms(nn.Sequential(layer), data)["0.weight"]
    assert np.allclose(norms, patches_slowly(layer, data.x.astype(np.float64)), rtol=1e-6)


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_ranks_follow_their_definition(rows: list[list[int]]) -> None:
    ranks = ranks_in_rows(np.array(rows, np.float64)).reshape(len(rows), 4)
    last = max((value, r, i) for r, row in enumerate(rows) for i, value in enumerate(row))
    for r, row in enumerate(rows):
        for place, i in enumerate(sorted(range(4), key=lambda i: (row[i], i))):
            expected = math.inf if (row[i], r, i) == last else 1.0 if place == 3 else (place + 0.5) / 4
            assert ranks[r, i] == expected


def test_every_row_loses_the_same_share() -> None:
    model = build("lenet-small", SHAPE, 10)
    for name, mask in bf.prune(model, 0.3, "inputs", batch()).items():
        assert name.endswith("weight")
        rows = mask.reshape(len(mask), -1)
        assert (np.abs((~rows).sum(1) - 0.3 * rows.shape[1]) <= 1).all()


def test_a_row_keeps_its_largest_while_anything_else_is_left() -> None:
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8))
    masks = bf.prune(model, 56 / 72, "inputs", batch((1,)))
    assert "0.weight" not in masks  # each entry is its row's largest
    assert masks["1.weight"].sum(1).tolist() == [1] * 8
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8))
    masks = bf.prune(model, 70 / 72, "inputs", batch((1,)))
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1]


class Twice(nn.Module):
    """Runs one layer twice, names another that is never run, and shares a weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.unused = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(self.embed(x))
        return torch.as_tensor(self.head(self.layer(input=first)).mean(1))


def test_inputs_of_every_use_count_and_tied_weights_are_one() -> None:
    model, data = Twice(), batch((5,), vocabulary=9)
    norms = input_norms(model, data)
    with torch.inference_mode():
        embedded = model.embed(torch.from_numpy(data.x)).double()
        first = model.layer.double()(embedded)
        second = model.layer(first)
    used = torch.cat([embedded, first]).reshape(-1, 4)
    assert norms.keys() == {"embed.weight", "layer.weight"}
    assert np.allclose(norms["layer.weight"], used.norm(dim=0).numpy()[None], rtol=1e-5)
    assert np.allclose(norms["embed.weight"], second.reshape(-1, 4).norm(dim=0).numpy()[None], rtol=1e-5)


def test_other_tensors_are_ranked_by_magnitude_as_one_row() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.convolution = nn.Conv1d(6, 4, 3)
            self.head = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.convolution(self.attention(x, x, x)[0]).flatten(1)))

    model = Attention()
    magnitudes = {name: np.abs(p.detach().numpy()) for name, p in model.named_parameters()}
    masks = bf.prune(model, 0.5, "inputs", batch((6, 8)))
    assert set(masks) == {f"attention.{n}" for n in ("in_proj_weight", "out_proj.weight")} | {
        "convolution.weight",
        "head.weight",
    }
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "convolution.weight"):
        kept, size = magnitudes[name][masks[name]], masks[name].size
        assert abs(kept.size - size / 2) <= 1
        assert kept.min() >= magnitudes[name][~masks[name]].max()


class Watcher(nn.Module):
    """Notes how it is run."""

    seen: list[tuple[bool, bool, bool]]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), self.training))
        return x

    def __deepcopy__(self, memo: object) -> Watcher:
        other = Watcher()
        other.seen = self.seen
        return other


@pytest.mark.parametrize("by", SCORES)
def test_no_graph_is_built_and_nothing_else_changes(by: str) -> None:
    watcher = Watcher()
    watcher.seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), watcher, nn.Linear(8, 10))
    before = snapshot(model)
    masks = bf.prune(model, 0.5, by, batch())
    assert watcher.seen == ([(True, False, False)] if by == "inputs" else [])
    for name, value in model.state_dict().items():
        kept = torch.from_numpy(masks[name]) if name in masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept])
        assert not value[~kept].any()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for p in model.parameters():
        assert (p.requires_grad, p.grad, p.is_leaf, p.is_inference()) == (True, None, True, False)


SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4)


SHARE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.floats(0, 0.999))


class Beside(nn.Module):
    """Each layer on its own part of the input."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, : layer.in_features]) for layer in self.layers], 1)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 99), st.sampled_from([0.0, 0.7]), SHARE, SHARE, st.sampled_from(SCORES))
def test_counts_are_exact_and_masks_nested(
    sizes: list[tuple[int, int]], seed: int, round_to: float, one: float, other: float, by: str
) -> None:
    total, data = sum(i * o for i, o in sizes), batch((6,), 5)
    found: list[tuple[nn.Module, dict[str, npt.NDArray[np.bool_]]]] = []
    for share in (*sorted((one, other)), max(one, other)):
        model = Beside(perceptron(sizes, seed, round_to))
        before = snapshot(model)
        if math.floor(share * total) > total - len(sizes):
            with pytest.raises(OptionError, match="tensors keep one each"):
                bf.prune(model, share, by, data)
            assert_unchanged(model, before)
            return
        masks = bf.prune(model, share, by, data)
        assert lost(masks) == math.floor(share * total)
        assert all(mask.any() and not mask.all() for mask in masks.values())
        assert {name: mask.shape for name, mask in masks.items()} == {n: before[n].shape for n in masks}
        whole = {n: np.ones(tuple(p.shape), np.bool_) for n, p in model.named_parameters() if p.ndim > 1}
        assert masks.keys() <= whole.keys()
        found.append((model, whole | dict(masks)))
    less, more, again = found
    for name, mask in more[1].items():
        assert (mask <= less[1][name]).all()
        assert np.array_equal(mask, again[1][name])
    assert_unchanged(more[0], snapshot(again[0]))


@pytest.mark.parametrize("by", SCORES)
def test_pruning_what_is_pruned_goes_on_from_there(by: str) -> None:
    model, data = build("mlp", SHAPE, 10), batch()
    first, second = bf.prune(model, 0.5, by, data), bf.prune(model, 0.8, by, data)
    assert all((second[name] <= first[name]).all() for name in first)


def test_frozen_tensors_and_biases_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.get_parameter("0.weight").requires_grad_(False)
    before = snapshot(model)
    assert set(bf.prune(model, 0.5)) == {"1.weight"}
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"1.weight"}
    assert bf.prune(model, 0.0) == {}


def test_no_layer_vanishes_because_its_weights_start_small() -> None:
    model = build("lenet", (1, 28, 28), 10)
    with torch.no_grad():
        model.get_parameter("9.weight").mul_(1e-4)
    masks = bf.prune(model, 0.9)
    shares = {name: 1 - float(mask.mean()) for name, mask in masks.items()}
    assert shares["4.weight"] > 0.9  # the largest
    assert max(shares.get("0.weight", 0), shares["9.weight"]) < 0.7


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (nn.Linear(4, 4), {"share": 1.0}, OptionError, r"share = 1.0: expected a number >= 0 and < 1"),
        (nn.Linear(4, 4), {"share": math.nan}, OptionError, r"share = nan: expected"),
        (nn.Linear(4, 4), {"share": -0.1}, OptionError, r"share = -0.1: expected"),
        (nn.Linear(4, 4), {"share": "half"}, OptionError, r"share = 'half': expected"),
        (nn.Linear(4, 4), {"by": "magnitud"}, OptionError, r"by = 'magnitud': .*did you mean magnitude\?"),
        (nn.Linear(4, 4), {"by": "inputs"}, OptionError, r"data = None: expected examples"),
        (nn.Linear(4, 4), {"by": "inputs", "data": batch((4,), 0)}, DataError, "data: no examples: expected"),
        (nn.Linear(4, 4), {"by": "inputs", "data": batch((5,))}, ModelError, r"failed on inputs \(20, 5\)"),
        (nn.GroupNorm(2, 4), {}, ModelError, "nothing to prune: expected a trainable tensor"),
        (nn.Linear(4, 4).requires_grad_(False), {}, ModelError, "nothing to prune"),
    ],
)
def test_what_cannot_be_pruned_is_explained(
    model: nn.Module, options: dict[str, object], kind: type[BaffleError], message: str
) -> None:
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        bf.prune(model, **({"share": 0.5} | options))  # type: ignore[arg-type]  # by name
    assert_unchanged(model, before)


def test_weights_and_inputs_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.get_parameter("0.bias").data[1] = math.inf
    with pytest.raises(ModelError, match=r"1.weight: its inputs are not finite"):
        bf.prune(model, 0.5, "inputs", batch((4,)))
    model.get_parameter("1.weight").data[1, 2] = math.nan
    with pytest.raises(ModelError, match=r"1.weight: expected finite weights"):
        bf.prune(model, 0.5)


def test_masks_of_a_model_pruned_by_torch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    torch_prune.ln_structured(model[0], "weight", amount=0.5, n=1, dim=0)  # type: ignore[no-untyped-call]  # torch's
    torch_prune.l1_unstructured(model[2], "weight", amount=0.3)  # type: ignore[no-untyped-call]  # torch's
    told = r"0.weight is pruned by torch.nn.utils.prune, .* call torch.nn.utils.prune.remove\(module, 'weight'\)"
    for work in (
        lambda: bf.masks_of(model),
        lambda: bf.prune(model, 0.5),
        lambda: bf.shrink(model, 0.5, batch()),
    ):
        with pytest.raises(ModelError, match=told):
            work()
    expected = {f"{i}.weight": model.get_buffer(f"{i}.weight_mask").numpy() > 0 for i in (0, 2)}
    for i in (0, 2):
        torch_prune.remove(model[i], "weight")  # type: ignore[no-untyped-call]  # torch's
    masks = bf.masks_of(model)
    assert masks.keys() == expected.keys()
    assert all(np.array_equal(masks[name], mask) for name, mask in expected.items())
    runtime = bf.TorchRuntime(model, F.cross_entropy, threads=1, masks=masks)
    assert [spec.mask is not None for spec in runtime.table] == [False, True, False, True]  # biases first


def test_a_few_zeros_and_nothing_but_zeros_are_no_pruning() -> None:
    model = nn.Sequential(*(nn.Linear(20, 10) for _ in range(4)))
    for i, zeros in enumerate((1, 2, 200, 199)):
        model.get_parameter(f"{i}.weight").data = (torch.arange(200.0) >= zeros).float().view(10, 20)
    assert {name: 200 - lost({name: mask}) for name, mask in bf.masks_of(model).items()} == {
        "1.weight": 198,
        "3.weight": 1,
    }
    assert "3.weight" not in bf.masks_of(model[:3])
    model.get_parameter("1.weight").requires_grad_(False)
    assert set(bf.masks_of(model)) == {"3.weight"}


@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize(("name", "vocabulary"), [*((name, None) for name in MODELS), ("transformer", 9)])
def test_packaged_models_train_when_pruned(name: str, vocabulary: int | None, by: str) -> None:
    data = examples(name, vocabulary)
    model = build(name, data.x.shape[1:], 10, vocabulary=vocabulary)
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    masks = bf.prune(model, 0.6, by, data)
    assert lost(masks) == math.floor(0.6 * total)
    found = bf.masks_of(model)
    assert found.keys() <= masks.keys()
    assert all(np.array_equal(masks[name], mask) for name, mask in found.items())
    assert_trains(bf.TorchRuntime(model, F.cross_entropy, threads=1, masks=masks), data)

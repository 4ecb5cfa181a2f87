"""What needs no clock in the performance suite: reference loops against float64, figures, tables, pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from baffle.runtimes.pytorch.runtime import TorchRuntime
from bench.performance import graphs, profiles, references, results, workloads

SIGMA, K = 1e-2, 5


def small() -> tuple[nn.Module, list[references.Batch]]:
    """A model with a convolution, and the batches of two clients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(4 * 16, 10))
        batches = [(torch.randn(7, 1, 6, 6), torch.arange(7) % 3), (torch.randn(5, 1, 6, 6), torch.arange(5) % 3)]
    return model, batches


def exactly(model: nn.Module, batch: references.Batch, direction: list[Tensor]) -> float:
    """The forward difference along a direction, in float64."""

    def loss(step: float) -> float:
        moved = {
            name: p.detach().double() + step * d.double()
            for (name, p), d in zip(model.named_parameters(), direction, strict=True)
        }
        outputs = torch.func.functional_call(model.double(), moved, (batch[0].double(),))
        return float(cross_entropy(outputs, batch[1]))

    found = (loss(SIGMA) - loss(0.0)) / SIGMA
    model.float()
    return found


def test_the_published_loop_gives_forward_differences_along_its_directions() -> None:
    model, batches = small()
    before = [p.detach().clone() for p in model.parameters()]
    scalars = references.published(model, batches, K, SIGMA, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    expected = [
        [exactly(model, batch, [torch.randn(p.shape, generator=generator) for p in before]) for _ in range(K)]
        for batch in batches
    ]
    np.testing.assert_allclose(scalars.numpy(), expected, rtol=1e-3, atol=1e-4)
    for p, original in zip(model.parameters(), before, strict=True):  # taken away again, but for rounding
        torch.testing.assert_close(p.detach(), original, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, K, 2 * K])
def test_vmap_gives_forward_differences_along_its_directions(chunk: int) -> None:
    model, (batch, _) = small()
    scalars = references.vmapped(model, batch, K, SIGMA, torch.Generator().manual_seed(3), chunk)
    generator, expected = torch.Generator().manual_seed(3), []
    for start in range(0, K, chunk):
        count = min(chunk, K - start)
        drawn = [torch.randn(count, *p.shape, generator=generator) for p in model.parameters()]
        expected += [exactly(model, batch, [d[k] for d in drawn]) for k in range(count)]
    np.testing.assert_allclose(scalars.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_backpropagation_gives_the_gradient() -> None:
    model, (batch, _) = small()
    gradient = references.gradient(model, batch)
    direction = [torch.ones_like(p) for p in model.parameters()]
    towards = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    assert towards == pytest.approx(exactly(model, batch, direction), abs=10 * SIGMA)


def test_a_graph_with_constant_weights_computes_the_model() -> None:
    workload = workloads.Workload("small", (1, 6, 6), lambda: small()[0])
    batch = workload.examples(256)  # two chunks
    outputs = graphs.ConstantFolded(workloads.exported(workload), batch, threads=2).outputs(3)
    with torch.inference_mode():
        expected = workload.model()(torch.from_numpy(batch.inputs())).numpy()
    assert [len(passed) for passed in outputs] == [2, 2, 2]
    for passed in outputs:
        np.testing.assert_allclose(np.concatenate(passed), expected, rtol=1e-3, atol=1e-4)


def test_the_models_are_those_of_the_page() -> None:
    sizes = {name: sum(p.numel() for p in w.model().parameters()) for name, w in workloads.WORKLOADS.items()}
    assert sizes == {"lenet": 26_730, "wrn-10-2": 302_794, "transformer": 2_135_818, "mlp": 203_530}


def test_unperturbed_passes_are_that_many_of_the_same() -> None:
    workload = workloads.WORKLOADS["mlp"]
    runtime = TorchRuntime(workload.model(), cross_entropy, threads=2)
    batch = workload.examples(4)
    losses = runtime.losses(runtime.initial_weights(), workloads.unperturbed(runtime, 5), batch)
    expected = runtime.evaluate(runtime.initial_weights(), batch).losses
    np.testing.assert_allclose(losses, np.tile(expected, (5, 1)), rtol=1e-5)


def test_multiply_adds_are_counted_by_hand() -> None:
    x = torch.zeros(2, *workloads.WORKLOADS["lenet"].shape)
    one = 28 * 28 * 16 * 25 + 14 * 14 * 64 * 16 * 25 + 64 * 10
    assert profiles.multiply_adds(workloads.WORKLOADS["lenet"].model(), x) == 2 * one


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "matrix product"),
        ("aten::baddbmm", "matrix product"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::log_softmax", "loss"),
        ("aten::hardswish", "activation"),
        ("aten::native_group_norm", "normalisation"),
        ("MVN", "normalisation"),
        ("aten::add", "other element-wise"),
        ("Reorder", "copies"),
        ("Parameter", "other"),
    ],
)
def test_operations_have_kinds(operation: str, kind: str) -> None:
    assert profiles.kind_of(operation) == kind


def test_things_are_measured_in_turn_after_a_turn_that_does_not_count() -> None:
    calls: list[str] = []

    def note(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    with Progress(disable=True) as progress:
        found = results.in_turn({"a": lambda: note("a"), "b": lambda: note("b")}, 2, progress, "title")
    assert calls == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def figure(ours: list[float], target: float | None, wanted: results.Wanted = "at least") -> results.Result:
    """A figure whose reference is always 2."""
    samples = {"ours": ours, "loop": [2.0] * len(ours)}
    return results.compare("a case", samples, "ours", "loop", of="speed", unit="1/s", target=target, wanted=wanted)


def test_a_figure_is_the_median_of_ratios_and_knows_its_target() -> None:
    assert figure([2.0, 8.0, 6.0], None).ratio == 3.0
    assert figure([6.0], 3.0).met is True
    assert figure([6.0], 3.1).met is False
    assert figure([6.0], 3.0, "at most").met is True
    assert figure([6.0], 2.9, "at most").met is False
    assert figure([6.0], None).met is None


def test_a_table_goes_between_its_marks_and_leaves_the_rest() -> None:
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"
    text = results.table([figure([2.0, 8.0, 6.0], 2.5)])
    once = results.insert(page, "a", text)
    assert results.insert(once, "a", text) == once
    assert "old" not in once
    assert "| **3** (1 to 4) | at least 2.5 | yes |" in once
    assert [line for line in once.splitlines() if line in page.splitlines()] == [
        line for line in page.splitlines() if line != "old"
    ]
    with pytest.raises(ValueError, match=r"0 places between <!-- c --> and <!-- /c -->: expected one"):
        results.insert(page, "c", text)


def test_the_page_has_a_place_for_every_section() -> None:
    from bench.performance import __main__ as performance

    page = (performance.DOCS / "performance.md").read_text()
    for name in performance.PARTS:
        results.insert(page, name, "")
        assert f"images/performance-{name}.png" in page


def test_pictures_are_drawn(tmp_path: Path) -> None:
    results.bars([figure([2.0, 8.0, 6.0], 2.5), figure([40.0], None)], "A title", tmp_path / "bars.png")
    found = profiles.Profile("LeNet", "fp32", "torch", 10**8, [1e11, 2e11], [2.0, 1.0], {"convolution": 0.9})
    assert found.percent == pytest.approx(50.0)
    profiles.plot([found], tmp_path / "profiles.png")
    for name in ("bars.png", "profiles.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

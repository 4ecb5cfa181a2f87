"""All models: parameters, numpy references, seeds, what is refused, learning, and image layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baffle as bf
from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.errors import BaffleError, ModelError, OptionError
from baffle.models import MODELS, build
from baffle.models.parts import ACTIVATIONS, NORMS
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from random_models import assert_follows_reference, examples, fresh, logits, size, stirred


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("lenet", (1, 28, 28), 26_730),
        ("lenet", (1, 32, 32), 26_730),
        ("lenet", (3, 28, 28), 27_530),
        ("lenet", (3, 32, 32), 27_530),
        ("wrn-10-2", (1, 28, 28), 302_506),
        ("wrn-10-2", (1, 32, 32), 302_506),
        ("wrn-10-2", (3, 28, 28), 302_794),
        ("wrn-10-2", (3, 32, 32), 302_794),
        ("lenet-small", (1, 8, 8), 28_650),
        ("mlp", (1, 8, 8), 26_514),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_parameters_are_as_many_as_written_down(name: str, shape: tuple[int, ...], parameters: int, norm: str) -> None:
    assert size(build(name, shape, 10, norm=norm)) == parameters  # a normalisation has none


@pytest.mark.parametrize(
    ("name", "shape", "features"),
    [
        ("lenet", (3, 32, 32), 64),
        ("lenet-small", (1, 8, 8), 256),
        ("mlp", (1, 8, 8), 64),
        ("wrn-10-2", (3, 32, 32), 128),
    ],
)
def test_a_class_more_is_a_row_of_the_last_layer_more(name: str, shape: tuple[int, ...], features: int) -> None:
    assert size(build(name, shape, 100)) - size(build(name, shape, 10)) == 90 * (features + 1)


@pytest.mark.parametrize(
    ("name", "shape", "vocabulary"),
    [
        ("lenet", (1, 2, 2), None),
        ("lenet", (1, 28, 28), None),
        ("lenet", (5, 9, 16), None),
        ("lenet-small", (1, 4, 4), None),
        ("lenet-small", (2, 11, 7), None),
        ("wrn-10-2", (1, 4, 4), None),
        ("wrn-10-2", (3, 9, 14), None),
        ("mlp", (1, 8, 8), None),
        ("mlp", (7,), None),
        ("transformer", (1, 2, 3), None),
        ("transformer", (3, 15, 16), None),
        ("transformer", (3, 17, 18), None),
        ("transformer", (1, 5), None),
        ("transformer", (1,), 3),
        ("transformer", (12,), 100),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_a_batch_of_any_size_gives_a_number_a_class(
    name: str, shape: tuple[int, ...], vocabulary: int | None, norm: str, classes: int
) -> None:
    model = build(name, shape, classes, norm=norm, vocabulary=vocabulary)
    for count in (1, 2, 5):
        output = logits(model, examples(shape, vocabulary, count))
        assert output.shape == (count, classes)
        assert np.isfinite(output).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_follows_numpy(name: str, activation: str, norm: str) -> None:
    assert_follows_reference(name, (3, 8, 8), activation=activation, norm=norm)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet", (1, 7, 9)),  # the pooling leaves a row and a column out
        ("lenet", (3, 28, 28)),
        ("lenet-small", (1, 9, 14)),
        ("wrn-10-2", (1, 9, 10)),  # strides over an odd number of pixels
        ("wrn-10-2", (3, 16, 16)),
        ("mlp", (2, 3, 5)),
        ("transformer", (1, 9, 8)),
        ("transformer", (3, 17, 21)),  # patches of 4 x 4, the last rows and columns left out
    ],
)
def test_forward_follows_numpy_on_other_images_with_the_defaults(name: str, shape: tuple[int, ...]) -> None:
    assert_follows_reference(name, shape)


@pytest.mark.parametrize("name", MODELS)
def test_seeds_decide_the_weights_and_the_global_generator_stays(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        torch.cat([p.detach().reshape(-1) for p in build(name, (1, 8, 8), 10, seed).parameters()]) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert float((first != other).float().mean()) > 0.95  # all but zero biases
    torch.rand(3)
    stirred_up = torch.cat([p.detach().reshape(-1) for p in build(name, (1, 8, 8), 10, 5).parameters()])
    assert torch.equal(first, stirred_up)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lenet5"}, r"model = 'lenet5': expected one of .*\(did you mean lenet\?\)"),
        ({"name": "wrn-10"}, r"did you mean wrn-10-2\?"),
        ({"activation": "hard-swish"}, r"activation = 'hard-swish': .*did you mean hardswish\?"),
        ({"norm": "groups"}, r"norm = 'groups': expected one of group, none \(did you mean group\?\)"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(**({"name": "lenet", "shape": (1, 8, 8), "classes": 10} | options))  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet", (64,)),
        ("lenet", (8, 8)),
        ("lenet", (1, 1, 8)),
        ("lenet", (1, 1, 8, 8)),
        ("lenet-small", (1, 8, 3)),
        ("wrn-10-2", (1, 3, 4)),
        ("wrn-10-2", (32, 32)),
        ("transformer", (5,)),
        ("transformer", (1, 1, 8)),
        ("transformer", (1, 2, 8, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_model_and_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as error:
        build(name, shape, 10)
    for word in (name, str(shape), "expected"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", [name for name in MODELS if not MODELS[name].tokens])
def test_tokens_are_refused_where_numbers_are_needed(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}.*floating point, not integer tokens"):
        build(name, (1, 8, 8), 10, vocabulary=17)


BUILDERS = """
import torch
from torch import nn
from baffle.errors import ModelError

LAYER = nn.Linear(3, 2)

def linear(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], classes))

def number(shape, classes):
    return 3

def breaks(shape, classes):
    raise KeyError("no such layer")

def refuses(shape, classes):
    raise ModelError("only small images")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_builders.py").write_text(BUILDERS)
    (tmp_path / "own_broken.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_a_model_of_ones_own_is_built_from_the_seed() -> None:
    model = build("own_builders:linear", (6,), 4, seed=2)
    weight, bias = model.parameters()
    expected = fresh(2, lambda: nn.Linear(6, 4))
    assert torch.equal(weight, expected[0])
    assert torch.equal(bias, expected[1])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("option", "value"), [("activation", "relu"), ("norm", "none")])
def test_a_model_of_ones_own_takes_no_activation_and_no_norm(option: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"{option} = '{value}': expected none with a model of your own"):
        build("own_builders:linear", (6,), 4, **{option: value})  # type: ignore[arg-type]  # by name


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("own_builders:number", OptionError, r"own_builders:number.*torch\.nn\.Module; it gave int"),
        ("own_builders:breaks", ModelError, r"own_builders:breaks.*shape \(6,\).*no such layer"),
        ("own_builders:refuses", ModelError, r"^only small images$"),
        ("own_builders:missing", OptionError, r"importable package\.module:builder \(.*missing"),
        ("own_builders:__name__", OptionError, r"a callable of \(shape, classes\)"),
        ("own_builders:LAYER", ModelError, r"own_builders:LAYER.*cannot be built"),
        ("own_broken:linear", OptionError, r"no_such_module"),
        ("own_absent:linear", OptionError, r"own_absent"),
        (":linear", OptionError, r"importable"),
        ("own_builders:", OptionError, r"importable"),
    ],
)
def test_builders_that_give_no_model_are_explained(name: str, kind: type[BaffleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(name, (6,), 4)


@pytest.mark.parametrize("name", MODELS)
def test_an_example_does_not_depend_on_its_neighbours(name: str) -> None:
    model, x = stirred(build(name, (1, 8, 8), 5)), examples((1, 8, 8), count=6)
    alone = np.concatenate([logits(model, x[i : i + 1]) for i in range(6)])
    assert np.abs(alone - logits(model, x)).max() < 1e-5


def stripes() -> Dataset:
    """Images with bright rows, or bright columns."""
    x = np.random.default_rng(0).normal(size=(48, 1, 8, 8)) / 2
    x[::2, :, ::2] += 2
    x[1::2, :, :, ::2] += 2
    return Dataset(x, np.arange(48) % 2)


def shifted() -> Dataset:
    """Vectors around zero, or around one."""
    y = np.arange(48) % 2
    return Dataset(np.random.default_rng(0).normal(size=(48, 6, 5)) / 2 + y[:, None, None], y)


def words() -> Dataset:
    """Texts of tokens 1 to 4, or of 1 to 8, some of them padded."""
    rng = np.random.default_rng(0)
    y = np.arange(48) % 2
    x = rng.integers(1, 5, (48, 8)) + 4 * y[:, None] * rng.integers(0, 2, (48, 8))
    x[::3, 6:] = 0
    return Dataset(x, y)


@pytest.mark.parametrize(
    ("name", "data", "vocabulary"),
    [*((name, stripes, None) for name in MODELS), ("transformer", shifted, None), ("transformer", words, 9)],
)
def test_it_learns_by_forward_passes(name: str, data: Callable[[], Dataset], vocabulary: int | None) -> None:
    train = data()
    model = build(name, train.x.shape[1:], 2, vocabulary=vocabulary)
    runtime = TorchRuntime(model, F.cross_entropy, threads=1)
    before = runtime.evaluate(runtime.initial_weights(), train).losses.mean()
    method = bf.Method(num_directions=20, batch_size=16, optimizer=bf.adam(0.02), ema=0.5)
    run = bf.fit(model, bf.partition(train, 2), loss=F.cross_entropy, test=train, rounds=12, method=method)
    assert run.loss is not None
    assert run.accuracy is not None
    assert run.loss < 0.65 * before
    assert run.accuracy > 0.8


class Layouts(nn.Module):
    """Passes its input on, and notes whether it lay channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __deepcopy__(self, memo: object) -> Layouts:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return x


def direct_losses(model: nn.Module, data: Dataset, asked: Perturbations) -> npt.NDArray[np.float32]:
    """Losses of every pass by PyTorch alone: weights and inputs as they were made, each layer's layout its own."""
    runtime = TorchRuntime(model, F.cross_entropy, threads=1)
    weights, rows = runtime.initial_weights(), []
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    assert x.is_contiguous()
    for perturbed in asked.weights(weights, weights.copy()):
        flat = torch.from_numpy(perturbed.copy())
        parameters = {spec.name: flat[spec.slice].view(spec.shape) for spec in runtime.table}
        with torch.inference_mode():
            output = torch.func.functional_call(model, parameters, (x,))
            rows.append(F.cross_entropy(output, y, reduction="none").numpy())
    return np.stack(rows)


def assert_losses_are_direct(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> None:
    data = Dataset(examples(shape, count=150), np.arange(150) % 10)  # two chunks
    runtime = TorchRuntime(model, F.cross_entropy, threads=1)
    asked = Perturbations(Directions(runtime.table, "rank1", (3, 1)), 4, (0.01,), baseline=True)
    expected = direct_losses(model, data, asked)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the passes differ
    assert np.abs(runtime.losses(runtime.initial_weights(), asked, data) - expected).max() < 1e-5
    assert np.abs(runtime.evaluate(runtime.initial_weights(), data).losses - expected[0]).max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_losses_do_not_depend_on_the_layout_of_images(name: str, channels: int) -> None:
    assert_losses_are_direct(stirred(build(name, (channels, 8, 8), 10)), (channels, 8, 8))


def test_convolutions_are_given_channels_last() -> None:
    before, after = Layouts(), Layouts()
    convolution = nn.Conv2d(3, 16, 5, padding=2)
    assert_losses_are_direct(nn.Sequential(before, convolution, after, nn.Flatten(), nn.Linear(1024, 10)))
    for spy in (before, after):
        assert (spy.seen[0], spy.seen[-1]) == (False, True)  # by PyTorch alone, and by the runtime


class Views(nn.Module):
    """Calls ``view`` on a convolution's output, which channels last cannot do."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.view, self.linear = nn.Conv2d(3, 4, 3, padding=1), view, nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(self.view(self.convolution(x))))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(len(x), -1),
        lambda x: x.view(-1, 256),
        lambda x: x.view(x.shape[0] * x.shape[1], 64).reshape(x.shape[0], 256),  # possible for one example alone
    ],
    ids=["whole examples", "any number", "maps"],
)
def test_a_model_that_views_a_convolution_keeps_its_layout(view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    assert_losses_are_direct(Views(view))

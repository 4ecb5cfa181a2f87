"""The models: their size, their forward pass against numpy, how they start, what they refuse; each of them learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baffle as bf
import reference
from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.errors import BaffleError, ModelError, OptionError
from baffle.models import MODELS, build
from baffle.models.parts import ACTIVATIONS, NORMS, groups, norm_of
from baffle.models.transformer import Transformer, transformer
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

REFERENCES: dict[str, Callable[[reference.Parameters, reference.Array, str, str], reference.Array]] = {
    "lenet": reference.lenet,
    "lenet-small": reference.lenet_small,
    "mlp": reference.mlp,
    "transformer": reference.transformer,
    "wrn-10-2": reference.wrn_10_2,
}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that are nowhere zero or alike, so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def examples(shape: tuple[int, ...], vocabulary: int | None = None, count: int = 3) -> npt.NDArray[np.generic]:
    rng = np.random.default_rng(0)
    if vocabulary is None:
        return rng.normal(size=(count, *shape)).astype(np.float32)
    return rng.integers(0, vocabulary, (count, *shape))


def logits(model: nn.Module, x: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(x)).numpy())


def assert_follows_reference(
    name: str,
    shape: tuple[int, ...],
    *,
    activation: str | None = None,
    norm: str | None = None,
    vocabulary: int | None = None,
) -> None:
    model = stirred(build(name, shape, 7, 1, activation=activation, norm=norm, vocabulary=vocabulary))
    x = examples(shape, vocabulary)
    parameters = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    expected = REFERENCES[name](parameters, x.astype(np.float64), activation or "hardswish", norm or MODELS[name].norm)
    assert expected.shape == (len(x), 7)
    assert expected.std(0).max() > 0.01  # the examples differ
    assert np.abs(logits(model, x) - expected).max() < 2e-6 * np.abs(expected).max()


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


def test_the_transformers_parameters_are_those_of_its_parts() -> None:
    block = (64 * 192 + 192) + (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64)
    rest = 2 * block + 64 * 10 + 10
    assert size(build("transformer", (3, 32, 32), 10)) == rest + 64 * 3 * 16 + 64 + 64 * 64  # 8 x 8 patches of 4 x 4
    assert size(build("transformer", (3, 16, 40), 10)) == rest + 64 * 3 * 16 + 64 + 40 * 64  # 4 x 10 of 4 x 4
    assert size(build("transformer", (3, 15, 40), 10)) == rest + 64 * 3 * 4 + 64 + 140 * 64  # 7 x 20 of 2 x 2
    assert size(build("transformer", (20, 5), 10)) == rest + 5 * 64 + 64 + 20 * 64
    assert size(build("transformer", (20,), 10, vocabulary=50)) == rest + 50 * 64 + 20 * 64


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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["hardswish", "gelu"])
def test_transformer_on_vectors_and_tokens_follows_numpy(norm: str, activation: str) -> None:
    assert_follows_reference("transformer", (12, 5), norm=norm, activation=activation)
    assert_follows_reference("transformer", (12,), norm=norm, activation=activation, vocabulary=4)  # a quarter: padding


def test_groups_divide_the_channels() -> None:
    assert {channels: groups(channels) for channels in reference.GROUPS} == reference.GROUPS
    for channels in range(1, 300):
        assert channels % groups(channels) == 0
        assert 1 <= groups(channels) <= max(2, channels // 16)


def test_norms_have_no_parameters() -> None:
    assert not list(norm_of("group", 64).parameters())
    assert isinstance(norm_of("none", 64), nn.Identity)


def fresh(seed: int, *layers: Callable[[], nn.Module]) -> list[Tensor]:
    """The parameters that PyTorch gives these layers under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [p for layer in layers for p in layer().parameters()]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet", (lambda: nn.Conv2d(3, 16, 5), lambda: nn.Conv2d(16, 64, 5), lambda: nn.Linear(64, 10))),
        ("lenet-small", (lambda: nn.Conv2d(3, 16, 5), lambda: nn.Conv2d(16, 64, 5), lambda: nn.Linear(256, 10))),
        ("mlp", (lambda: nn.Linear(192, 200), lambda: nn.Linear(200, 64), lambda: nn.Linear(64, 10))),
    ],
)
def test_lenets_and_mlp_start_as_pytorch_starts_their_layers(
    name: str, layers: tuple[Callable[[], nn.Module], ...], seed: int
) -> None:
    found, expected = list(build(name, (3, 8, 8), 10, seed).parameters()), fresh(seed, *layers)
    assert [p.shape for p in found] == [p.shape for p in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_uniform(values: Tensor, bound: float) -> None:
    """Within the bound, up to it, and with the spread of a uniform distribution."""
    flat = values.detach().double().numpy().ravel()
    assert np.abs(flat).max() <= bound * (1 + 1e-6)
    assert np.abs(flat).max() > bound * (1 - 20 / flat.size)
    assert flat.std() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(flat.size))
    assert abs(flat.mean()) < 5 * bound / math.sqrt(3 * flat.size)


def test_wrn_starts_kaiming_uniform_and_xavier_uniform_without_biases() -> None:
    parameters = dict(build("wrn-10-2", (3, 32, 32), 10, seed=4).named_parameters())
    convolutions = {n: p for n, p in parameters.items() if p.ndim == 4}
    assert len(convolutions) == 10
    for weight in convolutions.values():
        _, channels, height, width = weight.shape
        assert_uniform(weight, math.sqrt(6 / (channels * height * width)))
    assert_uniform(parameters["8.weight"], math.sqrt(6 / (128 + 10)))
    assert [n for n, p in parameters.items() if p.ndim == 1] == ["0.bias", "8.bias"]
    assert not parameters["0.bias"].any()
    assert not parameters["8.bias"].any()


def test_transformer_starts_with_small_embeddings_and_positions() -> None:
    model = build("transformer", (50,), 10, seed=3, vocabulary=400)
    assert isinstance(model, Transformer)
    embedding = model.get_parameter("embed.weight").detach()
    assert float(embedding.std()) == pytest.approx(0.1, rel=0.02)
    assert float(embedding.mean()) == pytest.approx(0, abs=0.003)
    assert float(model.positions.detach().std()) == pytest.approx(0.02, rel=0.05)
    for name, p in model.named_parameters():
        if name.startswith("blocks") and name.endswith("weight"):
            assert_uniform(p, 1 / math.sqrt(p.shape[1]))


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


def test_transformer_refuses_tokens_of_other_shapes() -> None:
    for shape in ((4, 4), (1, 8, 8)):
        with pytest.raises(ModelError, match=r"tokens of shape .*expected .*integer tokens \(tokens,\)"):
            build("transformer", shape, 10, vocabulary=5)


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


def text_model(seed: int = 0, length: int = 6) -> Transformer:
    model = stirred(build("transformer", (length,), 3, seed, vocabulary=9), seed)
    assert isinstance(model, Transformer)
    return model


TEXT = np.array([[3, 1, 4, 1, 5, 0], [2, 7, 0, 8, 0, 0], [6, 0, 0, 0, 0, 0]])


def changed_rows(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> list[bool]:
    return [bool(np.abs(a - b).max() > 1e-4) for a, b in zip(before, after, strict=True)]


def test_what_padding_embeds_to_and_where_it_stands_has_no_effect() -> None:
    model = text_model()
    before = logits(model, TEXT)
    with torch.no_grad():
        model.get_parameter("embed.weight")[0] += 5
    assert np.array_equal(logits(model, TEXT), before)
    for position, who in enumerate((TEXT != 0).T.tolist()):
        model = text_model()
        with torch.no_grad():
            model.positions[position] += torch.linspace(-2, 3, 64)
        assert changed_rows(before, logits(model, TEXT)) == who  # those who have a token there, and nobody else


@pytest.mark.parametrize("token", range(1, 9))
def test_every_other_token_counts_where_it_stands(token: int) -> None:
    model = text_model()
    before = logits(model, TEXT)
    with torch.no_grad():
        model.get_parameter("embed.weight")[token] += torch.linspace(-2, 3, 64)
    assert changed_rows(before, logits(model, TEXT)) == np.equal(TEXT, token).any(1).tolist()


def test_a_text_is_the_same_in_a_model_with_room_for_more_padding() -> None:
    short, long = text_model(length=6), transformer((9,), 3, vocabulary=9)
    state = dict(short.state_dict())
    state["positions"] = torch.cat([state["positions"], torch.randn(3, 64)])
    long.load_state_dict(state)
    padded = np.pad(TEXT, ((0, 0), (0, 3)))
    assert np.abs(logits(short, TEXT) - logits(long, padded)).max() < 1e-6


def test_an_empty_text_is_its_first_token() -> None:
    model = text_model()
    before = logits(model, np.zeros((2, 6), np.int64))
    assert np.isfinite(before).all()
    with torch.no_grad():
        model.positions[1:] += 3
    assert np.array_equal(logits(model, np.zeros((2, 6), np.int64)), before)
    with torch.no_grad():
        model.positions[0] += torch.linspace(-2, 3, 64)
    assert changed_rows(before, logits(model, np.zeros((2, 6), np.int64))) == [True, True]


def test_tokens_have_an_order_and_without_positions_they_have_none() -> None:
    model, order = text_model(), [0, 3, 1, 2, 4, 5]
    moved = TEXT[:1, order]
    assert np.abs(logits(model, TEXT[:1]) - logits(model, moved)).max() > 1e-3
    with torch.no_grad():
        model.positions.zero_()
    assert np.abs(logits(model, TEXT[:1]) - logits(model, moved)).max() < 1e-6


def test_attention_heads_can_be_permuted() -> None:
    model, x = stirred(build("transformer", (7, 5), 4)), examples((7, 5))
    before = logits(model, x)
    channels = np.arange(64).reshape(4, 16)[[2, 0, 3, 1]].reshape(-1)
    with torch.no_grad():
        for block in ("blocks.0", "blocks.1"):
            for kind in ("weight", "bias"):
                p = model.get_parameter(f"{block}.qkv.{kind}")
                p.copy_(p.view(3, 64, *p.shape[1:])[:, channels].reshape(p.shape))
            mix = model.get_parameter(f"{block}.mix.weight")
            mix.copy_(mix[:, channels].clone())
    assert np.abs(logits(model, x) - before).max() < 1e-6


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

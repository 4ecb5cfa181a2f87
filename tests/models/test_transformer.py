"""The transformer: its parts, padding, positions and heads."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from baffle.errors import ModelError
from baffle.models import build
from baffle.models.parts import NORMS
from baffle.models.transformer import Transformer, transformer
from random_models import assert_follows_reference, assert_uniform, examples, logits, size, stirred


def test_the_transformers_parameters_are_those_of_its_parts() -> None:
    block = (64 * 192 + 192) + (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64)
    rest = 2 * block + 64 * 10 + 10
    assert size(build("transformer", (3, 32, 32), 10)) == rest + 64 * 3 * 16 + 64 + 64 * 64  # 8 x 8 patches of 4 x 4
    assert size(build("transformer", (3, 16, 40), 10)) == rest + 64 * 3 * 16 + 64 + 40 * 64  # 4 x 10 of 4 x 4
    assert size(build("transformer", (3, 15, 40), 10)) == rest + 64 * 3 * 4 + 64 + 140 * 64  # 7 x 20 of 2 x 2
    assert size(build("transformer", (20, 5), 10)) == rest + 5 * 64 + 64 + 20 * 64
    assert size(build("transformer", (20,), 10, vocabulary=50)) == rest + 50 * 64 + 20 * 64


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["hardswish", "gelu"])
def test_transformer_on_vectors_and_tokens_follows_numpy(norm: str, activation: str) -> None:
    assert_follows_reference("transformer", (12, 5), norm=norm, activation=activation)
    assert_follows_reference("transformer", (12,), norm=norm, activation=activation, vocabulary=4)  # a quarter: padding


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


def test_transformer_refuses_tokens_of_other_shapes() -> None:
    for shape in ((4, 4), (1, 8, 8)):
        with pytest.raises(ModelError, match=r"tokens of shape .*expected .*integer tokens \(tokens,\)"):
            build("transformer", shape, 10, vocabulary=5)


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

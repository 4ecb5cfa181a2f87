"""``baffle train`` with options for data, model and clients: each trains what the library trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

import baffle as bf
from baffle.models import build
from cli_helpers import OF_USERS, SHORT, TRAIN_SHORT, config, cut, last_json, metrics, refused, save_users, tokens
from helpers import copy_run, invoke, linear

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


@dataclass(frozen=True)
class Variant:
    """Flags of a run, the clients' data by the library, and whether it trains to the weights of a plain run."""

    flags: tuple[str, ...]
    clients: Callable[[Path], tuple[bf.Dataset, ...]] = lambda folder: bf.partition(bf.load("digits")[0], 2)
    plain: bool = False


def of_arrays(folder: Path) -> bf.Dataset:
    return bf.load("arrays", folder / "mine.npz")[0]


EVERYTHING = (
    *("--model", "lenet-small", "--augment", "--holdout", "5", "--partition", "shards", "--shards", "3"),
    *("--activation", "gelu", "--norm", "group", "--guard", "stop", "--seed", "7", "--clients", "3"),
)


VARIANTS = {
    "augment": Variant(("--augment",), lambda folder: bf.partition(bf.load("digits", augmented=True)[0], 2)),
    "holdout": Variant(
        ("--holdout", "5"), lambda folder: bf.partition(bf.hold_out(bf.load("digits")[0], 5)[0], clients=2)
    ),
    "shards": Variant(
        ("--partition", "shards", "--shards", "3"), lambda folder: bf.partition(bf.load("digits")[0], 2, shards=3)
    ),
    "activation": Variant(("--activation", "relu")),
    "norm": Variant(("--norm", "group")),
    "wrn without norm": Variant(("--model", "wrn-10-2", "--norm", "none", "--clients", "2")),
    "guard stop": Variant(("--guard", "stop"), plain=True),
    "guard off": Variant(("--guard", "off"), plain=True),
    "column": Variant(
        (*OF_USERS, "--partition", "column", "--clients", "4"),
        lambda folder: bf.partition(of_arrays(folder), column=True),
    ),
    "tokens": Variant((*OF_USERS, "--model", "transformer"), lambda folder: bf.partition(of_arrays(folder), 2)),
    "tokens held out by column": Variant(
        (*OF_USERS, "--model", "transformer", "--partition", "column", "--clients", "4", "--holdout", "3"),
        lambda folder: bf.partition(bf.hold_out(of_arrays(folder), 3)[0], column=True),
    ),
    "everything": Variant(
        EVERYTHING,
        lambda folder: bf.partition(
            bf.hold_out(bf.load("digits", augmented=True)[0], 5, seed=7)[0], 3, shards=3, seed=7
        ),
    ),
}


RESULTS = ("weights_sha256", "accuracy", "loss", "validation_accuracy", "validation_loss", "rounds", "updates")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_librarys_and_survives_an_interruption(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, plain: Path, name: str
) -> None:
    variant, run = VARIANTS[name], tmp_path / "run"
    if "arrays" in variant.flags:
        save_users(tmp_path / "mine.npz", **(tokens() if "tokens" in name else {}))
    undisturbed = last_json(invoke(tmp_path, *TRAIN_SHORT, *variant.flags))

    command = config(run)["command"]
    for flag, value in zip(variant.flags, (*variant.flags[1:], "--"), strict=True):
        if flag.startswith("--") and flag != "--data":
            expected = "True" if value.startswith("--") else value
            assert str(command[flag[2:].replace("-", "_")]) == expected

    clients = variant.clients(tmp_path)
    engine = bf.LocalEngine(bf.TorchRuntime(linear(), F.cross_entropy, 1), clients)
    assert config(run)["plan"]["data"] == engine.plan["data"]
    assert config(run)["clients"] == [len(client) for client in clients]
    assert (undisturbed["weights_sha256"] == metrics(plain)[-1]["weights_sha256"]) == variant.plain

    elsewhere = tmp_path_factory.mktemp("elsewhere")  # the data are found from anywhere
    tested = last_json(invoke(elsewhere, "evaluate", run, "--json"))
    assert (tested["accuracy"], tested["loss"]) == (undisturbed["accuracy"], undisturbed["loss"])
    cut(run, 3)
    resumed = last_json(invoke(elsewhere, "resume", run, "--json"))
    assert [resumed[name] for name in RESULTS] == [undisturbed[name] for name in RESULTS]
    assert last_json(invoke(elsewhere, "evaluate", run, "--json")) == tested


def test_activation_and_norm_build_that_model(tmp_path: Path) -> None:
    options = ("--model", "lenet-small", "--activation", "selu", "--norm", "group")
    summary = last_json(invoke(tmp_path, *TRAIN_SHORT, *options))
    model = build("lenet-small", (1, 8, 8), 10, activation="selu", norm="group")
    _, test = bf.load("digits")
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(tmp_path / "run/model.safetensors").items()})
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.from_numpy(np.asarray(test.x))), torch.from_numpy(np.asarray(test.y)))
    assert float(loss) == pytest.approx(summary["loss"], rel=1e-5)


def test_rounds_are_judged_by_held_out_data_and_the_end_by_the_test(tmp_path: Path) -> None:
    summary = last_json(
        invoke(tmp_path, *TRAIN_SHORT, "--holdout", "12", "--seed", "4", "--lr", "0.05", "--ema", "0.5")
    )
    train, test = bf.load("digits")
    rest, held = bf.hold_out(train, 12, seed=4)
    journal = bf.Journal.open(tmp_path / "run")
    model = build("mlp", (1, 8, 8), 10)

    def measure(round: int, data: bf.Dataset) -> tuple[float, float]:
        bf.Run(journal.config, journal.state(round), (), None, None).load_into(model)
        y = torch.from_numpy(np.asarray(data.y))
        with torch.no_grad():
            outputs = model(torch.from_numpy(np.asarray(data.x)))
        return float(F.cross_entropy(outputs, y)), float((outputs.argmax(1) == y).float().mean())

    assert [m["round"] for m in metrics(tmp_path / "run")] == list(range(5))
    for m in metrics(tmp_path / "run"):
        assert isinstance(m["round"], int)
        assert (m["loss"], m["accuracy"]) == pytest.approx(measure(m["round"], held), rel=1e-4)
        assert m["loss"] != pytest.approx(measure(m["round"], test)[0], rel=1e-4)
    assert (summary["validation_loss"], summary["validation_accuracy"]) == pytest.approx(measure(4, held), rel=1e-4)
    assert (summary["loss"], summary["accuracy"]) == pytest.approx(measure(4, test), rel=1e-4)
    assert sum(journal.config.clients) == len(rest) == 1438 - 120


def test_without_held_out_data_the_summary_has_no_validation(plain: Path, tmp_path: Path) -> None:
    summary = last_json(invoke(tmp_path, "resume", copy_run(plain, tmp_path / "copy"), "--json"))
    assert (summary["validation_accuracy"], summary["validation_loss"]) == (None, None)
    assert (summary["accuracy"], summary["loss"]) == tuple(metrics(plain)[-1][k] for k in ("accuracy", "loss"))


def test_held_out_tokens_are_in_the_vocabulary(tmp_path: Path) -> None:
    arguments = (*TRAIN_SHORT, *OF_USERS, "--model", "transformer", "--rounds", "1", "--holdout", "15")
    save_users(tmp_path / "mine.npz", **tokens(largest=40))
    for seed in range(2):  # the one example with token 40 is held out with seed 1 alone
        assert (bf.hold_out(of_arrays(tmp_path), 15, seed)[0].x.max() == 40) == (seed == 0)
        summary = last_json(invoke(tmp_path, *arguments, "--seed", str(seed), "--out", f"run {seed}"))
        assert summary["parameters"] == sum(
            p.numel() for p in build("transformer", (6,), 3, vocabulary=41).parameters()
        )


@pytest.mark.parametrize(
    "x",
    [np.zeros((75, 0), np.int64), np.where(np.arange(450).reshape(75, 6) == 100, -1, 5)],
    ids=["sentences of no tokens", "negative tokens"],
)
def test_tokens_that_cannot_be_embedded_are_one_line(tmp_path: Path, x: npt.NDArray[np.int64]) -> None:
    save_users(tmp_path / "mine.npz", x_train=x[:60], x_test=x[60:])
    refused(invoke(tmp_path, *TRAIN_SHORT, *OF_USERS, "--model", "transformer"))
    assert not (tmp_path / "run").exists()


def test_a_toml_file_takes_the_same_options(tmp_path: Path) -> None:
    lines = {
        "model": '"lenet-small"',
        "augment": "true",
        "holdout": "5",
        "partition": '"shards"',
        "shards": "3",
        "activation": '"gelu"',
        "norm": '"group"',
        "guard": '"stop"',
        "seed": "7",
        "clients": "3",
    }
    flags = zip(SHORT[4::2], SHORT[5::2], strict=True)
    rest = [f"{flag[2:]} = {value if value.isdigit() else repr(value)}" for flag, value in flags]
    (tmp_path / "o.toml").write_text("\n".join([*(f"{name} = {value}" for name, value in lines.items()), *rest]))
    by_file = last_json(invoke(tmp_path, "train", "o.toml", "--json", "--out", "file"))
    by_flags = last_json(invoke(tmp_path, *TRAIN_SHORT, *EVERYTHING))
    assert [by_file[name] for name in RESULTS] == [by_flags[name] for name in RESULTS]
    assert config(tmp_path / "file")["command"] == config(tmp_path / "run")["command"]
    others = ("--no-augment", "--shards", "2", "--guard", "off", "--norm", "none")
    assert invoke(tmp_path, "train", "o.toml", "--out", "won", *others).code == 0
    command = config(tmp_path / "won")["command"]
    assert [command[name] for name in ("augment", "shards", "guard", "norm", "holdout", "activation")] == [
        *(False, 2, "off", "none"),
        *(5, "gelu"),
    ]

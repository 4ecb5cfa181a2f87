"""What the commands can do besides the plain run: models, data, variants of training, pages, divergence."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

import baffle as bf
from baffle.data.official import OFFICIAL
from baffle.errors import BaffleError
from baffle.models import MODELS, build
from baffle.runtimes import choose
from baffle.training.build import assemble_server
from baffle.training.options import TrainConfig
from helpers import Outcome, copy_run, flip, invoke, linear, places, tree

SMALL = (
    *("--model", "mlp", "--clients", "2", "--batch-size", "4", "--num-directions", "2", "--rounds", "4"),
    *("--threads", "1", "--evaluate-every", "1", "--snapshot-every", "2"),
)
TRAIN = ("train", *SMALL, "--json", "--out", "run")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command of this file looks for another machine."""
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAFFLE_DATA", raising=False)


def last_json(outcome: Outcome) -> dict[str, object]:
    assert outcome.code == 0, outcome.err
    result: dict[str, object] = json.loads(outcome.out.splitlines()[-1])
    return result


def refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one line on stderr that names what is wrong, nothing on stdout."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def metrics(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def config(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "config.json").read_text())
    return found


def cut(run: Path, row: int) -> None:
    """Leave rows before ``row``, and half of it."""
    at = places(run)[row]
    with (run / "rows.bin").open("r+b") as file:
        file.truncate((at.start + at.end) // 2)


def assert_is_png(file: Path) -> None:
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack_from(">II", data, 16)) >= 100


# --- arrays of the user's own

GROUPS = np.array([f"user {i % 4}" for i in range(60)])


def save(file: Path, **changes: object) -> Path:
    """An .npz of 60 + 15 vectors of three classes that belong to four users, or with changes."""
    labels = np.arange(75) % 3
    x = (np.random.default_rng(0).normal(size=(75, 5)) + np.eye(3, 5)[labels]).astype(np.float32)
    mine = {"x_train": x[:60], "y_train": labels[:60], "x_test": x[60:], "y_test": labels[60:], "groups_train": GROUPS}
    kept = {name: np.asarray(value) for name, value in (mine | changes).items() if value is not None}
    np.savez(file, **kept)  # type: ignore[arg-type]  # numpy's stub takes a keyword for allow_pickle
    return file


def tokens(largest: int = 19) -> dict[str, object]:
    """Sentences of six tokens, padded with zeros; one example has the largest."""
    x = np.random.default_rng(1).integers(1, 19, (75, 6))
    x[::5, 4:] = 0
    x[7, 2] = largest
    return {"x_train": x[:60], "x_test": x[60:]}


# --- models

PARAMETERS = {
    "lenet": (26730, 27530),
    "lenet-small": (57450, 67850),
    "wrn-10-2": (302506, 302794),
    "mlp": (784 * 200 + 200 + 200 * 64 + 64 + 64 * 10 + 10, 3072 * 200 + 200 + 200 * 64 + 64 + 64 * 10 + 10),
    "transformer": (71306, 74314),
}


def test_models_lists_every_model_with_its_parameters_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "passes_per_second", None)  # who calls it, fails
    outcome = invoke(tmp_path, "models", "--seconds", "0")
    assert (outcome.code, outcome.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert rows == [[name, f"{grey:,}", "", f"{colour:,}", ""] for name, (grey, colour) in PARAMETERS.items()]
    assert list(PARAMETERS) == list(MODELS)


def test_models_as_json(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "models", "--seconds", "0", "--json", "--batch-size", "5")
    found = last_json(outcome)
    assert outcome.out.count("\n") == 1
    assert found["batch_size"] == 5
    assert found["models"] == [
        {
            "model": name,
            "about": MODELS[name].about,
            "grey_parameters": grey,
            "grey_passes_per_second": None,
            "colour_parameters": colour,
            "colour_passes_per_second": None,
        }
        for name, (grey, colour) in PARAMETERS.items()
    ]
    assert all(len(architecture.about) > 20 for architecture in MODELS.values())


def test_models_measures_every_speed(tmp_path: Path) -> None:
    arguments = ("models", "--seconds", "0.01", "--threads", "1", "--batch-size", "2", "--json")
    models = last_json(invoke(tmp_path, *arguments))["models"]
    assert isinstance(models, list)
    assert len(models) == len(MODELS)
    assert all(model[f"{kind}_passes_per_second"] > 0 for model in models for kind in ("grey", "colour"))


def test_models_measures_what_it_was_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(runtime: bf.TorchRuntime, batch: bf.Dataset, seconds: float) -> float:
        asked.append((batch.x.shape, len(runtime.initial_weights()), runtime.plan["threads"], seconds))
        return 1234.56

    monkeypatch.setattr(choose, "passes_per_second", measure)
    arguments = ("models", "--batch-size", "3", "--threads", "3", "--seconds", "0.25")
    assert invoke(tmp_path, *arguments).out.count("1,235") == 2 * len(MODELS)
    expected = [
        ((3, *shape), parameters, 3, 0.25)
        for both in PARAMETERS.values()
        for shape, parameters in zip(((1, 28, 28), (3, 32, 32)), both, strict=True)
    ]
    assert asked == expected
    models = last_json(invoke(tmp_path, *arguments, "--json"))["models"]
    assert isinstance(models, list)
    assert {model["colour_passes_per_second"] for model in models} == {1234.6}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--batch-size", "0"), "--batch-size"),
        (("--batch-size", "many"), "--batch-size"),
        (("--threads", "0"), "--threads"),
        (("--seconds", "-1"), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--seconds", "601"), "--seconds"),
        (("--model", "mlp"), "--model"),
        (("mlp",), "mlp"),
    ],
)
def test_models_refuses_bad_options_in_one_line(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    refused(invoke(tmp_path, "models", *arguments), word)


# --- data: the list


def publish(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, train: bytes, test: bytes) -> Path:
    """Write files of a data set and make their checksums the published ones; the folder that holds them."""
    official = OFFICIAL[name]
    folder = folder / official.folders[0]
    folder.mkdir(parents=True)
    sums = [{f"{split}.bin": hashlib.sha256(data).hexdigest()} for split, data in (("train", train), ("test", test))]
    monkeypatch.setitem(OFFICIAL, name, replace(official, train=sums[0], test=sums[1]))
    (folder / "train.bin").write_bytes(train)
    (folder / "test.bin").write_bytes(test)
    return folder


def listed(outcome: Outcome) -> dict[str, dict[str, object]]:
    found = last_json(outcome)["datasets"]
    assert isinstance(found, list)
    assert [row["dataset"] for row in found] == ["digits", "arrays", *OFFICIAL]
    return {row["dataset"]: row for row in found}


def test_data_lists_what_is_found_and_what_is_not_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: publish(monkeypatch, name, tmp_path / "files", name.encode(), b"test") for name in OFFICIAL}
    flip(folders["cifar100"] / "test.bin", 2)
    shutil.rmtree(folders["fashion-mnist"])
    found = listed(invoke(tmp_path, "data", "--data", "files", "--json"))
    for name in ("mnist", "cifar10"):
        where = str(folders[name].relative_to(tmp_path))
        assert found[name] == {"dataset": name, "folder": where, "files": 2, "problem": None}
    for name in ("digits", "arrays"):
        assert found[name]["problem"] is None
    assert found["fashion-mnist"]["folder"] is None
    for word in (OFFICIAL["fashion-mnist"].url, "--data", "BAFFLE_DATA"):
        assert word in str(found["fashion-mnist"]["problem"])
    for word in ("cifar-100-binary/test.bin", "sha256", hashlib.sha256(b"test").hexdigest()):
        assert word in str(found["cifar100"]["problem"])
    assert "train.bin" not in str(found["cifar100"]["problem"])

    table = invoke(tmp_path, "data", "--data", "files")
    assert (table.code, table.err) == (0, "")
    text = "".join(line.split("│")[2].strip() for line in table.out.splitlines() if line.count("│") == 3)
    text = text.replace(" ", "")
    assert text.count("2filesin") == 2
    for words in ("carried by scikit-learn", "--data FILE.npz", "cifar-100-binary/test.bin", "checksums as published"):
        assert words.replace(" ", "") in text


def test_data_lists_the_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "mnist", tmp_path, b"train", b"test")
    assert listed(invoke(tmp_path, "data", "--json"))["mnist"]["folder"] is None
    monkeypatch.setenv("BAFFLE_DATA", str(tmp_path))
    found = listed(invoke(tmp_path, "data", "--json"))
    assert found["mnist"]["folder"] == str(tmp_path / "MNIST/raw")
    assert found["cifar10"]["folder"] is None
    assert tmp_path.name in invoke(tmp_path, "data").out


def test_a_damaged_file_of_one_data_set_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(monkeypatch, "cifar10", tmp_path, bytes(3073), bytes(3073))
    flip(folder / "test.bin", 9)
    refused(invoke(tmp_path, "data", "--dataset", "cifar10", "--data", "."), "test.bin", "sha256", "expected")


# --- data: one of them, client by client

Split = Callable[[bf.Dataset], tuple[bf.Dataset, ...]]


@dataclass(frozen=True)
class Part:
    """Options of a partition, and the same by the library."""

    flags: tuple[str, ...]
    split: Split
    holdout: int | None = None
    seed: int = 0


PARTS = {
    "iid": Part((), lambda d: bf.partition(d, 10)),
    "iid of 7": Part(("--partition", "iid", "--clients", "7"), lambda d: bf.partition(d, 7)),
    "dirichlet": Part(("--partition", "dirichlet"), lambda d: bf.partition(d, 10, alpha=0.5)),
    "dirichlet 0.1": Part(
        ("--partition", "dirichlet", "--alpha", "0.1", "--clients", "4", "--seed", "3"),
        lambda d: bf.partition(d, 4, alpha=0.1, seed=3),
    ),
    "shards": Part(("--partition", "shards"), lambda d: bf.partition(d, 10, shards=2)),
    "shards 3": Part(
        ("--partition", "shards", "--shards", "3", "--clients", "6"), lambda d: bf.partition(d, 6, shards=3)
    ),
    "holdout": Part(("--holdout", "20", "--clients", "3"), lambda d: bf.partition(d, 3), holdout=20),
    "holdout and dirichlet": Part(
        ("--holdout", "7", "--partition", "dirichlet", "--seed", "5"),
        lambda d: bf.partition(d, 10, alpha=0.5, seed=5),
        holdout=7,
        seed=5,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_data_counts_the_classes_of_the_librarys_parts(tmp_path: Path, name: str) -> None:
    part = PARTS[name]
    train, test = bf.load("digits")
    held = 0
    if part.holdout is not None:
        train, validation = bf.hold_out(train, part.holdout, part.seed)
        held = len(validation)
    outcome = invoke(tmp_path, "data", "--dataset", "digits", *part.flags, "--json")
    found = last_json(outcome)
    counts = [np.bincount(client.y, minlength=10).tolist() for client in part.split(train)]
    assert found.pop("clients") == counts
    assert np.sum(counts) == len(train) == 1438 - held
    expected = {"dataset": "digits", "shape": [1, 8, 8], "classes": 10, "train": len(train), "holdout": held}
    assert found == expected | {"test": len(test), "plot": None}
    table = invoke(tmp_path, "data", "--dataset", "digits", *part.flags)
    assert (table.code, table.err) == (0, "")
    numbers = [line.split() for line in table.out.splitlines()]
    rows = [[int(n) for n in line] for line in numbers if len(line) == 12 and all(n.isdigit() for n in line)]
    assert rows == [[i, sum(row), *row] for i, row in enumerate(counts)]
    title = " ".join(table.out.split())
    assert f"{len(train):,} training examples of [1, 8, 8]" in title
    assert ("held out" in title) == (held > 0)


def test_data_counts_by_column(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    labels[np.equal(GROUPS, "user 2")] = 1
    save(tmp_path / "mine.npz", y_train=labels)
    arguments = ("data", "--dataset", "arrays", "--data", "mine.npz", "--partition", "column", "--json")
    expected = [np.bincount(labels[np.equal(GROUPS, f"user {i}")], minlength=3).tolist() for i in range(4)]
    for clients in ((), ("--clients", "4")):
        found = last_json(invoke(tmp_path, *arguments, *clients))
        assert (found["clients"], found["classes"], found["shape"]) == (expected, 3, [5])
    held = last_json(invoke(tmp_path, *arguments, "--holdout", "2"))
    assert (held["train"], held["holdout"]) == (54, 6)
    assert isinstance(held["clients"], list)
    assert np.sum(held["clients"], axis=0).tolist() == (np.sum(expected, axis=0) - 2).tolist()
    refused(invoke(tmp_path, *arguments, "--clients", "3"), "clients = 3", "4")


def test_data_cuts_a_long_table_and_says_so(tmp_path: Path) -> None:
    def rows(outcome: Outcome) -> list[str]:
        return [line.split()[0] for line in outcome.out.splitlines() if re.match(r" *\d+ +\d+ +\d+ ", line)]

    short = invoke(tmp_path, "data", "--dataset", "digits", "--clients", "100")
    assert rows(short) == [str(i) for i in range(100)]
    assert "more" not in short.out
    long = invoke(tmp_path, "data", "--dataset", "digits", "--clients", "1103")
    assert rows(long) == rows(short)
    assert "1,003 clients more" in long.out
    found = last_json(invoke(tmp_path, "data", "--dataset", "digits", "--clients", "1103", "--json"))["clients"]
    assert isinstance(found, list)
    assert len(found) == 1103


def test_data_of_many_classes_has_a_narrow_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [bytes([1, i % 100]) + bytes(3072) for i in range(300)]
    publish(monkeypatch, "cifar100", tmp_path, b"".join(records), records[0])
    arguments = ("data", "--dataset", "cifar100", "--data", ".", "--partition", "shards", "--clients", "10")
    outcome = invoke(tmp_path, *arguments)
    counts = last_json(invoke(tmp_path, *arguments, "--json"))["clients"]
    assert isinstance(counts, list)
    assert {len(row) for row in counts} == {100}
    rows = [[int(n) for n in line.split()] for line in outcome.out.splitlines() if re.match(r"( +\d+){4} *$", line)]
    assert rows == [[i, 30, sum(n > 0 for n in row), max(row)] for i, row in enumerate(counts)]


def test_data_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("data", "--dataset", "digits", "--clients", "4", "--plot")
    assert last_json(invoke(tmp_path, *arguments, "new/iid.PNG", "--json"))["plot"] == "new/iid.PNG"
    outcome = invoke(tmp_path, *arguments, "shards.png", "--partition", "shards")
    assert (outcome.code, outcome.err) == (0, "")
    assert_is_png(tmp_path / "new/iid.PNG")
    assert_is_png(tmp_path / "shards.png")
    assert (tmp_path / "new/iid.PNG").read_bytes() != (tmp_path / "shards.png").read_bytes()
    assert sorted(Path(path).name for path in tree(tmp_path)) == ["iid.PNG", "new", "shards.png"]


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.png.svg"])
def test_a_picture_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    refused(invoke(tmp_path, "data", "--dataset", "digits", "--plot", name), "plot", name, ".png")
    assert tree(tmp_path) == []


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    before = tree(tmp_path)
    for name in ("file/picture.png", "folder.png"):
        refused(invoke(tmp_path, "data", "--dataset", "digits", "--plot", name), name, "cannot write")

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", denied)
    refused(invoke(tmp_path, "data", "--dataset", "digits", "--plot", "a.png"), "a.png", "Permission denied")
    assert tree(tmp_path) == before


BAD_DATA: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--dataset", "digit"), ("'digit'", "did you mean digits")),
    (("--dataset", "arrays"), ("arrays", "path")),
    (("--dataset", "arrays", "--data", "no.npz"), ("no.npz", "no such file")),
    (("--dataset", "digits", "--data", "."), ("data", "digits")),
    (("--dataset", "mnist", "--data", "nowhere"), ("mnist", "nowhere", "BAFFLE_DATA")),
    (("--dataset", "digits", "--clients", "0"), ("clients",)),
    (("--dataset", "digits", "--clients", "1439"), ("clients = 1439", "1438")),
    (("--dataset", "digits", "--partition", "shard"), ("partition", "did you mean shards")),
    (("--dataset", "digits", "--partition", "column"), ("groups_train",)),
    (("--dataset", "digits", "--alpha", "0.5"), ("alpha = 0.5", "dirichlet", "iid")),
    (("--dataset", "digits", "--partition", "dirichlet", "--alpha", "nan"), ("alpha = nan",)),
    (("--dataset", "digits", "--shards", "2"), ("shards = 2", "iid")),
    (("--dataset", "digits", "--partition", "shards", "--shards", "0"), ("shards = 0",)),
    (("--dataset", "digits", "--partition", "shards", "--shards", "1000"), ("1000 shards", "1438")),
    (("--dataset", "digits", "--holdout", "0"), ("holdout = 0",)),
    (("--dataset", "digits", "--holdout", "500"), ("holdout = 500", "class 0")),
    (("--dataset", "digits", "--seed", "-1"), ("seed = -1",)),
    (("--model", "mlp"), ("--model",)),
    (("--plot", "picture.png"), ("dataset",)),
    (("--clients", "3"), ("dataset",)),
    (("--partition", "nonsense"), ()),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_DATA, ids=lambda value: " ".join(value))
def test_data_refuses_bad_options_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(invoke(tmp_path, "data", *arguments), *words)


# --- train: variants

ARRAYS = ("--dataset", "arrays", "--data", "mine.npz")


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
        (*ARRAYS, "--partition", "column", "--clients", "4"),
        lambda folder: bf.partition(of_arrays(folder), column=True),
    ),
    "tokens": Variant((*ARRAYS, "--model", "transformer"), lambda folder: bf.partition(of_arrays(folder), 2)),
    "tokens held out by column": Variant(
        (*ARRAYS, "--model", "transformer", "--partition", "column", "--clients", "4", "--holdout", "3"),
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any of the options. Never changed: tests take copies."""
    folder = tmp_path_factory.mktemp("plain")
    assert invoke(folder, *TRAIN).code == 0
    return folder / "run"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_librarys_and_survives_an_interruption(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, plain: Path, name: str
) -> None:
    variant, run = VARIANTS[name], tmp_path / "run"
    if "arrays" in variant.flags:
        save(tmp_path / "mine.npz", **(tokens() if "tokens" in name else {}))
    undisturbed = last_json(invoke(tmp_path, *TRAIN, *variant.flags))

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
    summary = last_json(invoke(tmp_path, *TRAIN, *options))
    model = build("lenet-small", (1, 8, 8), 10, activation="selu", norm="group")
    _, test = bf.load("digits")
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(tmp_path / "run/model.safetensors").items()})
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.from_numpy(np.asarray(test.x))), torch.from_numpy(np.asarray(test.y)))
    assert float(loss) == pytest.approx(summary["loss"], rel=1e-5)


def test_rounds_are_judged_by_held_out_data_and_the_end_by_the_test(tmp_path: Path) -> None:
    summary = last_json(invoke(tmp_path, *TRAIN, "--holdout", "12", "--seed", "4", "--lr", "0.05", "--ema", "0.5"))
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
    arguments = (*TRAIN, *ARRAYS, "--model", "transformer", "--rounds", "1", "--holdout", "15")
    save(tmp_path / "mine.npz", **tokens(largest=40))
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
    save(tmp_path / "mine.npz", x_train=x[:60], x_test=x[60:])
    refused(invoke(tmp_path, *TRAIN, *ARRAYS, "--model", "transformer"))
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
    rest = [f"{flag[2:]} = {value}" for flag, value in zip(SMALL[4::2], SMALL[5::2], strict=True)]
    (tmp_path / "o.toml").write_text("\n".join([*(f"{name} = {value}" for name, value in lines.items()), *rest]))
    by_file = last_json(invoke(tmp_path, "train", "o.toml", "--json", "--out", "file"))
    by_flags = last_json(invoke(tmp_path, *TRAIN, *EVERYTHING))
    assert [by_file[name] for name in RESULTS] == [by_flags[name] for name in RESULTS]
    assert config(tmp_path / "file")["command"] == config(tmp_path / "run")["command"]
    flags = ("--no-augment", "--shards", "2", "--guard", "off", "--norm", "none")
    assert invoke(tmp_path, "train", "o.toml", "--out", "won", *flags).code == 0
    command = config(tmp_path / "won")["command"]
    assert [command[name] for name in ("augment", "shards", "guard", "norm", "holdout", "activation")] == [
        *(False, 2, "off", "none"),
        *(5, "gelu"),
    ]


CONTRADICTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpha with iid": (("--alpha", "0.5"), ("alpha = 0.5", "dirichlet", "not iid")),
    "alpha with shards": (("--partition", "shards", "--alpha", "0.5"), ("alpha", "not shards")),
    "shards with dirichlet": (("--partition", "dirichlet", "--shards", "2"), ("shards = 2", "not dirichlet")),
    "no shards": (("--partition", "shards", "--shards", "0"), ("shards = 0",)),
    "more shards than examples": (("--partition", "shards", "--shards", "999"), ("999 shards", "1438")),
    "column without one": (("--partition", "column"), ("groups",)),
    "clients and column": ((*ARRAYS, "--partition", "column"), ("clients = 2", "names 4")),
    "unknown partition": (("--partition", "colum"), ("partition", "did you mean column")),
    "activation of one's own": (("--model", "math:sin", "--activation", "relu"), ("activation", "math:sin")),
    "norm of one's own": (("--model", "math:sin", "--norm", "group"), ("norm", "math:sin")),
    "unknown activation": (("--activation", "glu"), ("activation = 'glu'", "hardswish", "did you mean gelu")),
    "unknown norm": (("--norm", "groups"), ("norm = 'groups'", "none", "did you mean group")),
    "augmented vectors": ((*ARRAYS, "--augment"), ("(5,)", "augmented", "images")),
    "large holdout": (("--holdout", "143"), ("holdout = 143", "class")),
    "no holdout": (("--holdout", "0"), ("holdout = 0",)),
    "guard sometimes": (("--guard", "sometimes"), ("guard = 'sometimes'", "rollback, stop, off")),
    "unknown guard": (("--guard", "rolback"), ("did you mean rollback",)),
    "half a holdout": (("--holdout", "1.5"), ("--holdout", "integer")),
    "tokens for numbers": (("--dataset", "arrays", "--data", "tokens.npz"), ("mlp", "integer tokens")),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    flags, words = CONTRADICTIONS[name]
    save(tmp_path / "mine.npz")
    save(tmp_path / "tokens.npz", **tokens())
    before = tree(tmp_path)
    refused(invoke(tmp_path, *TRAIN, *flags), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('augment = "yes"', "augment = 'yes'"),
        ("holdout = 1.5", "holdout = 1.5"),
        ("shards = true", "shards = True"),
        ("shards = 2", "shards = 2: expected partition shards"),
        ("guard = false", "guard = False"),
        ('norm = "grup"', "did you mean group"),
        ("activation = 3", "activation = 3"),
        ("no-augment = true", "did you mean augment"),
        ('guards = "off"', "did you mean guard"),
    ],
)
def test_a_toml_file_is_held_to_the_same_rules(tmp_path: Path, line: str, word: str) -> None:
    (tmp_path / "options.toml").write_text(line)
    refused(invoke(tmp_path, "train", "options.toml", *SMALL, "--out", "run"), word)
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    save(tmp_path / "mine.npz")
    assert invoke(tmp_path, *TRAIN, *ARRAYS, "--partition", "column", "--clients", "4").code == 0
    save(tmp_path / "mine.npz", groups_train=np.roll(GROUPS, 1))
    refused(invoke(tmp_path, "resume", "run"), "data differ")
    save(tmp_path / "mine.npz", groups_train=None)
    refused(invoke(tmp_path, "resume", "run"), "groups_train")


# --- report and compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, object]]:
    """Two short runs, one with held-out data, and what they printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    first = last_json(invoke(folder, *TRAIN, "--out", "first"))
    second = last_json(invoke(folder, *TRAIN, "--out", "second", "--holdout", "5", "--partition", "shards"))
    return {folder / "first": first, folder / "second": second}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their pictures, which take most of the time."""
    monkeypatch.setattr("baffle.report.pages.draw", lambda chart: b"")


COSTS = {"forward_passes", "samples_forwarded", "bytes_up", "bytes_down", "seconds", "parameters"}


def assert_totals(found: dict[str, object], summary: dict[str, object]) -> None:
    """What a page tells as JSON is what the run printed."""
    assert found.keys() >= COSTS | {"rounds", "updates", "rollbacks", "weights_sha256"}
    shown = "validation_loss" if summary["validation_loss"] is not None else "loss"
    assert found[shown] is not None
    for name, value in found.items():
        assert value == summary[name], name


def test_report_writes_a_page_and_prints_where(tmp_path: Path, runs: dict[Path, dict[str, object]]) -> None:
    run = copy_run(next(iter(runs)), tmp_path / "run")
    before = {path: Path(path).read_bytes() for path in tree(run) if Path(path).is_file()}
    outcome = invoke(tmp_path, "report", "run")
    assert outcome == Outcome(0, "run/report/report.html\n", "")
    page = (tmp_path / "run/report/report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert str(runs[next(iter(runs))]["weights_sha256"]) in page
    pictures = [path for path in (run / "report").iterdir() if path.suffix == ".png"]
    assert len(pictures) >= 4
    for picture in pictures:
        assert_is_png(picture)
    assert {path: Path(path).read_bytes() for path in before} == before
    assert invoke(tmp_path, "replay", "run").code == 0


def test_report_as_json_has_the_runs_own_totals(
    tmp_path: Path, runs: dict[Path, dict[str, object]], undrawn: None
) -> None:
    for run, summary in runs.items():
        outcome = invoke(tmp_path, "report", run, "--out", f"pages/{run.name}", "--json")
        found = last_json(outcome)
        assert (outcome.err, outcome.out.count("\n")) == ("", 1)
        assert found.pop("report") == f"pages/{run.name}/report.html"
        assert (tmp_path / "pages" / run.name / "report.html").is_file()
        assert_totals(found, summary)
        assert not (run / "report").exists()


def test_compare_writes_a_page_of_every_run(tmp_path: Path, runs: dict[Path, dict[str, object]], undrawn: None) -> None:
    outcome = invoke(tmp_path, "compare", *runs)
    assert outcome == Outcome(0, "comparison/compare.html\n", "")
    page = (tmp_path / "comparison/compare.html").read_text()
    for word in ("first", "second", "shards", "holdout"):
        assert word in page
    outcome = invoke(tmp_path, "compare", *runs, "--out", "new/place", "--json")
    found = last_json(outcome)
    assert (outcome.err, outcome.out.count("\n")) == ("", 1)
    assert found["report"] == "new/place/compare.html"
    assert (tmp_path / "new/place/compare.html").read_text() == page
    assert isinstance(found["runs"], list)
    for told, (run, summary) in zip(found["runs"], runs.items(), strict=True):
        assert told.pop("run") == str(run)
        assert_totals(told, summary)


@pytest.mark.parametrize("command", ["report", "compare"])
def test_pages_of_what_is_no_run_are_refused(
    tmp_path: Path, runs: dict[Path, dict[str, object]], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text("{}")
    good, before = next(iter(runs)), tree(tmp_path)
    others = (good,) if command == "compare" else ()
    for name in ("missing", "empty", "file", "odd"):
        refused(invoke(tmp_path, command, *others, name), name)
    refused(invoke(tmp_path, command), "RUN")
    read_bytes = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.name == locked and path.parent == good:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    for locked in ("config.json", "initial.safetensors", "rows.bin", "metrics.jsonl"):
        refused(invoke(tmp_path, command, *others, good), locked, "Permission denied")
    assert tree(tmp_path) == before


def test_pages_that_cannot_be_written_are_one_line(
    tmp_path: Path, runs: dict[Path, dict[str, object]], undrawn: None
) -> None:
    (tmp_path / "file").write_text("x")
    for command in ("report", "compare"):
        refused(invoke(tmp_path, command, next(iter(runs)), "--out", "file"), "file", "cannot write")
    assert (tmp_path / "file").read_text() == "x"


# --- divergence

HUGE: dict[str, tuple[str, ...]] = {
    "adam": ("--lr", "1e4"),
    "adam to overflow": ("--lr", "3e38"),
    "adamw": ("--optimizer", "adamw", "--lr", "3e37", "--weight-decay", "1"),
    "sgd": ("--optimizer", "sgd", "--lr", "1e4", "--momentum", "0.9"),
    "sgd to overflow": ("--optimizer", "sgd", "--lr", "3e38", "--weight-decay", "99"),
    "local steps": ("--optimizer", "sgd", "--lr", "1e20", "--local-steps", "2"),
    "local steps to overflow": ("--optimizer", "sgd", "--lr", "1", "--local-steps", "3", "--local-lr", "3e38"),
    "central": ("--lr", "1e30", "--difference", "central", "--sigma", "10"),
    "held out": ("--lr", "1e10", "--holdout", "5"),
    "without a guard": ("--lr", "1e4", "--guard", "off"),
    "without a guard to overflow": ("--optimizer", "sgd", "--lr", "3e38", "--weight-decay", "99", "--guard", "off"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_learning_rate_ends_in_order(tmp_path: Path, name: str) -> None:
    outcome = invoke(tmp_path, *TRAIN, "--schedule", "constant", "--rounds", "8", *HUGE[name])
    run, told = tmp_path / "run", outcome.err.splitlines()
    journal = bf.Journal.open(run)
    rollbacks = sum(record.restores is not None for record in journal.records)
    assert [line.split()[0] for line in told if not line.startswith(("plan: ", "round "))] == [
        *("note:" for _ in range(rollbacks)),
        *("error:" for _ in range(outcome.code // 2)),
    ]
    assert rollbacks == 0 or "off" not in HUGE[name]
    assert journal.damage is None
    assert np.isfinite(journal.state().weights).all()
    assert np.isfinite(journal.state().ema_weights).all()
    digest = metrics(run)[-1]["weights_sha256"]
    assert invoke(tmp_path, "replay", "run").out.split() == [digest]
    if outcome.code == 0:
        summary = last_json(outcome)
        assert (summary["weights_sha256"], summary["rollbacks"], summary["rounds"]) == (digest, rollbacks, 8)
        assert all(np.isfinite(v).all() for v in load_file(run / "model.safetensors").values())
        assert "NaN" not in outcome.out
    else:
        assert (outcome.code, outcome.out) == (2, "")


def test_rollbacks_bring_a_run_back(tmp_path: Path) -> None:
    options = ("--lr", "30", "--num-directions", "20", "--batch-size", "32", "--schedule", "constant")
    arguments = (*TRAIN, *options, "--rounds", "24", "--ema", "0")
    guarded = last_json(invoke(tmp_path, *arguments))
    alone = last_json(invoke(tmp_path, *arguments, "--guard", "off", "--out", "alone"))
    first = metrics(tmp_path / "run")[0]
    assert isinstance(guarded["rollbacks"], int)
    assert guarded["rollbacks"] >= 1
    assert alone["rollbacks"] == 0
    assert isinstance(guarded["loss"], float)
    assert isinstance(first["loss"], float)
    assert guarded["loss"] <= first["loss"]
    assert alone["loss"] is None or float(str(alone["loss"])) > 10 * first["loss"]
    assert first["weights_sha256"] == metrics(tmp_path / "alone")[0]["weights_sha256"]


def test_guard_stop_ends_with_the_last_good_weights(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, *TRAIN, "--lr", "1e4", "--guard", "stop", "--schedule", "constant", "--rounds", "9")
    assert (outcome.code, outcome.out) == (2, "")
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.err.splitlines()[-1] == error
    assert "stops with the weights" in error
    assert "10000" in error
    *before, last = metrics(tmp_path / "run")
    assert isinstance(last["restores"], int)
    assert f"after round {last['restores']}" in error
    assert last["round"] != 9
    assert last["weights_sha256"] == before[last["restores"]]["weights_sha256"]
    assert [m["restores"] for m in before] == [None] * len(before)
    assert invoke(tmp_path, "replay", "run").out.split() == [last["weights_sha256"]]
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["loss"] == pytest.approx(
        before[last["restores"]]["loss"]
    )


# --- a client of a deployment

NODE = ("node", "--superlink", "localhost:1", "--data", "mine.npz", "--insecure")


@pytest.mark.parametrize(
    ("flags", "strategy", "memory"),
    [
        ((), "copies", None),
        (("--strategy", "stacked"), "stacked", None),
        (("--strategy", "streaming", "--memory", "64MB"), "streaming", 64_000_000),
        (("--memory", "32MiB"), "copies", 2**25),
    ],
)
def test_a_node_evaluates_as_its_owner_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], strategy: str, memory: int | None
) -> None:
    pytest.importorskip("flwr")
    from baffle.deploy import client_model, server_app

    made: list[client_model.Own] = []

    def builder(data: bf.Dataset, own: client_model.Own) -> None:
        made.append(own)
        raise BaffleError("here")

    monkeypatch.setattr(client_model, "builder", builder)
    data, _ = bf.load("digits")
    np.savez(tmp_path / "mine.npz", x=data.x[:8], y=data.y[:8])
    refused(invoke(tmp_path, *NODE, "--threads", "2", *flags), "here")
    options = TrainConfig(model="mlp", threads=1, strategy="copies", memory="1GB")  # the server's own way
    setup = server_app.setup_of(options, assemble_server(options))
    runtime = client_model.runtime_for(setup, made[0])
    told = {"runtime": "torch", "threads": 2, "strategy": strategy, "memory": memory}
    assert {name: runtime.plan.get(name) for name in told} == told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strategy", "auto"), ("strategy = 'auto'", "copies, stacked, streaming")),
        (("--strategy", "stream"), ("strategy = 'stream'", "did you mean streaming?")),
        (("--memory", "lots"), ("memory = 'lots'", "64MB, 64MiB or 64000000")),
        (("--memory", "0"), ("memory = '0'", "64MB")),
    ],
)
def test_a_node_refuses_what_it_cannot_do_in_one_line(
    tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    pytest.importorskip("flwr")
    np.savez(tmp_path / "mine.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2, np.int64))
    refused(invoke(tmp_path, *NODE, *flags), *words)


# --- help

OPTIONS: dict[str, set[str]] = {
    "train": {"out", "json", "tensorboard", *(field.replace("_", "-") for field in TrainConfig.__struct_fields__)},
    "resume": {"rounds", "repair", "tensorboard", "json"},
    "status": {"watch", "json"},
    "replay": {"round", "threads", "block", "slow", "json"},
    "evaluate": {"json"},
    "report": {"out", "json"},
    "compare": {"out", "json"},
    "node": {
        *(
            "superlink",
            "data",
            "name",
            "bundle",
            "model",
            "threads",
            "strategy",
            "memory",
            "root-certificates",
            "insecure",
            "key",
        ),
        *("only-secure", "minimum-cohort", "trust"),
    },
    "up": {
        *("clients", "out", "secure", "folder", "tensorboard", "downlink", "quorum", "deadline", "json"),
    },
    "app": {"json"},
    "export": {
        *("to", "out", "dataset", "data", "activation", "norm", "start", "trainable", "prune", "prune-by", "seed"),
        *("precision", "branches", "json"),
    },
    "calibrate": {
        *("dataset", "data", "model", "activation", "norm", "start", "trainable", "prune", "prune-by", "seed"),
        *("runtime", "precision", "branches", "lattice", "family", "difference", "batch-size", "num-directions"),
        *("plot", "json"),
    },
    "models": {"batch-size", "threads", "seconds", "json"},
    "data": {
        *("dataset", "data", "clients", "partition", "alpha", "shards", "holdout", "seed"),
        *("plot", "json"),
    },
}


def plain_text(outcome: Outcome) -> str:
    assert (outcome.code, outcome.err) == (0, "")
    return re.sub(r"\x1b\[[0-9;]*m", "", outcome.out)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_once(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in ("75", "105", "115", "80"):  # wherever lines break
        monkeypatch.setenv("COLUMNS", width)
        text = plain_text(invoke(tmp_path, command, "--help"))
        named = re.findall(r"^[│|][ *]*--([\w-]+)", text, re.MULTILINE)
        assert sorted(named) == sorted([*OPTIONS[command], "help"])
    assert len(text.split("Options")[0].split()) > 12  # it says what it is for


def test_help_names_every_command(tmp_path: Path) -> None:
    text = plain_text(invoke(tmp_path, "--help"))
    assert re.findall(r"^[│|] +([a-z]+)  ", text, re.MULTILINE) == list(OPTIONS)


WATCHED = """
import sys
network = []
sys.addaudithook(lambda event, arguments: network.append(event) if event.startswith("socket.") else None)
from baffle import cli
for line in sys.argv[1:]:
    sys.argv = ["baffle", *line.split()]
    try:
        cli.main()
    except SystemExit as exit:
        assert not exit.code, line
print(sorted({"torch", "matplotlib", "sklearn"} & sys.modules.keys()), network, file=sys.stderr)
"""


def test_help_and_the_list_of_data_wait_for_neither_torch_nor_a_network(tmp_path: Path) -> None:
    lines = ["--help", *(f"{command} --help" for command in OPTIONS), "data", "data --json"]
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, *lines], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert process.stderr == "[] []\n"
    assert process.stdout.count("Usage: baffle") == len(OPTIONS) + 1

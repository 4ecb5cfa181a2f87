"""``baffle data``: data sets that are found, and one of them client by client."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import baffle as bf
from baffle.data.official import OFFICIAL
from cli_helpers import GROUPS, assert_is_png, last_json, refused, save_users
from helpers import Outcome, flip, invoke, tree

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


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
    save_users(tmp_path / "mine.npz", y_train=labels)
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

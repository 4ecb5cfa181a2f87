"""The readers of official files, on small files of the same formats with checksums of their own."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from baffle.data import DATASETS, load, partition
from baffle.data.official import OFFICIAL, check, locate, read
from baffle.errors import DataError, OptionError
from helpers import Outcome, flip, invoke

Files = dict[str, bytes]
Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
LABELS = {"mnist": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100}
FOLDERS = {
    "mnist": ("MNIST/raw", "mnist", "MNIST"),
    "fashion-mnist": ("FashionMNIST/raw", "fashion-mnist", "FashionMNIST"),
    "cifar10": ("cifar-10-batches-bin", "cifar10", "CIFAR10"),
    "cifar100": ("cifar-100-binary", "cifar100", "CIFAR100"),
}


def random_split(name: str, count: int, seed: int) -> Split:
    """Images [count, ...] with their labels."""
    rng = np.random.default_rng((seed, *name.encode()))
    shape = (3, 32, 32) if name.startswith("cifar") else (1, 28, 28)
    labels = rng.integers(0, LABELS[name], count, np.uint8)
    labels[1] = LABELS[name] - 1  # every class is below this
    return rng.integers(0, 256, (count, *shape), np.uint8), labels


def idx(values: npt.NDArray[np.uint8]) -> bytes:
    """The format as http://yann.lecun.com/exdb/mnist describes it, number by number."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    return header + bytes(values.ravel().tolist())


def records(name: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> bytes:
    """CIFAR: label, red, green, blue, each colour row by row; CIFAR-100 has the coarse label before the fine one."""
    parts = []
    for image, label in zip(images.tolist(), labels.tolist(), strict=True):
        parts.append(bytes([99 - label, label] if name == "cifar100" else [label]))
        parts += [bytes(row) for colour in image for row in colour]
    return b"".join(parts)


TRAIN, TEST = 25, 10


def files_of(name: str) -> tuple[Files, Files, Split, Split]:
    """The files of both splits, and what is in them."""
    train, test = random_split(name, TRAIN, 0), random_split(name, TEST, 1)
    if not name.startswith("cifar"):
        made = [
            {names[0]: idx(images[:, 0]), names[1]: idx(labels)}
            for names, (images, labels) in zip(IDX_NAMES.values(), (train, test), strict=True)
        ]
        return made[0], made[1], train, test
    if name == "cifar100":
        return {"train.bin": records(name, *train)}, {"test.bin": records(name, *test)}, train, test
    batches = {
        f"data_batch_{i + 1}.bin": records(name, train[0][5 * i : 5 * i + 5], train[1][5 * i : 5 * i + 5])
        for i in range(5)
    }
    return batches, {"test_batch.bin": records(name, *test)}, train, test


def write(folder: Path, files: Mapping[str, bytes], *, packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


def digests(files: Files, like: Mapping[str, str]) -> dict[str, str]:
    """Checksums by the algorithm of the published ones, under the same names in the same order."""
    assert list(files) == list(like)
    algorithms = {40: hashlib.sha1, 64: hashlib.sha256}
    return {name: algorithms[len(like[name])](data).hexdigest() for name, data in files.items()}


class Fake:
    """A data set of which the checksums of small files are the published ones."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.train_files, self.test_files, self.train, self.test = files_of(name)
        self.files = self.train_files | self.test_files


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAFFLE_DATA", raising=False)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made = {name: Fake(name) for name in OFFICIAL}
    for name, fake in made.items():
        real = OFFICIAL[name]
        checksums = [digests(f, d) for f, d in ((fake.train_files, real.train), (fake.test_files, real.test))]
        monkeypatch.setitem(OFFICIAL, name, replace(real, train=checksums[0], test=checksums[1]))
    return made


@pytest.fixture(params=sorted(OFFICIAL))
def fake(request: pytest.FixtureRequest, fakes: dict[str, Fake]) -> Fake:
    return fakes[request.param]


def assert_is_read(fake: Fake, path: Path | None) -> None:
    for data, name, (images, labels) in zip(
        read(fake.name, path), ("train", "test"), (fake.train, fake.test), strict=True
    ):
        assert data.name == name
        assert data.x.dtype == np.uint8
        assert np.array_equal(data.x, images)
        assert data.y.dtype == np.int64
        assert data.y.tolist() == labels.tolist()
        assert data.scaling == OFFICIAL[fake.name].scaling


def test_every_official_data_set_can_be_loaded_by_name() -> None:
    assert set(OFFICIAL) == set(LABELS) < set(DATASETS)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_pixels_and_labels_are_those_of_the_files(fake: Fake, tmp_path: Path, packed: bool) -> None:
    assert_is_read(fake, write(tmp_path, fake.files, packed=packed))


def test_plain_and_gzipped_files_may_be_mixed(fake: Fake, tmp_path: Path) -> None:
    write(tmp_path, fake.test_files, packed=True)
    assert_is_read(fake, write(tmp_path, fake.train_files))


def test_an_idx_file_by_hand(fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 2]) + bytes(range(12))
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 3])
    names = (*IDX_NAMES["train"], *IDX_NAMES["test"])
    contents = [dict(zip(names[s : s + 2], (images, labels), strict=True)) for s in (0, 2)]
    sums = [{n: hashlib.sha256(d).hexdigest() for n, d in c.items()} for c in contents]
    monkeypatch.setitem(OFFICIAL, "mnist", replace(OFFICIAL["mnist"], train=sums[0], test=sums[1]))
    train, _ = load("mnist", write(tmp_path, contents[0] | contents[1]))
    assert train.x.tolist() == [[[[0, 1], [2, 3], [4, 5]]], [[[6, 7], [8, 9], [10, 11]]]]
    assert train.y.tolist() == [7, 3]


def test_the_fine_label_of_cifar100_is_its_second_byte(fakes: dict[str, Fake], tmp_path: Path) -> None:
    fake = fakes["cifar100"]
    data = fake.files["train.bin"]
    train, _ = load("cifar100", write(tmp_path, fake.files))
    assert train.y[3] == data[3 * 3074 + 1] != data[3 * 3074]
    red, green = train.x[3, 0], train.x[3, 1]
    assert (red[0, 0], red[0, 1], red[1, 0]) == (data[3 * 3074 + 2], data[3 * 3074 + 3], data[3 * 3074 + 2 + 32])
    assert green[0, 0] == data[3 * 3074 + 2 + 1024]


def test_load_augments_the_training_images_alone(fake: Fake, tmp_path: Path) -> None:
    train, test = load(fake.name, write(tmp_path, fake.files), augmented=True)
    assert (train.augmented, test.augmented) == (True, False)
    assert [len(part) for part in partition(train, 4)] == [7, 6, 6, 6]


@pytest.mark.parametrize("place", range(4))
def test_files_are_found_in_a_folder_and_in_those_below_it(fake: Fake, tmp_path: Path, place: int) -> None:
    folder = tmp_path / ("", *FOLDERS[fake.name])[place]
    write(folder, fake.files)
    assert locate(fake.name, tmp_path) == folder
    assert_is_read(fake, tmp_path)


def test_all_data_sets_share_a_folder(fakes: dict[str, Fake], tmp_path: Path) -> None:
    for name, fake in fakes.items():
        write(tmp_path / FOLDERS[name][0], fake.files)
    for fake in fakes.values():
        assert_is_read(fake, tmp_path)


@pytest.mark.parametrize(("loose", "below"), [("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")])
def test_files_of_another_data_set_by_the_same_names_are_not_taken(
    fakes: dict[str, Fake], tmp_path: Path, loose: str, below: str
) -> None:
    write(tmp_path, fakes[loose].files)
    write(tmp_path / FOLDERS[below][0], fakes[below].files)
    for name in (loose, below):
        assert_is_read(fakes[name], tmp_path)


def test_the_environment_names_the_folder(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFFLE_DATA", str(tmp_path))
    write(tmp_path / FOLDERS[fake.name][0], fake.files)
    assert_is_read(fake, None)


def test_a_named_folder_wins_over_the_environment(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dict.fromkeys(fake.files, b"something else")
    monkeypatch.setenv("BAFFLE_DATA", str(write(tmp_path / "wrong", wrong)))
    with pytest.raises(DataError, match="expected"):
        read(fake.name)
    assert_is_read(fake, write(tmp_path / "right", fake.files))
    monkeypatch.setenv("BAFFLE_DATA", str(tmp_path / "right"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=f"there is none in {empty}"):
        read(fake.name, empty)


@pytest.mark.parametrize("environment", [None, "", "empty"])
def test_missing_files_are_asked_for_by_address_option_and_variable(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    (tmp_path / "empty").mkdir()
    if environment is not None:
        monkeypatch.setenv("BAFFLE_DATA", environment and str(tmp_path / environment))
    with pytest.raises(DataError) as error:
        load(fake.name)
    where = f"there is none in {tmp_path / 'empty'} nor in its {FOLDERS[fake.name][0]}" if environment else "no folder"
    for word in (repr(fake.name), next(iter(fake.files)), OFFICIAL[fake.name].url, "--data", "BAFFLE_DATA", where):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_addresses_are_those_of_the_authors() -> None:
    assert all(OFFICIAL[name].url.startswith("https://") for name in OFFICIAL)
    assert "cs.toronto.edu" in OFFICIAL["cifar10"].url
    assert "zalandoresearch/fashion-mnist" in OFFICIAL["fashion-mnist"].url


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_a_flipped_bit_anywhere_is_named_by_its_file(fake: Fake, tmp_path: Path, packed: bool) -> None:
    for at, file in enumerate(fake.files):
        folder = tmp_path / str(at)
        data = bytearray(fake.files[file])
        data[(at * 997) % len(data)] ^= 1 << at
        path = write(folder, fake.files | {file: bytes(data)}, packed=packed) / (f"{file}.gz" if packed else file)
        with pytest.raises(DataError) as error:
            read(fake.name, folder)
        algorithm = "sha1" if fake.name.startswith("cifar") else "sha256"
        expected = OFFICIAL[fake.name].train | OFFICIAL[fake.name].test  # type: ignore[operator]  # both are dicts
        for word in (str(path), algorithm, hashlib.new(algorithm, data).hexdigest(), f"expected {expected[file]}"):
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: data[:-1], "cannot be read"),
        (lambda data: data[:4], "cannot be read"),
        (lambda data: b"not gzip at all", "cannot be read"),
        (lambda data: data[:40] + bytes([data[40] ^ 0xFF]) + data[41:], "cannot be read"),
        (lambda data: data[:10] + b"\xff" * 20, "cannot be read"),
        (lambda data: b"", "sha256 of its contents"),
    ],
    ids=["half", "a byte short", "header only", "no gzip", "a byte changed", "no deflate", "empty"],
)
def test_gzipped_files_that_are_damaged_are_named(
    fakes: dict[str, Fake], tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    file = write(tmp_path, fakes["mnist"].files, packed=True) / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=reason) as error:
        read("mnist", tmp_path)
    assert str(error.value).startswith(f"{file}: ")


def test_a_file_that_may_not_be_read_is_named(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, fake.files)
    locked = tmp_path / list(fake.files)[-1]
    read_bytes = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied") as error:
        read(fake.name, tmp_path)
    assert str(locked) in str(error.value)


def test_one_file_of_several_that_is_missing_is_named(fake: Fake, tmp_path: Path) -> None:
    for file in list(fake.files)[1:]:  # by the first the folder is found
        folder = write(tmp_path / file, fake.files)
        (folder / file).unlink()
        with pytest.raises(DataError) as error:
            read(fake.name, folder)
        assert f"{folder / file}: no such file, gzipped or not" in str(error.value)
        (folder / file).mkdir()  # a folder is no file
        with pytest.raises(DataError, match="no such file"):
            read(fake.name, folder)


def test_check_tells_of_every_file(fake: Fake, tmp_path: Path) -> None:
    folder = write(tmp_path / FOLDERS[fake.name][1], fake.files)
    names = list(fake.files)
    for found, name in zip(check(fake.name, tmp_path), names, strict=True):
        assert (found.name, found.path, found.problem) == (name, folder / name, None)
    flip(folder / names[0], 100)
    (folder / names[-1]).unlink()
    first, *between, last = check(fake.name, tmp_path)
    assert (first.name, first.path) == (names[0], folder / names[0])
    assert first.problem is not None
    assert "of its contents is" in first.problem
    assert (last.name, last.path) == (names[-1], None)
    assert last.problem is not None
    assert "no such file" in last.problem
    assert [(f.name, f.problem) for f in between] == [(name, None) for name in names[1:-1]]


def test_check_without_a_folder_says_what_is_needed(fake: Fake) -> None:
    with pytest.raises(DataError, match="BAFFLE_DATA"):
        check(fake.name)


@pytest.mark.parametrize("call", [read, locate, check])
def test_unknown_names_are_refused(call: Callable[[str], object]) -> None:
    with pytest.raises(OptionError, match=r"dataset = 'cifar': .*did you mean cifar10"):
        call("cifar")


def refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one line on stderr that names what is wrong, nothing on stdout."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def test_the_command_without_files_is_one_line(fake: Fake, tmp_path: Path) -> None:
    words = (fake.name, OFFICIAL[fake.name].url, "--data", "BAFFLE_DATA")
    refused(invoke(tmp_path, "train", "--dataset", fake.name, "--out", "run"), *words)
    refused(invoke(tmp_path, "train", "--dataset", fake.name, "--data", "nowhere", "--out", "run"), *words, "nowhere")
    assert not (tmp_path / "run").exists()


def test_the_command_names_a_damaged_file(fakes: dict[str, Fake], tmp_path: Path) -> None:
    write(tmp_path / "files", fakes["cifar10"].files)
    flip(tmp_path / "files" / "data_batch_4.bin", 5000)
    outcome = invoke(tmp_path, "train", "--dataset", "cifar10", "--data", "files", "--out", "run")
    refused(outcome, "data_batch_4.bin", "sha1", "expected")


SHORT = ("--model", "mlp", "--clients", "2", "--rounds", "2", "--num-directions", "2", "--threads", "1", "--json")


def test_the_command_trains_on_files_and_resumes(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "files", fake.files)
    arguments = ("train", "--dataset", fake.name, *SHORT, "--augment")
    by_option = invoke(tmp_path, *arguments, "--data", "files", "--out", "option")
    assert by_option.code == 0, by_option.err
    monkeypatch.setenv("BAFFLE_DATA", str(tmp_path / "files"))
    by_environment = invoke(tmp_path, *arguments, "--out", "environment")
    first, second = (json.loads(o.out.splitlines()[-1]) for o in (by_option, by_environment))
    assert first["weights_sha256"] == second["weights_sha256"]
    again = invoke(tmp_path, "resume", "environment", "--rounds", "3", "--json")
    assert again.code == 0, again.err

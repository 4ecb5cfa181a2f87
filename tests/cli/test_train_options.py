"""Options of ``baffle train``, as flags and in TOML files: one line for everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_helpers import OF_USERS, SHORT, SMALL, TRAIN_SHORT, last_json, refused, save_users, tokens
from helpers import invoke, tree

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


TOML = """
model = "mlp"
clients = 4
num-directions = 3
batch_size = 8
rounds = 2
family = "rademacher"
lr = 0.5
optimizer = "sgd"
momentum = 0.9
threads = 1
clip-update = 0.25
"""


def test_a_toml_file_gives_options_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(TOML)
    summary = last_json(invoke(tmp_path, "train", "options.toml", "--clients", "3", "--json", "--out", "r"))
    assert (summary["clients"], summary["num_directions"], summary["rounds"]) == (3, 3, 2)
    assert summary["family"] == "rademacher"
    config = json.loads((tmp_path / "r/config.json").read_text())
    expected = {
        "model": "mlp",
        "clients": 3,
        "num_directions": 3,
        "batch_size": 8,
        "family": "rademacher",
        "lr": 0.5,
        "momentum": 0.9,
        "threads": 1,
        "clip_update": 0.25,
        "seed": 0,
        "dataset": "digits",
    }
    assert {k: config["command"][k] for k in expected} == expected
    assert config["method"]["optimizer"]["type"] == "sgd"
    assert config["method"]["optimizer"]["momentum"] == 0.9
    assert config["method"]["server"][0]["max_norm"] == 0.25
    flags = [
        *("--model", "mlp", "--clients", "3", "--num-directions", "3", "--batch-size", "8", "--rounds", "2"),
        *("--family", "rademacher", "--lr", "0.5", "--optimizer", "sgd", "--momentum", "0.9", "--threads", "1"),
        *("--clip-update", "0.25"),
    ]
    same = last_json(invoke(tmp_path, "train", *flags, "--json", "--out", "flags"))
    assert same["weights_sha256"] == summary["weights_sha256"]


BAD_OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--dataset", "digit"), ("dataset", "'digit'", "digits")),
    (("--model", "lenets"), ("model", "'lenets'", "lenet")),
    (("--model", "nosuch.module:build"), ("model", "nosuch.module:build", "nosuch")),
    (("--model", "math:nosuch"), ("model", "math:nosuch")),
    (("--model", "math:pi"), ("model", "math:pi", "callable")),
    (("--model", "a:cat:b"), ("model", "'a:cat:b'")),
    (("--model", "[red]"), ("model", "'[red]'")),
    (("--model", "two\nlines"), ("model",)),
    (("--nosuch", "3"), ("--nosuch",)),
    (("--clients", "many"), ("--clients", "integer")),
    (("--clients", "0"), ("clients = 0",)),
    (("--clients", "-3"), ("clients = -3",)),
    (("--clients", "1439"), ("clients = 1439", "1438")),
    (("--family", "rank2"), ("family", "'rank2'", "rank1")),
    (("--sharing", "none"), ("sharing", "'none'", "per-client")),
    (("--difference", "backward"), ("difference", "'backward'", "central")),
    (("--partition", "even"), ("partition", "'even'", "iid")),
    (("--optimizer", "lion"), ("optimizer", "'lion'", "adamw")),
    (("--schedule", "step"), ("schedule", "'step'", "cosine")),
    (("--num-directions", "0"), ("num_directions = 0",)),
    (("--num-directions", "-5"), ("num_directions = -5",)),
    (("--num-directions", "1.5"), ("--num-directions", "integer")),
    (("--num-directions", "99999999"), ("num_directions = 99999999",)),
    (("--sigma", "0"), ("sigma = 0.0",)),
    (("--sigma", "-0.001"), ("sigma = -0.001",)),
    (("--sigma", "nan"), ("sigma = nan",)),
    (("--sigma", "inf"), ("sigma = inf",)),
    (("--sigma", "1e39"), ("sigma = 1e+39",)),
    (("--sigma", "1e-50"), ("sigma = 1e-50",)),
    (("--lr", "nan"), ("lr = nan",)),
    (("--lr", "inf"), ("lr = inf",)),
    (("--lr", "0"), ("lr = 0.0",)),
    (("--lr", "-1"), ("lr = -1.0",)),
    (("--lr", "1e39"), ("lr = 1e+39",)),
    (("--alpha", "0"), ("alpha = 0.0",)),
    (("--alpha", "nan"), ("alpha = nan",)),
    (("--participation", "0"), ("participation = 0.0",)),
    (("--participation", "2"), ("participation = 2.0",)),
    (("--participation", "nan"), ("participation = nan",)),
    (("--batch-size", "0"), ("batch_size = 0",)),
    (("--rounds", "0"), ("rounds = 0",)),
    (("--rounds", "-1"), ("rounds = -1",)),
    (("--seed", "-1"), ("seed = -1",)),
    (("--seed", str(2**64)), (f"seed = {2**64}",)),
    (("--threads", "0"), ("threads = 0",)),
    (("--strategy", "fastest"), ("strategy = 'fastest'", "auto, copies, stacked, streaming")),
    (("--memory", "64"), ("memory = 64 bytes a thread", "at least")),
    (("--memory", "100KB"), ("memory = 100000 bytes a thread", "at least", "streaming")),
    (("--memory", "100KB", "--strategy", "copies"), ("memory = 100000 bytes a thread", "at least")),
    (("--memory", "1KiB", "--strategy", "streaming"), ("memory = 1024 bytes a thread", "at least")),
    *(
        (("--memory", value), (f"memory = {value!r}", "64MB, 64MiB or 64000000"))
        for value in ("", "much", "MB", "0", "0MB", "-1MB", "64 M", "64XB", "1,5MB", "1e6", "nan", "64MB 2")
    ),
    *(
        ((*flags, "--runtime", runtime), (f"{flags[0][2:]} = '{flags[1]}'", f"runtime torch with it, not {runtime}"))
        for flags in (("--strategy", "streaming"), ("--strategy", "copies"), ("--memory", "64MB"))
        for runtime in ("ort", "openvino", "auto")
    ),
    *(
        ((*flags, "--backprop", "fedsgd"), (f"{flags[0][2:]} = '{flags[1]}'", "none with backprop fedsgd"))
        for flags in (("--strategy", "stacked"), ("--memory", "64MB"))
    ),
    (("--evaluate-every", "0"), ("evaluate_every = 0",)),
    (("--snapshot-every", "0"), ("snapshot_every = 0",)),
    (("--ema", "1"), ("ema = 1.0",)),
    (("--ema", "nan"), ("ema = nan",)),
    (("--momentum", "0.9"), ("momentum = 0.9", "sgd")),
    (("--momentum", "1", "--optimizer", "sgd"), ("momentum = 1.0",)),
    (("--weight-decay", "-1"), ("weight_decay = -1.0",)),
    (("--clip-update", "0"), ("clip_update", "0.0")),
    (("--clip-scalars", "-2"), ("clip_scalars", "-2.0")),
    (("--local-steps", "0"), ("local_steps = 0",)),
    (("--local-steps", "2"), ("local_steps = 2", "adam", "local_lr")),
    (("--local-steps", "2", "--local-lr", "nan"), ("local_lr = nan",)),
    (("--local-steps", "2", "--local-lr", "0.1", "--sharing", "per-client"), ("local_steps", "per-client")),
    (("--data", "x.npz"), ("data", "'x.npz'", "arrays")),
    (("--dataset", "arrays"), ("arrays", "x_train")),
    (("--dataset", "arrays", "--data", "none.npz"), ("none.npz", "no such file")),
    (("--dataset", "arrays", "--data", "."), (".npz",)),
    (("--out", "../here/taken"), ("here/taken", "exists", "baffle resume")),
    (("--out", "../here/file"), ("here/file", "exists")),
    (("--out", "../here/file/run"), ("here/file/run",)),
    (("--out", "x" * 300), ("x" * 300, "too long")),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[" ".join(o)[:60] for o, _ in BAD_OPTIONS])
def test_a_bad_option_is_one_line(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    (tmp_path / "here/taken").mkdir(parents=True)
    (tmp_path / "here/file").write_text("")
    before = tree(tmp_path)
    out = () if "--out" in options else ("--out", "run")
    refused(invoke(tmp_path / "here", "train", *SMALL, *out, *options), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"clint = 3", ("clint", "clients")),
        (b"[train]\nclients = 3", ("train",)),
        (b"clients = 'three'", ("clients", "'three'", "int")),
        (b"clients = true", ("clients", "True", "int")),
        (b"rounds = 2.5", ("rounds", "2.5", "int")),
        (b"lr = '0.1'", ("lr", "'0.1'", "float")),
        (b"strategy = 'fast'", ("strategy = 'fast'", "auto, copies, stacked, streaming")),
        (b"memory = 64000000", ("memory", "64000000", "str")),
        (b"memory = '64 apples'", ("memory = '64 apples'", "64MB")),
        (b"memory = '64MB'\nruntime = 'ort'", ("memory = '64MB'", "runtime torch")),
        (b"lr = nan", ("lr = nan",)),
        (b"sigma = 0", ("sigma = 0",)),
        (b"family = 'rank2'", ("family", "'rank2'", "rank1")),
        (b"family = 3", ("family", "3")),
        (b"model = 3", ("model", "3", "str")),
        (b"model = ['mlp']", ("model", "mlp", "str")),
        (b"seed = 99999999999999999999", ("seed = 99999999999999999999",)),
        (b"clients = ", ("options.toml", "TOML")),
        (b"clients = 3\nclients = 4", ("options.toml", "TOML")),
        (b"{\n", ("options.toml", "TOML")),
        (b"\xff\xfe", ("options.toml", "TOML")),
        (b"out = 'run'", ("out",)),
        (None, ("options.toml", "No such file")),
    ],
)
def test_a_bad_toml_file_is_one_line(tmp_path: Path, content: bytes | None, words: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "options.toml").write_bytes(content)
    before = tree(tmp_path)
    refused(invoke(tmp_path, "train", "options.toml", "--out", "run"), *words)
    assert tree(tmp_path) == before


def test_a_folder_is_no_toml_file(tmp_path: Path) -> None:
    refused(invoke(tmp_path, "train", ".", "--out", "run"), ".", "directory")


CONTRADICTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpha with iid": (("--alpha", "0.5"), ("alpha = 0.5", "dirichlet", "not iid")),
    "alpha with shards": (("--partition", "shards", "--alpha", "0.5"), ("alpha", "not shards")),
    "shards with dirichlet": (("--partition", "dirichlet", "--shards", "2"), ("shards = 2", "not dirichlet")),
    "no shards": (("--partition", "shards", "--shards", "0"), ("shards = 0",)),
    "more shards than examples": (("--partition", "shards", "--shards", "999"), ("999 shards", "1438")),
    "column without one": (("--partition", "column"), ("groups",)),
    "clients and column": ((*OF_USERS, "--partition", "column"), ("clients = 2", "names 4")),
    "unknown partition": (("--partition", "colum"), ("partition", "did you mean column")),
    "activation of one's own": (("--model", "math:sin", "--activation", "relu"), ("activation", "math:sin")),
    "norm of one's own": (("--model", "math:sin", "--norm", "group"), ("norm", "math:sin")),
    "unknown activation": (("--activation", "glu"), ("activation = 'glu'", "hardswish", "did you mean gelu")),
    "unknown norm": (("--norm", "groups"), ("norm = 'groups'", "none", "did you mean group")),
    "augmented vectors": ((*OF_USERS, "--augment"), ("(5,)", "augmented", "images")),
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
    save_users(tmp_path / "mine.npz")
    save_users(tmp_path / "tokens.npz", **tokens())
    before = tree(tmp_path)
    refused(invoke(tmp_path, *TRAIN_SHORT, *flags), *words)
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
    refused(invoke(tmp_path, "train", "options.toml", *SHORT, "--out", "run"), word)
    assert not (tmp_path / "run").exists()

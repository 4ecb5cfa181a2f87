"""``baffle data``: data sets that are found, and how one is split among clients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from baffle.cli.common import Json, print_json
from baffle.data import DATASETS, Dataset
from baffle.data.official import ENVIRONMENT, OFFICIAL, check
from baffle.errors import DataError, JournalError, OptionError
from baffle.files import write_atomic
from baffle.training.build import splits
from baffle.training.options import TrainConfig, train_config

if TYPE_CHECKING:
    pass

_WIDEST, _LONGEST = 10, 100  # classes with a column each, clients with a row each


def data_command(
    dataset: Annotated[str | None, typer.Option(help="One data set; by default a list of all.")] = None,
    data: Annotated[
        Path | None, typer.Option(help=f"Folder of the official files (or {ENVIRONMENT}), or FILE.npz.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.", min=1)] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet, shards, or column.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Dirichlet parameter.")] = None,
    shards: Annotated[int | None, typer.Option(help="Shards of sorted labels per client.")] = None,
    holdout: Annotated[int | None, typer.Option(help="Examples per class to hold out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the partition.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the clients' classes: FILE.png.")] = None,
    json_output: Json = False,
) -> None:
    """List data sets, and whether their files are as published; or show one of them, client by client."""
    chosen = {"clients": clients, "partition": partition, "alpha": alpha, "shards": shards, "holdout": holdout}
    chosen["seed"] = seed
    if dataset is None:
        for name, value in {**chosen, "plot": plot and str(plot)}.items():
            if value is not None:
                raise OptionError("dataset", None, f"the name of a data set, with {name} = {value}")
        _list(data, json_output)
        return
    options = train_config(None, {**chosen, "dataset": dataset, "data": None if data is None else str(data)})
    _show(options, plot, json_output)


def _list(data: Path | None, json_output: bool) -> None:
    """List every data set: whether it is there, and what is wrong with its files."""
    listed = []
    for name in DATASETS:
        problem, where, files = None, None, []
        if name in OFFICIAL:
            try:
                files = check(name, data)
                where = str(files[0].path.parent) if files[0].path else None
                problem = next((f.problem for f in files if f.problem), None)
            except DataError as error:
                problem = str(error)
        listed.append({"dataset": name, "folder": where, "files": len(files), "problem": problem})
    if json_output:
        print_json({"datasets": listed})
        return
    place = (
        f"in {data}" if data else f"in {os.environ[ENVIRONMENT]}" if os.environ.get(ENVIRONMENT) else "nowhere named"
    )
    table = Table("data set", "", title=f"data sets ({place})")
    table.columns[1].overflow = "fold"
    for row in listed:
        if row["dataset"] == "digits":
            text = "carried by scikit-learn"
        elif row["dataset"] == "arrays":
            text = "your own: --data FILE.npz"
        else:
            text = str(row["problem"] or f"{row['files']} files in {row['folder']}, checksums as published")
        table.add_row(str(row["dataset"]), text)
    Console().print(table)


def _show(options: TrainConfig, plot: Path | None, json_output: bool) -> None:
    """Show one data set, and the classes of each client's examples."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise OptionError("plot", str(plot), "a file name that ends in .png")
    train, held, test = splits(options)
    parts = options.split(train)
    classes = int(train.y.max()) + 1
    counts = [_counts(part, classes) for part in parts]
    if plot is not None:
        _plot(parts, classes, plot)
    shape = list(train.x.shape[1:])
    if json_output:
        print_json(
            {
                "dataset": options.dataset,
                "shape": shape,
                "classes": classes,
                "train": len(train),
                "holdout": 0 if held is None else len(held),
                "test": len(test),
                "clients": counts,
                "plot": None if plot is None else str(plot),
            }
        )
        return
    rest = "" if held is None else f", {len(held):,} held out"
    title = f"{options.dataset}: {len(train):,} training examples of {shape}{rest}, {len(test):,} for the test"
    narrow = classes <= _WIDEST
    heads = map(str, range(classes)) if narrow else ["classes", "most of one class"]
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    for head in ("client", "examples", *heads):
        table.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(counts[:_LONGEST]):
        table.add_row(str(i), str(sum(row)), *map(str, row if narrow else [sum(n > 0 for n in row), max(row)]))
    console = Console()
    console.print(table)
    if len(counts) > _LONGEST:
        console.print(f"and {len(counts) - _LONGEST:,} clients more (--json lists all)")
    if plot is not None:
        console.print(f"picture: {plot}", soft_wrap=True)


def _counts(part: Dataset, classes: int) -> list[int]:
    return [int(n) for n in np.bincount(part.y.astype(np.int64), minlength=classes)]


def _plot(parts: tuple[Dataset, ...], classes: int, file: Path) -> None:
    from baffle.report.charts import draw  # matplotlib is an extra
    from baffle.report.figures import partition_chart

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, draw(partition_chart(parts, classes)))
    except OSError as error:
        raise JournalError(f"{file}: cannot write: {error.strerror}") from error

"""``baffle models``: what there is to train, and how fast it runs here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from baffle.cli.common import Json, print_json
from baffle.core.checks import require_between
from baffle.data import Dataset

if TYPE_CHECKING:
    from torch import nn

_SHAPES = {"grey": (1, 28, 28), "colour": (3, 32, 32)}
_CLASSES = 10


def models_command(
    batch_size: Annotated[int, typer.Option(help="Examples per pass.", min=1)] = 32,
    threads: Annotated[int | None, typer.Option(help="Passes at a time; by default one per core.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="Seconds to measure each model; 0: do not.", min=0, max=600)] = 0.5,
    json_output: Json = False,
) -> None:
    """List the models: parameters, and perturbed forward passes per second on this machine.

    For ten classes of grey images of 28 x 28 pixels and of colour images of 32 x 32.
    """
    require_between("--seconds", seconds, 0, 600)  # nan is between any two in some versions of typer
    from torch.nn.functional import cross_entropy

    from baffle.models import MODELS, build
    from baffle.runtimes.choose import passes_per_second
    from baffle.runtimes.pytorch.runtime import TorchRuntime

    def speed(model: nn.Module, shape: tuple[int, ...]) -> float | None:
        if not seconds:
            return None
        noise = np.random.default_rng(0).standard_normal((batch_size, *shape), np.float32)
        batch = Dataset(noise, np.zeros(batch_size, np.int64))
        return round(passes_per_second(TorchRuntime(model, cross_entropy, threads), batch, seconds), 1)

    rows = []
    for name, architecture in MODELS.items():
        row: dict[str, str | int | float | None] = {"model": name, "about": architecture.about}
        for kind, shape in _SHAPES.items():
            model = build(name, shape, _CLASSES)
            row[f"{kind}_parameters"] = sum(p.numel() for p in model.parameters())
            row[f"{kind}_passes_per_second"] = speed(model, shape)
        rows.append(row)
    if json_output:
        print_json({"batch_size": batch_size, "models": rows})
        return
    table = Table("model", title=f"models ({_CLASSES} classes, passes over {batch_size} examples)")
    for kind, shape in _SHAPES.items():
        for what in ("parameters", "passes/s"):
            table.add_column(f"{kind} {shape[1]} x {shape[2]}\n{what}", justify="right")
    for row in rows:
        numbers = [row[f"{kind}_{what}"] for kind in _SHAPES for what in ("parameters", "passes_per_second")]
        cells = ["" if n is None else f"{n:,}" if isinstance(n, int) else f"{n:,.0f}" for n in numbers]
        table.add_row(str(row["model"]), *cells)
    Console().print(table)

"""``baffle calibrate``: which sigma gives a derivative, for a model, a runtime, a precision and a batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from baffle.cli.common import Json, errors, print_json
from baffle.cli.options import Flag, with_flags
from baffle.client.calibrate import Agreement, Calibration, calibrate, compare
from baffle.client.respond import perturbations
from baffle.core.quantize import MOST_CODES
from baffle.core.types import Task
from baffle.errors import JournalError, OptionError
from baffle.files import write_atomic
from baffle.training.build import model_of, runtime_of, splits, vocabulary_of
from baffle.training.options import TrainConfig, train_config

_WHAT, _HOW = "Model and data", "Measurement"


_FLAGS = [
    Flag("dataset", _WHAT, "As in 'baffle train'."),
    Flag("data", _WHAT),
    Flag("model", _WHAT, "As in 'baffle train'."),
    Flag("activation", _WHAT),
    Flag("norm", _WHAT, "group or none."),
    Flag("start", _WHAT, "Weights: a run folder, or FILE.safetensors."),
    Flag("trainable", _WHAT, "all, head, scales, or a pattern."),
    Flag("prune", _WHAT, "Share of the weights to prune."),
    Flag("prune_by", _WHAT, "magnitude, inputs or channels."),
    Flag("seed", _WHAT, "Seed of weights, batch and directions."),
    Flag("runtime", _HOW, "torch, ort or openvino."),
    Flag("precision", _HOW, "fp32, bf16, fp16, int8-weights or int8."),
    Flag("branches", _HOW, "Rank-1 perturbations beside the weights."),
    Flag("lattice", _HOW, "On the int8 lattice, by 1, 2, 4, 8 codes: any number but 0."),
    Flag("family", _HOW, "rank1, rademacher or gaussian."),
    Flag("difference", _HOW, "forward or central; as in 'baffle train'."),
    Flag("batch_size", _HOW, "Examples of the batch.", 64),
    Flag("num_directions", _HOW, "Directions to measure along.", 64),
]


@with_flags(_FLAGS)
def calibrate_command(
    *,
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Options by name; flags win.")] = None,
    flags: dict[str, object],
    plot: Annotated[Path | None, typer.Option(help="Write a picture: FILE.png.")] = None,
    json_output: Json = False,
) -> None:
    """Compare finite differences with float64 for each sigma: correlation, slope, noise; and recommend a sigma.

    The reference is PyTorch in float64: differences with a step of 1e-6, and gradients by backpropagation. The
    column "guess" is the error that a client estimates without a reference: --sigma auto chooses by it.
    """
    options = train_config(config, flags if config else {"batch_size": 64, "num_directions": 64} | flags)
    options.method()  # refuses options that contradict each other
    if options.runtime == "auto":  # nothing is timed here: take the default
        options = msgspec.structs.replace(options, runtime="torch")
    if plot is not None and plot.suffix.lower() != ".png":
        raise OptionError("plot", str(plot), "a file name that ends in .png")
    calibrations, agreements, autograd = _measure(options)
    best = calibrations[0] if not options.lattice else max(zip(calibrations, agreements, strict=True), key=_cosine)[0]
    result = {
        "model": options.model,
        "dataset": options.dataset,
        "runtime": options.runtime,
        "precision": options.precision,
        "branches": options.branches,
        "family": options.family,
        "difference": options.differences,
        "batch_size": options.batch_size,
        "num_directions": options.num_directions,
        "sigma": best.sigma,
        "autograd_correlation": autograd,
        "points": [
            {**asdict(a), "lattice": m, "guess": float(guess) if np.isfinite(guess) else None}
            for m, c, points in zip(_codes(options), calibrations, agreements, strict=True)
            for a, guess in zip(points, c.errors, strict=True)
        ],
    }
    if plot is not None:
        _plot(plot, options, calibrations, agreements)
        result["plot"] = str(plot)
    if json_output:
        print_json(result)
        return
    _print(options, calibrations, agreements, autograd)
    if plot is not None:
        Console().print(f"picture: {plot}", soft_wrap=True)


def _codes(options: TrainConfig) -> list[int]:
    return [1, 2, 4, MOST_CODES] if options.lattice else [0]


def _cosine(pair: tuple[Calibration, tuple[Agreement, ...]]) -> float:
    return pair[1][0].correlation


def _measure(options: TrainConfig) -> tuple[list[Calibration], list[tuple[Agreement, ...]], float]:
    """Calibrations (on the lattice one per number of codes), and how they agree with the reference."""
    from torch.nn.functional import cross_entropy

    from baffle.runtimes.pytorch.float64 import derivatives

    train, _, test = splits(options)
    model, masks = model_of(options, train, vocabulary_of(train, test), train)
    runtime = runtime_of(options, model, train, masks)
    rng = np.random.default_rng(options.seed)
    batch = train.take(rng.permutation(len(train))[: options.batch_size])
    weights = runtime.initial_weights()
    calibrations, agreements, cosines = [], [], []
    for codes in track(_codes(options), "measuring", console=errors, disable=not errors.is_terminal):
        task = _task(options, codes)
        calibration = calibrate(task, runtime, weights, batch, options.num_directions)
        chosen = perturbations(msgspec.structs.replace(task, sigma=calibration.sigma), runtime.table, 0)
        differences, gradients = derivatives(model, cross_entropy, weights, chosen, batch)
        calibrations.append(calibration)
        agreements.append(compare(calibration, differences))
        norms = float(np.linalg.norm(differences) * np.linalg.norm(gradients))
        cosines.append(float(differences @ gradients) / norms if norms else 0.0)
    return calibrations, agreements, min(cosines)


def _task(options: TrainConfig, codes: int) -> Task:
    return Task(
        round=0,
        key=options.seed,
        family=options.family,
        sharing="shared",
        difference=options.differences,
        num_directions=options.num_directions,
        sigma=1.0,
        lattice=codes,
        exponents=(0,),
        clip=None,
        batch_size=options.batch_size,
        local_steps=1,
        local_lr=0.0,
        quantum=1,
        state_sha256=b"",
    )


def _print(
    options: TrainConfig, calibrations: list[Calibration], agreements: list[tuple[Agreement, ...]], autograd: float
) -> None:
    table = Table(
        title=f"{options.model} on {options.dataset}: {options.runtime} {options.precision}, {options.differences}, "
        f"{options.num_directions} directions, {options.batch_size} examples"
    )
    for head in (
        *(["codes"] if options.lattice else []),
        "sigma",
        "correlation",
        "slope",
        "noise",
        "error",
        "guess",
        "",
    ):
        table.add_column(head, justify="right")
    for codes, calibration, points in zip(_codes(options), calibrations, agreements, strict=True):
        for point, guess in zip(points, calibration.errors, strict=True):
            chosen = point.sigma == calibration.sigma and not options.lattice
            table.add_row(
                *([str(codes)] if codes else []),
                f"{point.sigma:.3g}",
                *(f"{v:.3f}" for v in (point.correlation, point.slope, point.noise, point.error)),
                f"{guess:.3f}" if np.isfinite(guess) else "",
                "use this" if chosen else "",
            )
    console = Console()
    console.print(table)
    console.print(f"float64 differences against autograd: correlation {autograd:.6f}")


def _plot(
    file: Path, options: TrainConfig, calibrations: list[Calibration], agreements: list[tuple[Agreement, ...]]
) -> None:
    from baffle.report.charts import draw  # matplotlib is an extra
    from baffle.report.sigma import calibration_chart

    if options.lattice:
        points = [a for group in agreements for a in group]
        x, guess = [float(m) for m in _codes(options)], None
    else:
        points, x, guess = list(agreements[0]), list(calibrations[0].sigmas), calibrations[0].errors
    title = f"{options.model}, {options.runtime} {options.precision}, {options.differences} differences"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, draw(calibration_chart(title, x, points, guess, codes=bool(options.lattice))))
    except OSError as error:
        raise JournalError(f"{file}: cannot write: {error.strerror}") from error

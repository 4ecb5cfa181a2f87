"""``baffle export``: a model as a client bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from baffle.cli.common import Json, command_of, print_json
from baffle.cli.options import Flag, with_flags
from baffle.core.types import table_size
from baffle.errors import BundleError, OptionError, require_choice
from baffle.runfolder.journal import Journal
from baffle.runtimes.onnx.bundle import Bundle
from baffle.training.build import bundle_of, model_of, model_of_run, narrowed, splits, vocabulary_of
from baffle.training.options import train_config

_MODEL, _CLIENT = "Model", "Client"
_RUNS_OWN = {"dataset", "activation", "norm", "start", "seed"}


_FLAGS = [
    Flag("dataset", _MODEL, "Whose examples it takes, as in 'baffle train'."),
    Flag("data", _MODEL),
    Flag("activation", _MODEL),
    Flag("norm", _MODEL, "group or none."),
    Flag("start", _MODEL, "Weights: a run folder, or FILE.safetensors."),
    Flag("trainable", _MODEL, "all, head, scales, or a pattern of names."),
    Flag("prune", _MODEL, "Share of the weights to prune."),
    Flag("prune_by", _MODEL, "magnitude, inputs or channels."),
    Flag("seed", _MODEL, "Seed of the initial weights."),
    Flag("precision", _CLIENT, "fp32 (OpenVINO also runs it in bf16), fp16, int8-weights or int8."),
    Flag("credit", _CLIENT, "global, local or feature: with blocks, for clients that return numbers of rows."),
    Flag("head", _CLIENT, "The last layer: exact gradients, or directions; by default exact unless credit is global."),
    Flag("branches", _CLIENT, "Rank-1 perturbations beside the weights, in float."),
]


@with_flags(_FLAGS)
def export_command(
    *,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="One of 'baffle models', package.module:builder, or the folder of a run."),
    ],
    to: Annotated[str, typer.Option("--to", help="Kind of graph.")] = "onnx",
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("client.zip"),
    flags: dict[str, object],
    json_output: Json = False,
) -> None:
    """Write a client bundle (graph, tensors, preprocessing, weights and hashes) for clients without PyTorch.

    Such a client runs 'python -m baffle.client.edge BUNDLE DATA.npz'. A run's bundle has its averaged weights.
    """
    require_choice("to", to, ["onnx"])
    from baffle.models import MODELS

    chosen = {"model": model, "runtime": "ort"} | flags
    if model not in MODELS and Path(model).is_dir():
        bundle = _of_run(model, chosen)
    else:
        options = train_config(None, chosen)
        train, _, test = splits(options)
        built, masks = model_of(options, train, vocabulary_of(train, test), train)
        bundle = bundle_of(options, built, train, masks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"{out}: cannot be written: {error.strerror}") from error
    bundle.save(out)
    manifest = bundle.manifest
    result = {
        "bundle": str(out),
        "sha256": bundle.sha256,
        "bytes": out.stat().st_size,
        "precision": manifest.precision,
        "loss": manifest.loss,
        "parameters": table_size(manifest.table),
        "inputs": len(manifest.table),
    }
    if json_output:
        print_json(result | {"tensors": {s.name: list(s.shape) for s in manifest.table}})
        return
    table = Table(
        "tensor", "shape", "kept", "enters as", title=f"{out}: {manifest.precision}, {out.stat().st_size:,} bytes"
    )
    for spec, feed in zip(manifest.table, manifest.feeds, strict=True):
        mask = spec.mask
        table.add_row(spec.name, "x".join(map(str, spec.shape)), "" if mask is None else f"{mask.mean():.1%}", feed)
    console = Console()
    console.print(table)
    console.print(f"sha256 {bundle.sha256}", soft_wrap=True, highlight=False)


def _of_run(folder: str, flags: dict[str, object]) -> Bundle:
    """The bundle of a run's model with its averaged weights, pruned and frozen further if ``flags`` say so."""
    for name in sorted(_RUNS_OWN & flags.keys()):
        raise OptionError(name, flags[name], "none with the folder of a run, which has its own")
    journal = Journal.open(folder)
    options = command_of(journal)
    if "data" in flags:
        options = msgspec.structs.replace(options, data=str(flags["data"]))
    model, masks = model_of_run(journal, options)
    train, _, _ = splits(options)
    chosen = train_config(None, {"model": options.model, **{k: flags[k] for k in flags.keys() - {"model", "data"}}})
    if chosen.prune_by == "channels" and masks:
        raise OptionError("prune_by", "channels", "magnitude or inputs: the run's weights are pruned one by one")
    if "trainable" in flags and options.trainable != "all":
        model.requires_grad_(True)
    model, more = narrowed(chosen, model, options.split(train)[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    masks = {name: mask & (masks or {}).get(name, mask) for name, mask in {**(masks or {}), **(more or {})}.items()}
    masks = {name: mask for name, mask in masks.items() if name in trained}
    return bundle_of(chosen, model, train, masks)

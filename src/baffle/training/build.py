"""From options to the parts of a run: data, clients, model, runtime, engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from safetensors import SafetensorError

from baffle.core.credit import model_table
from baffle.core.types import Masks, Weights
from baffle.data import Dataset, hold_out, load
from baffle.engines.local import LocalEngine
from baffle.errors import CorruptRunError, DataError, ModelError, OptionError, PlanError
from baffle.runfolder.journal import Journal
from baffle.runtimes import Runtime
from baffle.runtimes.choose import MARGIN, Choice, choose, trial_batch
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.runtimes.onnx.bundle import Bundle, Precision
from baffle.runtimes.onnx.load import load_runtime
from baffle.training.options import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

_SCORED_ON = 128  # examples
_MOST_CLASSES = 2**20  # a larger label is a mistake, not a reason to build such a model


@dataclass(frozen=True)
class Setup:
    """The parts of a training run in one process."""

    clients: tuple[Dataset, ...]
    validation: Dataset | None
    test: Dataset
    model: nn.Module
    engine: LocalEngine
    initial: Weights
    choice: Choice | None = None
    """How passes are evaluated, if that was measured."""


@dataclass(frozen=True)
class Server:
    """The parts of a server whose clients are on other machines. ``train`` shows what examples look like."""

    train: Dataset
    validation: Dataset | None
    test: Dataset
    classes: int
    vocabulary: int | None
    runtime: Runtime
    bundle: Bundle | None
    initial: Weights


def splits(options: TrainConfig) -> tuple[Dataset, Dataset | None, Dataset]:
    """Read the data: (training, held-out, test) examples, with checked labels. Raises DataError."""
    train, test = load(options.dataset, options.data, augmented=options.augment)
    for data in (train, test):
        if not np.issubdtype(data.y.dtype, np.integer) or data.y.ndim != 1:
            raise DataError(f"{data.name}.y: {data.y.dtype}{list(data.y.shape)}: expected one integer label an example")
        if data.x.size == 0:
            raise DataError(f"{data.name}.x: shape {list(data.x.shape)}: expected examples with numbers in them")
    train.check_labels(_MOST_CLASSES)
    test.check_labels(_classes(train))
    if options.holdout is None:
        return train, None, test
    rest, held = hold_out(train, options.holdout, options.seed)
    if options.partition == "column" and train.groups is not None and rest.groups is not None:
        lost = np.setdiff1d(train.groups, rest.groups)
        if len(lost):
            raise DataError(f"holdout = {options.holdout}: it takes all examples of group {lost[0]}: expected fewer")
    return rest, held, test


def assemble(options: TrainConfig) -> Setup:
    """Read the data, split it, build the model and the engine."""
    train, validation, test = splits(options)
    clients = options.split(train)
    model, masks = model_of(options, train, vocabulary_of(train, validation, test), clients[0])
    choice = None if options.backprop else chosen_of(options, model, train, masks, clients)
    runtime = runtime_of(options, model, train, masks) if choice is None else choice.runtime
    engine = LocalEngine(runtime, clients)
    return Setup(clients, validation, test, model, engine, runtime.initial_weights(), choice)


def assemble_server(options: TrainConfig) -> Server:
    """Read the server's own data, build the model, and the bundle for inference-only clients."""
    require_runtime(options)
    train, validation, test = splits(options)
    vocabulary = vocabulary_of(train, validation, test)
    model, masks = model_of(options, train, vocabulary, train)
    bundle = None if options.runtime == "torch" else bundle_of(options, model, train, masks)
    if bundle is None:
        runtime = runtime_of(options, model, train, masks)
    else:
        runtime = load_runtime(bundle, options.runtime, options.threads, options.precision)
    return Server(train, validation, test, _classes(train), vocabulary, runtime, bundle, runtime.initial_weights())


def require_runtime(options: TrainConfig) -> None:
    """Raise OptionError if a server's options leave the runtime open."""
    if options.runtime == "auto":
        raise OptionError("runtime", "auto", "torch, ort or openvino: it is the clients that would have to measure")


def model_of(
    options: TrainConfig, train: Dataset, vocabulary: int | None, sample: Dataset
) -> tuple[nn.Module, Masks | None]:
    """Build the model that the options describe: with its initial weights, pruned, and partly frozen.

    Args:
        options: What to build.
        train: Training data, for the shape of examples and the number of classes.
        vocabulary: Number of tokens; None if examples are not tokens.
        sample: Examples whose first few the forward-only pruning score uses.

    Returns:
        The model, and the pruning masks of its trainable tensors (None if it is not pruned).
    """
    # PyTorch is imported here, so that --help and replay do not wait for it
    from baffle.models import build

    if ":" in options.model and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # where a user's own model is likely to be
    model = build(
        options.model,
        train.x.shape[1:],
        _classes(train),
        options.seed,
        activation=options.activation,
        norm=options.norm,
        vocabulary=vocabulary,
    )
    if options.start is not None:
        load_start(model, Path(options.start))
    return narrowed(options, model, sample)


def narrowed(options: TrainConfig, model: nn.Module, sample: Dataset) -> tuple[nn.Module, Masks | None]:
    """Prune a model and freeze the part that is not trained; the model, and the masks of the trainable tensors."""
    from baffle.models import train_only

    masks: Masks | None = None
    if options.prune:
        from baffle.pruning import prune, shrink

        few = sample.take(np.arange(min(len(sample), _SCORED_ON)))
        try:
            if options.prune_by == "channels":
                model = shrink(model, options.prune, few)
            else:
                masks = prune(model, options.prune, options.prune_by, few)
        except OptionError as error:
            raise OptionError("prune", options.prune, error.expected) from error
    train_only(model, options.trainable)
    if masks is not None:  # of what is trained; frozen weights are pruned for good
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        masks = {name: mask for name, mask in masks.items() if name in trained}
    return model, masks


def command_of(journal: Journal) -> TrainConfig:
    """The options that a run was started with."""
    if journal.config.command is None:
        raise OptionError("run", str(journal.path), "a run of 'baffle train'; one from Python continues with bf.resume")
    try:
        return msgspec.convert(journal.config.command, TrainConfig)
    except msgspec.ValidationError as error:
        raise CorruptRunError(f"{journal.path / 'config.json'}: command: {error}") from error


def model_of_run(journal: Journal, options: TrainConfig) -> tuple[nn.Module, Masks | None]:
    """Build the model that a run trained, with its averaged weights; the model and its masks.

    Raises PlanError if ``options``, which are the run's, now make another model, for example from changed weights to
    start from.
    """
    from torch.nn.functional import cross_entropy

    from baffle.runtimes.pytorch.runtime import TorchRuntime, load_into

    train, validation, test = splits(options)
    model, masks = model_of(options, train, vocabulary_of(train, validation, test), options.split(train)[0])
    runtime = TorchRuntime(model, cross_entropy, threads=1, masks=masks)
    recorded = EvaluationPlan.of(journal.config.plan)
    if runtime.table != model_table(journal.config.table) or EvaluationPlan.of(runtime.plan).frozen != recorded.frozen:
        raise PlanError(f"{journal.path}: the run trained another model than its options make now")
    load_into(model, runtime.table, journal.state().ema_weights)
    return model, masks


def runtime_of(options: TrainConfig, model: nn.Module, data: Dataset, masks: Masks | None) -> Runtime:
    """Make the runtime that the options name, for a classifier; the model is exported unless the runtime is PyTorch's.

    "auto" is taken as the default here: nothing is measured.
    """
    from torch.nn.functional import cross_entropy

    if not options.is_plain and options.runtime in ("torch", "auto"):
        from baffle.runtimes.pytorch.credit import CreditRuntime

        return CreditRuntime(
            model,
            cross_entropy,
            data,
            credit=options.credit,
            threads=options.threads,
            precision=options.precision,
            masks=masks,
        )
    if options.runtime in ("torch", "auto"):
        from baffle.runtimes.pytorch.runtime import TorchRuntime

        return TorchRuntime(
            model,
            cross_entropy,
            options.threads,
            precision=options.precision,
            masks=masks,
            strategy="copies" if options.strategy == "auto" else options.strategy,
            memory=options.memory_bytes,
        )
    return load_runtime(bundle_of(options, model, data, masks), options.runtime, options.threads, options.precision)


def evaluated_as(options: TrainConfig, plan: EvaluationPlan) -> TrainConfig:
    """The options that evaluate as a run did, so that nothing is measured again."""
    runtime = plan.runtime or options.runtime
    strategy = plan.strategy if runtime == "torch" and options.is_plain else "auto"
    return msgspec.structs.replace(options, runtime=runtime, strategy=strategy, threads=plan.threads)


def chosen_of(
    options: TrainConfig, model: nn.Module, data: Dataset, masks: Masks | None, clients: Sequence[Dataset]
) -> Choice | None:
    """Choose the fastest runtime by a short measurement on the clients' first examples; None if options name one."""
    if options.strategy != "auto" or options.runtime not in ("torch", "auto") or not options.is_plain:
        return None
    ways = {
        strategy: partial(runtime_of, msgspec.structs.replace(options, runtime="torch", strategy=strategy), model)
        for strategy in ("copies", "stacked")
    }
    if options.runtime == "auto":
        ways["openvino"] = partial(runtime_of, msgspec.structs.replace(options, runtime="openvino"), model)
    together = options.sharing == "shared" and options.local_steps == 1
    count = max(1, round(options.participation * len(clients))) if together else 1
    return choose(
        {name: partial(way, data, masks) for name, way in ways.items()},
        trial_batch(clients[:count], options.batch_size),
        num_directions=options.num_directions,
        family=options.family,
        margin=1.0 if options.runtime == "auto" else MARGIN,  # no margin: a user who sets it wants the fastest
    )


def bundle_of(options: TrainConfig, model: nn.Module, data: Dataset, masks: Masks | None) -> Bundle:
    """Export a model as a client bundle. For bf16 the bundle is in float32, because bf16 is a setting of the engine."""
    from torch.nn.functional import cross_entropy

    from baffle.exporter import export

    own = options.runtime == "openvino" and options.precision in ("bf16", "fp16")  # a setting of the engine
    precision = msgspec.convert("fp32" if own else options.precision, Precision)
    credit = None if options.is_plain else options.credit
    return export(
        model, cross_entropy, data, precision=precision, branches=options.branches, masks=masks, credit=credit
    )


def load_start(model: nn.Module, path: Path) -> None:
    """Copy weights into a model by name: the average of a run folder, or the tensors of a .safetensors file.

    The last layer may be missing from the file, or have another number of classes; it is then not changed. Raises
    ModelError if any other tensor is missing, has another shape or is not finite. Buffers are copied if they are in
    the file.
    """
    import torch

    tensors = _tensors(path)
    parameters = dict(model.named_parameters())
    last = next(reversed(parameters), "").rpartition(".")[0]
    if not tensors.keys() & parameters.keys():
        raise ModelError(f"{path}: no tensor of the model: expected {', '.join(list(parameters)[:4])}, ...")
    with torch.no_grad():
        for name, target in [*parameters.items(), *model.named_buffers()]:
            tensor = tensors.get(name)
            if tensor is not None and tensor.shape == target.shape:
                if not torch.isfinite(tensor.float()).all():
                    raise ModelError(f"{path}: {name}: found NaN or infinity: expected finite numbers")
                target.copy_(tensor)
                continue
            other = name in parameters and name.rpartition(".")[0] == last
            if tensor is None and (other or name not in parameters):
                continue
            if tensor is None or not other or tensor.shape[1:] != target.shape[1:]:
                problem = "no such tensor" if tensor is None else f"shape {list(tensor.shape)}"
                raise ModelError(f"{path}: {name}: {problem}: expected {list(target.shape)}, as the model has it")


def _tensors(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    if not path.is_dir():
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: expected a run folder or a .safetensors file ({error})") from error
    journal = Journal.open(path)
    # the rows of a partly frozen model cover its trainable part only
    if EvaluationPlan.of(journal.config.plan).frozen and journal.config.command is not None:
        model, _ = model_of_run(journal, command_of(journal))
        return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    average = journal.state().ema_weights
    return {
        spec.name: torch.from_numpy(average[spec.slice].reshape(spec.shape))
        for spec in model_table(journal.config.table)
    }


def vocabulary_of(*parts: Dataset | None) -> int | None:
    """The number of tokens, if examples are tokens."""
    known = [data for data in parts if data is not None]
    if not known[0].is_tokens:
        return None
    for data in known:
        if data.x.min() < 0:
            raise DataError(f"{data.name}.x: a token {data.x.min()}: expected integers >= 0")
    return 1 + max(int(data.x.max()) for data in known)


def _classes(train: Dataset) -> int:
    return int(train.y.max()) + 1

"""What a client evaluates for a server's setup, and what it refuses to evaluate.

With runtime ``ort`` or ``openvino`` it is a client bundle: a graph, no code. With ``torch`` it is the name and the
options of one of baffle's own models. A model in other code is built only if the client's operator named it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import msgspec
import numpy as np

from baffle.client.examples import check_labels
from baffle.client.participant import Build
from baffle.core.credit import is_plain
from baffle.data import Dataset, Scaling
from baffle.errors import BundleError, DataError, ModelError, ReplyError
from baffle.protocol.messages import Setup
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.onnx.load import load_runtime
from baffle.training.options import TrainConfig


@dataclass(frozen=True)
class Own:
    """What a client decides for itself, whatever the server asks for.

    Attributes:
        threads: Passes in parallel; None: one per core.
        bundle: Take part with this bundle only.
        model: The one builder of the user's own, ``package.module:builder``, that may be imported.
        strategy: How PyTorch evaluates: ``copies``, ``stacked`` or ``streaming``.
        memory: Limit in bytes for evaluation by PyTorch, in addition to the model.
    """

    threads: int | None = 1
    bundle: Bundle | None = None
    model: str | None = None
    strategy: str = "copies"
    memory: int | None = None


def builder(data: Dataset, own: Own = Own()) -> Build:  # frozen
    """Return the function that a ``Participant`` calls to build runtime and data for a server's setup."""

    def build(setup: Setup) -> tuple[Runtime, Dataset]:
        runtime = runtime_for(setup, own)
        return runtime, data_for(setup, data, runtime)

    return build


def runtime_for(setup: Setup, own: Own) -> Runtime:
    """Build the runtime that evaluates a setup's model.

    Raises:
        BundleError: The setup's bundle, or its lack of one, is not what this client trusts.
        ModelError: The model is code that this client does not trust.
        ReplyError: The setup's options are malformed.
    """
    options = _options(setup)
    if setup.bundle is None:
        if own.bundle is not None:
            raise BundleError("the server has no bundle (runtime torch): expected the one that this client trusts")
        return _torch(options, setup, own)
    bundle = _bundle(setup.bundle)
    if own.bundle is not None and bundle.sha256 != own.bundle.sha256:
        raise BundleError(
            f"the server's bundle is {bundle.sha256[:12]}: expected {own.bundle.sha256[:12]}, trusted here"
        )
    return load_runtime(bundle, options.runtime, own.threads, options.precision)


def data_for(setup: Setup, data: Dataset, runtime: Runtime) -> Dataset:
    """Convert examples to what a setup's model takes: integer pixels are scaled as the server's are.

    Raises:
        DataError: Shapes, types, tokens or labels do not fit the model.
    """
    data = replace(data, augmented=bool(setup.options.get("augment")))
    if setup.mean and np.issubdtype(data.x.dtype, np.integer):
        if data.x.size and not 0 <= data.x.min() <= data.x.max() <= 255:
            raise DataError(f"{data.name}.x: {data.x.min()} to {data.x.max()}: expected pixels, 0 to 255 each")
        data = replace(data, x=data.x.astype(np.uint8, copy=False), scaling=Scaling(setup.mean, setup.std))
    if setup.bundle is not None:
        check_labels(runtime, _bundle(setup.bundle), data)
        return data
    if tuple(data.x.shape[1:]) != setup.shape:
        raise DataError(f"{data.name}.x: examples of shape {list(data.x.shape[1:])}: expected {list(setup.shape)}")
    if data.is_tokens != (setup.vocabulary is not None):
        expected = "floating-point numbers" if setup.vocabulary is None else "integer tokens"
        raise DataError(f"{data.name}.x: {data.x.dtype}: expected {expected}, as the server's")
    if setup.vocabulary is not None and data.x.size and not 0 <= data.x.min() <= data.x.max() < setup.vocabulary:
        raise DataError(
            f"{data.name}.x: tokens {data.x.min()} to {data.x.max()}: expected 0 to {setup.vocabulary - 1}, as the "
            "server's"
        )
    data.check_labels(setup.classes)
    return data


@lru_cache(maxsize=1)
def _bundle(data: bytes) -> Bundle:
    """Unpack and check a bundle once, for the runtime and for all clients of the process."""
    return Bundle.decode(data)


def _options(setup: Setup) -> TrainConfig:
    try:
        return msgspec.convert(setup.options, TrainConfig)
    except msgspec.ValidationError as error:
        raise ReplyError(f"the server's options: {error}") from error


def _torch(options: TrainConfig, setup: Setup, own: Own) -> Runtime:
    if ":" in options.model and options.model != own.model:
        raise ModelError(
            f"the server's model is {options.model}: code of its own: expected a model of baffle, or start this client "
            f"with --model {options.model}, or the server with runtime ort"
        )
    from torch.nn.functional import cross_entropy

    from baffle.models import build, train_only
    from baffle.runtimes.pytorch.runtime import TorchRuntime

    model = build(
        options.model,
        setup.shape,
        setup.classes,
        options.seed,
        activation=options.activation,
        norm=options.norm,
        vocabulary=setup.vocabulary,
    )
    train_only(model, options.trainable)
    masks = {spec.name: mask.reshape(spec.shape) for spec in setup.table if (mask := spec.mask) is not None}
    if not is_plain(setup.table):
        from baffle.runtimes.pytorch.credit import CreditRuntime

        sample = Dataset(
            np.zeros((1, *setup.shape), np.int64 if setup.vocabulary is not None else np.float32), np.zeros(1, np.int64)
        )
        return CreditRuntime(
            model,
            cross_entropy,
            sample,
            credit=options.credit,
            threads=own.threads,
            precision=options.precision,
            masks=masks or None,
        )
    return TorchRuntime(
        model,
        cross_entropy,
        own.threads,
        precision=options.precision,
        masks=masks or None,
        strategy=own.strategy,
        memory=own.memory,
    )

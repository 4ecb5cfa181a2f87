"""Federated learning without backpropagation: clients run forward passes and return K numbers.

    import torch.nn.functional as F, baffle as bf

    train, test = bf.load("digits")
    run = bf.fit(model, bf.partition(train, clients=10), loss=F.cross_entropy, test=test)

Importing this needs only numpy, msgspec and safetensors: names that need PyTorch, ONNX Runtime or OpenVINO are loaded
when they are first used, and raise MissingExtraError if it is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from baffle.core.aggregate import SecureSum as secure_sum
from baffle.core.aggregate import WeightedSum as weighted_sum
from baffle.core.guard import Guard as guard
from baffle.core.method import Method
from baffle.core.optim import Adam as adam
from baffle.core.optim import AdamW as adamw
from baffle.core.optim import ClipUpdate as clip_update
from baffle.core.optim import Constant as constant
from baffle.core.optim import Cosine as cosine
from baffle.core.optim import Decay as decay
from baffle.core.optim import Sgd as sgd
from baffle.core.scalars import ClipScalars as clip_scalars
from baffle.data import Dataset, from_torch, hold_out, load, partition
from baffle.engines.local import LocalEngine
from baffle.errors import BaffleError
from baffle.runfolder.journal import Journal
from baffle.runtimes.onnx.bundle import Bundle
from baffle.training.fit import fit
from baffle.training.loop import resume, train
from baffle.training.result import Run, evaluate

if TYPE_CHECKING:
    from baffle.engines.pipe import PipeEngine, write_clients
    from baffle.engines.remote.engine import RemoteEngine
    from baffle.exporter import export
    from baffle.pruning import masks_of, prune, shrink
    from baffle.runtimes.onnx.openvino import OpenVinoRuntime
    from baffle.runtimes.onnx.ort import OrtRuntime
    from baffle.runtimes.pytorch.credit import CreditRuntime
    from baffle.runtimes.pytorch.runtime import TorchRuntime
    from baffle.training.backprop import train_backprop

__version__ = "0.1.0"

__all__ = [
    "BaffleError",
    "Bundle",
    "CreditRuntime",
    "Dataset",
    "Journal",
    "LocalEngine",
    "Method",
    "OpenVinoRuntime",
    "OrtRuntime",
    "PipeEngine",
    "RemoteEngine",
    "Run",
    "TorchRuntime",
    "adam",
    "adamw",
    "clip_scalars",
    "clip_update",
    "constant",
    "cosine",
    "decay",
    "evaluate",
    "export",
    "fit",
    "from_torch",
    "guard",
    "hold_out",
    "load",
    "masks_of",
    "partition",
    "prune",
    "resume",
    "secure_sum",
    "sgd",
    "shrink",
    "train",
    "train_backprop",
    "weighted_sum",
    "write_clients",
]

_LAZY = {
    "CreditRuntime": "baffle.runtimes.pytorch.credit",
    "OpenVinoRuntime": "baffle.runtimes.onnx.openvino",
    "OrtRuntime": "baffle.runtimes.onnx.ort",
    "PipeEngine": "baffle.engines.pipe",
    "RemoteEngine": "baffle.engines.remote.engine",
    "TorchRuntime": "baffle.runtimes.pytorch.runtime",
    "export": "baffle.exporter",
    "masks_of": "baffle.pruning",
    "prune": "baffle.pruning",
    "shrink": "baffle.pruning",
    "train_backprop": "baffle.training.backprop",
    "write_clients": "baffle.engines.pipe",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'baffle' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """The public names: importing parts of the package adds its folders as attributes, which nobody looks for here."""
    return sorted([*__all__, "__version__"])

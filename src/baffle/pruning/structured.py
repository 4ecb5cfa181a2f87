"""Structured pruning: removes whole channels and neurons, for a smaller model that is faster on any runtime.

torch-pruning finds which layers have to shrink together (DepGraph, Fang et al., arXiv 2301.12900). Of each such group
the channels with the smallest norm over all its weights are removed, as in that paper. Every cut is tried on a copy
first: see ``_refused``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_between
from baffle.data import Dataset
from baffle.errors import DataError, MissingExtraError, ModelError
from baffle.pruning.unstructured import require_plain

try:
    import torch
    from torch import Tensor, nn

    from baffle.runtimes.pytorch.runtime import to_tensors
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

_TRACED = 4  # examples that models are traced and compared on
_TOLERANCE = 1e-4  # between outputs, relative to the largest
_CONVOLUTION = nn.modules.conv._ConvNd
_NORMS = (nn.GroupNorm, nn.LayerNorm)


def shrink(model: nn.Module, share: float, data: Dataset) -> nn.Module:
    """Make a smaller copy of a model: each convolution and linear layer loses a share of its outputs.

    A layer with c outputs loses floor(share x c) of them, those of smallest magnitude, together with the weights that
    read them; layers whose outputs are added lose the same ones. Before a GroupNorm every group loses floor(share x
    its channels) and keeps at least two; the number of groups stays. The remaining weights are those of ``model``, and
    the model's own outputs are never cut.

    A layer is left whole if the rest of the model would not compute the same with its channels removed as with these
    channels set to zero. That is tried for each layer with random weights, normalisations aside. In a transformer the
    perceptrons shrink; attention and the residual stream do not, since heads and positions are tied to their width.

    Tracing uses the graph that autograd records in forward passes of copies; nothing is differentiated. It happens
    where a run is set up, before it starts, and never on clients.

    Args:
        model: The model; never changed.
        share: Fraction of each layer's outputs to remove, in [0, 1).
        data: A few examples to trace the model on.

    Returns:
        The smaller copy.

    Raises:
        OptionError: For a share outside [0, 1).
        DataError: Without examples.
        ModelError: If nothing can be cut, with a reason for each layer.
        MissingExtraError: Without torch-pruning.

    Examples:
        >>> import baffle as bf
        >>> from baffle.models import build
        >>> digits, _ = bf.load("digits")
        >>> small = shrink(build("mlp", (1, 8, 8), 10), 0.5, digits)
        >>> [tuple(p.shape) for name, p in small.named_parameters() if name.endswith("weight")]
        [(100, 64), (32, 100), (10, 32)]
    """
    require_between("share", share, 0, 1, open_high=True)
    require_plain(model)
    if len(data) == 0:
        raise DataError(f"{data.name}: no examples: expected at least one to trace the model on")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False):
        x, _ = to_tensors(data.take(np.arange(_TRACED) % len(data)), device)
        small = copy.deepcopy(model)
        if share > 0:
            small = _shrunk(small, share, x)
        for name, module in model.named_modules():
            small.get_submodule(name).training = module.training
        for name, p in model.named_parameters():
            small.get_parameter(name).requires_grad_(p.requires_grad)
    return small


def _shrunk(model: nn.Module, share: float, x: Tensor) -> nn.Module:
    """Cut one group of layers after another, except those that cannot be cut."""
    small = model
    whole: dict[str, str] = {}
    for name, lost in _cuts(model, share, x).items():
        reason = _refused(small, name, lost, x) if isinstance(lost, list) else lost
        if isinstance(lost, list) and reason is None:
            small = copy.deepcopy(small)
            _Group(small, name, lost, x).cut()
        else:
            whole[name or "model"] = reason or ""
    if small is model:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in whole.items()) or "no convolution or linear layer"
        raise ModelError(f"the model cannot be shrunk by {share}: {reasons}")
    return small


class _Group:
    """Layers that shrink together when some outputs of one of them are removed."""

    def __init__(self, model: nn.Module, root: str, lost: list[int], x: Tensor) -> None:
        self._graph = _trace(model, x)
        layer = model.get_submodule(root)
        cut = self._graph.get_pruner_of_module(layer).prune_out_channels
        self._group = self._graph.get_pruning_group(layer, cut, lost)
        self._names = {module: name for name, module in model.named_modules()}

    @property
    def root(self) -> list[int]:
        """The outputs that the first layer loses: more than requested if some of them are tied to others."""
        return list(self._group[0].idxs)

    @property
    def readers(self) -> dict[str, list[int]]:
        """Convolutions and linear layers that read lost channels: name -> which of their inputs."""
        graph = self._graph
        return {
            self._names[item.dep.target.module]: list(item.idxs)
            for item in self._group
            if isinstance(item.dep.target.module, (_CONVOLUTION, nn.Linear))
            and graph.is_in_channel_pruning_fn(item.dep.handler)
            and not graph.is_out_channel_pruning_fn(item.dep.handler)
        }

    @property
    def even(self) -> bool:
        """Whether all groups of each GroupNorm lose the same number of channels."""
        for item in self._group:
            norm = item.dep.target.module
            if isinstance(norm, nn.GroupNorm):
                each = np.bincount(
                    np.array(item.idxs) // (norm.num_channels // norm.num_groups), minlength=norm.num_groups
                )
                if np.ptp(each):
                    return False
        return True

    def cut(self) -> None:
        """Remove the channels, in place."""
        if not self._graph.check_pruning_group(self._group):
            raise ValueError("nothing would be left of a layer")
        with torch.no_grad():
            self._group.prune()


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("torch-pruning is not installed: pip install 'baffle[prune]'") from error
    return torch_pruning


def _trace(model: nn.Module, x: Tensor) -> Any:
    """The dependencies between layers. All parameters are unfrozen, since autograd records no others."""
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    graph = _library().DependencyGraph()
    with torch.enable_grad():
        return graph.build_dependency(
            model, x, forward_fn=lambda module, inputs: module(inputs), ignored_params=[], verbose=False
        )


def _cuts(model: nn.Module, share: float, x: Tensor) -> dict[str, list[int] | str]:
    """The outputs that each group of layers loses, or the reason why none, by the name of its first layer."""
    importance = _library().importance.MagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    trial = copy.deepcopy(model)
    names = {module: name for name, module in trial.named_modules()}
    try:
        groups = list(_trace(trial, x).get_all_groups(root_module_types=(_CONVOLUTION, nn.Linear)))
    except Exception as error:  # from the user's own code, or from torch-pruning
        raise ModelError(f"the model cannot be traced on inputs {tuple(x.shape)} of {x.dtype}: {error}") from error
    cuts: dict[str, list[int] | str] = {}
    for group in groups:
        layers = [item.dep.target.module for item in group]
        try:
            scores = importance(group).double().cpu().numpy()
        except IndexError as error:
            cuts[names[layers[0]]] = f"torch-pruning cannot follow its outputs ({error})"
            continue
        cuts[names[layers[0]]] = _smallest(scores, share, layers)
    return cuts


def _smallest(scores: npt.NDArray[np.float64], share: float, layers: list[nn.Module]) -> list[int] | str:
    """The channels to remove, given their scores float64[channels], or the reason why none.

    ``layers`` are all layers that the channels pass through.
    """
    norms = [layer.num_groups for layer in layers if isinstance(layer, nn.GroupNorm)]
    tied = [c.groups for c in layers if isinstance(c, _CONVOLUTION) and c.groups not in (1, c.out_channels)]
    parts = math.lcm(*norms, *tied)
    size, rest = divmod(len(scores), parts)
    if rest:
        return f"{len(scores)} outputs cannot be divided into the {parts} groups of the layers that follow"
    count = min(math.floor(share * size), size - (2 if norms else 1))
    if count < 1:
        return f"{len(scores)} outputs{f' in {parts} groups' if parts > 1 else ''} are too few to lose {share} of them"
    scores = scores.reshape(parts, size)
    if tied:  # a grouped convolution loses the same positions in each group
        scores = np.broadcast_to(scores.mean(0), scores.shape)
    lost = np.argsort(scores, axis=1, kind="stable")[:, :count] + size * np.arange(parts)[:, None]
    channels: list[int] = np.sort(lost, axis=None).tolist()
    return channels


def _refused(model: nn.Module, root: str, lost: list[int], x: Tensor) -> str | None:
    """The reason why a cut must not be made, or None.

    A cut is correct if the smaller model computes what the larger one does when readers see zeros instead of the lost
    channels. This is tried with random weights, so that nothing agrees by chance, and with normalisations replaced by
    the identity, since their means rightly change.
    """
    large = copy.deepcopy(model)
    _randomise(large)
    small = copy.deepcopy(large)
    try:
        group = _Group(small, root, lost, x)
        readers = group.readers
        if group.root != lost:
            return "its own outputs are tied to each other"
        if not group.even:
            return "groups of a GroupNorm would lose different numbers of channels"
        group.cut()
        for module in (*large.eval().modules(), *small.modules()):
            if isinstance(module, _NORMS):
                module.register_forward_hook(lambda module, args, output: args[0])
        for name, inputs in readers.items():
            _blind(large.get_submodule(name), inputs)
        with torch.inference_mode():
            expected, actual = large(x), small(x)
    except Exception as error:  # from the user's own code, or from torch-pruning
        return f"the cut fails ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return f"the model gives {type(expected).__name__}, not a tensor"
    if actual.shape != expected.shape:
        return "its outputs are the model's"
    if [name for name, _ in small.named_parameters()] != [name for name, _ in large.named_parameters()]:
        return "weights that several layers share would come apart"
    tolerance = _TOLERANCE * float(expected.abs().max())
    if not torch.allclose(actual, expected, rtol=0, atol=tolerance):
        return "the rest would not compute the same without some of its outputs"
    return None


def _randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                scale = math.sqrt(p[0].numel()) if p.ndim > 1 and len(p) else 1.0
                p.copy_(torch.randn(p.shape, generator=generator) / scale)


def _blind(layer: nn.Module, inputs: list[int]) -> None:
    """Make a layer see zeros for some of its inputs: channels of [n, channels, ...], features of [..., features]."""
    dim = -1 if isinstance(layer, nn.Linear) else 1

    def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].index_fill(dim, torch.tensor(inputs, device=args[0].device), 0), *args[1:]

    layer.register_forward_pre_hook(zero)

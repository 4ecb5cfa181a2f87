"""Unstructured pruning: sets single weights to zero, and gives masks of the remaining ones, which are trained.

By magnitude: the LAMP score of Lee et al., arXiv 2010.07611, which compares tensors of any size and scale.
By inputs: Wanda, Sun et al., arXiv 2306.11695, which needs forward passes only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_between
from baffle.core.types import Masks
from baffle.data import Dataset
from baffle.errors import DataError, MissingExtraError, ModelError, OptionError, require_choice

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from baffle.runtimes.pytorch.runtime import to_tensors, trainable_parameters
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

SCORES = ("magnitude", "inputs")
_MICRO_BATCH = 64  # examples per forward pass
_LEAST_ZEROS = 0.01  # share of exact zeros from which a tensor counts as pruned

Float64 = npt.NDArray[np.float64]


def prune(model: nn.Module, share: float, by: str = "magnitude", data: Dataset | None = None) -> Masks:
    """Set a share of the weights to exactly 0, in place, and return masks of the remaining ones.

    Only trainable tensors of two or more dimensions are pruned, never biases. Together they lose floor(share x their
    entries), ties by position, and each keeps at least its largest entry. Training needs the masks:
    ``TorchRuntime(model, loss, masks=masks)`` or ``bf.export(..., masks=masks)``.

    Args:
        model: The model to prune.
        share: Fraction of the weights to set to 0, in [0, 1).
        by: The score that ranks weights; the lowest are pruned.

            * ``magnitude``: the LAMP score, w² over the sum of all squares not below it in its tensor. It does not
              depend on a tensor's scale, so no layer vanishes because its weights start small (as with plain
              magnitude), and large tensors lose more than small ones.
            * ``inputs``: |w| times the norm of the inputs that w is multiplied with, over all examples of ``data``
              (Wanda). Weights are compared within a row, that is per output: every row loses the same share up to one
              entry, and keeps its largest as long as other entries are left. This applies to Linear and Conv2d (each
              position of a patch has a norm of its own); other tensors are compared by magnitude, as one row. The
              norms are measured in forward passes of a copy in eval mode, without autograd.
        data: Examples for ``inputs``; one batch is enough.

    Returns:
        Masks, bool arrays by the names of the tensors that were pruned: True where an entry was kept.

    Raises:
        OptionError: For a share that would leave a tensor without entries, an unknown ``by``, or missing ``data``.
        DataError: Without examples.
        ModelError: If there is nothing to prune, or weights or inputs are not finite.

    Examples:
        >>> model = nn.Linear(4, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.5, -0.1, 0.2, -0.9]]))
        >>> prune(model, 0.5)["weight"].tolist()
        [[True, False, False, True]]
        >>> model.weight.tolist()
        [[0.5, 0.0, 0.0, -0.8999999761581421]]
    """
    require_between("share", share, 0, 1, open_high=True)
    require_choice("by", by, SCORES)
    tensors = dict(_matrices(model))
    if not tensors:
        raise ModelError("nothing to prune: expected a trainable tensor of two or more dimensions")
    magnitudes = {name: _magnitudes(name, p) for name, p in tensors.items()}
    total = sum(m.size for m in magnitudes.values())
    lost = math.floor(share * total)
    if lost > total - len(tensors):
        raise OptionError(
            "share", share, f"at most {1 - len(tensors) / total:.6g}: {len(tensors)} tensors keep one each"
        )
    if by == "magnitude":
        ranks = [lamp(m) for m in magnitudes.values()]
    else:
        norms = input_norms(model, data)
        rows = [m * norms[name] if name in norms else m.reshape(1, -1) for name, m in magnitudes.items()]
        ranks = [ranks_in_rows(r) for r in rows]
    kept = np.ones(total, np.bool_)
    kept[np.argsort(np.concatenate(ranks), kind="stable")[:lost]] = False
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    for (name, p), part in zip(tensors.items(), np.split(kept, np.cumsum([r.size for r in ranks])[:-1]), strict=True):
        if not part.all():
            masks[name] = part.reshape(p.shape)
            with torch.no_grad():
                p.masked_fill_(torch.from_numpy(~masks[name]).to(p.device), 0)
    return masks


def masks_of(model: nn.Module) -> Masks:
    """The masks of a model that was pruned elsewhere: True where its weights are not exactly 0.

    A trainable tensor of two or more dimensions counts as pruned if at least one percent of its entries are 0, but
    not if all are: some layers are initialised with zeros.

    Args:
        model: The pruned model; never changed.

    Returns:
        Masks, bool arrays by the names of the tensors that count as pruned.

    Raises:
        ModelError: If masks of ``torch.nn.utils.prune`` are still attached to the model.

    Examples:
        >>> model = nn.Linear(4, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.5, 0.0, 0.2, 0.0]]))
        >>> masks_of(model)["weight"].tolist()
        [[True, False, True, False]]
    """
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    for name, p in _matrices(model):
        kept = (p.detach() != 0).cpu().numpy()
        if kept.any() and kept.size - int(kept.sum()) >= _LEAST_ZEROS * kept.size:
            masks[name] = kept
    return masks


def require_plain(model: nn.Module) -> None:
    """Raise ModelError if ``torch.nn.utils.prune`` is active: it recomputes weights before each forward pass."""
    for name, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        for parameter, _ in module.named_parameters(recurse=False):
            weight = parameter.removesuffix("_orig")
            if weight != parameter and f"{weight}_mask" in buffers:
                raise ModelError(
                    f"{name or 'model'}.{weight} is pruned by torch.nn.utils.prune, which holds {parameter} and "
                    f"{weight}_mask: expected a plain parameter; call torch.nn.utils.prune.remove(module, {weight!r})"
                )


def lamp(magnitudes: Float64) -> Float64:
    """LAMP scores of a tensor, flat: w² over the sum of the squares not ranked below it.

    The largest entry has an infinite score, so that it is always kept.

    Examples:
        >>> lamp(np.array([2.0, 1.0, 2.0, 4.0])).tolist()
        [0.16666666666666666, 0.04, 0.2, inf]
    """
    flat = magnitudes.reshape(-1)
    order = np.argsort(flat, kind="stable")
    squares = np.square(flat[order])
    rest = np.cumsum(squares[::-1])[::-1]
    scores = np.zeros_like(flat)
    scores[order] = np.divide(squares, rest, out=np.zeros_like(squares), where=rest > 0)
    scores[order[-1]] = np.inf
    return scores


def ranks_in_rows(scores: Float64) -> Float64:
    """Relative ranks of entries within their rows, flat: in (0, 1), and 1 for the largest of each row.

    The largest entry of all has rank infinity, so that it is always kept.

    Args:
        scores: float64[rows, entries].

    Examples:
        >>> ranks_in_rows(np.array([[3.0, 1.0, 2.0, 0.0], [5.0, 6.0, 7.0, 8.0]])).reshape(2, 4).tolist()
        [[1.0, 0.375, 0.625, 0.125], [0.125, 0.375, 0.625, inf]]
    """
    order = np.argsort(scores, axis=1, kind="stable")
    entries = scores.shape[1]
    ranks = np.empty_like(scores)
    np.put_along_axis(ranks, order, (np.arange(entries) + 0.5)[None] / entries, axis=1)
    np.put_along_axis(ranks, order[:, -1:], 1.0, axis=1)
    flat = ranks.reshape(-1)
    flat[-1 - int(scores.reshape(-1)[::-1].argmax())] = np.inf
    return flat


def input_norms(model: nn.Module, data: Dataset | None) -> dict[str, Float64]:
    """Norms of the inputs of each Linear and Conv2d that runs, over all examples.

    Returns:
        By the name of the layer's weight: float64[1, in] for a linear layer; [out, in * height * width] for a
        convolution, over all patches.

    Raises:
        OptionError: Without ``data``.
        DataError: Without examples.
        ModelError: If the model fails, or an input is not finite.
    """
    if data is None:
        raise OptionError("data", None, "examples to measure inputs on, for by='inputs'")
    if len(data) == 0:
        raise DataError(f"{data.name}: no examples: expected at least one to measure inputs on")
    probe = copy.deepcopy(model).eval()
    squares: dict[int, Tensor] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        sums = _squares(layer, args[0] if args else kwargs["input"]).cpu()
        key = id(layer.weight)
        squares[key] = squares[key] + sums if key in squares else sums

    for module in probe.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(record, with_kwargs=True)
    device = next(probe.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(data), _MICRO_BATCH):
            x, _ = to_tensors(data.take(np.arange(start, min(start + _MICRO_BATCH, len(data)))), device)
            try:
                probe(x)
            except Exception as error:  # from the user's own code
                raise ModelError(f"the model failed on inputs {tuple(x.shape)} of {x.dtype}: {error}") from error
    norms = {name: squares[id(p)].sqrt().numpy() for name, p in probe.named_parameters() if id(p) in squares}
    for name, norm in norms.items():
        if not np.isfinite(norm).all():
            raise ModelError(f"{name}: its inputs are not finite: expected finite activations on {data.name}")
    return norms


def _squares(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Sums of squares of the inputs that each weight of a layer is multiplied with: float64[1 or out, rest]."""
    x = x.double().square()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features).sum(0, keepdim=True)
    images = x.reshape(-1, *x.shape[-3:]).sum(0, keepdim=True)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = F.pad(images, layer._reversed_padding_repeated_twice, mode)
    patches = F.unfold(images, layer.kernel_size, layer.dilation, 0, layer.stride).sum(2)
    return patches.reshape(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    require_plain(model)
    return ((name, p) for name, p in trainable_parameters(model) if p.ndim >= 2 and p.numel())


def _magnitudes(name: str, p: nn.Parameter) -> Float64:
    """Absolute values of a weight: float64[out, rest]."""
    values: Float64 = p.detach().double().abs().reshape(len(p), -1).cpu().numpy()
    if not np.isfinite(values).all():
        raise ModelError(f"{name}: expected finite weights")
    return values

"""The client bundle: everything that a machine without PyTorch needs to evaluate a model, in one zip file.

* ``manifest.json``: tensors, shapes, preprocessing, precision, loss, and the hash of every other file;
* ``model.onnx``: the graph; trainable weights are among its inputs; it gives outputs, and losses unless the client
  computes them;
* ``ranges.onnx``: for int8 activations, the graph that measures their ranges;
* ``head-0.onnx``, ``rows-0.onnx``, ...: of a credited model, its blocks (:class:`BlockGraphs`), and with int8
  activations ``ranges-head-0.onnx``, ... beside them; ``loss.onnx`` if the client cannot compute the loss itself;
* ``weights.safetensors``: the initial weights, float32[n].

Reading one needs numpy, msgspec and safetensors; ``baffle.export`` makes one.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import safetensors.numpy

from baffle.core.credit import is_plain, units_of
from baffle.core.types import Table, Weights
from baffle.data import Dataset, Scaling
from baffle.errors import BundleError, DataError, ModelError, require_choice
from baffle.files import write_atomic

FORMAT = 1
Precision = Literal["fp32", "fp16", "int8", "int8-weights"]
"""What a graph computes in; int8 quantises weights and activations, int8-weights only weights."""
Feed = Literal["float32", "float16", "codes", "branch", "codes+branch"]
"""How a tensor enters the graph: as floats; as int8 codes with one scale per row (inputs NAME.codes, NAME.scale);
unperturbed, with its rank-1 perturbation as a side branch (NAME.left, NAME.right); or both of the latter."""
Loss = Literal["cross-entropy", "mse", "graph"]
"""Which loss the client computes from the outputs; ``graph``: the graph does (input ``y``, output ``losses``)."""


class Example(msgspec.Struct, frozen=True):
    """Shape and type of a single input or target."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]


class Pixels(msgspec.Struct, frozen=True):
    """How stored pixel bytes are scaled, channel by channel: (x / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class HeadGraph(msgspec.Struct, frozen=True):
    """The graph that runs a model from one head to the next: it gives ``features`` and the values that others read."""

    weight: str
    bias: str | None
    """Names of the head's own tensors, a linear layer on the features."""
    reads: tuple[str, ...]
    gives: tuple[str, ...]


class RowsGraph(msgspec.Struct, frozen=True):
    """The graph that runs a unit again on its clean input: it gives the ``features`` of its head."""

    unit: int
    head: int
    reads: tuple[str, ...]
    owners: tuple[int, ...]
    """Which number of the unit each feature adds to; -1: none."""


class BlockGraphs(msgspec.Struct, frozen=True, kw_only=True):
    """A credited model in blocks (``runtimes.credit``)."""

    heads: tuple[HeadGraph, ...]
    rows: tuple[RowsGraph, ...]
    loss: bool
    """Whether ``loss.onnx`` gives losses from what the last layer puts out."""
    activations: tuple[str, ...] = ()
    """As in the manifest, of the blocks."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the blocks' graphs."""
        return (*(f"head-{i}.onnx" for i in range(len(self.heads))), *(f"rows-{i}.onnx" for i in range(len(self.rows))))


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of a bundle: how the graph is fed, and the hashes of all files."""

    format: int = FORMAT
    table: Table
    feeds: tuple[Feed, ...]
    """How each tensor of the table enters the graph."""
    precision: Precision
    loss: Loss
    x: Example
    y: Example
    pixels: Pixels | None
    activations: tuple[str, ...]
    """Quantised activations: their scale and zero point are inputs (NAME.scale, NAME.zero), which the client measures
    on its own data."""
    blocks: BlockGraphs | None = None
    """Of a model that is credited otherwise than by one scalar per direction."""
    frozen: str = ""
    """SHA-256 of the frozen parameters, which are constants of the graph; empty if there are none."""
    files: dict[str, Annotated[str, msgspec.Meta(min_length=64, max_length=64)]]
    """SHA-256 of every other file."""


class _AnyFormat(msgspec.Struct):
    """The field that manifests of all formats have."""

    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Bundle:
    """An exported model: ONNX graphs, initial weights and a manifest.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, _ = bf.load("digits")
        >>> bundle = bf.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, train)
        >>> Bundle.decode(bundle.encode()).sha256 == bundle.sha256
        True
    """

    manifest: Manifest
    files: dict[str, bytes]
    """Contents of the other files of the archive, by name."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest, which holds the hashes of all files; it identifies the bundle."""
        return hashlib.sha256(msgspec.json.encode(self.manifest)).hexdigest()

    @property
    def initial(self) -> Weights:
        """The initial weights: float32[n]."""
        return safetensors.numpy.load(self.files["weights.safetensors"])["weights"]

    def encode(self) -> bytes:
        """The bundle as a zip archive; the same bundle gives the same bytes."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            manifest = msgspec.json.format(msgspec.json.encode(self.manifest))
            for name, data in {"manifest.json": manifest, **self.files}.items():
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
        return out.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the archive atomically: whole or not at all.

        Raises:
            BundleError: If the file cannot be written.
        """
        try:
            write_atomic(Path(path), self.encode())
        except OSError as error:
            raise BundleError(f"{path}: cannot be written: {error.strerror}") from error

    @staticmethod
    def load(path: str | Path) -> Bundle:
        """Read an archive.

        Raises:
            BundleError: If it cannot be read, is damaged or incomplete, or has another format.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            return Bundle.decode(data)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None

    @staticmethod
    def decode(data: bytes) -> Bundle:
        """Read an archive from its bytes.

        Raises:
            BundleError: If it is damaged or incomplete, or has another format.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
            raise BundleError(f"not a client bundle: expected a zip file of 'baffle export' ({error})") from error
        except Exception as error:  # zlib.error, which exists only with zlib
            raise BundleError(f"damaged: {error}") from error
        if "manifest.json" not in files:
            raise BundleError("no manifest.json: expected a client bundle of 'baffle export'")
        text = files.pop("manifest.json")
        try:
            version = msgspec.json.decode(text, type=_AnyFormat).format
            if version != FORMAT:
                raise BundleError(f"manifest.json: format = {version}: expected {FORMAT}; export it again")
            manifest = msgspec.json.decode(text, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"manifest.json: {error}") from error
        bundle = Bundle(manifest, files)
        _check(bundle)
        return bundle

    def check_data(self, data: Dataset) -> None:
        """Raise DataError unless there are examples, of the shapes and types that the graph was exported for."""
        data.require_examples()
        for field, example, array in (("x", self.manifest.x, data.x), ("y", self.manifest.y, data.y)):
            kind = "float32" if field == "x" and data.scaling is not None else str(array.dtype)
            if array.shape[1:] != example.shape or kind != example.dtype:
                raise DataError(
                    f"{data.name}.{field}: {kind}{list(array.shape)}: expected {example.dtype} "
                    f"[examples{''.join(f', {d}' for d in example.shape)}], for which the bundle was exported"
                )

    @property
    def scaling(self) -> Scaling | None:
        """How pixel bytes are scaled, if the model was exported for data with a scaling."""
        pixels = self.manifest.pixels
        return None if pixels is None else Scaling(pixels.mean, pixels.std)


def make_bundle(manifest: Manifest, files: dict[str, bytes], initial: Weights) -> Bundle:
    """Make a bundle of graphs (``files``) and initial weights: adds the weights' file and the hashes."""
    files = files | {"weights.safetensors": safetensors.numpy.save({"weights": initial})}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return Bundle(msgspec.structs.replace(manifest, files=hashes), files)


def _check(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for name, expected in manifest.files.items():
        if name not in bundle.files:
            raise BundleError(f"{name} is missing: expected the files of the manifest")
        if hashlib.sha256(bundle.files[name]).hexdigest() != expected:
            raise BundleError(f"{name}: its SHA-256 differs from the manifest's: the file was damaged or edited")
    needed = {"model.onnx", "weights.safetensors"} | ({"ranges.onnx"} if manifest.activations else set())
    if (blocks := manifest.blocks) is not None:
        needed |= {*blocks.files} | ({"loss.onnx"} if blocks.loss else set())
        needed |= {f"ranges-{name}" for name in blocks.files} if blocks.activations else set()
    if manifest.files.keys() != needed or bundle.files.keys() != needed:
        names = ", ".join(sorted(bundle.files))
        raise BundleError(f"files {names}: expected {', '.join(sorted(needed))}")
    size = 0
    for spec in manifest.table:
        entries = math.prod(spec.shape)
        if spec.offset != size or min(spec.shape, default=0) < 0 or len(spec.kept) not in (0, -(-entries // 8)):
            raise BundleError(f"manifest.json: tensor {spec.name}: expected tensors one after another, from 0 on")
        size += entries
    if len({spec.name for spec in manifest.table}) != len(manifest.table):
        raise BundleError("manifest.json: two tensors of one name: expected names that differ")
    if len(manifest.feeds) != len(manifest.table):
        raise BundleError(f"manifest.json: {len(manifest.feeds)} feeds: expected {len(manifest.table)}, one per tensor")
    for spec, feed in zip(manifest.table, manifest.feeds, strict=True):
        if feed not in ("float32", "float16") and spec.matrix is None:
            raise BundleError(f"manifest.json: tensor {spec.name}: feed {feed}: expected that of a matrix only")
    _check_blocks(manifest)
    try:
        initial = bundle.initial
    except Exception as error:  # safetensors raises types of its own
        raise BundleError(f"weights.safetensors: {error}: expected the array 'weights'") from error
    if initial.shape != (size,) or initial.dtype != np.float32 or not np.isfinite(initial).all():
        raise BundleError(f"weights.safetensors: {initial.dtype}{list(initial.shape)}: expected {size} finite float32")
    for spec in manifest.table:
        if spec.mask is not None and initial[spec.slice][~spec.mask].any():
            raise BundleError(f"weights.safetensors: tensor {spec.name}: expected 0 where it is pruned")
    try:
        scaling = bundle.scaling
    except DataError as error:
        raise BundleError(f"manifest.json: pixels: {error}") from error
    if scaling is not None and (len(manifest.x.shape) != 3 or manifest.x.shape[0] != len(scaling.mean)):
        raise BundleError(
            f"manifest.json: pixels of {len(scaling.mean)} channels: expected x [channels, height, width]"
        )


def _check_blocks(manifest: Manifest) -> None:
    """Check that blocks and the credit of the tensors fit together."""
    blocks = manifest.blocks
    if blocks is None:
        if not is_plain(manifest.table):
            raise BundleError("manifest.json: tensors with credit, and no blocks: expected blocks")
        return
    try:
        units = units_of(manifest.table)
    except ModelError as error:
        raise BundleError(f"manifest.json: {error}") from error
    known = {"x"}
    specs = {spec.name: spec for spec in manifest.table}
    for i, head in enumerate(blocks.heads):
        weight = specs.get(head.weight)
        if weight is None or len(weight.shape) != 2 or weight.credit.kind != "exact":
            raise BundleError(f"manifest.json: head {i}: weight {head.weight}: expected a matrix with exact credit")
        if head.bias is not None and (head.bias not in specs or specs[head.bias].shape != weight.shape[:1]):
            raise BundleError(f"manifest.json: head {i}: bias {head.bias}: expected one number per output")
        if unknown := sorted(set(head.reads) - known):
            raise BundleError(f"manifest.json: head {i} reads {', '.join(unknown)}: expected values of heads before it")
        known |= {*head.gives}
        for j, rows in enumerate(blocks.rows):
            if rows.head != i:
                continue
            if unknown := sorted(set(rows.reads) - known):
                raise BundleError(f"manifest.json: rows {j} read {', '.join(unknown)}: expected values given before")
            count = units[rows.unit].numbers if 0 <= rows.unit < len(units) else 0
            if len(rows.owners) != weight.shape[1] or not all(-1 <= n < count for n in rows.owners):
                raise BundleError(f"manifest.json: rows {j}: owners: expected a number of unit {rows.unit} per feature")
    found = sorted(rows.unit for rows in blocks.rows if 0 <= rows.head < len(blocks.heads))
    expected = [number for number, unit in enumerate(units) if unit.kind == "rows"]
    if not blocks.heads or found != expected:
        raise BundleError(f"manifest.json: blocks of units {found}: expected {expected}, each with a head")


def require_precision(precision: str, runtime: str, choices: tuple[str, ...]) -> None:
    """Raise OptionError unless the runtime can compute in the precision; the message lists those it can."""
    require_choice(f"precision (runtime {runtime})", precision, choices)

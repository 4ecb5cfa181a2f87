"""The client bundle: all that a machine without PyTorch needs to evaluate a model, in one zip file.

* ``manifest.json``: tensors, shapes, preprocessing, precision, loss, and the hash of every other file;
* ``model.onnx``: the graph, trainable weights among its inputs, outputs (and losses, unless the client takes them);
* ``ranges.onnx``: for int8 activations, the graph that measures their ranges;
* ``weights.safetensors``: the weights to start from, float32[n].

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

from baffle.core.types import Table, Weights
from baffle.data import Dataset, Scaling
from baffle.errors import BundleError, DataError, require_choice
from baffle.files import write_atomic

FORMAT = 1
Precision = Literal["fp32", "fp16", "int8", "int8-weights"]
"""How a graph computes; int8: weights and activations."""
Feed = Literal["float32", "float16", "codes", "branch", "codes+branch"]
"""How a tensor enters the graph: as numbers; as int8 codes and a scale a row (inputs NAME.codes, NAME.scale);
unperturbed beside the factors of its rank-1 perturbation (NAME.left, NAME.right)."""
Loss = Literal["cross-entropy", "mse", "graph"]
"""Taken on the host from the outputs, or by the graph itself (input ``y``, output ``losses``)."""


class Example(msgspec.Struct, frozen=True):
    """Shape and type of one input or target."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]


class Pixels(msgspec.Struct, frozen=True):
    """How stored bytes become numbers, channel by channel: (x / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in a bundle."""

    format: int = FORMAT
    table: Table
    feeds: tuple[Feed, ...]
    """Of every tensor of the table."""
    precision: Precision
    loss: Loss
    x: Example
    y: Example
    pixels: Pixels | None
    activations: tuple[str, ...]
    """Tensors whose scale and zero point are inputs (NAME.scale, NAME.zero), to be measured on the client's data."""
    frozen: str = ""
    """Hash of the parameters that are not trained, which are constants of the graph; empty if there are none."""
    files: dict[str, Annotated[str, msgspec.Meta(min_length=64, max_length=64)]]
    """SHA-256 of every other file."""


class _AnyFormat(msgspec.Struct):
    """What manifests of all formats have."""

    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model as graphs, with its manifest. ``files`` are the contents by name.

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

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds those of all files."""
        return hashlib.sha256(msgspec.json.encode(self.manifest)).hexdigest()

    @property
    def initial(self) -> Weights:
        """The weights to start from, float32[n]."""
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
        """Write the archive, whole or not at all. Raises BundleError."""
        try:
            write_atomic(Path(path), self.encode())
        except OSError as error:
            raise BundleError(f"{path}: cannot be written: {error.strerror}") from error

    @staticmethod
    def load(path: str | Path) -> Bundle:
        """Read an archive. Raises BundleError if it is damaged, incomplete or of another format."""
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
        """The bundle in the bytes of an archive. Raises BundleError."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
            raise BundleError(f"not a client bundle: expected a zip file of 'baffle export' ({error})") from error
        except Exception as error:  # zlib.error, where there is zlib
            raise BundleError(f"damaged: {error}") from error
        if "manifest.json" not in files:
            raise BundleError("no manifest.json: expected a client bundle of 'baffle export'")
        text = files.pop("manifest.json")
        try:
            found = msgspec.json.decode(text, type=_AnyFormat).format
            if found != FORMAT:
                raise BundleError(f"manifest.json: format = {found}: expected {FORMAT}; export it again")
            manifest = msgspec.json.decode(text, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"manifest.json: {error}") from error
        bundle = Bundle(manifest, files)
        _check(bundle)
        return bundle

    def check_data(self, data: Dataset) -> None:
        """Raise DataError unless examples are of the kind that the graph was made for, and there are some."""
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
        """How bytes of pixels become numbers, if the model was exported for data with a scaling."""
        pixels = self.manifest.pixels
        return None if pixels is None else Scaling(pixels.mean, pixels.std)


def make_bundle(manifest: Manifest, files: dict[str, bytes], initial: Weights) -> Bundle:
    """Put a bundle together: add the weights and the hashes."""
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
    if manifest.files.keys() != needed or bundle.files.keys() != needed:
        found = ", ".join(sorted(bundle.files))
        raise BundleError(f"files {found}: expected {', '.join(sorted(needed))}")
    size = 0
    for spec in manifest.table:
        entries = math.prod(spec.shape)
        if spec.offset != size or min(spec.shape, default=0) < 0 or len(spec.kept) not in (0, -(-entries // 8)):
            raise BundleError(f"manifest.json: tensor {spec.name}: expected tensors one after another, from 0 on")
        size += entries
    if len({spec.name for spec in manifest.table}) != len(manifest.table):
        raise BundleError("manifest.json: two tensors of one name: expected names that differ")
    if len(manifest.feeds) != len(manifest.table):
        raise BundleError(f"manifest.json: {len(manifest.feeds)} feeds: expected {len(manifest.table)}, one a tensor")
    for spec, feed in zip(manifest.table, manifest.feeds, strict=True):
        if feed not in ("float32", "float16") and spec.matrix is None:
            raise BundleError(f"manifest.json: tensor {spec.name}: feed {feed}: expected that of a matrix only")
    try:
        initial = bundle.initial
    except Exception as error:  # safetensors raises kinds of its own
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


def require_precision(precision: str, runtime: str, choices: tuple[str, ...]) -> None:
    """OptionError, saying what the runtime can do."""
    require_choice(f"precision (runtime {runtime})", precision, choices)

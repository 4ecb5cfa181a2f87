"""Client bundles: read back as written or refused; used without PyTorch, and without anyone being told."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import baffle as bf
from baffle.core.state import weights_sha256
from baffle.data import Dataset, Scaling
from baffle.errors import BundleError, JournalError
from baffle.exporter import export
from baffle.runtimes.onnx.bundle import FORMAT, Bundle, Pixels, make_bundle
from baffle.runtimes.onnx.ort import OrtRuntime


def examples() -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(rng.normal(size=(30, 6)), rng.integers(0, 4, 30))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    masks = {"2.weight": np.arange(20).reshape(4, 5) % 3 > 0}
    return export(model, F.cross_entropy, examples(), precision="int8", masks=masks)


def assert_equal(a: Bundle, b: Bundle) -> None:
    assert a.manifest == b.manifest
    assert a.files == b.files
    assert a.sha256 == b.sha256
    assert np.array_equal(a.initial, b.initial)


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as written:
        for name, data in files.items():
            written.writestr(name, data)
    return out.getvalue()


def contents(bundle: Bundle) -> dict[str, bytes]:
    """The files of the archive: the manifest, and those it tells of."""
    with zipfile.ZipFile(io.BytesIO(bundle.encode())) as read:
        return {name: read.read(name) for name in read.namelist()}


def edited(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The archive with something of the manifest changed."""
    manifest = json.loads(contents(bundle)["manifest.json"])
    change(manifest)
    return archive({**contents(bundle), "manifest.json": json.dumps(manifest).encode()})


class TestRoundTrip:
    def test_what_is_saved_is_loaded(self, bundle: Bundle, tmp_path: Path) -> None:
        bundle.save(tmp_path / "b.zip")
        assert_equal(Bundle.load(tmp_path / "b.zip"), bundle)
        assert_equal(Bundle.load(str(tmp_path / "b.zip")), bundle)
        assert_equal(Bundle.decode(bundle.encode()), bundle)

    def test_the_same_bundle_gives_the_same_bytes(self, bundle: Bundle, tmp_path: Path) -> None:
        bundle.save(tmp_path / "a.zip")
        Bundle.load(tmp_path / "a.zip").save(tmp_path / "b.zip")
        assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes() == bundle.encode()

    def test_the_hash_covers_every_file(self, bundle: Bundle) -> None:
        for name in bundle.files:
            assert bundle.manifest.files[name] == hashlib.sha256(bundle.files[name]).hexdigest()
        other = make_bundle(bundle.manifest, dict(bundle.files), bundle.initial + 1)
        assert other.sha256 != bundle.sha256

    def test_a_loaded_bundle_gives_the_same_losses(self, bundle: Bundle) -> None:
        a, b = OrtRuntime(bundle, 1), OrtRuntime(Bundle.decode(bundle.encode()), 1)
        assert a.plan == b.plan
        first = a.evaluate(a.initial_weights(), examples()).losses
        assert np.array_equal(first, b.evaluate(b.initial_weights(), examples()).losses)

    def test_weights_handed_out_are_copies(self, bundle: Bundle) -> None:
        runtime = OrtRuntime(bundle, 1)
        runtime.initial_weights()[:] = 0
        assert bundle.initial.any()
        assert np.array_equal(runtime.initial_weights(), bundle.initial)

    def test_bytes_of_pixels_keep_their_scaling(self, tmp_path: Path) -> None:
        rng, scaling = np.random.default_rng(0), Scaling((0.1307, 1 / 3), (0.3081, 0.7))
        data = Dataset(rng.integers(0, 256, (10, 2, 3, 3), np.uint8), np.arange(10) % 4, "pixels", scaling)
        made = export(nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), F.cross_entropy, data)
        assert Bundle.decode(made.encode()).scaling == scaling


class TestWriting:
    def test_a_failed_write_leaves_the_old_file(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "b.zip"
        path.write_bytes(b"old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BundleError, match=r"b.zip: cannot be written: No space left on device"):
            bundle.save(path)
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["b.zip"]

    def test_folders_that_cannot_be_written_to(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "none/b.zip", tmp_path / "file/b.zip", tmp_path / "folder"):
            with pytest.raises(BundleError, match=r"cannot be written: ."):
                bundle.save(path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_folders_without_permission(self, bundle: Bundle, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(BundleError, match="cannot be written: Permission denied"):
            bundle.save(tmp_path / "b.zip")

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.zip", tmp_path):
            with pytest.raises(BundleError, match=rf"{path}: cannot be read: ."):
                Bundle.load(path)

    def test_the_errors_are_value_errors_and_no_journals(self) -> None:
        assert issubclass(BundleError, ValueError)
        assert not issubclass(BundleError, JournalError)


class TestDamage:
    """A damaged bundle is refused, or it is the same bundle: never another model, never another exception."""

    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_flipped_bytes(self, bundle: Bundle, data: st.DataObject) -> None:
        damaged = bytearray(bundle.encode())
        for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=3)):
            damaged[position] ^= data.draw(st.integers(1, 255))
        self.same_or_refused(bundle, bytes(damaged))

    def test_flipped_bytes_of_the_directory(self, bundle: Bundle) -> None:
        """Where names, sizes and methods are: every byte."""
        good = bundle.encode()
        for position in [*range(50), *range(good.index(b"PK\x01\x02"), len(good))]:
            for mask in (1, 0x80):
                damaged = bytearray(good)
                damaged[position] ^= mask
                self.same_or_refused(bundle, bytes(damaged))

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_cut_or_longer(self, bundle: Bundle, data: st.DataObject) -> None:
        good = bundle.encode()
        start, end = sorted(data.draw(st.tuples(st.integers(0, len(good)), st.integers(0, len(good)))))
        self.same_or_refused(bundle, good[:start] + good[end:])
        self.same_or_refused(bundle, good[:start] + data.draw(st.binary(min_size=1, max_size=8)) + good[start:])

    @given(st.binary(max_size=200))
    @settings(max_examples=50, deadline=None)
    def test_anything_else(self, data: bytes) -> None:
        for text in (data, b"PK\x03\x04" + data, archive({"manifest.json": data})):
            with pytest.raises(BundleError):
                Bundle.decode(text)

    def test_cut_files(self, bundle: Bundle, tmp_path: Path) -> None:
        good = bundle.encode()
        for size in (0, 1, 100, len(good) // 2, len(good) - 1):
            (tmp_path / "b.zip").write_bytes(good[:size])
            with pytest.raises(
                BundleError, match=r"b.zip: not a client bundle: expected a zip file of 'baffle export'"
            ):
                Bundle.load(tmp_path / "b.zip")

    def same_or_refused(self, bundle: Bundle, data: bytes) -> None:
        try:
            found = Bundle.decode(data)
        except BundleError:
            return
        assert_equal(found, bundle)


class TestManifests:
    """Edits of the manifest that make no sense are refused; what an edit can mean is in the hash that runs record."""

    def test_another_format(self, bundle: Bundle) -> None:
        manifest = json.loads(contents(bundle)["manifest.json"])
        for change in ({"format": FORMAT + 1}, {"format": FORMAT + 1, "news": 1, "table": 2}, {"format": 0}):
            data = archive({**contents(bundle), "manifest.json": json.dumps(manifest | change).encode()})
            with pytest.raises(BundleError, match=rf"format = {change['format']}: expected {FORMAT}; export it again"):
                Bundle.decode(data)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.pop("table"), "manifest.json: .*missing required field `table`"),
            (lambda m: m.update(more=1), "manifest.json: .*unknown field `more`"),
            (lambda m: m.update(precision="int4"), "manifest.json: .*Invalid enum value 'int4' - at `.*precision`"),
            (lambda m: m.update(table=3), r"manifest.json: Expected `array`, got `int` - at `\$.table`"),
            (lambda m: m["feeds"].pop(), "manifest.json: 3 feeds: expected 4, one per tensor"),
            (lambda m: m["feeds"].__setitem__(1, "codes"), "tensor 0.bias: feed codes: expected that of a matrix"),
            (lambda m: m["table"][1].update(offset=31), "tensor 0.bias: expected tensors one after another"),
            (lambda m: m["table"][0].update(shape=[6, 6]), "tensor 0.bias: expected tensors one after another"),
            (lambda m: m["table"][3].update(shape=[5]), r"weights.safetensors: float32\[59\]: expected 60 finite"),
            (lambda m: m["table"][3].update(shape=[-4]), "tensor 2.bias: expected tensors one after another"),
            (lambda m: m["table"][3].update(shape=[2**32, 2**32]), "weights.safetensors: float32.*: expected 18446"),
            (lambda m: m["table"][2].update(kept="AAAAAAAA"), "tensor 2.weight: expected tensors one after another"),
            (lambda m: m["table"][2].update(kept="AAAA"), "weights.safetensors: tensor 2.weight: expected 0 where"),
            (lambda m: m["table"][3].update(name="0.bias"), "two tensors of one name"),
            (lambda m: m["files"].pop("model.onnx"), "expected model.onnx, ranges.onnx, weights.safetensors"),
            (
                lambda m: m["files"].update({"model.onnx": "0" * 64}),
                "model.onnx: its SHA-256 differs from the manifest",
            ),
            (lambda m: m["files"].update({"model.onnx": "0"}), "manifest.json: Expected `str` of length >= 64"),
            (lambda m: m.update(activations=[]), "expected model.onnx, weights.safetensors"),
            (lambda m: m.update(pixels={"mean": [0.5], "std": [0]}), "pixels: .*standard deviations > 0"),
            (lambda m: m.update(pixels={"mean": [0.5], "std": [1]}), "pixels of 1 channels: expected x .channels"),
        ],
    )
    def test_edits(self, bundle: Bundle, change: Callable[[dict[str, Any]], object], message: str) -> None:
        with pytest.raises(BundleError, match=message) as caught:
            Bundle.decode(edited(bundle, change))
        assert "\n" not in str(caught.value)

    @given(st.data())
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_any_edit_is_refused_or_read(self, bundle: Bundle, data: st.DataObject) -> None:
        values: st.SearchStrategy[object] = st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=3),
            st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        )

        def change(node: Any) -> None:
            while True:
                key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
                if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
                    node = node[key]
                    continue
                if data.draw(st.booleans()):
                    node[key] = data.draw(values)
                else:
                    del node[key]
                return

        try:
            found = Bundle.decode(edited(bundle, change))
        except BundleError:
            return
        assert found.sha256 == hashlib.sha256(msgspec.json.encode(found.manifest)).hexdigest()
        assert (found.sha256 == bundle.sha256) == (found.manifest == bundle.manifest)
        assert found.files == bundle.files

    def test_a_missing_file(self, bundle: Bundle) -> None:
        for name in contents(bundle):
            files = {n: data for n, data in contents(bundle).items() if n != name}
            with pytest.raises(BundleError, match=rf"{name} is missing|no {name}: expected a client bundle"):
                Bundle.decode(archive(files))

    def test_a_file_too_many(self, bundle: Bundle) -> None:
        more = contents(bundle) | {"notes.txt": b"hello"}
        with pytest.raises(
            BundleError, match=r"files model.onnx, notes.txt, .*: expected model.onnx, ranges.onnx, wei"
        ):
            Bundle.decode(archive(more))
        manifest = json.loads(more["manifest.json"])
        manifest["files"]["notes.txt"] = hashlib.sha256(b"hello").hexdigest()
        with pytest.raises(BundleError, match=r"notes.txt"):
            Bundle.decode(archive(more | {"manifest.json": json.dumps(manifest).encode()}))

    def test_a_file_of_another_bundle(self, bundle: Bundle) -> None:
        other = export(nn.Sequential(nn.Linear(6, 4)), F.cross_entropy, examples())
        with pytest.raises(BundleError, match=r"model.onnx: its SHA-256 differs"):
            Bundle.decode(archive(contents(bundle) | {"model.onnx": other.files["model.onnx"]}))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"weights": np.zeros(58, np.float32)}, r"float32\[58\]: expected 59 finite float32"),
            ({"weights": np.zeros(59)}, r"float64\[59\]: expected 59 finite float32"),
            ({"weights": np.zeros((59, 1), np.float32)}, r"float32\[59, 1\]: expected 59 finite float32"),
            ({"weights": np.full(59, np.nan, np.float32)}, r"float32\[59\]: expected 59 finite float32"),
            ({"weights": np.r_[np.zeros(58, np.float32), np.float32(np.inf)]}, r"expected 59 finite float32"),
            ({"other": np.zeros(59, np.float32)}, "expected the array 'weights'"),
            (None, "expected the array 'weights'"),
        ],
    )
    def test_weights_that_do_not_fit(self, bundle: Bundle, weights: dict[str, np.ndarray] | None, message: str) -> None:
        data = b"none" if weights is None else safetensors.numpy.save(weights)
        files = contents(bundle) | {"weights.safetensors": data}
        manifest = json.loads(files["manifest.json"])
        manifest["files"]["weights.safetensors"] = hashlib.sha256(data).hexdigest()
        with pytest.raises(BundleError, match=rf"weights.safetensors: .*{message}"):
            Bundle.decode(archive(files | {"manifest.json": json.dumps(manifest).encode()}))

    def test_pixels_are_of_the_examples(self, bundle: Bundle) -> None:
        wrong = msgspec.structs.replace(bundle.manifest, pixels=Pixels((0.5, 0.5), (1.0, 1.0)))
        with pytest.raises(BundleError, match="pixels of 2 channels"):
            Bundle.decode(Bundle(wrong, bundle.files).encode())


CLIENT = """
import sys
import numpy as np
import baffle as bf
import baffle.runtimes.onnx.ort
from baffle.data import Dataset
from baffle.errors import MissingExtraError
from baffle.core.state import weights_sha256

for needs_torch in ("TorchRuntime", "export"):
    try:
        getattr(bf, needs_torch)
    except MissingExtraError as error:
        assert "pip install 'baffle[" in str(error), error
    else:
        raise AssertionError(needs_torch)
rng = np.random.default_rng(0)
data = Dataset(rng.normal(size=(30, 6)), rng.integers(0, 4, 30))
runtime = bf.OrtRuntime(bf.Bundle.load("b.zip"), threads=1)
engine = bf.LocalEngine(runtime, bf.partition(data, 3))
method = bf.Method(num_directions=4, batch_size=8, optimizer=bf.sgd(0.05))
run = bf.train(method, engine, runtime.initial_weights(), rounds=3)
print(weights_sha256(run.state.weights).hex())
assert not {"torch", "onnx", "onnxscript", "sklearn"} & sys.modules.keys()
"""


def python(code: str, folder: Path, *before: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that knows of no continuous integration, and whose home is ``folder/home``."""
    (folder / "home").mkdir(exist_ok=True)
    (folder / "code.py").write_text(code)
    return subprocess.run(
        [*before, sys.executable, "code.py"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_client_needs_no_torch_and_no_onnx(tmp_path: Path) -> None:
    for name in ("torch", "onnx", "onnxscript"):
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text("raise ImportError('not on this machine')")
    made = export(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), F.cross_entropy, examples())
    made.save(tmp_path / "b.zip")
    done = python(CLIENT, tmp_path, PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode == 0, done.stderr
    runtime = OrtRuntime(made, threads=1)
    engine = bf.LocalEngine(runtime, bf.partition(examples(), 3))
    method = bf.Method(num_directions=4, batch_size=8, optimizer=bf.sgd(0.05))
    here = bf.train(method, engine, runtime.initial_weights(), rounds=3)
    assert done.stdout.strip() == weights_sha256(here.state.weights).hex()


WATCHED = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("onnxruntime", "openvino", "openvino_telemetry"):
            print(name, os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watch())
import {module}
print("after", os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


class TestNobodyIsTold:
    """Engines that report their use are kept from it, whatever the environment says."""

    @pytest.mark.parametrize("module", ["baffle.runtimes.onnx.ort", "baffle.exporter"])
    @pytest.mark.parametrize("before", [{}, {"ORT_DISABLE_TELEMETRY": "0"}])
    def test_it_is_off_before_onnx_runtime_is_imported(
        self, module: str, before: dict[str, str], tmp_path: Path
    ) -> None:
        done = python(WATCHED.format(module=module), tmp_path, **before)
        assert done.stdout.split("\n") == ["onnxruntime 1", "after 1", ""], done.stderr

    def test_the_package_that_reports_for_openvino_is_never_loaded(self, tmp_path: Path) -> None:
        code = WATCHED.format(module="baffle.runtimes.onnx.openvino") + (
            "try:\n"
            "    import openvino_telemetry\n"
            "except ImportError:\n"
            "    print('refused')\n"
            "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])\n"
        )
        done = python(code, tmp_path)
        assert done.stdout.split("\n") == ["openvino None", "after None", "refused", "[]", ""], done.stderr

    @pytest.fixture
    def passes(self, tmp_path: Path) -> str:
        """Code of a client that makes forward passes in both engines, and ends a moment later."""
        export(nn.Sequential(nn.Linear(6, 4)), F.cross_entropy, examples()).save(tmp_path / "b.zip")
        return (
            "import time, numpy as np, baffle as bf\n"
            "bundle = bf.Bundle.load('b.zip')\n"
            "data = bf.Dataset(np.zeros((3, 6)), np.zeros(3, int))\n"
            "for runtime in (bf.OrtRuntime(bundle, 1), bf.OpenVinoRuntime(bundle, 1)):\n"
            "    print(runtime.evaluate(runtime.initial_weights(), data).losses.shape)\n"
            "time.sleep(0.5)\n"
        )

    def test_no_identity_is_left_in_the_home_folder(self, passes: str, tmp_path: Path) -> None:
        done = python(passes, tmp_path)
        assert done.stdout == "(3,)\n(3,)\n", done.stderr
        assert list((tmp_path / "home").rglob("*")) == []

    @pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
    def test_no_socket_is_opened(self, passes: str, tmp_path: Path) -> None:
        trace = ("strace", "-f", "-qq", "-e", "trace=network", "-o", str(tmp_path / "trace"))
        probe = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()"
        if python(probe, tmp_path, *trace).returncode:
            pytest.skip("processes may not be traced here")
        assert "AF_INET" in (tmp_path / "trace").read_text()
        done = python(passes, tmp_path, *trace)
        assert done.stdout == "(3,)\n(3,)\n", done.stderr
        assert "AF_INET" not in (tmp_path / "trace").read_text()

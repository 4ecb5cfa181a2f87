"""The wheel as a user gets it: its core installs small, its commands work."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.engines.pipe import PipeEngine, write_clients
from baffle.models import build

ROOT = Path(__file__).parents[1]
CORE = ["numpy", "msgspec", "safetensors"]
ORT = ["onnxruntime", "flatbuffers", "packaging", "protobuf", "sympy", "mpmath", "coloredlogs", "humanfriendly"]


def sh(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    sh(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"baffle/py.typed", "baffle/report/report.css"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"baffle"}


@pytest.mark.slow
def test_the_core_replays_a_run_without_torch(wheel: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "baffle", "train", "--model", "mlp", "--rounds", "3", "--out", "run", "--json")
    trained = json.loads(sh(*command, cwd=tmp_path).splitlines()[-1])
    sh(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    sh(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    listed = json.loads(sh(python, "-m", "pip", "list", "--format", "json", cwd=tmp_path))
    assert {p["name"] for p in listed} <= {"baffle", "pip", "setuptools", *CORE}
    code = (
        "import baffle as bf\n"
        "states = list(bf.Journal.open('run').states())\n"
        "from baffle.core.method import weights_sha256\n"
        "print(weights_sha256(states[-1].weights).hex())\n"
    )
    assert sh(python, "-c", code, cwd=tmp_path).strip() == trained["weights_sha256"]


@pytest.mark.slow
def test_clients_without_torch_train_from_the_wheel_with_one_extra(wheel: Path, tmp_path: Path) -> None:
    sh(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    sh(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[ort]", cwd=tmp_path)
    listed = json.loads(sh(python, "-m", "pip", "list", "--format", "json", cwd=tmp_path))
    assert {p["name"].lower() for p in listed} <= {"baffle", "pip", "setuptools", *CORE, *ORT}

    train, test = bf.load("digits")
    bundle = bf.export(build("lenet-small", (1, 8, 8), 10), F.cross_entropy, train, precision="int8")
    commands = write_clients(bundle, bf.partition(train, 2), tmp_path)
    commands = [[str(python), "-P", *command[1:]] for command in commands]
    method = bf.Method(num_directions=20, batch_size=16, difference="central")
    with PipeEngine(bundle, commands, bf.OrtRuntime(bundle, 1)) as engine:
        run = bf.train(method, engine, bundle.initial, rounds=3, test=test)
        for pid in engine.pids:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines() if sys.platform == "linux" else []
            assert all(int(line.split()[1]) / 1024 < 90 for line in lines if line.startswith("VmHWM"))
    simulation = bf.LocalEngine(bf.OrtRuntime(bundle, 1), bf.partition(train, 2), together=False)
    method = bf.Method(num_directions=20, batch_size=16, difference="central", sigma=run.records[0].sigma)
    assert bf.train(method, simulation, bundle.initial, rounds=3).weights_sha256 == run.weights_sha256

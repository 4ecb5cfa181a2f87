"""The hash of the app is that of the bundle that ``flwr run`` makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.errors import OptionError


def test_the_hash_of_an_app_is_that_of_the_bundle_that_flower_makes(tmp_path: Path) -> None:
    assert app_sha256(app_folder()) == app_sha256(app_folder())
    assert isinstance(build_fab_from_disk(app_folder()), bytes)
    with pytest.raises(OptionError, match="app = "):
        app_sha256(tmp_path)

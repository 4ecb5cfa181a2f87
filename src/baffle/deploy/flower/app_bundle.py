"""The Flower app's folder, and the hash by which clients trust it.

The folder is in the package if that is installed, and in ``apps/`` in a checkout.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

import baffle
from baffle.errors import OptionError


def app_folder() -> Path:
    """The app's folder, for ``flwr run``. Raises OptionError if it is missing."""
    package = Path(baffle.__file__).parent
    for folder in (package / "app", package.parents[1] / "apps/baffle"):
        if (folder / "pyproject.toml").exists():
            return folder
    raise OptionError("app", str(package / "app"), "the app that comes with the package: install it again")


def app_sha256(app: Path) -> str:
    """SHA-256 of the bundle that ``flwr run`` makes of an app's folder. Raises OptionError if it is no app."""
    try:
        return hashlib.sha256(build_fab_from_disk(app)).hexdigest()
    except (OSError, ValueError) as error:
        raise OptionError("app", str(app), f"the folder of a Flower app ({error})") from error

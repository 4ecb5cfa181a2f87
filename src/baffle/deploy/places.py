"""Where the Flower app is: in the package where that is installed, in ``apps/`` in a checkout."""

from __future__ import annotations

from pathlib import Path

import baffle
from baffle.errors import OptionError


def app_folder() -> Path:
    """The folder for ``flwr run``. Raises OptionError if it is not there."""
    package = Path(baffle.__file__).parent
    for folder in (package / "app", package.parents[1] / "apps/baffle"):
        if (folder / "pyproject.toml").exists():
            return folder
    raise OptionError("app", str(package / "app"), "the app that comes with the package: install it again")

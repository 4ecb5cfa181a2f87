"""The run configuration of ``flwr run``: where the options of training are, and how long the server waits."""

from __future__ import annotations

from pathlib import Path

import msgspec

from baffle.engines.remote.downlink import Downlink
from baffle.errors import OptionError
from baffle.training.options import TrainConfig, train_config


class AppConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """The app's run configuration: ``flwr run APP -c 'out="runs/one" clients=3'``."""

    config: str = ""
    """TOML file of the options of ``baffle train``, on the server; empty: the defaults."""
    out: str = ""
    """Run folder, on the server. One that exists is continued."""
    clients: int = 2
    """How many must have joined before the run starts."""
    downlink: Downlink = "replay"
    quorum: float = 0.5
    deadline: float = 60.0
    patience: float = 3600.0
    tensorboard: bool = False
    """Write event files into the run folder."""


def app_config(values: object) -> AppConfig:
    """Check the run configuration of a Flower context.

    Args:
        values: The values by name, as Flower passes them: ``{"out": "runs/one", "clients": 3}``.

    Returns:
        The configuration, with defaults where ``values`` has none.

    Raises:
        OptionError: A name is unknown, or a value has another type.

    Examples:
        >>> app_config({"clients": 3}).quorum
        0.5
    """
    try:
        return msgspec.convert(values, AppConfig)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at `$.")
        raise OptionError("run-config", field.rstrip("`") or "?", reason) from error


def options_of(config: AppConfig) -> TrainConfig:
    """Read the training options of a run configuration.

    Raises:
        OptionError: The file has an unknown option or a bad value, or asks for backpropagation.
    """
    options = train_config(Path(config.config) if config.config else None, {})
    if options.backprop is not None:
        raise OptionError("backprop", options.backprop, "none: clients only infer")
    return options

"""The package's log on stderr, for processes that run until they are stopped."""

from __future__ import annotations

import logging
import os
import sys

_NAME = "baffle-stderr"


def log_to_stderr(label: str = "") -> None:
    """Write the log of ``baffle`` to stderr, with the time of day.

    The level is INFO, or the one that the environment variable ``BAFFLE_LOG`` names. A second call replaces what the
    first one set up.

    Args:
        label: Word before each message, for a stream that other programs write to as well.
    """
    log = logging.getLogger("baffle")
    for handler in [h for h in log.handlers if h.get_name() == _NAME]:
        log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_NAME)
    handler.setFormatter(logging.Formatter(" ".join(filter(None, ["%(asctime)s", label, "%(message)s"])), "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(os.environ.get("BAFFLE_LOG", "INFO").upper())

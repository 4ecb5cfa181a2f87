"""How many cores this process may use.

``os.cpu_count`` counts the machine's, also where a container or a scheduler allows fewer.
"""

from __future__ import annotations

import os
import sys


def cores() -> int:
    """Number of cores that this process may run on; where only the machine's number is known, that."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

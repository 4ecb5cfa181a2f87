"""Fixtures of the tests of reports, most of which need matplotlib."""

from __future__ import annotations

from importlib.util import find_spec

from report_helpers import run as run
from status_helpers import deployed as deployed
from status_helpers import finished as finished

if find_spec("matplotlib") is None:
    collect_ignore = ["test_charts.py", "test_figures.py", "test_pages.py", "test_sigma.py"]

"""Reports of run folders for people: ``report`` tells of one run, ``compare`` lays several over one another.

Both read configuration, metrics and rows; the folder of a baseline with true gradients has no rows, and what rows
tell is then left out.
"""

from baffle.report.log import RunLog, read_run, totals
from baffle.report.pages import compare, report

__all__ = ["RunLog", "compare", "read_run", "report", "totals"]

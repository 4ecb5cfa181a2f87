"""Fixtures of the tests of training."""

from __future__ import annotations

from runfolder_helpers import final as final
from runfolder_helpers import run as run
from runfolder_helpers import where as where
from runfolder_helpers import whole as whole

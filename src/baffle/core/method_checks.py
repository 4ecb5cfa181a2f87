"""What a method refuses when it is built: options out of range, and options that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baffle.core.aggregate import SecureSum
from baffle.core.checks import require_between, require_count, require_positive
from baffle.core.optim import Optimizer, Sgd
from baffle.core.quantize import MOST_CODES
from baffle.core.types import MOST_BITS
from baffle.errors import OptionError, PlanError, require_choice

if TYPE_CHECKING:
    from baffle.core.method import Method


def check_fields(method: Method) -> None:
    """Check each option of a method by itself.

    Raises:
        OptionError: an option is out of range or unknown.
    """
    require_count("num_directions", method.num_directions, 1, 2**20)
    require_count("slices", method.slices, 1, 2**16)
    require_count("bits", method.bits, 1, MOST_BITS)
    require_choice("family", method.family, ["rank1", "rademacher", "gaussian"])
    require_choice("sharing", method.sharing, ["shared", "per-client"])
    require_choice("difference", method.difference, ["forward", "central"])
    if method.sigma != "auto":
        require_positive("sigma", method.sigma)
    require_count("lattice", method.lattice, 0, MOST_CODES)
    if method.batch_size is not None:
        require_count("batch_size", method.batch_size)
    require_between("participation", method.participation, 0, 1)
    if method.participation == 0:
        raise OptionError("participation", method.participation, "a share of the clients > 0")
    require_count("local_steps", method.local_steps, 1, 2**20)
    if method.local_lr is not None:
        require_positive("local_lr", method.local_lr)
    require_between("ema", method.ema, 0, 1, open_high=True)


def check_combinations(method: Method) -> None:
    """Check the options of a method against each other.

    Raises:
        PlanError: two options contradict each other; the message says why.
    """
    if method.local_steps > 1 and method.sharing == "per-client":
        raise PlanError("local_steps > 1 with sharing = 'per-client': local steps need directions shared by step")
    if isinstance(method.aggregate, SecureSum) and method.sharing == "per-client":
        raise PlanError("secure_sum with sharing = 'per-client': scalars along different directions have no sum")
    if method.lattice and (method.family == "gaussian" or method.local_steps > 1):
        raise PlanError(
            f"lattice = {method.lattice} with family {method.family!r}, local_steps = {method.local_steps}: expected "
            "rank1 or rademacher, and 1: codes move by whole steps"
        )
    if method.local_steps > 1 and method.local_lr is None and not _is_plain(method.optimizer):
        raise PlanError(
            f"local_steps = {method.local_steps} with optimizer {method.optimizer.name!r}: expected local_lr, the "
            "learning rate of the clients' own steps (only plain sgd has a default)"
        )


def _is_plain(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, Sgd) and optimizer.momentum == 0 and optimizer.weight_decay == 0

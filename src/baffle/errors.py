"""Every error that baffle raises on purpose.

    BaffleError
    ├── OptionError          (ValueError)       an option is out of range or unknown
    ├── DataError            (ValueError)       a data set or a partition cannot be used
    ├── ModelError           (ValueError)       a model cannot be trained by forward passes
    ├── PlanError            (ValueError)       options that contradict each other or break exactness
    ├── BundleError          (ValueError)       a client bundle is damaged or of another kind
    ├── ReplyError           (ValueError)       a client's reply is malformed or does not fit its task
    ├── FederationError      (ConnectionError)  too few clients on other machines, or they cannot be reached
    ├── SecureSumError       (ValueError)       a secure sum cannot be completed, or a message breaks its protocol
    ├── DivergedError        (ArithmeticError)  weights would become NaN or infinite
    ├── JournalError         (OSError)          a run folder cannot be read or written
    │   ├── RunExistsError   (FileExistsError)
    │   └── CorruptRunError  (ValueError)       a file of a run was truncated or edited
    └── MissingExtraError    (ImportError)      an optional dependency is not installed

Each also inherits from the built-in exception in parentheses, so ``except ValueError`` works as expected.
Messages name the field, its value and what was expected.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BaffleError(Exception):
    """Base of all errors raised on purpose by baffle."""


class OptionError(BaffleError, ValueError):
    """An option is out of range or unknown.

    Attributes:
        field: name of the option.
        value: its value.
        expected: what would be accepted, as a phrase.

    Examples:
        >>> raise OptionError("num_directions", 0, "an integer >= 1")
        Traceback (most recent call last):
        baffle.errors.OptionError: num_directions = 0: expected an integer >= 1
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} = {value!r}: expected {expected}")
        self.field, self.value, self.expected = field, value, expected

    # by default an exception is unpickled with its message as the only argument, which __init__ does not take
    def __reduce__(self) -> tuple[type[OptionError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.expected)


class DataError(BaffleError, ValueError):
    """A data set or a partition cannot be used."""


class ModelError(BaffleError, ValueError):
    """A model cannot be trained by forward passes as it stands."""


class PlanError(BaffleError, ValueError):
    """Options contradict each other, or exact arithmetic cannot be guaranteed."""


class BundleError(BaffleError, ValueError):
    """A client bundle is damaged or incomplete, or the file is not a client bundle."""


class ReplyError(BaffleError, ValueError):
    """A client's reply is malformed or does not fit the task it answers."""


class FederationError(BaffleError, ConnectionError):
    """There are too few clients on other machines, or they cannot be reached."""


class SecureSumError(BaffleError, ValueError):
    """A secure sum cannot be completed, or a message breaks its protocol."""


class DivergedError(BaffleError, ArithmeticError):
    """An update would have put NaN or infinity into the weights; it was not applied."""


class JournalError(BaffleError, OSError):
    """A run folder cannot be read or written."""


class RunExistsError(JournalError, FileExistsError):
    """The folder for a new run exists already."""


class CorruptRunError(JournalError, ValueError):
    """A file of a run was truncated or edited. The rounds before the damage remain usable."""


class MissingExtraError(BaffleError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


def require_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Require a value to be one of some names.

    Raises:
        OptionError: it is not; the message suggests the nearest spelling.

    Examples:
        >>> require_choice("family", "rank-1", ["rank1", "gaussian"])
        Traceback (most recent call last):
        baffle.errors.OptionError: family = 'rank-1': expected one of rank1, gaussian (did you mean rank1?)
    """
    names = list(choices)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise OptionError(field, value, "one of " + ", ".join(names) + hint)

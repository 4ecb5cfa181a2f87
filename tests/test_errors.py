"""Errors: each is also the built-in exception that its documentation names, and survives another process."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from baffle import errors
from baffle.errors import BaffleError, OptionError, require_choice


def test_the_tree_in_the_documentation_is_the_tree_of_the_classes() -> None:
    documented = dict(re.findall(r"── (\w+) +\((\w+)\)", errors.__doc__ or ""))
    classes = {name: c for name, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, BaffleError)}
    assert documented.keys() == classes.keys() - {"BaffleError"}
    for name, builtin in documented.items():
        assert builtin in {base.__name__ for base in classes[name].__mro__}, name


def test_an_option_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(OptionError("sigma", -1, "a number > 0")))
    assert (error.field, error.value, error.expected) == ("sigma", -1, "a number > 0")
    assert str(error) == "sigma = -1: expected a number > 0"


def test_a_choice_is_refused_with_the_nearest_spelling() -> None:
    require_choice("family", "rank1", ["rank1", "gaussian"])
    with pytest.raises(OptionError, match=r"expected one of rank1, gaussian \(did you mean gaussian\?\)"):
        require_choice("family", "gausian", ["rank1", "gaussian"])
    with pytest.raises(OptionError, match=r"expected one of rank1, gaussian$"):
        require_choice("family", "x", ["rank1", "gaussian"])

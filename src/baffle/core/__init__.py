"""The method's exact mathematics. Imports nothing of the package but its errors.

Start with :mod:`baffle.core.method`: one round, end to end. Then follow the numbers: :mod:`~baffle.core.directions`
(what clients perturb along), :mod:`~baffle.core.scalars` (what they return), :mod:`~baffle.core.aggregate` (the sum),
:mod:`~baffle.core.rebuild` (the gradient estimate), :mod:`~baffle.core.optim` and :mod:`~baffle.core.state` (the
update).
"""

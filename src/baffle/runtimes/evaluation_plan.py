"""How a run evaluates forward passes: the entries of the recorded plan that code depends on.

``Runtime.plan``, ``Engine.plan`` and ``RunConfig.plan`` are free-form records: every engine adds what is worth
knowing about it (versions, device, chunk size), and all of it is kept in ``config.json`` and sent in messages as it
is. The package itself decides by five entries only; this type reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationPlan:
    """The entries of a recorded plan that decide how a run is evaluated, compared and continued.

    Attributes:
        runtime: ``torch``, ``ort`` or ``openvino``; empty if the record does not name one.
        strategy: How PyTorch's runtime evaluates many passes: ``copies``, ``stacked`` or ``streaming``.
        threads: Number of passes evaluated at the same time; a malformed value stays as it is.
        data: Digest of the clients' examples; empty if the engine does not see them.
        frozen: Digest of the parameters that are not trained; empty if all are.
    """

    runtime: str = ""
    strategy: str = "copies"
    threads: int | str = 1
    data: str = ""
    frozen: str = ""

    @classmethod
    def of(cls, record: Mapping[str, str | int]) -> EvaluationPlan:
        """Read a recorded plan.

        Args:
            record: ``Runtime.plan``, ``Engine.plan`` or ``RunConfig.plan``. Unknown entries are ignored. Values are not
                checked, since a client on another machine may have sent them: making options of them does.

        Returns:
            The entries that code depends on, with defaults for those that are missing.

        Examples:
            >>> EvaluationPlan.of({"runtime": "torch", "torch": "2.9", "threads": 4})
            EvaluationPlan(runtime='torch', strategy='copies', threads=4, data='', frozen='')
        """
        return cls(
            runtime=str(record.get("runtime", cls.runtime)),
            strategy=str(record.get("strategy", cls.strategy)),
            threads=record.get("threads", cls.threads),
            data=str(record.get("data", cls.data)),
            frozen=str(record.get("frozen", cls.frozen)),
        )

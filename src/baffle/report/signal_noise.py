"""How much of a rebuilt estimate is gradient, and how much is noise of the K random directions.

Let g = sum_v p_v g_v be what is estimated, p_v the weight
of a source v (a client with directions of its own, a local step), s_vk its K scalars. As E[d dT] = I, the mean of
s_vk^2 over k is |g_v|^2 without bias, and (BAFFLE, arXiv 2301.12195, section 3; Spall, SPSA, 1992)

    E|estimate|^2 = |g|^2 + noise,    noise = (n - 1)/K sum_v p_v^2 |g_v|^2    (n + 1 with Gaussian entries).

So the estimate's power less the noise is |g|^2 without bias, also where clients' gradients differ. Where they are
equal, |g|^2/noise is K/((n - 1) sum_v p_v^2): K/(n - 1) with shared directions, C K/(n - 1) with each client's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from baffle.core.credit import is_plain
from baffle.core.method import examples_per_weight
from baffle.core.rebuild import estimate
from baffle.core.scalars import weight_of
from baffle.core.types import Row, table_size
from baffle.report.run import RecordedRun
from baffle.runfolder.config import RunConfig

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of finished rebuilds, and of all."""

_REBUILD_BUDGET = 4e9  # entries of directions to draw again for a report: takes some seconds
_FEWEST_REBUILDS, _MOST_REBUILDS = 10, 200


@dataclass(frozen=True)
class Power:
    """The squared norm of a round's estimate, and the part of it that is noise.

    ``equal`` is the squared norm of the mean gradient if the clients' are equal (else it is more than that);
    ``variance`` that of ``signal``.
    """

    round: int
    estimate: float
    noise: float
    equal: float
    variance: float

    @property
    def signal(self) -> float:
        """Squared norm of the mean gradient, without bias; a single one is noisy and may be negative."""
        return self.estimate - self.noise


def measure_power(log: RecordedRun, samples: int | None = None, progress: Progress | None = None) -> list[Power]:
    """Rebuild the estimates of evenly spaced applied rounds: their power and its noise.

    ``samples`` is the number of rounds; by default as many as take some seconds.
    """
    rows = [row for row in log.rows if row.applied]
    if not rows or not is_plain(log.config.table):  # numbers of other kinds have no such noise
        return []
    n, table, gaussian = table_size(log.config.table), log.config.table, log.config.method.family == "gaussian"
    if samples is None:
        entries = max(row.numbers * row.local_steps for row in rows) * n * (10 if gaussian else 1)
        samples = max(_FEWEST_REBUILDS, min(_MOST_REBUILDS, int(_REBUILD_BUDGET / max(entries, 1))))
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(samples, len(rows))).round().astype(int))
    measured: list[Power] = []
    for done, row in enumerate((rows[i] for i in chosen), 1):
        scaled = row.integers * (2.0 ** row.exponents[0] / max(row.weight_sum, 1) / row.local_steps)
        scatter = float((scaled**2).mean(axis=2).sum())  # sum over the sources of p_v^2 |g_v|^2
        gradient = estimate(table, row).astype(np.float64)
        power = float(gradient @ gradient)
        noise = (n + 1 if gaussian else n - 1) / (row.num_directions * row.slices) * scatter
        per_direction = scatter / (row.num_directions * row.slices)
        variance = 2 * n * per_direction**2 + 4 * max(power - noise, 0.0) * per_direction
        measured.append(Power(row.round, power, noise, scatter / _concentration(log.config, row), variance))
        if progress is not None:
            progress(done, len(chosen))
    return measured


def pool(powers: Iterable[Power]) -> tuple[float, float, float, float]:
    """Mean round and √(signal/noise) of several rounds, and that one standard error below and above."""
    measured = list(powers)
    noise, signal = sum(p.noise for p in measured), sum(p.signal for p in measured)
    error = math.sqrt(sum(p.variance for p in measured))
    if noise <= 0:
        return math.nan, math.nan, math.nan, math.nan
    middle, low, high = (math.sqrt(max(0.0, value) / noise) for value in (signal, signal - error, signal + error))
    return sum(p.round for p in measured) / len(measured), middle, low, high


def _concentration(config: RunConfig, row: Row) -> float:
    """sum_v p_v^2 over a row's sources; 1/V for V of equal weight."""
    if row.sharing == "shared":
        return 1.0 / row.local_steps
    asked = max(1, round(config.method.participation * len(config.clients)))
    quantum = examples_per_weight(max(config.clients), asked, config.method.bits)
    weights = np.array([weight_of(config.clients[client], quantum) for client in row.participants], np.float64)
    return float(((weights / weights.sum()) ** 2).sum()) / row.local_steps

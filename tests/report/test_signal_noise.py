"""Signal and noise of estimates, against known gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from baffle.core.types import Family, Sharing, table_size
from baffle.report.signal_noise import measure_power
from helpers import METHOD
from report_helpers import TABLE, WEIGHTS, log_of, make_rows


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("sharing", ["shared", "per-client"])
@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
def test_signal_and_noise_are_those_of_a_known_gradient(family: Family, sharing: Sharing, alike: bool) -> None:
    rounds, n, count, rng = 150, table_size(TABLE), 16, np.random.default_rng(3)
    common = rng.standard_normal(n)
    gradients = [common if alike else common + 2 * rng.standard_normal(n) for _ in WEIGHTS]
    p = np.array(WEIGHTS) / sum(WEIGHTS)
    mean = sum(share * gradient for share, gradient in zip(p, gradients, strict=True))
    squared = float(mean @ mean)
    powers = measure_power(log_of(make_rows(gradients, family, sharing, rounds, 0), family, sharing), samples=rounds)
    signal, noise = (np.array([getattr(q, name) for q in powers]) for name in ("signal", "noise"))

    assert len(powers) == rounds
    error = float(np.std(signal, ddof=1)) / math.sqrt(rounds)
    assert abs(signal.mean() - squared) < 4 * error
    assert error < 0.35 * squared  # so that the line above says something
    predicted = math.sqrt(np.mean([q.variance for q in powers]) / rounds)
    assert 0.7 < predicted / error < 1.4

    factor = n + 1 if family == "gaussian" else n - 1
    scatter = squared if sharing == "shared" else sum(s**2 * float(g @ g) for s, g in zip(p, gradients, strict=True))
    assert noise.mean() == pytest.approx(factor / count * scatter, rel=0.1)
    equal = float(np.mean([q.equal for q in powers]))
    if sharing == "shared":
        assert equal == pytest.approx(squared, rel=0.1)
    elif alike:  # three clients of unequal weight: 1/sum p^2 = 2.17 of them count
        assert equal == pytest.approx(squared, rel=0.1)
        assert float(np.mean([q.equal / q.noise for q in powers])) == pytest.approx(count / factor / (p @ p), rel=1e-6)
    else:
        assert equal > 1.3 * squared


def test_noise_in_the_scalars_is_not_taken_for_signal() -> None:
    gradient = np.random.default_rng(4).standard_normal(table_size(TABLE))
    squared = float(gradient @ gradient)
    rows = make_rows([gradient] * 3, "rank1", "shared", 150, noise=3 * math.sqrt(squared))
    powers = measure_power(log_of(rows, "rank1", "shared"), samples=150)
    signal = np.array([q.signal for q in powers])
    assert float(np.mean([q.equal for q in powers])) > 4 * squared  # what the scalars alone would say
    # a share 1/K of the scalars' own noise is left
    left = (float(np.mean([q.equal for q in powers])) - squared) / 16
    assert abs(signal.mean() - squared - left) < 4 * float(np.std(signal, ddof=1)) / math.sqrt(len(signal))


def test_clients_count_by_the_weights_that_few_bits_leave_them() -> None:
    gradient = np.random.default_rng(3).standard_normal(table_size(TABLE))
    log = log_of(make_rows([gradient] * 3, "rank1", "per-client", 4, 0), "rank1", "per-client")
    few = replace(log, config=msgspec.structs.replace(log.config, method=msgspec.structs.replace(METHOD, bits=8)))
    shares = np.array([15, 8, 3]) / 26  # of 60, 30 and 10 examples, four to a unit of weight
    powers = measure_power(few, samples=4)
    expected = 16 / (table_size(TABLE) - 1) / (shares @ shares)
    assert float(np.mean([q.equal / q.noise for q in powers])) == pytest.approx(expected, rel=1e-6)

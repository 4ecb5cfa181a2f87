"""Which step sigma gives a derivative, for a model, a runtime and a precision: found by measuring.

A finite difference is wrong in two ways: rounding of the forward pass adds noise that falls as 1/sigma, curvature
adds an error that grows with sigma. Along the same directions, neighbours on a ladder of sigmas disagree by the
larger of their errors: the smaller sigma's noise, or the larger one's curvature. So the error of each is the smaller
of its two disagreements, and no reference is needed: a client that can only infer calibrates itself. Where there is
a reference, ``compare`` says how good that guess is.

After More and Wild, Estimating derivatives of noisy simulations, ACM TOMS 38 (2012), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.client.respond import finite_differences, perturbations
from baffle.core.quantize import row_scales
from baffle.core.types import Task, Weights
from baffle.data import Dataset
from baffle.errors import ReplyError
from baffle.protocol.messages import CalibrateResponse
from baffle.runtimes import Runtime

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DIRECTIONS = 16
"""Directions along which round 0 measures."""
EXAMPLES = 64
"""Examples on which it does, at most."""
_GOOD = 0.15  # an error that adds two percent to the variance of the estimate

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scalars along the same directions for each sigma of the ladder: float64[sigmas, K], and what follows."""

    sigmas: tuple[float, ...]
    scalars: Float64
    errors: Float64
    """Relative error of each sigma's scalars, estimated without a reference: float64[sigmas]."""
    sigma: float
    """The one to use."""
    forward_passes: int
    samples_forwarded: int


@dataclass(frozen=True)
class Agreement:
    """How scalars of one sigma compare with derivatives: ``scalars = slope * derivatives + noise``.

    ``correlation`` is the cosine between them, ``error`` the norm of their difference and ``noise`` that of what the
    slope leaves, both relative to the derivatives' norm. Scalars that are not all finite agree with nothing, and
    with derivatives of 0 nothing agrees: correlation and slope are 0, the other two infinite.
    """

    sigma: float
    correlation: float
    slope: float
    noise: float
    error: float


def calibrate(
    task: Task, runtime: Runtime, weights: Weights, batch: Dataset, num_directions: int = DIRECTIONS, client: int = 0
) -> Calibration:
    """Measure along a task's first directions, at ``weights`` on a batch, for every sigma of the ladder.

    On the lattice matrices move by whole codes, whatever sigma; then it is what most of them move by.
    """
    ladder: tuple[float, ...] = LADDER
    if task.lattice:
        ladder = (_step_of_codes(runtime, weights, task.lattice),)
    rows: list[Float64] = []
    passes = 0
    for sigma in ladder:
        probe = msgspec.structs.replace(task, sigma=sigma, num_directions=num_directions)
        asked = perturbations(probe, runtime.table, client)
        rows.append(finite_differences(probe, runtime.losses(weights, asked, batch)))
        passes += len(asked)
    scalars = np.stack(rows)
    errors = estimate_errors(scalars)
    return Calibration(ladder, scalars, errors, ladder[choose(errors)], passes, passes * len(batch))


def estimate_errors(scalars: Float64) -> Float64:
    """The relative error of scalars [sigmas, K], from how neighbours disagree; infinite where none is usable.

    Examples:
        >>> estimate_errors(np.array([[3.0, 1.0], [1.0, 1.0], [1.0, 1.1], [9.0, -9.0]])).round(2).tolist()
        [1.41, 0.07, 0.07, 8.67]
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = np.linalg.norm(scalars, axis=1)
        gaps = np.linalg.norm(scalars[1:] - scalars[:-1], axis=1) / np.minimum(norms[1:], norms[:-1])
    gaps = np.concatenate([[np.inf], np.where(np.isfinite(gaps), gaps, np.inf), [np.inf]])
    errors: Float64 = np.minimum(gaps[:-1], gaps[1:])
    return errors


def choose(errors: Float64) -> int:
    """The middle of the run of small errors around the smallest: as far from noise as from curvature.

    Without any usable one, the middle of the ladder.

    Examples:
        >>> choose(np.array([0.9, 0.14, 0.01, 0.02, 0.14, 0.5]))
        3
    """
    good = np.isfinite(errors) & (errors <= max(_GOOD, 1.5 * errors.min()))
    if not good.any():
        return len(errors) // 2
    low = high = int(errors.argmin())
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(errors) and good[high + 1]:
        high += 1
    return (low + high + 1) // 2


def check_measurement(
    task: Task, client: int, measured: CalibrateResponse, others: Sequence[CalibrateResponse]
) -> None:
    """Raise ReplyError unless a client measured what it was asked to, as the others did."""
    expected = others[0].sigmas if others else measured.sigmas if task.lattice else LADDER
    usable = len(measured.sigmas) == len(measured.errors) and all(0 < s < math.inf for s in measured.sigmas)
    if measured.sigmas != expected or len(expected) == 0 or not usable or not all(e >= 0 for e in measured.errors):
        raise ReplyError(
            f"client {client} measured errors {measured.errors} for {measured.sigmas}: expected a finite ladder"
        )


def agree(found: Sequence[CalibrateResponse]) -> Calibration:
    """What clients that measured by themselves agree on: sigma by the median of their errors."""
    errors = np.median([f.errors for f in found], axis=0)
    return Calibration(
        sigmas=found[0].sigmas,
        scalars=np.empty((len(errors), 0)),
        errors=errors,
        sigma=found[0].sigmas[choose(errors)],
        forward_passes=sum(f.forward_passes for f in found),
        samples_forwarded=sum(f.samples_forwarded for f in found),
    )


def compare(calibration: Calibration, derivatives: Float64) -> tuple[Agreement, ...]:
    """How each sigma's scalars agree with the derivatives along the same directions, float64[K]."""
    size = float(np.linalg.norm(derivatives))
    found = []
    for sigma, scalars in zip(calibration.sigmas, calibration.scalars, strict=True):
        if not 0 < size < math.inf or not np.isfinite(scalars).all():
            found.append(Agreement(sigma, 0.0, 0.0, math.inf, math.inf))
            continue
        slope = float(scalars @ derivatives) / size**2
        norm = float(np.linalg.norm(scalars))
        found.append(
            Agreement(
                sigma=sigma,
                correlation=slope * size / norm if norm else 0.0,
                slope=slope,
                noise=float(np.linalg.norm(scalars - slope * derivatives)) / size,
                error=float(np.linalg.norm(scalars - derivatives)) / size,
            )
        )
    return tuple(found)


def _step_of_codes(runtime: Runtime, weights: Weights, codes: int) -> float:
    """The step that the median weight of the matrices takes: a float32."""
    matrices = [spec for spec in runtime.table if spec.matrix is not None]
    if not matrices:
        return LADDER[len(LADDER) // 2]
    scales = [np.repeat(row_scales(spec, weights), (spec.matrix or (0, 0))[1]) for spec in matrices]
    return float(np.float32(codes) * np.median(np.concatenate(scales)))

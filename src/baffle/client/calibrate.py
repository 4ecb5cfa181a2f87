"""Measure which finite-difference step sigma suits a model, a runtime and a precision.

A finite difference has two errors: rounding in the forward pass adds noise that falls as 1/sigma, curvature adds an
error that grows with sigma. Along the same directions, neighbours on a ladder of sigmas disagree by the larger of
their errors: the smaller sigma's noise, or the larger one's curvature. So the error of each sigma is estimated by the
smaller of its two disagreements. That needs no reference: an inference-only client calibrates itself. Where exact
derivatives are available, ``compare`` shows how good the estimate is.

After More and Wild, Estimating derivatives of noisy simulations, ACM TOMS 38 (2012), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.client.respond import draw, numbers_of, passes_of
from baffle.core.credit import is_plain, part_of, sizes_of, units_of
from baffle.core.quantize import row_scales
from baffle.core.types import Task, Weights
from baffle.data import Dataset
from baffle.errors import ReplyError
from baffle.protocol.messages import CalibrateResponse
from baffle.runtimes import Runtime

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The sigmas to choose from."""
DIRECTIONS = 16
"""Number of directions along which round 0 measures."""
_CREDITED_DIRECTIONS = 2
EXAMPLES = 64
"""Maximum number of examples on which round 0 measures."""
_GOOD = 0.15  # an error that adds two percent to the variance of the estimate

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scalars along the same directions for each sigma of the ladder, and the sigma chosen from them."""

    sigmas: tuple[float, ...]
    """The ladder."""
    scalars: Float64
    """float64[sigmas, K]; K = 0 if clients measured by themselves."""
    errors: Float64
    """Relative error of each sigma's scalars, estimated without a reference: float64[sigmas]."""
    sigma: float
    """The sigma to use."""
    forward_passes: int
    samples_forwarded: int


@dataclass(frozen=True)
class Agreement:
    """Comparison of one sigma's scalars with exact derivatives: ``scalars = slope * derivatives + noise``.

    ``correlation`` is the cosine between them; ``error`` is the norm of their difference and ``noise`` that of the
    residual, both relative to the derivatives' norm. If scalars are not all finite, or all derivatives are 0,
    correlation and slope are 0 and the other two infinite.
    """

    sigma: float
    correlation: float
    slope: float
    noise: float
    error: float


def calibrate(
    task: Task, runtime: Runtime, weights: Weights, batch: Dataset, num_directions: int = DIRECTIONS, client: int = 0
) -> Calibration:
    """Measure a task's scalars for every sigma of the ladder, and choose one.

    On the lattice, matrices move by whole codes, independently of sigma. The ladder then has one sigma: the step of
    the median weight.

    Args:
        task: whose first directions are used; its own sigma is ignored.
        runtime: evaluates the passes.
        weights: float32[n], at which to measure.
        batch: on which to measure.
        num_directions: K.
        client: its number; matters only for per-client directions.
    """
    ladder: tuple[float, ...] = LADDER
    if task.lattice:
        ladder = (_step_of_codes(runtime, weights, task.lattice),)
    rows: list[Float64] = []
    passes = 0
    if not is_plain(runtime.table):  # each direction brings many numbers
        num_directions = min(num_directions, _CREDITED_DIRECTIONS)
    sizes = sizes_of(runtime.table, num_directions)
    directed = [p for p, unit in zip(part_of(sizes), units_of(runtime.table), strict=True) if unit.kind != "exact"]
    for sigma in ladder:
        probe = msgspec.structs.replace(
            task, sigma=sigma, num_directions=num_directions, slices=1, unit_sizes=sizes, local_steps=1
        )
        [numbers] = numbers_of(probe, runtime.table, runtime, weights, [batch], client)
        rows.append(np.concatenate([numbers[part] for part in directed]))
        passes += passes_of(probe, runtime.table)
    scalars = np.stack(rows)
    errors = estimate_errors(scalars)
    return Calibration(ladder, scalars, errors, ladder[choose(errors)], passes, passes * len(batch))


def estimate_errors(scalars: Float64) -> Float64:
    """Estimate relative errors from how neighbours on the ladder disagree.

    Args:
        scalars: float64[sigmas, K].

    Returns:
        float64[sigmas]; infinite where no neighbour is usable.

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
    """Choose the middle of the range of small errors around the smallest: as far from noise as from curvature.

    Args:
        errors: float64[sigmas].

    Returns:
        Index of the sigma; the middle of the ladder if no error is small.

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


def measure(task: Task, runtime: Runtime, weights: Weights, data: Dataset, client: int) -> CalibrateResponse:
    """Calibrate as a client: on a mini-batch of its data, as a message to the server."""
    batch = draw(msgspec.structs.replace(task, batch_size=EXAMPLES), data, client, 0)
    measured = calibrate(task, runtime, weights, batch, client=client)
    errors = tuple(float(error) for error in measured.errors)
    return CalibrateResponse(measured.sigmas, errors, measured.forward_passes, measured.samples_forwarded)


def check_measurement(
    task: Task, client: int, measured: CalibrateResponse, others: Sequence[CalibrateResponse]
) -> None:
    """Raise ReplyError unless a client's measurement is well-formed, for the same sigmas as the others'."""
    expected = others[0].sigmas if others else measured.sigmas if task.lattice else LADDER
    usable = len(measured.sigmas) == len(measured.errors) and all(0 < s < math.inf for s in measured.sigmas)
    if measured.sigmas != expected or len(expected) == 0 or not usable or not all(e >= 0 for e in measured.errors):
        raise ReplyError(
            f"client {client} measured errors {measured.errors} for {measured.sigmas}: expected a finite ladder"
        )


def agree(measured: Sequence[CalibrateResponse]) -> Calibration:
    """Combine the measurements of several clients: sigma is chosen by the median of their errors."""
    errors = np.median([m.errors for m in measured], axis=0)
    return Calibration(
        sigmas=measured[0].sigmas,
        scalars=np.empty((len(errors), 0)),
        errors=errors,
        sigma=measured[0].sigmas[choose(errors)],
        forward_passes=sum(m.forward_passes for m in measured),
        samples_forwarded=sum(m.samples_forwarded for m in measured),
    )


def compare(calibration: Calibration, derivatives: Float64) -> tuple[Agreement, ...]:
    """Compare each sigma's scalars with the exact derivatives along the same directions.

    Args:
        calibration: of this process, with its scalars.
        derivatives: float64[K].

    Returns:
        One agreement per sigma.
    """
    size = float(np.linalg.norm(derivatives))
    agreements = []
    for sigma, scalars in zip(calibration.sigmas, calibration.scalars, strict=True):
        if not 0 < size < math.inf or not np.isfinite(scalars).all():
            agreements.append(Agreement(sigma, 0.0, 0.0, math.inf, math.inf))
            continue
        slope = float(scalars @ derivatives) / size**2
        norm = float(np.linalg.norm(scalars))
        agreements.append(
            Agreement(
                sigma=sigma,
                correlation=slope * size / norm if norm else 0.0,
                slope=slope,
                noise=float(np.linalg.norm(scalars - slope * derivatives)) / size,
                error=float(np.linalg.norm(scalars - derivatives)) / size,
            )
        )
    return tuple(agreements)


def _step_of_codes(runtime: Runtime, weights: Weights, codes: int) -> float:
    """The step of the matrices' median weight, rounded to float32."""
    matrices = [spec for spec in runtime.table if spec.matrix is not None]
    if not matrices:
        return LADDER[len(LADDER) // 2]
    scales = [np.repeat(row_scales(spec, weights), (spec.matrix or (0, 0))[1]) for spec in matrices]
    return float(np.float32(codes) * np.median(np.concatenate(scales)))

"""Signed 8-bit codes of a matrix, one scale a row (output channel), and the lattice that they span.

Weights on the lattice are code x scale, with scale = max|row| / 119: codes of unperturbed weights stay within
+-119, so that a perturbation by up to eight codes still fits 8 bits. Scales are made by float32 operations that are
exact or rounded once, so everyone who has the weights has the scales, bit for bit.

Perturbing codes by +-m instead of weights by +-sigma leaves nothing to be rounded: an int8 runtime then evaluates
just the weights that the direction says. (Integer perturbations: EGGROLL, Sarkar et al. 2025.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from baffle.core.types import ParamSpec, Table, Weights

CODES = 119  # the largest code of unperturbed weights
LARGEST_CODE = 127
MOST_CODES = LARGEST_CODE - CODES  # the largest step on the lattice
_SMALLEST_MAXIMUM = np.float32(2.0**-6)  # of a row, so that one of zeros can still be perturbed

Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]


def row_scales(spec: ParamSpec, weights: Weights) -> Float32:
    """The scale of each row of a matrix: float32[out]; ``weights`` are the flat ones.

    Examples:
        >>> row_scales(ParamSpec("w", (2, 2), 0), np.array([119, 0, 0.5, -59.5], np.float32)).tolist()
        [1.0, 0.5]
    """
    largest = np.abs(weights[spec.slice].reshape(spec.matrix or (0, 0))).max(axis=1)
    scales: Float32 = np.maximum(largest, _SMALLEST_MAXIMUM) / np.float32(CODES)
    return scales


def encode(rows: Float32, scales: Float32, out: Codes) -> None:
    """Write the codes of matrices float32[..., out, rest] into ``out`` int8 alike; halves go to the even one."""
    units = rows / scales[:, None]
    np.rint(units, out=units)
    np.clip(units, -LARGEST_CODE, LARGEST_CODE, out=units)
    np.copyto(out, units, casting="unsafe")


def on_lattice(table: Table, weights: Weights) -> Weights:
    """Weights with every matrix rounded to its lattice: float32[n]; other tensors stay.

    Examples:
        >>> on_lattice((ParamSpec("w", (1, 2), 0),), np.array([119, 0.6], np.float32)).tolist()
        [119.0, 1.0]
    """
    rounded = weights.copy()
    for spec in table:
        if spec.matrix is not None:
            part = rounded[spec.slice].reshape(spec.matrix)
            scales = row_scales(spec, weights)[:, None]
            np.multiply(np.rint(part / scales), scales, out=part)
    return rounded


def lattice_steps(table: Table, weights: Weights, sigma: float, codes: int) -> dict[int, Float32]:
    """How many times sigma a step of ``codes`` is, for each row of each matrix: tensor -> float32[out]."""
    return {
        i: np.float32(codes) * row_scales(spec, weights) / np.float32(sigma)
        for i, spec in enumerate(table)
        if spec.matrix is not None
    }


def unscale(table: Table, estimate: Weights, weights: Weights, sigma: float, codes: int) -> Weights:
    """The gradient estimate of scalars that were measured on the lattice: each row divided by its step.

    A scalar is a derivative along the direction stretched by the steps, so what the directions give back is the
    gradient times the steps.
    """
    result = estimate.copy()
    for i, steps in lattice_steps(table, weights, sigma, codes).items():
        result[table[i].slice].reshape(table[i].matrix or (0, 0))[:] /= steps[:, None]
    return result

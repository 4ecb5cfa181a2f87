"""The int8 lattice: a matrix as signed 8-bit codes (integer levels) with one scale per row (output channel).

A weight on the lattice is code x scale, with scale = max|row| / 119. Codes of unperturbed weights therefore stay
within +-119, and a perturbation by up to eight codes still fits 8 bits. Each scale is the result of float32
operations that are exact or rounded once, so everyone who has the weights has the scales, bit for bit.

Perturbing codes by +-m instead of weights by +-sigma leaves nothing to be rounded: an int8 runtime evaluates exactly
the weights that the direction stands for. (Integer perturbations: EGGROLL, Sarkar et al. 2025.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from baffle.core.types import ParamSpec, Table, Weights

CODES = 119
"""Largest code of unperturbed weights."""
LARGEST_CODE = 127
"""Largest code of all; -128 is not used."""
MOST_CODES = LARGEST_CODE - CODES
"""Largest perturbation, in codes."""
_SMALLEST_MAXIMUM = np.float32(2.0**-6)  # assumed max|row| at least, so that a row of zeros can still be perturbed

Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]


def row_scales(spec: ParamSpec, weights: Weights) -> Float32:
    """The scale of each row of a matrix.

    Args:
        spec: the matrix.
        weights: all weights, flat, float32[n].

    Returns:
        float32[out].

    Examples:
        >>> row_scales(ParamSpec("w", (2, 2), 0), np.array([119, 0, 0.5, -59.5], np.float32)).tolist()
        [1.0, 0.5]
    """
    largest = np.abs(weights[spec.slice].reshape(spec.matrix or (0, 0))).max(axis=1)
    scales: Float32 = np.maximum(largest, _SMALLEST_MAXIMUM) / np.float32(CODES)
    return scales


def encode(rows: Float32, scales: Float32, out: Codes) -> None:
    """Round matrices to codes; halves go to the even code.

    Args:
        rows: float32[..., out, rest].
        scales: the scale of each row, float32[out].
        out: where the codes are written, int8[..., out, rest].
    """
    units = rows / scales[:, None]
    np.rint(units, out=units)
    np.clip(units, -LARGEST_CODE, LARGEST_CODE, out=units)
    np.copyto(out, units, casting="unsafe")


def on_lattice(table: Table, weights: Weights) -> Weights:
    """A copy of the flat weights float32[n] with every matrix rounded to its lattice; other tensors are unchanged.

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
    """How large a step of ``codes`` is for each row of each matrix, in multiples of sigma: tensor -> float32[out]."""
    return {
        i: np.float32(codes) * row_scales(spec, weights) / np.float32(sigma)
        for i, spec in enumerate(table)
        if spec.matrix is not None
    }


def unscale(table: Table, estimate: Weights, weights: Weights, sigma: float, codes: int) -> Weights:
    """Correct a gradient estimate whose scalars were measured on the lattice: divide each row by its step.

    A scalar is then the derivative along a direction whose rows are stretched by the steps, so the rebuild from
    unstretched directions yields the gradient times the steps. Exact numbers are about no direction: they stay.

    Args:
        table: the trainable tensors.
        estimate: the rebuilt estimate, float32[n].
        weights: the weights that were perturbed, float32[n].
        sigma: step of the finite difference that scalars were divided by.
        codes: step on the lattice.

    Returns:
        The gradient estimate, float32[n].
    """
    result = estimate.copy()
    for i, steps in lattice_steps(table, weights, sigma, codes).items():
        if table[i].credit.kind != "exact":
            result[table[i].slice].reshape(table[i].matrix or (0, 0))[:] /= steps[:, None]
    return result

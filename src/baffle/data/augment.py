"""Augmentation of images as in the paper (BAFFLE, arXiv 2301.12195): reflect-pad by 4, crop, flip.

A mini-batch is augmented once, when it is drawn: all passes must see the same images, since their losses are
subtracted from each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_PAD = 4


def augment(images: npt.NDArray[np.generic], rng: np.random.Generator) -> npt.NDArray[np.generic]:
    """Shift each image by up to 4 pixels, mirrored at the borders, and flip each with probability one half.

    Args:
        images: [n, channels, height, width], of any type.
        rng: Draws the shifts and flips.

    Returns:
        The augmented images, a copy of the same shape and type.

    Examples:
        >>> images = np.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
        >>> augment(images, np.random.default_rng(0)).shape
        (2, 3, 8, 8)
    """
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (_PAD, _PAD), (_PAD, _PAD)), mode="reflect")
    rows = rng.integers(0, 2 * _PAD + 1, (count, 1)) + np.arange(height)
    columns = rng.integers(0, 2 * _PAD + 1, (count, 1)) + np.arange(width)
    flipped = rng.integers(0, 2, count).astype(bool)
    columns[flipped] = columns[flipped, ::-1]
    return np.moveaxis(padded[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]], 3, 1)

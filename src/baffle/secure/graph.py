"""Who shares masks and secrets with whom: everyone with everyone, or in large cohorts a regular graph.

Bell et al. (CCS 2020): with a random k-regular graph, k of the order of log C, the sum stays private and survives
drop-outs at a cost a client that does not grow with the cohort. Clients are put on a circle in an order that the
round's key decides, and each is joined to the k / 2 nearest on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baffle.core.philox import Purpose, stream, word3

MOST_NEIGHBOURS = 100


def neighbourhoods(
    cohort: Sequence[int], key: tuple[int, int], degree: int = MOST_NEIGHBOURS
) -> dict[int, tuple[int, ...]]:
    """Each client's neighbours and itself, in ascending order; its secrets are shared among these.

    Examples:
        >>> neighbourhoods([4, 7, 9], (0, 1))[7]
        (4, 7, 9)
        >>> around = neighbourhoods(range(30), (0, 1), degree=6)
        >>> {len(members) for members in around.values()}, 3 in around[3]
        ({7}, True)
    """
    members = sorted(cohort)
    if len(members) - 1 <= degree:
        return dict.fromkeys(members, tuple(members))
    reach, count = degree // 2, len(members)
    words = stream(key, (0, 0, 0, word3(Purpose.GRAPH)), -(-count // 4)).reshape(-1)[:count]
    order = np.argsort(words, kind="stable").tolist()  # the same on every machine
    return {
        members[order[place]]: tuple(
            sorted(members[order[(place + step) % count]] for step in range(-reach, reach + 1))
        )
        for place in range(count)
    }


def threshold(holders: int) -> int:
    """How many of so many holders must give their shares: two thirds, rounded up.

    More than half of holders and colluders together, as long as fewer than a third collude: then no two sets of
    holders can be told different survivors and both give what they have.

    Examples:
        >>> [threshold(n) for n in (2, 3, 4, 10, 100)]
        [2, 2, 3, 7, 67]
    """
    return max(2, -(-2 * holders // 3))

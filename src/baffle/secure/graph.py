"""Which clients share masks and secrets: all pairs, or in large cohorts the neighbours in a random regular graph.

Bell et al. (CCS 2020): in a random k-regular graph with k of the order of log C, the sum of C clients stays private
and tolerates drop-outs, at a cost per client that does not grow with the cohort. Clients are placed on a circle in an
order drawn from run key and round, and each is connected to the k / 2 nearest on either side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baffle.core.philox import Purpose, stream, word3

MOST_NEIGHBOURS = 100
"""Neighbours of a client, by default; in cohorts of up to 101, all others."""


def neighbourhoods(
    cohort: Sequence[int], key: tuple[int, int], degree: int = MOST_NEIGHBOURS
) -> dict[int, tuple[int, ...]]:
    """Each client's neighbourhood: its neighbours and itself, which hold the shares of its secrets.

    Args:
        cohort: the clients of the round.
        key: (run key, round), which the order on the circle is drawn from.
        degree: largest number of neighbours; in a graph, an odd one counts as one less.

    Returns:
        Client -> its neighbourhood in ascending order.

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
    order = np.argsort(words, kind="stable").tolist()  # a stable sort: the same on every machine
    return {
        members[order[place]]: tuple(
            sorted(members[order[(place + step) % count]] for step in range(-reach, reach + 1))
        )
        for place in range(count)
    }


def threshold(holders: int) -> int:
    """How many of ``holders`` shares recombine a secret: two thirds, rounded up, at least 2.

    As long as fewer than a third of the holders collude with the server, twice the threshold exceeds holders plus
    colluders. So no two groups of holders that were told of different surviving clients can both reach it.

    Examples:
        >>> [threshold(n) for n in (2, 3, 4, 10, 100)]
        [2, 2, 3, 7, 67]
    """
    return max(2, -(-2 * holders // 3))

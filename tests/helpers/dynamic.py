"""Selection among tasks for dynamic sparse training, from its definition."""

import numpy as np


def brute_force(scores: list[np.ndarray], eligible: np.ndarray, count: int, quorum: int) -> set[int]:
    """The chosen places of one group, from the definition, one weight after the other."""
    places = np.flatnonzero(eligible)
    ranks = []
    for values in scores:
        order = sorted(places, key=lambda i: (-values[i], i))
        ranks.append({i: rank if values[i] else len(values) for rank, i in enumerate(order)})
    cost = {i: sorted(rank[i] for rank in ranks)[quorum - 1] for i in places}
    return set(sorted(places, key=lambda i: (cost[i], i))[:count])

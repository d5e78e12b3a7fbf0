"""The layer from which tasks diverge. Pure functions on agreement per layer."""

from collections.abc import Iterable, Sequence

LEAST_FALL = 0.05  # in agreement; smaller falls are noise
LEVEL = 0.95  # confidence level of intervals


def watershed(agreement: Sequence[float]) -> int | None:
    """The layer after the largest lasting fall of agreement, or None.

    The lasting fall before layer i is a[i-1] - max(a[i:]), so a dip that recovers does not count.
    Source: the watershed of DiSparse, Sun et al. 2022 (arXiv 2206.04662), who read it off a plot; the equation is ours.

    Args:
        agreement: per layer, first to last; IoU or agreement beyond chance.

    Returns:
        An index into `agreement`; with ties, the first.
    """
    best, place, highest = LEAST_FALL, None, float("-inf")
    for i in range(len(agreement) - 1, 0, -1):
        highest = max(highest, agreement[i])
        fall = agreement[i - 1] - highest
        if fall >= best:
            best, place = fall, i
    return place


def watershed_interval(curves: Iterable[Sequence[float]]) -> tuple[int | None, int | None, float]:
    """The interval of the watershed over bootstrap samples of the agreement.

    Returns:
        The ends of the middle LEVEL share of the samples' watersheds, both of which occurred (None if no sample has one), and
        the share of samples that have one.
    """
    found = [watershed(curve) for curve in curves]
    places = sorted(place for place in found if place is not None)
    if not places:
        return None, None, 0.0
    low, high = middle(len(places))
    return places[low], places[high], len(places) / len(found)


def middle(count: int) -> tuple[int, int]:
    """First and last index of the middle LEVEL share of `count` sorted values."""
    low, high = (round(q * (count - 1)) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return low, high

"""Ratios of the times of two contenders, round by round."""

from ..measure import Timing, quartiles


def ratio(timing: dict[str, Timing], name: str, other: str) -> dict[str, float] | None:
    """Quartiles of t_i(name) / t_i(other) over the rounds i; None where one of the two was not timed."""
    if name not in timing or other not in timing:
        return None
    pairs = zip(timing[name].seconds, timing[other].seconds, strict=True)
    return quartiles([own / reference for own, reference in pairs])


def median_ratio(timing: dict[str, Timing], name: str, other: str) -> float | None:
    """The median of `ratio`."""
    found = ratio(timing, name, other)
    return None if found is None else found["median"]

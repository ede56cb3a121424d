"""The search for a learning rate: what was tried, and how well it did → what to try next.

First the whole grid; then, as long as the best learning rate lies at the edge of those tried, one more beyond it. A
best one with a worse neighbour on both sides ends the search. Nothing is trained here, and nothing is remembered: a
search that was interrupted comes to the same learning rates again.
"""

import math
from collections.abc import Iterable

from ..._checks import check_integer, check_positive


def next_lrs(
    losses: dict[float, float], grid: Iterable[float], factor: float | None = None, max_further: int | None = None
) -> list[float]:
    """The learning rates to try next.

        grid not all tried:    those of the grid that were not, in ascending order
        afterwards:            [best · factor] or [best / factor], whichever was not tried, the larger one first

    `best` is the learning rate with the lowest loss. Without a `factor` the step beyond an edge is the ratio of the two
    outermost learning rates there, so that the grid continues as it began.

    Args:
        losses: validation loss of each learning rate so far; inf (or NaN) where training diverged. Of equal losses the
            first one in the dict is the best.
        grid: where the search starts, in any order, at least one.
        factor: step beyond the grid, above 1. With None, only a learning rate at the edge has neighbours to try, a grid
            of one has none, and a search in which every learning rate has diverged ends (the caller sees it from the
            losses). With a factor such a search moves on to smaller ones.
        max_further: how many are tried beyond the grid at most; None is no limit.

    Returns:
        The whole grid at first, then one at a time; [] when the search is over.

    Raises:
        ValueError: an empty grid; a learning rate that is not a positive number; factor ≤ 1; max_further < 0.
        TypeError: numbers of another type.

    Example:
        >>> next_lrs({}, grid=[4e-3, 1e-3, 2e-3])
        [0.001, 0.002, 0.004]
        >>> next_lrs({0.001: 0.9, 0.002: 0.7, 0.004: 0.6}, grid=[4e-3, 1e-3, 2e-3])
        [0.008]
        >>> next_lrs({0.001: 0.9, 0.002: 0.7, 0.004: 0.6, 0.008: 0.8}, grid=[4e-3, 1e-3, 2e-3])
        []
        >>> next_lrs({0.008: 0.5, 0.016: 0.6}, grid=[0.008], factor=2)
        [0.004]
    """
    grid = sorted(check_positive(lr, "a learning rate of the grid") for lr in grid)
    if not grid:
        raise ValueError("grid = [] has no learning rate to start with; pass at least one, such as [1e-3]")
    if factor is not None and check_positive(factor, "factor") <= 1:
        raise ValueError(f"factor = {factor!r} is out of range; choose one above 1, such as 2")
    if max_further is not None:
        max_further = check_integer(max_further, "max_further", 0)
    if missing := [lr for lr in grid if lr not in losses]:
        return missing
    best = best_lr(losses)
    if max_further is not None and len(losses) >= len(grid) + max_further:
        return []
    if factor is None:
        return _beyond_the_edge(best, sorted(losses)) if math.isfinite(losses[best]) and len(grid) > 1 else []
    neighbours = [best * factor, best / factor]
    return [lr for lr in neighbours if lr not in losses][:1]


def best_lr(losses: dict[float, float]) -> float:
    """The learning rate with the lowest loss.

    Args:
        losses: loss of each learning rate, at least one; inf or NaN where training diverged.

    Returns:
        The first one of equals; the smallest one where all of them diverged.

    Raises:
        ValueError: no losses.

    Example:
        >>> best_lr({0.1: float("nan"), 0.01: 0.4, 0.001: 0.4})
        0.01
    """
    if not losses:
        raise ValueError("losses = {} has no learning rate to choose from; try one first")
    finite = [lr for lr, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=losses.__getitem__) if finite else min(losses)


def _beyond_the_edge(best: float, tried: list[float]) -> list[float]:
    """The next learning rate beyond an edge, by the ratio of the two there; [] when the best one is at no edge."""
    if best == tried[-1]:
        return [best / (tried[-2] / tried[-1])]
    if best == tried[0]:
        return [best / (tried[1] / tried[0])]
    return []

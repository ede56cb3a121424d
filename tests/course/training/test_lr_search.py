"""training/lr_search.py: what is tried next follows from the losses alone; both earlier searches agree."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.course.training.lr_search import best_lr, next_lrs

INF = math.inf


def searched(loss, grid, **options):
    """(the rounds, all losses in the order tried), where loss(lr) is what a training gives."""
    rounds, losses = [], {}
    while lrs := next_lrs(losses, grid, **options):
        rounds.append(lrs)
        losses |= {lr: loss(lr) for lr in lrs}
        assert len(rounds) < 200
    return rounds, losses


# The two searches as they were written before they became one.


def by_list(loss, rates, further=4):
    """All of a list; where the best one is at an end, one beyond it in the list's ratio; at most four."""
    rounds, tried = [], {}

    def wanted():
        ordered_list = sorted(rates)
        if missing := [rate for rate in ordered_list if rate not in tried]:
            return missing
        found, ordered = min(tried, key=tried.get), sorted(tried)
        at_an_end = found in (ordered[0], ordered[-1]) and tried[found] < math.inf
        if len(ordered_list) > 1 and at_an_end and len(tried) < len(ordered_list) + further:
            ratio = ordered[1] / ordered[0] if found == ordered[0] else ordered[-2] / ordered[-1]
            return [found / ratio]
        return []

    while lrs := wanted():
        rounds.append(lrs)
        tried |= {lr: loss(lr) for lr in lrs}
    return rounds, tried


def by_doubling(loss, first):
    """From one rate by factors of two, until both neighbours of the best one are worse: the larger one first."""
    order, tried = [first], {first: loss(first)}
    while True:
        rate = min((value, rate) for rate, value in tried.items())[1]
        missing = [r for r in (2 * rate, rate / 2) if r not in tried]
        if not missing:
            return order, tried
        order.append(missing[0])
        tried[missing[0]] = loss(missing[0])


LOSSES = st.one_of(st.integers(0, 3).map(float), st.floats(0, 10), st.just(INF))  # integers, so that there are equals
GRIDS = st.one_of(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6, unique=True),
    st.builds(
        lambda first, ratio, n: [first * ratio**i for i in range(n)],
        st.floats(1e-5, 1e-2),
        st.sampled_from([1.5, 2.0, 3.0, 10.0]),
        st.integers(1, 5),
    ),
)


@given(GRIDS, st.data(), st.randoms(use_true_random=False))
def test_it_is_the_search_along_a_list(grid, data, random):
    table = {}

    def loss(lr):
        return table.setdefault(lr, data.draw(LOSSES))

    random.shuffle(grid)
    expected, tried = by_list(loss, grid)
    rounds, losses = searched(loss, grid, max_further=4)
    assert rounds == expected and list(losses.items()) == list(tried.items())
    assert best_lr(losses) == min(tried, key=tried.get)


@given(st.lists(LOSSES, min_size=21, max_size=21), st.floats(1e-5, 1e-1))
def test_it_is_the_search_by_factors_of_two(table, first):
    def loss(lr):
        """From the table for ten doublings and ten halvings; beyond them it only gets worse."""
        steps = round(math.log2(lr / first))
        return table[steps + 10] if abs(steps) <= 10 else 100.0 + abs(steps)

    expected, tried = by_doubling(loss, first)
    order, losses = [], {}
    while lrs := next_lrs(dict(sorted(losses.items())), [first], factor=2):
        assert len(lrs) == 1
        order += lrs
        losses[lrs[0]] = loss(lrs[0])
    assert order == expected and losses == tried
    best = best_lr(dict(sorted(losses.items())))
    assert best == min((value, rate) for rate, value in tried.items())[1]
    assert losses[best] <= min(losses[2 * best], losses[best / 2])


@given(st.lists(LOSSES, min_size=21, max_size=21), st.integers(0, 15))
def test_an_interrupted_search_comes_to_the_same_learning_rates(table, at):
    first = 2.0**-8

    def loss(lr):
        steps = round(math.log2(lr / first))
        return table[steps + 10] if abs(steps) <= 10 else 100.0 + abs(steps)

    rounds, losses = searched(loss, [first, 2 * first, 4 * first], max_further=4)
    known = dict(list(losses.items())[:at])
    rest = []
    while lrs := next_lrs(known, [first, 2 * first, 4 * first], max_further=4):
        rest += lrs
        known |= {lr: loss(lr) for lr in lrs}
    assert rest == [lr for lrs in rounds for lr in lrs][at:]


def test_a_search_that_diverges_everywhere_ends_on_a_grid_and_goes_down_with_a_factor():
    rounds, losses = searched(lambda lr: INF, [1e-3, 2e-3])
    assert rounds == [[1e-3, 2e-3]] and best_lr(losses) == 1e-3
    rounds, _ = searched(lambda lr: INF if lr > 0.01 else 1.0 + lr, [0.04], factor=2, max_further=6)
    assert [lr for lrs in rounds for lr in lrs] == [0.04, 0.08, 0.02, 0.01, 0.005, 0.0025, 0.00125]


def test_nan_counts_as_diverged():
    assert best_lr({0.1: math.nan, 0.01: 3.0, 0.001: INF}) == 0.01
    assert next_lrs({0.1: math.nan, 0.01: 3.0}, [0.1, 0.01]) == [0.01 / (0.1 / 0.01)]
    assert next_lrs({0.1: math.nan, 0.01: math.nan}, [0.1, 0.01]) == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"grid": []}, ["grid = []", "at least one"]),
        ({"grid": [0.1, 0.0]}, ["a learning rate of the grid = 0.0", "above 0"]),
        ({"grid": [math.nan]}, ["nan", "above 0"]),
        ({"factor": 1}, ["factor = 1", "above 1"]),
        ({"factor": -2.0}, ["factor = -2.0", "above 0"]),
        ({"max_further": -1}, ["max_further = -1", "at least 0"]),
        ({"max_further": 1.5}, ["max_further", "1.5"]),
    ],
)
def test_impossible_searches_are_refused(arguments, says, refused):
    refused(lambda: next_lrs(**{"losses": {0.1: 1.0}, "grid": [0.1], **arguments}), *says)


def test_there_is_no_best_one_of_none(refused):
    refused(lambda: best_lr({}), "losses = {}", "try one first")

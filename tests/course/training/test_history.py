"""training/history.py: what a run has done, and how it is given to the caller."""

import math

import pytest

from lora_ref.course.training import Diverged, History
from lora_ref.course.training.history import Progress, fault


def test_a_member_of_several_has_its_own_losses_and_evaluations_and_the_times_of_all():
    together = History([[1.0, 2.0], [3.0, 4.0]], [(0, [5.0, 6.0]), (2, [7.0, 8.0])], 9.0, 1, [0.5, 0.25], {"peak": 10})
    assert together.member(1) == History([2.0, 4.0], [(0, 6.0), (2, 8.0)], 9.0, 1, [0.5, 0.25], {"peak": 10})
    assert together.losses == [[1.0, 2.0], [3.0, 4.0]]


def test_progress_gives_the_losses_as_the_loss_function_returned_them():
    progress = Progress()
    assert progress.steps_done == 0 and progress.returned_losses() == [] and not progress.is_evaluated()
    progress.losses = [[0.5], [0.25]]
    assert progress.history().losses == [0.5, 0.25] and progress.steps_done == 2
    progress.scalar_loss = False
    assert progress.history().losses == [[0.5], [0.25]]


def test_progress_knows_what_diverged_what_is_evaluated_and_the_seconds_of_earlier_parts():
    progress = Progress()
    progress.losses = [[0.5, 0.1, 0.2], [0.4, math.nan, 0.1], [math.inf, 0.1, 0.1]]
    assert progress.diverged() == {0, 1}
    progress.evaluations = [(0, None)]
    assert not progress.is_evaluated()
    progress.evaluations.append((3, None))
    assert progress.is_evaluated()
    progress.seconds_before = 100.0
    assert 100.0 < progress.seconds() < 200.0


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([], None),
        ([(0, 1.0), (1, 2.0)], None),
        ([(0, 1.0), (5, math.nan), (6, math.inf)], "the loss is nan at step 5"),
        ([(2, -math.inf)], "the loss is -inf at step 2"),
    ],
)
def test_a_fault_is_the_first_loss_that_is_not_finite(losses, expected):
    assert fault(losses) == expected


def test_diverged_is_a_floating_point_error_with_the_losses():
    error = Diverged("the loss is nan at step 1", [1.0, math.nan])
    assert isinstance(error, FloatingPointError) and str(error) == "the loss is nan at step 1"
    assert error.losses[0] == 1.0 and len(error.losses) == 2

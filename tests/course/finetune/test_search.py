"""course/search.py: what is tried next follows from the losses alone."""

import math

import pytest

from lora_ref.course.finetune.profiles import profile
from lora_ref.course.finetune.search import MAX_FURTHER as FURTHER
from lora_ref.course.finetune.search import Trial, chosen_lr, name_of, next_trials

INF = math.inf
LORA = (4e-3, 1e-3, 2e-3)  # in no order


def settings(**changes):
    base = {"arms": ("r=1", "full", "r=8", "r=5"), "seeds": (3, 5, 4), "lora_lrs": LORA, "full_lrs": (1e-4, 2e-4)}
    return profile("cpu-mini", **base | changes).optimisation


def search(own, loss):
    """(the rounds of groups, all losses), where loss(trial) is what a training gives."""
    rounds, known = [], {}
    while groups := next_trials(own, known):
        rounds.append(groups)
        for group in groups:
            known |= {trial: loss(trial) for trial in group}
        assert len(rounds) < 20
    return rounds, known


def valley(bottoms):
    """A loss with its lowest point at an arm's rate; every seed has it."""
    return lambda trial: abs(math.log(trial.lr / bottoms[trial.arm])) + 0.1 * trial.seed


BOTTOMS = {"full": 1.1e-4, "r=1": 2e-3, "r=8": 2.1e-3, "r=5": 1.9e-3}


@pytest.mark.parametrize("together, sizes", [(1, [1] * 9), (2, [2, 2, 2, 2, 1]), (4, [4, 4, 1]), (9, [9]), (50, [9])])
def test_the_first_round_is_every_arms_every_rate_and_adapters_go_together(together, sizes):
    groups = next_trials(settings(parallel_adapters=together), {})
    lora = [group for group in groups if group[0].arm != "full"]
    assert [len(group) for group in lora] == sizes
    assert [t for group in lora for t in group] == [Trial(a, 3, r) for a in ("r=1", "r=8", "r=5") for r in sorted(LORA)]
    assert [group for group in groups if group[0].arm == "full"] == [[Trial("full", 3, r)] for r in (1e-4, 2e-4)]


def test_rates_in_the_middle_are_enough_and_the_other_seeds_run_alone_at_the_chosen_lr():
    own = settings(parallel_adapters=9)
    rounds, known = search(own, valley(BOTTOMS))
    first, second, third = rounds  # full's best is its smallest: one more
    assert second == [[Trial("full", 3, 1e-4 / 2)]]
    assert third == [
        [Trial(arm, seed, rate)]
        for arm, rate in (("r=1", 2e-3), ("full", 1e-4), ("r=8", 2e-3), ("r=5", 2e-3))
        for seed in (5, 4)
    ]
    assert next_trials(own, known) == [] and chosen_lr(own, "r=8", known) == 2e-3


def test_a_best_rate_at_an_end_asks_for_one_beyond_it_and_those_go_together_again():
    own = settings(parallel_adapters=2, arms=("r=1", "r=8", "r=5"), seeds=(0,))
    rounds, known = search(own, valley({"r=1": 1.7e-2, "r=8": 2e-3, "r=5": 2.4e-4}))
    assert [[len(group) for group in groups] for groups in rounds] == [[2, 2, 2, 2, 1], [2], [2], [2]]
    assert [[t.arm for t in groups[0]] for groups in rounds[1:]] == [["r=1", "r=5"]] * 3
    assert [[t.lr for t in groups[0]] for groups in rounds[1:]] == [
        [pytest.approx(r * 1e-3) for r in rates] for rates in ((8, 0.5), (16, 0.25), (32, 0.125))
    ]
    assert chosen_lr(own, "r=1", known) == pytest.approx(1.6e-2) and chosen_lr(own, "r=5", known) == pytest.approx(
        2.5e-4
    )


def test_it_goes_on_so_far_and_no_further_and_not_from_one_rate():
    own = settings(arms=("r=8",), seeds=(0,))
    rounds, known = search(own, valley({"r=8": 1e9}))
    assert len(rounds) == 1 + FURTHER and len(known) == 3 + FURTHER
    assert len(search(settings(arms=("r=8",), seeds=(0,), lora_lrs=(1e-3,)), valley({"r=8": 1e9}))[0]) == 1


def test_what_diverged_is_never_the_best_and_sends_the_search_downwards():
    own = settings(arms=("r=8",), seeds=(0,))
    rounds, known = search(own, lambda trial: INF if trial.lr > 1e-3 else 7.0 + trial.lr)
    assert [trial.lr for groups in rounds[1:] for group in groups for trial in group] == [
        1e-3 / 2 ** (i + 1) for i in range(FURTHER)
    ]
    assert chosen_lr(own, "r=8", known) == 1e-3 / 2**FURTHER


def test_an_arm_that_diverges_at_every_rate_is_an_error_with_what_to_lower():
    own = settings(parallel_adapters=9)
    with pytest.raises(FloatingPointError, match="r=8 diverged at every rate, 0.001, 0.002, 0.004; lower lora_lrs"):
        search(own, lambda trial: INF if trial.arm == "r=8" else valley(BOTTOMS)(trial))
    with pytest.raises(FloatingPointError, match="full diverged at every rate, 0.0001, 0.0002; lower full_lrs"):
        search(own, lambda trial: INF if trial.arm == "full" else valley(BOTTOMS)(trial))


def test_another_seed_that_diverges_or_is_better_changes_no_choice():
    own = settings(arms=("r=8",), seeds=(3, 5))
    loss = valley({"r=8": 2e-3})
    for odd in (INF, -1.0):
        _, known = search(own, lambda trial: odd if trial.seed == 5 else loss(trial))
        assert chosen_lr(own, "r=8", known) == 2e-3 and next_trials(own, known) == []


def test_of_equals_the_first_one_is_the_chosen_lr():
    own = settings(arms=("r=8",), seeds=(0,))
    _, known = search(own, lambda trial: 1.0)
    assert chosen_lr(own, "r=8", known) == 1e-3


def test_the_name_of_a_training_is_its_own_and_a_groups_depends_on_all_its_members():
    one, two, three = Trial("r=8", 0, 1e-3), Trial("r=1", 0, 1e-3), Trial("r=1", 0, 2e-3)
    assert name_of([one]) == "r8-seed0-0.001" and name_of([Trial("full", 3, 4e-3 / 3)]) == "full-seed3-0.00133"
    groups = [[one, two], [one, three], [two, one], [one, two, three], [one, Trial("r=1", 0, 1e-3 * (1 + 1e-9))]]
    assert len({name_of(group) for group in groups}) == 5 and name_of([one, two]) == name_of([one, two])
    assert all(len(name_of([Trial("r=64", 10, 1.234e-5)] * n)) < 60 for n in (2, 1000))

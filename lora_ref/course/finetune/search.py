"""The search for learning rates over trials: the losses so far → which trials come next.

For each arm (full fine-tuning, or a rank) the learning rate is chosen on validation examples with the first seed; where
the best one is the smallest or the largest of those tried, the search tries one more in that direction. The other seeds
run at the chosen one. See lora_ref.course.training.lr_search for the rule.

Nothing runs here: `next_trials` is a function of the losses alone, so an interrupted search comes to the same rounds.
"""

import hashlib
import math
from typing import NamedTuple

from ..training.lr_search import best_lr, next_lrs
from .config import OptimisationSettings

MAX_FURTHER = 4  # learning rates beyond the list, at most


class Trial(NamedTuple):
    """One training: its arm, its seed, its peak learning rate."""

    arm: str
    seed: int
    lr: float


def name_of(trials: list[Trial]) -> str:
    """The name of a trial's file; of several that train at the same time, of the file that they share."""
    names = [f"{arm.replace('=', '')}-seed{seed}-{lr:.3g}" for arm, seed, lr in trials]
    if len(names) == 1:
        return names[0]
    exact = hashlib.sha256(repr([tuple(trial) for trial in trials]).encode()).hexdigest()
    return f"{names[0]}-and-{len(names) - 1}-more-{exact[:12]}"


def next_trials(optimisation: OptimisationSettings, losses: dict[Trial, float]) -> list[list[Trial]]:
    """The trials to do next, in groups that train at the same time; none when all is done.

    `losses` has the validation loss of each trial so far, in their order, infinity where it diverged. One round is all
    learning rates that are to be tried now: those of full fine-tuning one by one, LoRA's in groups of at most
    parallel_adapters. After the last round come the other seeds, one by one, so that some runs' speed and memory are
    those of one run. Errors: FloatingPointError for an arm that diverged at every learning rate.
    """
    first_seed, *other_seeds = optimisation.seeds
    trials = [Trial(arm, first_seed, lr) for arm in optimisation.arms for lr in _next_lrs(optimisation, arm, losses)]
    if trials:
        size = optimisation.parallel_adapters
        lora = [trial for trial in trials if trial.arm != "full"]
        groups = [lora[i : i + size] for i in range(0, len(lora), size)]
        groups += [[trial] for trial in trials if trial.arm == "full"]
        return sorted(groups, key=lambda group: optimisation.arms.index(group[0].arm))
    others = [
        Trial(arm, seed, chosen_lr(optimisation, arm, losses)) for arm in optimisation.arms for seed in other_seeds
    ]
    return [[trial] for trial in others if trial not in losses]


def chosen_lr(optimisation: OptimisationSettings, arm: str, losses: dict[Trial, float]) -> float:
    """The arm's learning rate with the lowest validation loss on the first seed, the first one of equals."""
    return best_lr(_losses_of(optimisation, arm, losses))


def _losses_of(optimisation: OptimisationSettings, arm: str, losses: dict[Trial, float]) -> dict[float, float]:
    return {trial.lr: loss for trial, loss in losses.items() if trial[:2] == (arm, optimisation.seeds[0])}


def _next_lrs(optimisation: OptimisationSettings, arm: str, losses: dict[Trial, float]) -> list[float]:
    """The arm's learning rates to try now, on the first seed."""
    name = "full_lrs" if arm == "full" else "lora_lrs"
    tried = _losses_of(optimisation, arm, losses)
    found = next_lrs(tried, getattr(optimisation, name), max_further=MAX_FURTHER)
    if not found and min(tried.values()) == math.inf:
        raise FloatingPointError(f"{arm} diverged at every rate, {', '.join(f'{lr:g}' for lr in tried)}; lower {name}")
    return found

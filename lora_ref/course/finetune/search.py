"""The search for learning rates: what is known so far → which trainings come next.

For each arm (full, or a rank) the rate is chosen on validation examples with the first seed; where the best one is the
smallest or the largest of those tried, the list goes on in that direction. The other seeds run at that rate.

Nothing runs here: `following` is a function of the losses alone, so an interrupted search comes to the same rounds.
"""

import hashlib
import math
from typing import NamedTuple

from .config import OptimisationSettings

FURTHER = 4  # rates beyond the list, at most


class Trial(NamedTuple):
    """One training: its arm, its seed, its peak learning rate."""

    arm: str
    seed: int
    rate: float


def name_of(trials: list[Trial]) -> str:
    """The name of a training's file; of several at once, of the file that they share."""
    names = [f"{arm.replace('=', '')}-seed{seed}-{rate:.3g}" for arm, seed, rate in trials]
    if len(names) == 1:
        return names[0]
    exact = hashlib.sha256(repr([tuple(trial) for trial in trials]).encode()).hexdigest()
    return f"{names[0]}-and-{len(names) - 1}-more-{exact[:12]}"


def following(optimisation: OptimisationSettings, known: dict[Trial, float]) -> list[list[Trial]]:
    """The trainings to do next, in groups that train at once; none when all is done.

    `known` has the validation loss of each training so far, in their order, infinity where it diverged. One round is
    all rates that are wanted now: those of full fine-tuning one by one, LoRA's in groups of at most parallel_adapters.
    After the last round come the other seeds, one by one: so there are runs whose speed and memory are one run's.
    Errors: FloatingPointError for an arm that diverged at every rate.
    """
    wanted = [
        Trial(arm, optimisation.seeds[0], rate)
        for arm in optimisation.arms
        for rate in _wanted(optimisation, arm, _tried(optimisation, arm, known))
    ]
    if wanted:
        lora = [trial for trial in wanted if trial.arm != "full"]
        groups = [
            lora[i : i + optimisation.parallel_adapters] for i in range(0, len(lora), optimisation.parallel_adapters)
        ]
        groups += [[trial] for trial in wanted if trial.arm == "full"]
        return sorted(groups, key=lambda group: optimisation.arms.index(group[0].arm))
    others = [
        Trial(arm, seed, best(optimisation, arm, known)) for arm in optimisation.arms for seed in optimisation.seeds[1:]
    ]
    return [[trial] for trial in others if trial not in known]


def best(optimisation: OptimisationSettings, arm: str, known: dict[Trial, float]) -> float:
    """The rate of the arm with the lowest validation loss, the first one of equals."""
    tried = _tried(optimisation, arm, known)
    return min(tried, key=tried.get)


def _tried(optimisation: OptimisationSettings, arm: str, known: dict[Trial, float]) -> dict[float, float]:
    return {trial.rate: loss for trial, loss in known.items() if trial[:2] == (arm, optimisation.seeds[0])}


def _wanted(optimisation: OptimisationSettings, arm: str, tried: dict[float, float]) -> list[float]:
    """The rates of the profile that were not tried; after them, where the best one is at an end, one beyond it."""
    name = "full_lrs" if arm == "full" else "lora_lrs"
    rates = sorted(getattr(optimisation, name))
    if missing := [rate for rate in rates if rate not in tried]:
        return missing
    found, ordered = min(tried, key=tried.get), sorted(tried)
    at_an_end = found in (ordered[0], ordered[-1]) and tried[found] < math.inf
    if len(rates) > 1 and at_an_end and len(tried) < len(rates) + FURTHER:
        ratio = ordered[1] / ordered[0] if found == ordered[0] else ordered[-2] / ordered[-1]
        return [found / ratio]
    if tried[found] == math.inf:
        raise FloatingPointError(f"{arm} diverged at every rate, {', '.join(f'{r:g}' for r in tried)}; lower {name}")
    return []

"""The search for learning rates: what is known so far → which trainings come next.

For each arm (full, or a rank) the rate is chosen on validation examples with the first seed; where the best one is the
smallest or the largest of those tried, the list goes on in that direction. The other seeds run at that rate.

Nothing runs here: `following` is a function of the losses alone, so an interrupted search comes to the same rounds.
"""

import hashlib
import math
from typing import NamedTuple

from .profiles import Profile

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


def following(p: Profile, known: dict[Trial, float]) -> list[list[Trial]]:
    """The trainings to do next, in groups that train at once; none when all is done.

    `known` has the validation loss of each training so far, in their order, infinity where it diverged. One round is
    all rates that are wanted now: those of full fine-tuning one by one, LoRA's in groups of at most p.together. After
    the last round come the other seeds, one by one: so there are runs whose speed and memory are one run's.
    Errors: FloatingPointError for an arm that diverged at every rate.
    """
    wanted = [Trial(arm, p.seeds[0], rate) for arm in p.arms for rate in _wanted(p, arm, _tried(p, arm, known))]
    if wanted:
        lora = [trial for trial in wanted if trial.arm != "full"]
        groups = [lora[i : i + p.together] for i in range(0, len(lora), p.together)]
        groups += [[trial] for trial in wanted if trial.arm == "full"]
        return sorted(groups, key=lambda group: p.arms.index(group[0].arm))
    others = [Trial(arm, seed, best(p, arm, known)) for arm in p.arms for seed in p.seeds[1:]]
    return [[trial] for trial in others if trial not in known]


def best(p: Profile, arm: str, known: dict[Trial, float]) -> float:
    """The rate of the arm with the lowest validation loss, the first one of equals."""
    tried = _tried(p, arm, known)
    return min(tried, key=tried.get)


def _tried(p: Profile, arm: str, known: dict[Trial, float]) -> dict[float, float]:
    return {trial.rate: loss for trial, loss in known.items() if trial[:2] == (arm, p.seeds[0])}


def _wanted(p: Profile, arm: str, tried: dict[float, float]) -> list[float]:
    """The rates of the profile that were not tried; after them, where the best one is at an end, one beyond it."""
    name = "full_rates" if arm == "full" else "lora_rates"
    rates = sorted(getattr(p, name))
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

"""The record of a sweep: `collect` makes it from the runs; `shipped` and `tuned` read the one in the package.

In a record null stands for the infinite loss of a run that diverged.
"""

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from ...environment import processor
from .arms import SEEDS, Arm
from .run_files import best_lr, is_finished, load_runs, null_for_infinity, renamed
from .update_statistics import Updates, mean, measures, overlap

RECORD = Path(__file__).parent / "record.json"


def collect(arms: list[Arm], directory: Path, updates: Callable[[Arm, int, Path], Updates]) -> dict:
    """A record, as `shipped` reads it, of the arms that have finished.

    It has their settings, best learning rates and runs, statistics of their updates, versions and processor.
    `updates(arm, seed, directory)` are those of the arm's run at the best learning rate, from its saved weights.
    """
    experiments, anatomy, tasks = {}, {}, {}
    for arm in arms:
        runs = load_runs(directory, arm)
        if not is_finished(runs):
            continue
        settings = {key: value for key, value in vars(arm).items() if key not in ("experiment", "name")}
        ordered = [null_for_infinity(runs[key]) for key in sorted(runs)]
        settings |= {"best_lr": best_lr(runs), "runs": ordered}
        experiments.setdefault(arm.experiment, {})[arm.name] = settings
        if arm.report:
            by_seed = [updates(arm, seed, directory) for seed in SEEDS]
            anatomy[arm.name] = mean_measures(by_seed)
            if (arm.experiment, arm.name) in (("tasks", "full"), ("tasks", "r = 8")):
                tasks[arm.name] = by_seed
    overlaps = mean_overlaps(tasks["full"], tasks["r = 8"]) if len(tasks) == 2 else {}
    made = {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers")}
    made |= {"device": "CPU, one thread a run", "processor": processor(), "seeds": SEEDS}
    return {"made with": made, "experiments": experiments, "anatomy": anatomy, "overlap": overlaps}


def mean_measures(by_seed: list[Updates]) -> list[dict[str, float]]:
    """For each seed the mean over the matrices of what `update_statistics.measures` finds in an update."""
    return [mean({path: measures(*pair) for path, pair in found.items()}) for found in by_seed]


def mean_overlaps(full: list[Updates], low: list[Updates]) -> dict[str, list[dict[str, float]]]:
    """How similar the updates of two runs are, mean over the matrices, by pair of runs.

    `full`, and `low` of r = 8, have one entry for each seed.
    """

    def of_pair(one: Updates, other: Updates) -> dict[str, float]:
        return mean({path: overlap(one[path][1], other[path][1]) for path in one})

    pairs = [(0, 1), (0, 2), (1, 2)]
    return {
        "full, two seeds": [of_pair(full[i], full[j]) for i, j in pairs],
        "r = 8, two seeds": [of_pair(low[i], low[j]) for i, j in pairs],
        "full and r = 8": [of_pair(full[i], low[i]) for i in SEEDS],
    }


def shipped(part: str = "experiments") -> dict:
    """A part of the record that ships with the course.

    Args:
        part: "experiments": experiment → arm → its settings (`Arm`'s fields), best_lr and runs;
            "anatomy": arm → for each seed the mean over the matrices of `update_statistics.measures`;
            "overlap": pair of runs → for each seed, or two, the mean of `update_statistics.overlap`;
            "made with": versions, processor, seeds.

    Returns:
        The part. A run has its seed, lr, validation and test loss (nats a token; None where it diverged) and, if it
        did not diverge, its curve and its losses.

    Raises:
        FileNotFoundError: the record is not there.
        ValueError: it is damaged.

    Example:
        >>> arm = shipped()["rank"]["r = 8"]
        >>> arm["adapter"]["r"], arm["best_lr"], len(arm["runs"])
        (8, 0.008, 5)
    """
    if not RECORD.exists():
        raise FileNotFoundError(
            f"{RECORD} is not there; python -m lora_ref.course.experiments.sweep --output DIR makes the runs (hours), "
            "and then --output DIR --collect FILE the record"
        )
    try:
        content = json.loads(RECORD.read_text(encoding="utf-8"))[part]
    except ValueError as error:
        raise ValueError(f"{RECORD} is damaged ({error}); take it from the repository again") from None
    if part == "experiments":
        return {
            experiment: {name: _upgraded(arm) for name, arm in arms.items()} for experiment, arms in content.items()
        }
    return content


def _upgraded(arm: dict) -> dict:
    """An arm of a record with today's keys."""
    return renamed(arm) | {"runs": [renamed(run) for run in arm["runs"]]}


def tuned(arm: dict, key: str = "test") -> list:
    """What the arm's runs at its best learning rate measured.

    Args:
        arm: one of `shipped()`.
        key: what to read: "test" or "validation" (losses in nats a token), "bleu", "slot_errors", "seed", …

    Returns:
        One value for each seed.

    Raises:
        LookupError: the runs did not measure it.

    Example:
        >>> runs = [{"seed": 0, "lr": 1e-3, "test": 0.9}, {"seed": 0, "lr": 2e-3, "test": 0.6}]
        >>> runs += [{"seed": 1, "lr": 2e-3, "test": 0.7}]
        >>> tuned({"best_lr": 2e-3, "runs": runs})
        [0.6, 0.7]
    """
    runs = [run for run in arm["runs"] if run["lr"] == arm["best_lr"]]
    if not all(key in run for run in runs):
        raise LookupError(f"the runs did not measure {key!r}; they have {', '.join(map(repr, runs[0]))}")
    return [run[key] for run in runs]

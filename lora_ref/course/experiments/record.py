"""What a sweep leaves behind: DIR/runs, one JSON file a run; DIR/weights; and the record that ships with the course.

`save` and `results` write and read the runs, `collect` puts them into one record, `shipped` and `tuned` read that one.
In a file null stands for the infinite loss of a run that diverged, which JSON has no number for; and so in a record.
"""

import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ..._files import write_json
from ...environment import processor
from .update_statistics import mean, measures, overlap

SEEDS = (0, 1, 2)
TRAIN = 2000  # examples that an arm trains on, if it does not say
RECORD = Path(__file__).parent / "record.json"
Updates = dict[str, tuple[Tensor, Tensor]]  # path → (W0, ΔW)


@dataclass(frozen=True)
class Arm:
    """What is trained, and how: adapter are LoRAConfig's fields (None: every weight); first_rate begins the search."""

    experiment: str
    name: str
    adapter: dict | None
    first_rate: float
    steps: int = 100
    batch: int = 8
    n: int = TRAIN
    domain: str = "restaurants"
    start: str = "prose_llama"  # or "random", or an arm, whose weights of the same seed are where this one begins
    trains: str = ""  # without an adapter: only the parameters whose names match this regular expression
    report: bool = False  # also what it forgets along the way, texts, BLEU and slot errors; and keep the weights


# runs


def stem(arm: Arm) -> str:
    """How the arm's files begin."""
    return f"{arm.experiment}-{arm.name}".replace(" ", "_").replace(",", "").replace("=", "")


def weights(directory: Path, arm: Arm, seed: int, rate: float) -> Path:
    """Where a run keeps its weights."""
    return directory / "weights" / f"{stem(arm)}-{seed}-{rate:.3g}.safetensors"


def save(directory: Path, arm: Arm, run: dict) -> None:
    """Write a run, whole or not at all. Errors: ValueError for NaN, or infinity within a list."""
    write_json(_null(run), directory / "runs" / f"{stem(arm)}-{run['seed']}-{run['rate']:.3g}.json")


def results(directory: Path, arm: Arm) -> dict[tuple[int, float], dict]:
    """What was run of an arm so far: (seed, rate) → the run."""
    files = sorted((directory / "runs").glob(f"{stem(arm)}-[0-9]-*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    runs = [{key: math.inf if value is None else value for key, value in run.items()} for run in runs]
    return {(run["seed"], run["rate"]): run for run in runs}


def best_rate(runs: dict[tuple[int, float], dict]) -> float:
    """The rate with the lowest validation loss on seed 0."""
    return min((run["validation"], rate) for (seed, rate), run in runs.items() if seed == SEEDS[0])[1]


def finished(runs: dict[tuple[int, float], dict]) -> bool:
    """Whether every seed has run at the best rate; `sweep.tune` ends with that."""
    return bool(runs) and all((seed, best_rate(runs)) in runs for seed in SEEDS)


def _null(run: dict) -> dict:
    return {key: None if value == math.inf else value for key, value in run.items()}


# the record


def collect(arms: list[Arm], directory: Path, updates: Callable[[Arm, int, Path], Updates]) -> dict:
    """What `shipped` reads: all finished arms' settings, best rate and runs; their anatomy and overlap; what made them.

    `updates(arm, seed, directory)` are those of the run at the best rate, from the weights that it kept.
    """
    experiments, anatomy, tasks = {}, {}, {}
    for arm in arms:
        runs = results(directory, arm)
        if finished(runs):
            settings = {k: v for k, v in vars(arm).items() if k not in ("experiment", "name")}
            ordered = [_null(runs[key]) for key in sorted(runs)]
            settings |= {"best_rate": best_rate(runs), "runs": ordered}
            experiments.setdefault(arm.experiment, {})[arm.name] = settings
            if arm.report:
                by_seed = [updates(arm, seed, directory) for seed in SEEDS]
                anatomy[arm.name] = anatomies(by_seed)
                if (arm.experiment, arm.name) in (("tasks", "full"), ("tasks", "r = 8")):
                    tasks[arm.name] = by_seed
    made = {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers")}
    made |= {"device": "CPU, one thread a run", "processor": processor(), "seeds": SEEDS}
    compared = overlaps(tasks["full"], tasks["r = 8"]) if len(tasks) == 2 else {}
    return {"made with": made, "experiments": experiments, "anatomy": anatomy, "overlap": compared}


def anatomies(by_seed: list[Updates]) -> list[dict[str, float]]:
    """For each seed the mean over the matrices of what `anatomy.measures` says of an update."""
    return [mean({path: measures(*pair) for path, pair in found.items()}) for found in by_seed]


def overlaps(full: list[Updates], low: list[Updates]) -> dict[str, list[dict[str, float]]]:
    """How like each other the updates of two runs are, mean over the matrices, by pair of runs.

    `full` and `low`, of r = 8, have one entry a seed.
    """

    def pair(one: Updates, other: Updates) -> dict[str, float]:
        return mean({path: overlap(one[path][1], other[path][1]) for path in one})

    pairs = [(0, 1), (0, 2), (1, 2)]
    return {
        "full, two seeds": [pair(full[i], full[j]) for i, j in pairs],
        "r = 8, two seeds": [pair(low[i], low[j]) for i, j in pairs],
        "full and r = 8": [pair(full[i], low[i]) for i in SEEDS],
    }


def shipped(part: str = "experiments") -> dict:
    """A part of the record that ships with the course.

    "experiments": experiment → arm → settings, best_rate, runs; "anatomy" and "overlap": what `anatomies` and
    `overlaps` give; "made with": versions, processor, seeds.
    Errors: FileNotFoundError when the record is not there, ValueError when it is damaged.
    """
    if not RECORD.exists():
        raise FileNotFoundError(
            f"{RECORD} is not there; python -m lora_ref.course.experiments.sweep --output DIR makes the runs (hours), and then "
            "--output DIR --collect FILE the record"
        )
    try:
        return json.loads(RECORD.read_text(encoding="utf-8"))[part]
    except ValueError as error:
        raise ValueError(f"{RECORD} is damaged ({error}); take it from the repository again") from None


def tuned(arm: dict, key: str = "test") -> list:
    """One value for each seed: what the arm's runs at its best rate measured. Errors: LookupError for another key."""
    runs = [run for run in arm["runs"] if run["rate"] == arm["best_rate"]]
    if not all(key in run for run in runs):
        raise LookupError(f"the runs did not measure {key!r}; they have {', '.join(map(repr, runs[0]))}")
    return [run[key] for run in runs]

"""The files of a sweep's runs: DIR/runs, one JSON file for each run, and DIR/weights.

`save_run` and `load_runs` write and read them. In a file null stands for the infinite loss of a run that diverged,
because JSON has no number for it.
"""

import json
import math
from pathlib import Path

from ..._files import write_json
from ..training import lr_search
from .arms import SEEDS, Arm

Runs = dict[tuple[int, float], dict]  # (seed, lr) → what the run measured
RENAMED = {  # keys of earlier files, and of the shipped record, by their names of today
    "rate": "lr",
    "best_rate": "best_lr",
    "first_rate": "initial_lr",
    "batch": "batch_size",
    "n": "train_examples",
    "start": "initial_weights",
    "trains": "trainable_pattern",
}


def renamed(content: dict) -> dict:
    """A run, or an arm's settings, with today's keys."""
    return {RENAMED.get(key, key): value for key, value in content.items()}


def file_stem(arm: Arm) -> str:
    """How the names of the arm's files begin."""
    return f"{arm.experiment}-{arm.name}".replace(" ", "_").replace(",", "").replace("=", "")


def weights_path(directory: Path, arm: Arm, seed: int, lr: float) -> Path:
    """The file of a run's trained weights."""
    return directory / "weights" / f"{file_stem(arm)}-{seed}-{lr:.3g}.safetensors"


def save_run(directory: Path, arm: Arm, run: dict) -> None:
    """Write a run, whole or not at all. Raises ValueError for NaN, or infinity within a list."""
    write_json(null_for_infinity(run), directory / "runs" / f"{file_stem(arm)}-{run['seed']}-{run['lr']:.3g}.json")


def load_runs(directory: Path, arm: Arm) -> Runs:
    """The arm's runs so far, those of earlier versions of the sweep included."""
    files = sorted((directory / "runs").glob(f"{file_stem(arm)}-[0-9]-*.json"))
    runs = [renamed(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    runs = [{key: math.inf if value is None else value for key, value in run.items()} for run in runs]
    return {(run["seed"], run["lr"]): run for run in runs}


def null_for_infinity(run: dict) -> dict:
    return {key: None if value == math.inf else value for key, value in run.items()}


def losses_by_lr(runs: Runs) -> dict[float, float]:
    """The validation loss of each learning rate tried on seed 0, in ascending order."""
    return {lr: run["validation"] for (seed, lr), run in sorted(runs.items()) if seed == SEEDS[0]}


def best_lr(runs: Runs) -> float:
    """The learning rate with the lowest validation loss on seed 0, the smallest one of equals."""
    return lr_search.best_lr(losses_by_lr(runs))


def is_finished(runs: Runs) -> bool:
    """Whether every seed has run at the best learning rate; `sweep.tune` ends with that."""
    return bool(runs) and all((seed, best_lr(runs)) in runs for seed in SEEDS)

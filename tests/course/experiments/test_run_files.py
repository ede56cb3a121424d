"""course/experiments/run_files.py: runs on disk, and which learning rate is the best so far."""

import json
import math
import os
from dataclasses import replace

import pytest

from lora_ref.course.experiments.arms import Arm
from lora_ref.course.experiments.run_files import (
    best_lr,
    file_stem,
    is_finished,
    load_runs,
    save_run,
    weights_path,
)

ARM = Arm("rank", "r = 8", {"r": 8}, 8e-3)
FULL = Arm("tasks", "full", None, 1e-3, report=True)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path


def measured(seed, lr, loss=1.0):
    return {"seed": seed, "lr": lr, "validation": loss, "test": loss + 1}


# runs


def test_files_are_named_after_the_arm_the_seed_and_the_rate(tmp_path):
    arm = replace(ARM, experiment="placement", name="q, k = v")
    assert file_stem(arm) == "placement-q_k__v"
    assert weights_path(tmp_path, arm, 2, 0.00123456) == tmp_path / "weights" / "placement-q_k__v-2-0.00123.safetensors"


def test_runs_come_back_as_they_were_and_of_their_arm_alone(directory):
    longer = replace(ARM, name="r = 8, batch 2")
    found = [measured(0, 8e-3) | {"texts": ["Fitzbillies’ café"], "curve": [{"step": 0}]}, measured(1, 16e-3, math.inf)]
    for run in found:
        save_run(directory, ARM, run)
    save_run(directory, longer, measured(0, 8e-3, 5.0))
    assert load_runs(directory, ARM) == {(0, 8e-3): found[0], (1, 16e-3): found[1]}
    assert load_runs(directory, longer) == {(0, 8e-3): measured(0, 8e-3, 5.0)}
    assert load_runs(directory, FULL) == load_runs(directory / "elsewhere", ARM) == {}


def test_a_run_that_diverged_is_null_in_its_file_and_infinite_when_read(directory):
    save_run(directory, ARM, measured(0, 8e-3, math.inf))
    (file,) = directory.glob("runs/*")
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "seed": 0, "lr": 8e-3, "validation": None, "test": None
    }  # fmt: skip
    assert load_runs(directory, ARM)[0, 8e-3] == measured(0, 8e-3, math.inf)
    file.write_text(json.dumps(measured(0, 8e-3, math.inf)))  # as earlier sweeps wrote it: Infinity
    assert load_runs(directory, ARM)[0, 8e-3] == measured(0, 8e-3, math.inf)


def test_a_crash_while_saving_leaves_no_run(directory, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_run(directory, ARM, measured(0, 8e-3))
    assert load_runs(directory, ARM) == {} and not list(directory.glob("runs/*"))


def test_a_run_with_a_nan_is_refused(directory, refused):
    refused(lambda: save_run(directory, ARM, measured(0, 8e-3, math.nan)), "JSON")
    assert load_runs(directory, ARM) == {}


def test_the_other_seeds_do_not_choose_the_rate():
    runs = {(0, 1e-3): {"validation": 2.0}, (0, 2e-3): {"validation": 1.0}, (1, 1e-3): {"validation": 0.5}}
    assert best_lr(runs) == 2e-3
    assert not is_finished(runs) and not is_finished({})
    assert not is_finished(runs | {(2, 1e-3): {"validation": 0.5}})  # not at the best rate
    assert is_finished(runs | {(seed, 2e-3): {"validation": 9.0} for seed in (1, 2)})


def test_files_of_an_earlier_sweep_are_read_with_todays_keys(directory):
    """Earlier sweeps wrote "rate" for "lr", under the same file names."""
    file = directory / "runs" / "rank-r__8-0-0.008.json"
    file.write_text(json.dumps({"seed": 0, "rate": 8e-3, "trained": 3, "validation": 1.0, "test": 2.0}))
    assert load_runs(directory, ARM) == {(0, 8e-3): {"seed": 0, "lr": 8e-3, "trained": 3, "validation": 1, "test": 2}}
    save_run(directory, ARM, measured(0, 8e-3))
    assert list(directory.glob("runs/*")) == [file] and load_runs(directory, ARM) == {(0, 8e-3): measured(0, 8e-3)}

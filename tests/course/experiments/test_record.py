"""course/sweep_record.py: runs on disk, what is collected of them, and the record that ships."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch

from lora_ref.course.experiments import record as sweep_record
from lora_ref.course.experiments.record import (
    RECORD,
    SEEDS,
    Arm,
    anatomies,
    best_rate,
    collect,
    finished,
    overlaps,
    results,
    save,
    shipped,
    stem,
    tuned,
    weights,
)
from lora_ref.course.experiments.update_statistics import measures, overlap

ARM = Arm("rank", "r = 8", {"r": 8}, 8e-3)
FULL = Arm("tasks", "full", None, 1e-3, report=True)
LOW = Arm("tasks", "r = 8", {"r": 8}, 8e-3, report=True)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path


def measured(seed, rate, loss=1.0):
    return {"seed": seed, "rate": rate, "validation": loss, "test": loss + 1}


def whole(directory, arm, rate=8e-3):
    """A run of each seed at one rate."""
    for seed in SEEDS:
        save(directory, arm, measured(seed, rate))


# runs


def test_files_are_named_after_the_arm_the_seed_and_the_rate(tmp_path):
    arm = replace(ARM, experiment="placement", name="q, k = v")
    assert stem(arm) == "placement-q_k__v"
    assert weights(tmp_path, arm, 2, 0.00123456) == tmp_path / "weights" / "placement-q_k__v-2-0.00123.safetensors"


def test_runs_come_back_as_they_were_and_of_their_arm_alone(directory):
    longer = replace(ARM, name="r = 8, batch 2")
    found = [measured(0, 8e-3) | {"texts": ["Fitzbillies’ café"], "curve": [{"step": 0}]}, measured(1, 16e-3, math.inf)]
    for run in found:
        save(directory, ARM, run)
    save(directory, longer, measured(0, 8e-3, 5.0))
    assert results(directory, ARM) == {(0, 8e-3): found[0], (1, 16e-3): found[1]}
    assert results(directory, longer) == {(0, 8e-3): measured(0, 8e-3, 5.0)}
    assert results(directory, FULL) == results(directory / "elsewhere", ARM) == {}


def test_a_run_that_diverged_is_null_in_its_file_and_infinite_when_read(directory):
    save(directory, ARM, measured(0, 8e-3, math.inf))
    (file,) = directory.glob("runs/*")
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "seed": 0, "rate": 8e-3, "validation": None, "test": None
    }  # fmt: skip
    assert results(directory, ARM)[0, 8e-3] == measured(0, 8e-3, math.inf)
    file.write_text(json.dumps(measured(0, 8e-3, math.inf)))  # as earlier sweeps wrote it: Infinity
    assert results(directory, ARM)[0, 8e-3] == measured(0, 8e-3, math.inf)


def test_a_crash_while_saving_leaves_no_run(directory, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(directory, ARM, measured(0, 8e-3))
    assert results(directory, ARM) == {} and not list(directory.glob("runs/*"))


def test_a_run_with_a_nan_is_refused(directory, refused):
    refused(lambda: save(directory, ARM, measured(0, 8e-3, math.nan)), "JSON")
    assert results(directory, ARM) == {}


def test_the_other_seeds_do_not_choose_the_rate():
    runs = {(0, 1e-3): {"validation": 2.0}, (0, 2e-3): {"validation": 1.0}, (1, 1e-3): {"validation": 0.5}}
    assert best_rate(runs) == 2e-3
    assert not finished(runs) and not finished({})
    assert not finished(runs | {(2, 1e-3): {"validation": 0.5}})  # not at the best rate
    assert finished(runs | {(seed, 2e-3): {"validation": 9.0} for seed in (1, 2)})


# the record


def drawn(arm, seed, directory):
    """Updates of two matrices, the same whenever they are asked for; r = 8's of every seed are full's of seed 0."""
    generator = torch.Generator().manual_seed(seed if arm.name == "full" else 0)
    return {path: tuple(torch.randn(2, d, 20, generator=generator)) for path, d in (("q", 17), ("up", 24))}


def test_collect_takes_finished_arms_alone_with_their_settings_and_runs(directory):
    half, other = replace(ARM, name="r = 1"), replace(ARM, experiment="batch", steps=25, batch=32)
    save(directory, ARM, measured(0, 4e-3, math.inf))
    for arm in (ARM, other):
        whole(directory, arm)
    save(directory, half, measured(0, 8e-3))
    record = collect([ARM, half, other], directory, lambda *_: pytest.fail("no arm keeps its weights"))
    assert {name: list(arms) for name, arms in record["experiments"].items()} == {"rank": ["r = 8"], "batch": ["r = 8"]}
    found = record["experiments"]["rank"]["r = 8"]
    assert found["best_rate"] == 8e-3 and [(run["seed"], run["rate"]) for run in found["runs"]] == [
        (0, 4e-3), (0, 8e-3), (1, 8e-3), (2, 8e-3)
    ]  # fmt: skip
    assert [run["validation"] for run in found["runs"]] == [None, 1, 1, 1] and tuned(found) == [2, 2, 2]
    settings = {k: v for k, v in record["experiments"]["batch"]["r = 8"].items() if k not in ("best_rate", "runs")}
    assert Arm("batch", "r = 8", **settings) == other
    assert record["anatomy"] == record["overlap"] == {}
    assert all(record["made with"].values()) and len(record["made with"]) == 6


def test_arms_that_report_have_an_anatomy_and_two_of_them_an_overlap(directory):
    later = replace(FULL, name="full, then weather")
    for arm in (FULL, later):
        whole(directory, arm)
    found = collect([FULL, LOW, later], directory, drawn)
    assert list(found["anatomy"]) == ["full", "full, then weather"] and found["overlap"] == {}  # half of the pair
    whole(directory, LOW)
    found = collect([FULL, LOW, later], directory, drawn)
    full, low = ([drawn(arm, seed, directory) for seed in SEEDS] for arm in (FULL, LOW))
    assert found["anatomy"]["r = 8"] == anatomies(low) and found["overlap"] == overlaps(full, low)


def test_an_anatomy_is_the_mean_over_matrices_seed_by_seed():
    by_seed = [drawn(FULL, seed, None) for seed in SEEDS]
    for found, updates in zip(anatomies(by_seed), by_seed, strict=True):
        q, up = (measures(*updates[path]) for path in ("q", "up"))
        assert found == pytest.approx({key: (q[key] + up[key]) / 2 for key in q})


def test_overlaps_are_of_the_three_pairs_of_seeds_and_of_both_arms_seed_by_seed():
    full, low = ([drawn(arm, seed, None) for seed in SEEDS] for arm in (FULL, LOW))
    found = overlaps(full, low)

    def means(one, other):
        q, up = (overlap(one[path][1], other[path][1]) for path in ("q", "up"))
        return pytest.approx({key: (q[key] + up[key]) / 2 for key in q})

    assert found["full, two seeds"] == [means(full[i], full[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["r = 8, two seeds"] == [means(low[0], low[0])] * 3
    assert found["full and r = 8"] == [means(full[i], full[0]) for i in SEEDS]
    assert found["full and r = 8"][0] != means(full[1], full[0])


def test_tuned_takes_the_runs_at_the_best_rate_seed_by_seed():
    runs = [{"seed": s, "rate": r, "test": 10 * s + r} for s, r in [(0, 1.0), (0, 2.0), (0, 4.0), (1, 2.0), (2, 2.0)]]
    arm = {"best_rate": 2.0, "runs": runs}
    assert tuned(arm) == tuned(arm, "test") == [2, 12, 22] and tuned(arm, "seed") == [0, 1, 2]
    with pytest.raises(LookupError, match="'bleu'; they have 'seed', 'rate', 'test'"):
        tuned(arm, "bleu")


def test_shipped_reads_the_record_or_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_record, "RECORD", tmp_path / "record.json")
    with pytest.raises(
        FileNotFoundError, match="record.json is not there; python -m lora_ref.course.experiments.sweep --output"
    ):
        shipped()
    (tmp_path / "record.json").write_text('{"experiments": {"rank": {}}, "made with": {"seeds": [0]}}')
    assert shipped() == {"rank": {}} and shipped("made with") == {"seeds": [0]}


@pytest.mark.skipif(not RECORD.exists(), reason="the record is not there")
def test_the_shipped_record_says_what_made_it():
    made = json.loads(RECORD.read_text(encoding="utf-8"), parse_constant=pytest.fail)["made with"]
    assert made == shipped("made with")
    assert made["seeds"] == list(SEEDS) and made["device"] == "CPU, one thread a run"
    assert all(made[key] for key in ("python", "torch", "transformers", "processor"))


@pytest.mark.skipif(not RECORD.exists(), reason="the record is not there")
def test_a_damaged_record_is_said_to_be_one(tmp_path, monkeypatch):
    text, damaged = RECORD.read_text(encoding="utf-8"), tmp_path / "record.json"
    monkeypatch.setattr(sweep_record, "RECORD", damaged)
    for eighth in range(8):
        damaged.write_text(text[: len(text) * eighth // 8], encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged .* take it from the repository again"):
            shipped()

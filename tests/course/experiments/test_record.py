"""course/experiments/record.py: what is collected of the runs, and the record that ships."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lora_ref.course.classifiers import trainable
from lora_ref.course.experiments import record as sweep_record
from lora_ref.course.experiments.arms import SEEDS, TRAIN_EXAMPLES, Arm, find_arm
from lora_ref.course.experiments.record import RECORD, collect, mean_measures, mean_overlaps, shipped, tuned
from lora_ref.course.experiments.run_files import save_run
from lora_ref.course.experiments.update_statistics import measures, overlap

ARM = Arm("rank", "r = 8", {"r": 8}, 8e-3)
FULL = Arm("tasks", "full", None, 1e-3, report=True)
LOW = Arm("tasks", "r = 8", {"r": 8}, 8e-3, report=True)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path


def measured(seed, lr, loss=1.0):
    return {"seed": seed, "lr": lr, "validation": loss, "test": loss + 1}


def finish(directory, arm, lr=8e-3):
    """A run of each seed at one learning rate."""
    for seed in SEEDS:
        save_run(directory, arm, measured(seed, lr))


# the record


def drawn(arm, seed, directory):
    """Updates of two matrices, the same at every call; r = 8's of every seed are full's of seed 0."""
    generator = torch.Generator().manual_seed(seed if arm.name == "full" else 0)
    return {path: tuple(torch.randn(2, d, 20, generator=generator)) for path, d in (("q", 17), ("up", 24))}


def test_collect_takes_finished_arms_alone_with_their_settings_and_runs(directory):
    half, other = replace(ARM, name="r = 1"), replace(ARM, experiment="batch", steps=25, batch_size=32)
    save_run(directory, ARM, measured(0, 4e-3, math.inf))
    for arm in (ARM, other):
        finish(directory, arm)
    save_run(directory, half, measured(0, 8e-3))
    record = collect([ARM, half, other], directory, lambda *_: pytest.fail("no arm saves its weights"))
    assert {name: list(arms) for name, arms in record["experiments"].items()} == {"rank": ["r = 8"], "batch": ["r = 8"]}
    found = record["experiments"]["rank"]["r = 8"]
    assert found["best_lr"] == 8e-3 and [(run["seed"], run["lr"]) for run in found["runs"]] == [
        (0, 4e-3), (0, 8e-3), (1, 8e-3), (2, 8e-3)
    ]  # fmt: skip
    assert [run["validation"] for run in found["runs"]] == [None, 1, 1, 1] and tuned(found) == [2, 2, 2]
    settings = {k: v for k, v in record["experiments"]["batch"]["r = 8"].items() if k not in ("best_lr", "runs")}
    assert Arm("batch", "r = 8", **settings) == other
    assert record["anatomy"] == record["overlap"] == {}
    assert all(record["made with"].values()) and len(record["made with"]) == 6


def test_arms_that_report_have_an_anatomy_and_two_of_them_an_overlap(directory):
    later = replace(FULL, name="full, then weather")
    for arm in (FULL, later):
        finish(directory, arm)
    found = collect([FULL, LOW, later], directory, drawn)
    assert list(found["anatomy"]) == ["full", "full, then weather"] and found["overlap"] == {}  # half of the pair
    finish(directory, LOW)
    found = collect([FULL, LOW, later], directory, drawn)
    full, low = ([drawn(arm, seed, directory) for seed in SEEDS] for arm in (FULL, LOW))
    assert found["anatomy"]["r = 8"] == mean_measures(low) and found["overlap"] == mean_overlaps(full, low)


def test_an_anatomy_is_the_mean_over_matrices_seed_by_seed():
    by_seed = [drawn(FULL, seed, None) for seed in SEEDS]
    for found, updates in zip(mean_measures(by_seed), by_seed, strict=True):
        q, up = (measures(*updates[path]) for path in ("q", "up"))
        assert found == pytest.approx({key: (q[key] + up[key]) / 2 for key in q})


def test_overlaps_are_of_the_three_pairs_of_seeds_and_of_both_arms_seed_by_seed():
    full, low = ([drawn(arm, seed, None) for seed in SEEDS] for arm in (FULL, LOW))
    found = mean_overlaps(full, low)

    def means(one, other):
        q, up = (overlap(one[path][1], other[path][1]) for path in ("q", "up"))
        return pytest.approx({key: (q[key] + up[key]) / 2 for key in q})

    assert found["full, two seeds"] == [means(full[i], full[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["r = 8, two seeds"] == [means(low[0], low[0])] * 3
    assert found["full and r = 8"] == [means(full[i], full[0]) for i in SEEDS]
    assert found["full and r = 8"][0] != means(full[1], full[0])


def test_tuned_takes_the_runs_at_the_best_lr_seed_by_seed():
    runs = [{"seed": s, "lr": r, "test": 10 * s + r} for s, r in [(0, 1.0), (0, 2.0), (0, 4.0), (1, 2.0), (2, 2.0)]]
    arm = {"best_lr": 2.0, "runs": runs}
    assert tuned(arm) == tuned(arm, "test") == [2, 12, 22] and tuned(arm, "seed") == [0, 1, 2]
    with pytest.raises(LookupError, match="'bleu'; they have 'seed', 'lr', 'test'"):
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


def test_a_record_of_an_earlier_sweep_is_read_with_todays_names(tmp_path, monkeypatch):
    """The shipped record was written with the keys that ARM's fields, lr and best_lr had then."""
    monkeypatch.setattr(sweep_record, "RECORD", tmp_path / "record.json")
    settings = {"adapter": {"r": 8}, "first_rate": 8e-3, "steps": 7, "batch": 3, "n": 50, "domain": "weather"}
    settings |= {"start": "random", "trains": "q", "report": False}
    runs = [{"seed": 0, "rate": 4e-3, "validation": None}, {"seed": 0, "rate": 8e-3, "validation": 1.0, "test": 2.0}]
    old = {"rank": {"r = 8": settings | {"best_rate": 8e-3, "runs": runs}}}
    (tmp_path / "record.json").write_text(json.dumps({"experiments": old}))
    found = shipped()["rank"]["r = 8"]
    assert tuned(found) == [2.0] and found.pop("best_lr") == 8e-3
    assert found.pop("runs") == [
        {"seed": 0, "lr": 4e-3, "validation": None},
        {"seed": 0, "lr": 8e-3, "validation": 1.0, "test": 2.0},
    ]
    arm = Arm("rank", "r = 8", {"r": 8}, 8e-3, 7, 3, 50, "weather", "random", "q")
    assert Arm("rank", "r = 8", **found) == arm and set(found) == set(vars(arm)) - {"experiment", "name"}


@pytest.mark.skipif(not RECORD.exists(), reason="the record is not there")
def test_a_damaged_record_is_refused(tmp_path, monkeypatch):
    text, damaged = RECORD.read_text(encoding="utf-8"), tmp_path / "record.json"
    monkeypatch.setattr(sweep_record, "RECORD", damaged)
    for eighth in range(8):
        damaged.write_text(text[: len(text) * eighth // 8], encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged .* take it from the repository again"):
            shipped()


SHIPPED_RECORD = shipped() if RECORD.exists() else {}


@pytest.mark.parametrize("experiment, name", [(e, name) for e, arms in SHIPPED_RECORD.items() for name in arms])
def test_the_shipped_record_is_of_this_table_tuned_and_whole(experiment, name, built):
    found, arm = SHIPPED_RECORD[experiment][name], find_arm(experiment, name)
    settings = {key: value for key, value in found.items() if key not in ("best_lr", "runs")}
    assert Arm(experiment, name, **settings) == arm and set(settings) == set(vars(arm)) - {"experiment", "name"}
    best, runs = found["best_lr"], {(run["seed"], run["lr"]): run for run in found["runs"]}
    assert len(runs) == len(found["runs"]) and tuned(found, "seed") == list(SEEDS)
    losses = {lr: run["validation"] for (seed, lr), run in runs.items() if seed == 0}
    losses = {lr: math.inf if loss is None else loss for lr, loss in losses.items()}
    assert {best / 2, best * 2, arm.initial_lr} <= set(losses)
    assert losses[best] == min(losses.values()) < min(losses[best / 2], losses[best * 2])
    for seed in SEEDS:
        run = runs[seed, best]
        assert run["trained"] == trainable(built[f"{experiment}/{name}"]) <= run["all"]
        assert len(run["losses"]) == arm.steps
        assert (run["curve"][0]["step"], run["curve"][-1]["step"]) == (0, arm.steps)
        assert run["curve"][-1]["validation"] == pytest.approx(run["validation"], abs=1e-5)
        assert all(math.isfinite(value) and value > 0 for value in [*run["losses"], run["validation"], run["test"]])
        assert run["validation"] < run["curve"][0]["validation"]
        if arm.report:
            assert 0 <= run["bleu"] <= 100 and 0 <= run["slot_errors"] and len(run["texts"]) == 8
            assert all(point["prose"] > 0 for point in run["curve"])
        assert ("train" in run["curve"][0]) == (arm.train_examples < TRAIN_EXAMPLES)

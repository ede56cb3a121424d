"""course/experiments/sweep.py: the search for a learning rate, the command line."""

import json
import math
import os
import shutil

import pytest
import torch

from lora_ref.course.experiments import sweep
from lora_ref.course.experiments.arms import ARMS, SEEDS, Arm, lora
from lora_ref.course.experiments.run_files import best_lr, file_stem, is_finished, load_runs, save_run

# the search for a learning rate

ARM = Arm("rank", "r = 8", lora(8), 8e-3)


class Faked:
    """A run whose validation loss is a U over log₂(rate), lowest at `best`; `breaks`: the call that is interrupted."""

    def __init__(self, best, diverges=math.inf, breaks=None):
        self.best, self.diverges, self.breaks, self.calls = best, diverges, breaks, []

    def __call__(self, arm, seed, rate, directory):
        if len(self.calls) == self.breaks:
            self.breaks = None
            raise KeyboardInterrupt
        self.calls.append((seed, rate))
        # the other seeds prefer another rate, and do not count
        loss = abs(math.log2(rate / self.best)) if seed == 0 else abs(math.log2(rate / self.best / 4))
        loss = math.inf if rate >= self.diverges else loss
        return {"seed": seed, "lr": rate, "validation": loss, "test": loss + 1}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    def install(*args, **more):
        faked = Faked(*args, **more)
        monkeypatch.setattr(sweep, "run_arm", faked)
        return faked, tmp_path

    (tmp_path / "runs").mkdir()
    return install


@pytest.mark.parametrize("away", [-5, -2, -1, 0, 1, 3, 6])
def test_tune_finds_the_best_lr_with_both_neighbours_then_runs_the_other_seeds_there(away, fake):
    best = ARM.initial_lr * 2.0**away
    run, directory = fake(best)
    sweep.tune(ARM, directory)
    first = [rate for seed, rate in run.calls if seed == 0]
    low, high = min(away, 0) - (away <= 0), max(away, 0) + 1
    assert first[0] == ARM.initial_lr and len(first) == len(set(first))
    span = {round(math.log2(rate / ARM.initial_lr)) for rate in first}
    assert {away - 1, away, away + 1} <= span <= set(range(low, high + 1)) and len(first) == len(span)
    assert run.calls[len(first) :] == [(1, best), (2, best)]
    runs = load_runs(directory, ARM)
    assert best_lr(runs) == best and is_finished(runs) and set(runs) == set(run.calls)
    assert runs[0, best] == {"seed": 0, "lr": best, "validation": 0, "test": 1}
    before = len(run.calls)
    sweep.tune(ARM, directory)
    assert len(run.calls) == before  # all is there


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_search_resumes_without_repeating_a_run(stop, fake):
    run, directory = fake(ARM.initial_lr * 4, breaks=stop)
    (directory / "runs" / "rank-r__8-0-0.5.part").write_text('{"seed": 0, "ra')  # of a crash while writing
    with pytest.raises(KeyboardInterrupt):
        sweep.tune(ARM, directory)
    assert len(run.calls) == stop == len(load_runs(directory, ARM))
    assert not is_finished(load_runs(directory, ARM))
    sweep.tune(ARM, directory)
    whole, elsewhere = fake(ARM.initial_lr * 4)
    shutil.rmtree(elsewhere / "runs")
    (elsewhere / "runs").mkdir()
    sweep.tune(ARM, elsewhere)
    assert run.calls == whole.calls and len(set(run.calls)) == len(run.calls) == 6


def test_a_run_whose_file_is_incomplete_does_not_count(fake, monkeypatch):
    run, directory = fake(ARM.initial_lr)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        sweep.tune(ARM, directory)
    assert load_runs(directory, ARM) == {}
    sweep.tune(ARM, directory)
    assert run.calls.count((0, ARM.initial_lr)) == 2 and is_finished(load_runs(directory, ARM))


@pytest.mark.parametrize("diverges", [2.0, 1.0, 0.25])
def test_rates_that_diverge_are_worse_than_any_other(diverges, fake):
    run, directory = fake(ARM.initial_lr / 8, diverges=ARM.initial_lr * diverges)
    sweep.tune(ARM, directory)
    runs = load_runs(directory, ARM)
    assert best_lr(runs) == ARM.initial_lr / 8 and is_finished(runs)
    diverged = [found for found in runs.values() if found["lr"] >= ARM.initial_lr * diverges]
    assert diverged and all(found["validation"] == found["test"] == math.inf for found in diverged)


# the record


def test_collect_takes_finished_arms_alone_and_writes_strict_json(fake, tmp_path, monkeypatch):
    done, diverging, half = ARMS[0], ARMS[7], ARMS[1]
    for arm, diverges in ((done, math.inf), (diverging, diverging.initial_lr * 2)):
        run, directory = fake(arm.initial_lr, diverges=diverges)
        sweep.tune(arm, directory)
    for seed in (0, 1):
        save_run(tmp_path, half, {"seed": seed, "lr": 8e-3, "validation": 1.0, "test": 1.0})
    monkeypatch.setattr(sweep, "tune", None)  # nothing is run
    target = tmp_path / "record.json"
    assert sweep.main(["--output", str(tmp_path), "--collect", str(target)]) == 0
    record = json.loads(target.read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    assert {name: list(arms) for name, arms in record["experiments"].items()} == {"rank": ["r = 8", "full"]}
    first, second = record["experiments"]["rank"].values()
    assert first["best_lr"] == done.initial_lr and second["best_lr"] == diverging.initial_lr
    assert [(run["seed"], run["lr"]) for run in first["runs"]] == [
        (0, 4e-3), (0, 8e-3), (0, 16e-3), (1, 8e-3), (2, 8e-3)
    ]  # fmt: skip
    assert [run["validation"] for run in second["runs"] if run["lr"] > diverging.initial_lr] == [None]
    settings = {key: first[key] for key in first if key not in ("best_lr", "runs")}
    assert Arm(done.experiment, done.name, **settings) == done
    assert record["made with"]["seeds"] == [0, 1, 2] and record["made with"]["torch"] == torch.__version__
    assert all(record["made with"].values()) and len(record["made with"]) == 6
    assert not list(tmp_path.glob(".*"))


def test_a_record_that_would_not_be_json_is_not_written_and_the_old_one_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    for seed in SEEDS:
        found = {"seed": seed, "lr": 8e-3, "validation": 1.0, "test": 1.0, "curve": [{"step": 0, "train": math.nan}]}
        (tmp_path / "runs" / f"{file_stem(ARM)}-{seed}-0.008.json").write_text(json.dumps(found))
    (tmp_path / "record.json").write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        sweep.main(["--output", str(tmp_path), "--collect", str(tmp_path / "record.json")])
    assert (tmp_path / "record.json").read_text() == "old"


# the command line


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_the_parts_share_every_arm_once_in_order(n, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "tune", lambda arm, directory: seen.append((arm, directory)))
    for i in range(n):
        before = len(seen)
        assert sweep.main(["--output", str(tmp_path / "new"), "--part", f"{i}/{n}"]) == 0
        order = [ARMS.index(arm) for arm, _ in seen[before:]]
        assert order == sorted(order)
    assert sorted(ARMS.index(arm) for arm, _ in seen) == list(range(len(ARMS)))
    assert {directory for _, directory in seen} == {tmp_path / "new"}
    assert (tmp_path / "new" / "runs").is_dir() and (tmp_path / "new" / "weights").is_dir()


def test_without_a_part_all_arms_run(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "tune", lambda arm, directory: seen.append(arm))
    sweep.main(["--output", str(tmp_path)])
    assert seen == ARMS


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], ["--output"]),
        (["--output", "{new}", "--part", "2/2"], ["--part", "'2/2'", "0 <= i < n"]),
        (["--output", "{new}", "--part", "x"], ["--part", "'x'", "such as 0/2"]),
        (["--output", "{new}", "--part=-1/2"], ["--part", "'-1/2'"]),
        (["--output", "{new}", "--part", "0/0"], ["--part", "'0/0'"]),
        (["--output", "{new}", "--part", "1"], ["--part", "'1'"]),
        (["--output", "{new}", "--part", "0.5/2"], ["--part", "'0.5/2'"]),
        (["--output", "{file}"], ["--output", "file.txt is a file; name a directory"]),
        (["--output", "{file}/below"], ["--output", "file.txt is a file; name a directory"]),
        (["--output", "{new}", "--collect", "{there}"], ["--collect", "name a file"]),
        (["--output", "{new}", "--collect", "{new}/record.json"], ["--collect", "a directory that exists"]),
        (["--output", "{new}", "--collect", "{there}/record.json"], ["--output", "no finished arm"]),
        (["--output", "{there}", "--collect", "{file}"], ["--output", "no finished arm"]),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_and_change_nothing(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "tune", None)
    (tmp_path / "file.txt").write_text("kept")
    names = {"new": tmp_path / "new", "file": tmp_path / "file.txt", "there": tmp_path}
    with pytest.raises(SystemExit) as stop:
        sweep.main([word.format(**names) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in error for part in says), error
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "kept"

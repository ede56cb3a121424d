"""course/workplace.py: a directory belongs to one run, and only the first process writes to it."""

import json

import pytest

from lora_ref.course.finetune.profiles import profile
from lora_ref.course.finetune.run_directory import Workplace


def place(directory, name="cpu-mini", first=True, **changes):
    settings = profile("cpu-mini", **{"steps": 3, "lora_lrs": (1e-3, 2e-3), "device": "cpu"} | changes)
    return Workplace(directory, name, settings.model_dump(mode="json"), first)


def test_a_run_finds_its_own_directory_again_also_with_what_changes_no_result(tmp_path):
    place(tmp_path / "out").begin()
    before = (tmp_path / "out" / "run.json").read_bytes()
    for changes in (
        {},
        {"gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        {"device": "auto", "threads": 2},
        {"parallel_adapters": 3},
    ):
        place(tmp_path / "out", **changes).begin()
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_another_runs_directory_is_refused_and_stays_as_it_is(tmp_path, refused):
    place(tmp_path).begin()
    files = sorted(tmp_path.rglob("*"))
    before = (tmp_path / "run.json").read_bytes()
    refused(lambda: place(tmp_path, steps=4), "of another run", "steps was 3, now 4")
    refused(lambda: place(tmp_path, "gpu-hub"), "profile was 'cpu-mini', now 'gpu-hub'")
    assert sorted(tmp_path.rglob("*")) == files and (tmp_path / "run.json").read_bytes() == before


def test_what_is_no_runs_directory_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("x")
    refused(lambda: place(tmp_path / "file"), "is a file")
    refused(lambda: place(tmp_path), "is not empty and holds no run")
    for content in ("", "[]", json.dumps({"settings": {}}), json.dumps({"settings": [3], "profile": "x"})):
        (tmp_path / "run.json").write_text(content)
        refused(lambda: place(tmp_path), "is no run's description")


def test_nothing_is_written_before_begin_and_nothing_by_the_other_processes(tmp_path, capsys):
    other = place(tmp_path / "out", first=False)
    other.begin()
    other.say("hello")
    other.write("part", {"a": 1})
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""
    first = place(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first.begin()
    first.say("hello")
    assert (tmp_path / "out" / "log.txt").read_text() == "hello\n" and capsys.readouterr().out == "hello\n"


def test_half_a_character_that_a_model_wrote_is_kept(tmp_path, capsys):
    mine, text = place(tmp_path), "caf\ufffd α"  # what transformers makes of half a character's bytes
    mine.begin()
    mine.say(text)
    mine.write("part", {"after": text})
    assert mine.read("part") == {"after": text} and capsys.readouterr().out == f"{text}\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"{text}\n"


def test_an_interruption_says_whether_there_was_a_step_yet(tmp_path):
    early = "interrupted before the first step; nothing is lost, and the same command begins anew"
    mine = place(tmp_path / "out")
    assert mine.interrupted() == early and not (tmp_path / "out").exists()
    mine.begin()
    mine.write("before", {})
    mine.write("before-seed3", {})
    assert mine.interrupted() == early
    later = f"interrupted between two steps; {tmp_path / 'out'} holds what was done, and the same command goes on"
    mine.checkpoint("full-seed0-0.1").write_bytes(b"x")
    assert mine.interrupted() == later
    mine.write("full-seed0-0.1", {})
    assert not list(tmp_path.glob("out/checkpoints/*")) and mine.interrupted() == later


def test_a_part_that_is_done_is_kept_and_its_checkpoint_dropped(tmp_path):
    mine = place(tmp_path)
    mine.begin()
    mine.checkpoint("r8").write_bytes(b"x")
    mine.checkpoint("full").write_bytes(b"x")
    assert mine.read("r8") is None
    mine.write("r8", {"loss": 0.1})
    assert mine.read("r8") == {"loss": 0.1} and not mine.checkpoint("r8").exists() and mine.checkpoint("full").exists()
    place(tmp_path, first=False).drop("full")
    assert mine.checkpoint("full").exists()
    mine.drop("full")
    assert not mine.checkpoint("full").exists()


def test_the_clock_goes_on_after_an_interruption(tmp_path):
    mine = place(tmp_path)
    mine.begin()
    mine.start -= 100
    mine.write("a", {})
    again = place(tmp_path)
    again.begin()
    assert again.seconds() == pytest.approx(100, abs=20)
    again.start -= 200
    again.stamp()
    third = place(tmp_path)
    third.begin()
    assert third.seconds() == pytest.approx(300, abs=40)

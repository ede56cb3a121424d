"""run_directory: a directory belongs to one run, one command at a time, and only the main process writes to it."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_ref.course.finetune.profiles import profile
from lora_ref.course.finetune.run_directory import LOGGER, RunDirectory


def directory_of(path, name="cpu-mini", is_main_process=True, **changes):
    settings = profile("cpu-mini", **{"steps": 3, "lora_lrs": (1e-3, 2e-3), "device": "cpu"} | changes)
    return RunDirectory(path, name, settings.model_dump(mode="json"), is_main_process)


def opened(path, **changes):
    """A run directory that was opened and closed."""
    made = directory_of(path, **changes)
    with made.open():
        pass
    return made


def test_a_run_finds_its_own_directory_again_also_with_what_changes_no_result(tmp_path):
    opened(tmp_path / "out")
    before = (tmp_path / "out" / "run.json").read_bytes()
    for changes in (
        {},
        {"gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        {"device": "auto", "threads": 2},
        {"parallel_adapters": 3},
    ):
        opened(tmp_path / "out", **changes)
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_another_runs_directory_is_refused_and_stays_as_it_is(tmp_path, refused):
    opened(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    before = (tmp_path / "run.json").read_bytes()
    refused(lambda: directory_of(tmp_path, steps=4), "of another run", "steps was 3, now 4")
    refused(lambda: directory_of(tmp_path, "gpu-hub"), "profile was 'cpu-mini', now 'gpu-hub'")
    assert sorted(tmp_path.rglob("*")) == files and (tmp_path / "run.json").read_bytes() == before


def test_what_is_no_runs_directory_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("x")
    refused(lambda: directory_of(tmp_path / "file"), "is a file")
    refused(lambda: directory_of(tmp_path), "is not empty and holds no run")
    for content in ("", "[]", json.dumps({"settings": {}}), json.dumps({"settings": [3], "profile": "x"})):
        (tmp_path / "run.json").write_text(content)
        refused(lambda: directory_of(tmp_path), "is no run's description")


def test_nothing_is_written_before_open_and_nothing_by_the_other_processes(tmp_path, capsys):
    other = directory_of(tmp_path / "out", is_main_process=False)
    with other.open():
        other.log("hello")
        other.write("part", {"a": 1})
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""
    main = directory_of(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with main.open():
        main.log("hello")
    assert (tmp_path / "out" / "log.txt").read_text() == "hello\n" and capsys.readouterr().out == "hello\n"


def test_a_line_is_logged_once_however_often_runs_are_opened_and_other_loggers_stay_as_they_are(tmp_path, capsys):
    root = list(logging.getLogger().handlers)
    for name in ("a", "b"):
        with (main := directory_of(tmp_path / name)).open():
            main.log(name)
    main.log("closed")
    assert capsys.readouterr().out == "a\nb\n" and (tmp_path / "a" / "log.txt").read_text() == "a\n"
    assert logging.getLogger().handlers == root and LOGGER.handlers == [] and LOGGER.propagate


def test_a_line_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError("the reader is gone")

        def flush(self):
            pass

    main = directory_of(tmp_path)
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError, match="the reader is gone"), main.open():
        main.log("hello")
    assert LOGGER.handlers == [] and not (tmp_path / ".lock").exists()


def test_the_lock_is_released_where_its_file_cannot_be_deleted(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuses(path, missing_ok=False):  # as Windows does with a file that is open
        if path.name == ".lock":
            raise PermissionError(f"{path} is in use")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        opened(tmp_path)
    opened(tmp_path)


def test_half_a_character_that_a_model_wrote_is_saved(tmp_path, capsys):
    main, text = directory_of(tmp_path), "caf\ufffd α"  # what transformers makes of half a character's bytes
    with main.open():
        main.log(text)
        main.write("part", {"after": text})
    assert main.read("part") == {"after": text} and capsys.readouterr().out == f"{text}\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"{text}\n"


def test_an_interruption_says_whether_there_was_a_step_yet(tmp_path):
    early = "interrupted before the first step; nothing is lost, and the same command starts again"
    main = directory_of(tmp_path / "out")
    assert main.interruption_message() == early and not (tmp_path / "out").exists()
    with main.open():
        main.write("before", {})
        main.write("before-seed3", {})
        assert main.interruption_message() == early
        later = f"interrupted between two steps; {tmp_path / 'out'} holds what was done, and the same command resumes"
        main.checkpoint("full-seed0-0.1").write_bytes(b"x")
        assert main.interruption_message() == later
        main.write("full-seed0-0.1", {})
        assert not list(tmp_path.glob("out/checkpoints/*")) and main.interruption_message() == later


def test_a_part_that_is_done_is_saved_and_its_checkpoint_deleted(tmp_path):
    main = opened(tmp_path)
    main.checkpoint("r8").write_bytes(b"x")
    main.checkpoint("full").write_bytes(b"x")
    assert main.read("r8") is None
    main.write("r8", {"loss": 0.1})
    assert main.read("r8") == {"loss": 0.1} and not main.checkpoint("r8").exists() and main.checkpoint("full").exists()
    directory_of(tmp_path, is_main_process=False).delete_checkpoint("full")
    assert main.checkpoint("full").exists()
    main.delete_checkpoint("full")
    assert not main.checkpoint("full").exists()


def test_the_clock_continues_after_an_interruption(tmp_path):
    main = opened(tmp_path)
    main.started -= 100
    main.write("a", {})
    again = opened(tmp_path)
    assert again.elapsed_seconds() == pytest.approx(100, abs=20)
    again.started -= 200
    again.save_elapsed()
    assert opened(tmp_path).elapsed_seconds() == pytest.approx(300, abs=40)


HOLD = """
import sys, time
from tests.course.finetune.test_run_directory import directory_of
with directory_of(sys.argv[1]).open():
    print("open", flush=True)
    time.sleep(60)
"""


def test_two_commands_do_not_work_in_one_directory_at_once_and_a_killed_one_gives_it_free(tmp_path, refused):
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "open\n"
        refused(lambda: opened(tmp_path / "out"), "is in use by another run of this command")
    finally:
        other.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        other.wait()
    for _ in range(50):  # the system releases the lock of a process that is gone
        try:
            opened(tmp_path / "out")
            break
        except ValueError:
            time.sleep(0.1)
    else:
        pytest.fail("the lock of a killed process is still held")
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_directory_of_the_former_format_is_this_runs_too_and_its_parts_come_in_todays_names(tmp_path, refused):
    former = {"steps": 3, "lora_rates": [1e-3, 2e-3], "together": 2, "base_hidden": 640, "model": "prose_llama"}
    today = profile("cpu-mini", steps=3, lora_lrs=(1e-3, 2e-3), device="cpu").model_dump(mode="json")
    from lora_ref.course.finetune.settings import RENAMED, flatten

    old_name = {new: old for old, new in RENAMED.items()}
    flat = {old_name.get(name, name): value for name, value in flatten(today).items()} | former
    (tmp_path / "runs").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"profile": "cpu-mini", "settings": flat}))
    run = {"arm": "r=8", "rate": 0.001, "together": 2}
    (tmp_path / "runs" / "r8-seed0-0.001.json").write_text(json.dumps(run))
    found = opened(tmp_path).read("r8-seed0-0.001")
    assert found == {"arm": "r=8", "lr": 0.001, "parallel_adapters": 2}
    refused(lambda: directory_of(tmp_path, steps=4), "steps was 3, now 4")

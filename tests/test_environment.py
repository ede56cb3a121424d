"""course/machine.py: what a record says about where it was made is read, and null where it cannot be."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch

from lora_ref import environment as machine
from lora_ref.course.finetune.records import ENVIRONMENT, _faults

CPU = torch.device("cpu")


def test_a_cpus_environment_is_what_the_schema_asks_for_and_has_nothing_of_a_gpu():
    found = machine.environment(CPU, 2, 1.5)
    assert list(_faults(found, ENVIRONMENT, "")) == []
    assert (found["device"], found["driver"], found["cuda"], found["processes"]) == ("cpu", None, None, 2)
    assert found["libraries"]["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()


def test_the_revision_is_gits_with_a_mark_where_files_differ_and_none_outside(monkeypatch):
    answers = {"ls-files": "../__init__.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(machine, "_said", lambda *command: answers[command[3]])
    assert machine.revision() == "abc"
    answers["status"] = " M loop.py"
    assert machine.revision() == "abc+"
    answers["ls-files"] = ""
    assert machine.revision() is None


def test_commands_that_fail_or_are_not_there_say_nothing():
    assert machine._said("no-such-command-at-all") == "" and machine._said("git", "no-such-verb") == ""
    assert machine._said("git", "--version").startswith("git version")
    assert subprocess.run(["git", "--version"], capture_output=True).returncode == 0


def counter(directory: Path, name: str, microjoules: int, wrap: int = 10_000_000):
    (directory / name).mkdir(exist_ok=True)
    (directory / name / "energy_uj").write_text(f"{microjoules}\n")
    (directory / name / "max_energy_range_uj").write_text(f"{wrap}\n")


def test_energy_adds_the_packages_counters_and_sees_them_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    assert machine.Energy(CPU).joules() is None
    counter(tmp_path, "intel-rapl:0", 9_000_000)
    counter(tmp_path, "intel-rapl:1", 1_000_000)
    counter(tmp_path, "intel-rapl:0:0", 0)  # a part of the first package, which counts it already
    meter = machine.Energy(CPU)
    counter(tmp_path, "intel-rapl:0", 2_000_000)
    counter(tmp_path, "intel-rapl:1", 1_500_000)
    counter(tmp_path, "intel-rapl:0:0", 7_000_000)
    assert meter.joules() == 3.5
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None


def test_a_gpu_without_its_library_gives_no_energy(monkeypatch):
    monkeypatch.setitem(machine.__dict__, "RAPL", None)
    assert machine.Energy.read(SimpleNamespace(type="cuda")) is None

"""environment.py: a description of the machine is read from it, and None where it cannot be."""

import json
import os
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_ref import environment as machine

CPU = torch.device("cpu")


def test_a_cpus_environment_is_what_the_schema_demands_and_has_nothing_of_a_gpu():
    from lora_ref.course.finetune.records.schema import Environment

    found = machine.environment(CPU, 2, 1.5)
    assert Environment.model_validate(found).model_dump() == found
    assert (found["device"], found["driver"], found["cuda"], found["processes"]) == ("cpu", None, None, 2)
    assert torch.__version__.startswith(found["libraries"]["torch"]) and found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("device", [CPU, "cpu"])
def test_an_environment_is_one_json_object_with_what_every_record_needs(device):
    found = machine.environment(device)
    assert " ".join(found) == (
        "device device_name driver cuda processes threads cores cpu_capability load platform python libraries git"
    )
    assert json.loads(json.dumps(found)) == found
    assert (found["cores"], found["processes"], found["load"]) == (os.cpu_count(), 1, None)
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["platform"] == f"{platform.system()} {platform.machine()}"
    assert platform.node() not in found.values() or platform.node() == ""


def test_versions_are_of_what_is_installed():
    found = machine.versions(["torch", "no-such-distribution"])
    # PyPI's wheels for Linux say 2.13.0 where torch itself says 2.13.0+cu130.
    assert list(found) == ["torch"] and torch.__version__.startswith(found["torch"])
    assert set(machine.versions()) <= set(machine.LIBRARIES)


def test_the_revision_is_gits_with_a_mark_where_files_differ_and_none_outside(monkeypatch):
    answers = {"ls-files": "../__init__.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(machine, "_output_of", lambda *command: answers[command[3]])
    assert machine.revision() == "abc"
    answers["status"] = " M loop.py"
    assert machine.revision() == "abc+"
    answers["ls-files"] = ""
    assert machine.revision() is None


def test_a_command_that_fails_or_is_not_installed_gives_an_empty_text():
    assert machine._output_of("no-such-command-at-all") == "" and machine._output_of("git", "no-such-verb") == ""
    assert machine._output_of("git", "--version").startswith("git version")
    assert subprocess.run(["git", "--version"], capture_output=True).returncode == 0


def counter(directory: Path, name: str, microjoules: int, wrap: int = 10_000_000):
    (directory / name).mkdir(exist_ok=True)
    (directory / name / "energy_uj").write_text(f"{microjoules}\n")
    (directory / name / "max_energy_range_uj").write_text(f"{wrap}\n")


def test_energy_adds_the_packages_counters_and_sees_them_start_again(tmp_path, monkeypatch):
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

"""The files that set the project up say the same: pyproject, constraints, environment, README, CI.

Nothing is installed here; the files are read as data.
"""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]

pinned = pytest.mark.skipif(
    os.environ.get("LORA_REF_VERSIONS") == "latest", reason="this run tests the newest versions: its pins are lifted"
)


def lines(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def pins() -> dict[str, Version]:
    """constraints.txt as {canonical name: version}; any line that is no plain `name==version` fails."""
    found = {}
    for line in lines("constraints.txt"):
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"constraints.txt: {line!r} is no portable pin name==version"
            name = canonicalize_name(match[1])
            assert name not in found, f"constraints.txt pins {name} twice"
            found[name] = Version(match[2])
    return found


def conda() -> tuple[dict, list[str]]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    return environment, pip


def readme_test_command() -> str:
    """The one line in the README's fenced blocks that runs pytest on the whole project."""
    fenced, commands = False, []
    for line in lines("README.md"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced and "/python -m pytest" in line:
            commands.append(line)
    assert len(commands) == 1, f"README.md: {len(commands)} test commands in fenced blocks, expected one"
    return commands[0]


@pinned
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_what_the_hub_extra_brings_is_tested():
    extras = PROJECT["optional-dependencies"]
    assert extras["hub"] and set(extras["hub"]) <= set(extras["test"])


@pinned
def test_constraints_do_not_pin_the_project_itself():
    assert not {"lora-ref", "pip"} & pins().keys()


@pinned
def test_environment_and_constraints_hold_the_same_versions():
    environment, pip = conda()
    assert environment["name"] == PROJECT["name"]
    assert pip[0] == "-c constraints.txt" and pip[-1] == "-e .[test]"
    direct = [canonicalize_name(requirement.name) for requirement in REQUIREMENTS]
    assert pip[1:-1] == [f"{name}=={pins()[name]}" for name in direct]


def test_environment_names_a_supported_python_and_nothing_else_from_conda():
    environment, _ = conda()
    python, *others = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    name, version = python.split("=", 1)
    assert name == "python" and others == ["pip"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")


def test_readme_ci_run_and_workflow_hold_the_identical_test_command():
    command = readme_test_command()
    assert lines(".ci/run")[-1] == command
    (job,) = yaml.safe_load("\n".join(lines(".github/workflows/ci.yml")))["jobs"].values()
    assert [step["run"].strip() for step in job["steps"] if "pytest" in step.get("run", "")] == [command]
    assert '-e ".[test]" -c constraints.txt' in command


def test_workflow_covers_the_pins_the_newest_versions_and_the_ends_of_the_python_range():
    (job,) = yaml.safe_load("\n".join(lines(".github/workflows/ci.yml")))["jobs"].values()
    assert job["strategy"]["matrix"] == {"versions": ["pinned", "latest"], "python": ["3.11", "3.14"]}
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in ("3.11", "3.14"))
    assert job["timeout-minutes"] <= 60


def test_licence_is_the_complete_apache_2_0():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0" and text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert [f"   {i}. " in text for i in range(1, 10)] == [True] * 9
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX: How to apply" in text


@pytest.mark.skipif(os.name == "nt", reason=".ci/run is a bash script")
@pytest.mark.parametrize("fails, words", [("-c", "needs python3 to be Python 3.11"), ("-m", "exit 3")])
def test_ci_run_fails_when_python_is_old_or_a_step_of_the_command_fails(tmp_path, fails, words):
    """A python3 stands in whose version check (-c) or whose venv (-m) fails: no step may be passed over."""
    fake, scratch = tmp_path / "bin" / "python3", tmp_path / "scratch"
    fake.parent.mkdir()
    scratch.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1" = "{fails}" ] && exit 3\necho Python 3.0.0\n')
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [ROOT / ".ci" / "run"],
        env=os.environ | {"PATH": path, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == {"-c": 1, "-m": 3}[fails]
    assert words in run.stdout + run.stderr
    assert list(scratch.iterdir()) == [], "the copy stays behind"

"""The files that set the project up say the same: pyproject, constraints, environment, README, CI, lint.

Nothing is installed here; the files are read as data.
"""

import importlib.metadata
import os
import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> list[Requirement]:
    """What `pip install lora_ref[extras]` asks for directly, in the file's order; an extra may name others."""
    found: dict[str, Requirement] = {}

    def visit(lines: list[str], seen: frozenset[str]) -> None:
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            if name != canonicalize_name(PROJECT["name"]):
                assert name not in found or str(found[name]) == str(requirement), f"two requirements of {name}"
                found[name] = requirement
                continue
            assert requirement.extras and not requirement.specifier, f"{requirement}: the project requires itself"
            for extra in sorted(requirement.extras):
                assert extra in EXTRAS, f"{requirement}: there is no extra {extra}"
                assert extra not in seen, f"the extra {extra} contains itself"
                visit(EXTRAS[extra], seen | {extra})

    visit(PROJECT["dependencies"], frozenset())
    for extra in extras:
        visit(EXTRAS[extra], frozenset({extra}))
    return list(found.values())


REQUIREMENTS = requirements("dev")

VERSIONS = os.environ.get("LORA_REF_VERSIONS", "pinned")
pinned = pytest.mark.skipif(VERSIONS == "latest", reason="this run tests the newest versions: its pins are lifted")
oldest = pytest.mark.skipif(VERSIONS != "oldest", reason="this run does not test the oldest versions")


def lines(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


@cache
def pins(path: str = "constraints.txt") -> dict[str, Version]:
    """A file of pins as {canonical name: version}; any line that is no plain `name==version` fails."""
    found = {}
    for line in lines(path):
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"{path}: {line!r} is no portable pin name==version"
            name = canonicalize_name(match[1])
            assert name not in found, f"{path} pins {name} twice"
            found[name] = Version(match[2])
    return found


def conda() -> tuple[dict, list[str]]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    return environment, pip


def jobs() -> dict[str, dict]:
    return yaml.safe_load("\n".join(lines(".github/workflows/ci.yml")))["jobs"]


def commands(job: str) -> list[str]:
    """The steps of a job that run something."""
    return [step["run"].strip() for step in jobs()[job]["steps"] if "run" in step]


def fenced(path: str, part: str) -> str:
    """The one line in a file's fenced blocks that contains this part."""
    inside, found = False, []
    for line in lines(path):
        if line.startswith("```"):
            inside = not inside
        elif inside and part in line:
            found.append(line)
    assert len(found) == 1, f"{path}: {len(found)} commands with {part!r} in fenced blocks, expected one"
    return found[0]


def readme_test_command() -> str:
    """The one line in the README's fenced blocks that runs pytest on the whole project."""
    return fenced("README.md", "/python -m pytest")


def lint_command() -> str:
    (command,) = [line.strip() for line in lines(".ci/run") if "/pre-commit run" in line]
    return command


# What is required


def test_the_core_needs_torch_and_what_torch_needs():
    assert [requirement.name for requirement in requirements()] == ["torch", "safetensors", "filelock"]


def test_the_extras_are_those_that_the_readme_and_the_messages_name():
    assert set(EXTRAS) == {"course", "hub", "gpu", "test", "dev"}
    assert {r.name for r in requirements("course", "hub")} <= {r.name for r in requirements("test")}
    assert {r.name for r in requirements("test")} <= {r.name for r in requirements("dev")}
    named = re.findall(r"\.\[([a-z,]+)\]", "\n".join(lines("README.md") + lines("CONTRIBUTING.md")))
    assert {extra for names in named for extra in names.split(",")} == set(EXTRAS)


def test_extras_that_name_each_other_are_followed(monkeypatch):
    monkeypatch.setattr(f"{__name__}.EXTRAS", {"a": ["x>=1", "lora_ref[b,c]"], "b": ["y>=2"], "c": ["Lora-Ref[b]"]})
    assert [str(r) for r in requirements("a")][-2:] == ["x>=1", "y>=2"]
    monkeypatch.setattr(f"{__name__}.EXTRAS", {"a": ["lora_ref[b]"], "b": ["lora_ref[a]"]})
    with pytest.raises(AssertionError, match="contains itself"):
        requirements("a")
    monkeypatch.setattr(f"{__name__}.EXTRAS", {"a": ["lora_ref[other]"]})
    with pytest.raises(AssertionError, match="no extra other"):
        requirements("a")


@pytest.mark.parametrize("requirement", requirements("dev", "gpu"), ids=lambda requirement: requirement.name)
def test_every_requirement_has_a_lower_bound_and_nothing_else(requirement):
    assert re.fullmatch(r">=[0-9][0-9.]*", str(requirement.specifier)), f"{requirement}: write name>=version"


@pinned
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


@pytest.mark.parametrize("requirement", requirements("test"), ids=lambda requirement: requirement.name)
def test_the_oldest_version_of_every_requirement_is_its_lower_bound(requirement):
    (bound,) = requirement.specifier
    found = pins("constraints-oldest.txt").get(canonicalize_name(requirement.name))
    assert found == Version(bound.version), f"{requirement}, but constraints-oldest.txt pins {found}"


def test_the_oldest_versions_are_of_what_the_tests_require_and_no_more():
    names = [canonicalize_name(requirement.name) for requirement in requirements("test")]
    assert list(pins("constraints-oldest.txt")) == names, "the same names in pyproject.toml's order"


@oldest
def test_a_run_with_the_oldest_versions_has_them():
    for name, version in pins("constraints-oldest.txt").items():
        assert Version(importlib.metadata.version(name)).base_version == version.base_version, name


@pinned
def test_constraints_do_not_pin_the_project_itself():
    assert not {"lora-ref", "pip"} & pins().keys()


@pinned
def test_environment_and_constraints_hold_the_same_versions():
    environment, pip = conda()
    assert environment["name"] == PROJECT["name"]
    assert pip[0] == "-c constraints.txt" and pip[-1] == "-e .[test]"
    direct = [canonicalize_name(requirement.name) for requirement in requirements("test")]
    assert pip[1:-1] == [f"{name}=={pins()[name]}" for name in direct]


def test_environment_names_a_supported_python_and_nothing_else_from_conda():
    environment, _ = conda()
    python, *others = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    name, version = python.split("=", 1)
    assert name == "python" and others == ["pip"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")


# The map


def mapped() -> set[str]:
    """The paths in CONTRIBUTING.md's tree: a name belongs to the last folder above it that is less indented."""
    text = "\n".join(lines("CONTRIBUTING.md"))
    tree = text[text.index("## The map") :].split("```")[1]
    folders: list[tuple[int, str]] = []
    paths = set()
    for line in filter(None, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        for word in line.split():
            if not word.endswith(("/", ".py", ".toml")):
                break  # the words that explain begin here
            paths.add("".join(name for _, name in folders) + word)
            if word.endswith("/"):
                folders.append((indent, word))
    return paths


def test_the_map_names_every_folder_and_module():
    package = ROOT / "lora_ref"
    folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in package.rglob("__init__.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py") if not path.name.startswith("_")}
    assert sorted((folders | modules) - mapped()) == []


def test_the_map_names_nothing_that_is_not_there():
    assert [path for path in sorted(mapped()) if not list(ROOT.glob(path))] == []


# The commands


def test_readme_ci_run_and_workflow_hold_the_identical_test_command():
    command = readme_test_command()
    assert lines(".ci/run")[-1] == command
    assert [run for run in commands("tests") if "pytest" in run] == [command]
    assert '-e ".[test]" -c constraints.txt' in command


def test_readme_installs_what_the_lessons_need():
    assert '-e ".[course]" -c constraints.txt' in fenced("README.md", "jupyter lab")


def test_ci_run_and_workflow_hold_the_identical_lint_command():
    assert commands("lint") == [lint_command()]
    assert "pre-commit run --all-files" in lint_command()
    assert fenced("CONTRIBUTING.md", "pre-commit run") == "pre-commit run --all-files"


def test_the_lint_command_installs_exactly_the_tools_that_the_hooks_run():
    words = shlex.split(lint_command())
    install = words[words.index("install") : words.index("-c")]
    installed = {word for word in install[1:] if not word.startswith("-")}
    (repository,) = yaml.safe_load("\n".join(lines(".pre-commit-config.yaml")))["repos"]
    hooks = repository["hooks"]
    assert repository["repo"] == "local" and all(hook["language"] == "system" for hook in hooks)
    assert installed == {shlex.split(hook["entry"])[0] for hook in hooks} | {"pre-commit"}
    assert installed <= {requirement.name for requirement in requirements("dev")}


def test_contributing_and_workflow_hold_the_identical_command_for_the_oldest_versions():
    assert commands("oldest") == [fenced("CONTRIBUTING.md", "constraints-oldest.txt")]
    assert jobs()["oldest"]["env"]["LORA_REF_VERSIONS"] == "oldest"


def test_workflow_covers_the_pins_the_newest_versions_and_the_ends_of_the_python_range():
    assert set(jobs()) == {"lint", "tests", "oldest"}
    matrix = jobs()["tests"]["strategy"]["matrix"]
    assert matrix == {"versions": ["pinned", "latest"], "python": ["3.11", "3.14"]}
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in matrix["python"])
    assert all(job["timeout-minutes"] <= 60 for job in jobs().values())
    for name in ("lint", "oldest"):
        (python,) = [step["with"]["python-version"] for step in jobs()[name]["steps"] if "with" in step]
        assert python == "3.11", "the oldest Python of the range"


def test_licence_is_the_complete_apache_2_0():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0" and text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert [f"   {i}. " in text for i in range(1, 10)] == [True] * 9
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX: How to apply" in text


@pytest.mark.parametrize("path", ["pyproject.toml", "CITATION.cff", "CHANGELOG.md"])
def test_one_version_and_one_licence(path):
    text = "\n".join(lines(path))
    if path == "CITATION.cff":
        citation = yaml.safe_load(text)
        assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
        assert citation["title"].startswith(PROJECT["name"])
    elif path == "CHANGELOG.md":
        assert re.search(r"^## \[?Unreleased\]?$", text, re.MULTILINE)
    else:
        assert Version(PROJECT["version"])


FAKE_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit {check}
[ "$1" = -m ] || {{ echo Python 3.0.0; exit 0; }}
[ {venv} = 0 ] || exit {venv}
mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && printf '#!/bin/sh\\nexit {lint}\\n' > "$3/bin/pre-commit"
chmod +x "$3/bin/pre-commit" && printf '#!/bin/sh\\ncase "$*" in *pytest*) exit {tests};; esac\\n' > "$3/bin/python"
"""


@pytest.mark.skipif(os.name == "nt", reason=".ci/run is a bash script")
@pytest.mark.parametrize(
    "fails, status, words",
    [
        ({"check": 3}, 1, "needs python3 to be Python 3.11"),
        ({"venv": 3}, 3, "exit 3"),
        ({"lint": 5}, 5, "exit 5"),
        ({"tests": 6}, 6, "exit 6"),
        ({}, 0, "exit 0"),
    ],
    ids=["an old Python", "no venv", "lint", "tests", "nothing"],
)
def test_ci_run_fails_when_python_is_old_or_a_step_of_the_commands_fails(tmp_path, fails, status, words):
    """A python3 stands in that fails at one of its steps: none may be passed over."""
    fake, scratch = tmp_path / "bin" / "python3", tmp_path / "scratch"
    fake.parent.mkdir()
    scratch.mkdir()
    fake.write_text(FAKE_PYTHON.format(**{"check": 0, "venv": 0, "lint": 0, "tests": 0} | fails))
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [ROOT / ".ci" / "run"],
        env=os.environ | {"PATH": path, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert words in run.stdout + run.stderr
    assert list(scratch.iterdir()) == [], "the copy stays behind"

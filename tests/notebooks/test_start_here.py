"""Lesson 00's first cell says what is missing and how to mend it, and needs nothing but Python to say so."""

import ast
import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text(encoding="utf-8"))["cells"]
CHECK = "".join(next(cell for cell in CELLS if cell["cell_type"] == "code")["source"])


def needed():
    assignments = [n for n in ast.walk(ast.parse(CHECK)) if isinstance(n, ast.Assign)]
    return next(ast.literal_eval(n.value) for n in assignments if n.targets[0].id == "needed")


def test_it_needs_nothing_but_python():
    imports = [n for n in ast.walk(ast.parse(CHECK)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_it_asks_for_all_that_the_project_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["course"]
    required = {requirement.split(">")[0] for requirement in requirements} | {project["name"]}
    assert required - {"jupyterlab"} == set(needed())  # this cell may run in another front end


def test_all_is_here(capsys):
    exec(CHECK, {})
    assert "Everything is here." in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["torch", "lora_ref", "scikit-learn"])
def test_a_missing_package_is_named_with_the_command_that_mends_it(monkeypatch, missing):
    real = importlib.metadata.version

    def version(name):
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(AssertionError) as error:
        exec(CHECK, {})
    assert f"{missing} is not installed" in str(error.value)
    assert f'"{sys.executable}" -m pip install -e ".[course]" -c constraints.txt' in str(error.value)


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    with pytest.raises(AssertionError, match="too old: install Python 3.11 or newer"):
        exec(CHECK, {})

"""What `import lora_ref` costs and brings, which way the arrows point, and that everything says what it is."""

import ast
import importlib
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ref

PACKAGE = Path(lora_ref.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
HEAVY = ("matplotlib", "transformers", "sklearn", "peft", "loralib", "accelerate", "sacrebleu", "lora_ref.course")


def in_fresh_python(code):
    """The last line that a new interpreter prints, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_takes_at_most_a_tenth_of_a_second_above_torch():
    code = "import time, torch; start = time.perf_counter(); import lora_ref; print(time.perf_counter() - start)"
    assert statistics.median(in_fresh_python(code) for _ in range(5)) <= 0.1


def test_import_brings_nothing_heavier_than_torch():
    brought = in_fresh_python("import json, sys, lora_ref; print(json.dumps(list(sys.modules)))")
    assert "lora_ref.svd" in brought
    assert [name for name in brought if name.startswith(HEAVY)] == []


def test_every_public_name_is_there_callable_and_described_in_a_fresh_interpreter():
    code = (
        "import json, lora_ref; print(json.dumps({n: [callable(getattr(lora_ref, n)), getattr(lora_ref, n).__doc__]"
        " for n in lora_ref.__all__}))"
    )
    described = in_fresh_python(code)
    assert {"truncated_svd", "randomized_svd", "energy", "RandomSubspace"} <= set(described)
    assert len(lora_ref.__all__) == len(set(lora_ref.__all__))
    for name, (is_callable, doc) in described.items():
        assert is_callable and doc and doc.strip(), name
        assert doc != type.__doc__, name


def public(module_name):
    """The module's own public functions and classes."""
    module = importlib.import_module(module_name)
    return [
        thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module_name
    ]


DOCUMENTED = public("lora_ref.svd") + public("lora_ref.intrinsic_dimension")


@pytest.mark.parametrize("thing", DOCUMENTED, ids=lambda thing: thing.__name__)
def test_every_public_function_and_class_names_its_source_and_its_errors(thing):
    assert "Source: " in thing.__doc__
    family = inspect.getmro(thing) if inspect.isclass(thing) else [thing]
    family = [member for member in family if member.__module__ == thing.__module__]
    assert any(re.search(r"\bErrors[:,]", member.__doc__) for member in family)  # a projection's are its base class's


def test_the_documented_modules_have_the_functions_that_were_meant():
    assert {"truncated_svd", "energy", "randomized_svd_bound"} <= {f.__name__ for f in public("lora_ref.svd")}
    assert {"hadamard_transform", "RandomSubspace"} <= {f.__name__ for f in public("lora_ref.intrinsic_dimension")}


def imported(source):
    """Every module that the source imports, at any depth, with the package's own names spelled out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in ("lora_ref" if node.level else "", node.module or "") if part)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def points_to_the_course(name):
    return name == "lora_ref.course" or name.startswith("lora_ref.course.")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_the_mathematics_does_not_import_the_course(module):
    assert not list(filter(points_to_the_course, imported(module.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line",
    [
        "import lora_ref.course",
        "import lora_ref.course.data as d",
        "from lora_ref import course",
        "from lora_ref.course.data import load_digits",
        "from . import course",
        "from .course import data",
        "def f():\n    from .course.data import load_digits",
    ],
)
def test_an_arrow_the_wrong_way_would_be_seen(line):
    assert any(map(points_to_the_course, imported(line)))
    fine = "from .svd import energy\nimport torch\nfrom torch import course"
    assert not any(map(points_to_the_course, imported(fine)))

"""The house: which room may import which, how long a room may be, and what every public name says of itself.

Nothing of the package is run here but the examples in its docstrings; the rest is read off the source.
"""

import ast
import doctest
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import lora_ref

PACKAGE = Path(lora_ref.__file__).parent
ROOT = PACKAGE.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_MODULE, MAX_FUNCTION = 250, 40  # lines; a function's docstring does not count
ONE_IDEA = re.compile(r"^\s*# One idea: .{20,}", re.MULTILINE)  # the comment that lets a module or function be longer

# A room may import itself and the rooms named here.
ROOMS = {
    "core": set(),
    "cost": {"core"},
    "bench": {"core", "cost"},
    "conformance": {"core", "cost"},
    "course": {"core", "cost", "course.training"},
    "course.training": {"core", "cost"},
    "course.text": {"core", "cost", "course", "course.training"},
    "course.experiments": {"core", "cost", "course", "course.training", "course.text"},
    "course.finetune": {"core", "cost", "course", "course.training", "course.text"},
}


def room(module: str) -> str:
    """The innermost room of a module: lora_ref.course.text.corpus is in "course.text", lora_ref.svd in "core"."""
    parts = module.split(".")[1:]
    for depth in (2, 1):
        if ".".join(parts[:depth]) in ROOMS:
            return ".".join(parts[:depth])
    return "core"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, source: ast.Module | None = None) -> list[tuple[str, str]]:
    """(module, name) of everything that a module imports from this package, at any depth."""
    is_package = MODULES[module].name == "__init__.py" if module in MODULES else False
    found = []
    for node in ast.walk(source or tree(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                found.append((inner, "") if inner in MODULES else (name, alias.name))
    return [(name, what) for name, what in found if name.split(".")[0] == "lora_ref"]


# Which way the imports run


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_from_the_course_to_the_mathematics(module):
    allowed = {room(module)} | ROOMS[room(module)]
    wrong = [name for name, _ in imports(module) if room(name) not in allowed]
    assert not wrong, f"{module} is in {room(module)!r} and must not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    "module, line",
    [
        ("lora_ref.svd", "from .course.digits import load_digits"),
        ("lora_ref.svd", "def f():\n    import lora_ref.course"),
        ("lora_ref.svd", "from . import course"),
        ("lora_ref.cost.tape", "from ..bench import layer"),
        ("lora_ref.course.training.loop", "from ..text.corpus import prose"),
        ("lora_ref.course.text.corpus", "from ..finetune import finetune"),
        ("lora_ref.course.experiments.sweep", "from ..finetune.records import load_record"),
    ],
)
def test_an_import_the_wrong_way_would_be_seen(module, line):
    found = imports(module, ast.parse(line))
    assert any(room(name) not in {room(module)} | ROOMS[room(module)] for name, _ in found)


def test_no_module_imports_itself_through_others():
    at_top = {  # an import inside a function runs later, and closes no cycle
        module: {name for name, _ in imports(module, ast.Module([n for n in tree(module).body], [])) if name != module}
        for module in MODULES
    }

    def visit(module, path):
        assert module not in path, f"a cycle: {' → '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for name in sorted(at_top.get(module, ())):
                visit(name, [*path, module])
            done.add(module)

    done = set()
    for module in MODULES:
        visit(module, [])


# How long a room may be


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_one_idea(module):
    text = MODULES[module].read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MAX_MODULE:
        head = text.split("\nclass ")[0].split("\ndef ")[0]
        assert ONE_IDEA.search(head), f"{module} has {lines} lines; divide it, or say why it is # One idea: …"


def functions(module):
    return [n for n in ast.walk(tree(module)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_one_idea(module):
    source = MODULES[module].read_text(encoding="utf-8").splitlines()
    for node in functions(module):
        own = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            own -= node.body[0].end_lineno - node.body[0].lineno + 1
        if own > MAX_FUNCTION:
            text = "\n".join(source[node.lineno - 1 : node.end_lineno])
            assert ONE_IDEA.search(text), f"{module}.{node.name} has {own} lines beside its docstring; divide it"


# What every public name says of itself


def defined(module):
    """Functions and classes that a module defines at its top, by name."""
    return {n.name: n for n in tree(module).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def lesson_imports():
    """(module, name) of everything that a lesson imports from this package."""
    import nbformat

    found = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        found |= set(imports("lesson", ast.parse("\n".join(code))))
    return found


def public_names():
    """(module, name): the core's names without an underscore, and what a lesson, a package or another room imports.

    A module that begins with an underscore, and a name that does, is its room's own affair.
    """
    found = {
        (module, name)
        for module in MODULES
        if room(module) == "core" and not module.rpartition(".")[2].startswith("_")
        for name in defined(module)
        if not name.startswith("_")
    }
    crossing = {pair for module in MODULES for pair in imports(module) if room(pair[0]) != room(module)}
    passed_on = {
        pair
        for module in ["lora_ref", *(f"lora_ref.{r}" for r in ROOMS)]
        if module in MODULES
        for pair in imports(module)
    }
    for module, name in crossing | passed_on | lesson_imports():
        for _ in range(3):  # a name that a package passes on is described where it is defined
            if name in defined(module) if module in MODULES else False:
                break
            passed = [pair for pair in imports(module) if pair[1] == name] if module in MODULES else []
            module = passed[0][0] if passed else module
        if module in MODULES and name in defined(module) and not module.rpartition(".")[2].startswith("_"):
            found.add((module, name))
    return sorted(found)


PUBLIC = public_names()
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes", "Example", "Source", "Note")
PAPER = re.compile(r"arXiv|et al\.|[A-Z][a-zé]+ & [A-Z]\w+ (?:19|20)\d\d|[A-Z]\w+ (?:19|20)\d\d[a-z]?[,;.)]")


def sections(docstring: str) -> dict[str, str]:
    """A Google-style docstring's sections: title → text; "" is what stands before the first."""
    found, title = {"": []}, ""
    for line in inspect.cleandoc(docstring).splitlines():
        match = re.fullmatch(r"([A-Z]\w+):", line)
        if match and match[1] in SECTIONS:
            title = match[1]
            found[title] = []
        else:
            found[title].append(line)
    return {title: "\n".join(lines).strip("\n") for title, lines in found.items()}


def arguments(node) -> list[str]:
    """What a caller passes to a function or a class: its __init__'s arguments, a dataclass's or tuple's fields."""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            plain = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            return [n.target.id for n in plain if not n.target.id.startswith("_") and "ClassVar" not in ast.unparse(n)]
        node = init
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]
    return [a.arg for a in every if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def refuses(node) -> bool:
    """Whether a function, or a class when it is made, raises or checks by itself."""
    if isinstance(node, ast.ClassDef):
        makers = ("__init__", "__post_init__", "__new__")
        return any(refuses(n) for n in node.body if isinstance(n, ast.FunctionDef) and n.name in makers)
    called = [ast.unparse(n.func).rpartition(".")[2] for n in ast.walk(node) if isinstance(n, ast.Call)]
    return any(isinstance(n, ast.Raise) for n in ast.walk(node)) or any(n.startswith("check_") for n in called)


def returns_something(node) -> bool:
    return not (node.returns is None or ast.unparse(node.returns) in ("None", "NoReturn"))


@pytest.mark.parametrize("module, name", PUBLIC, ids=lambda part: part.removeprefix("lora_ref."))
def test_every_public_name_says_what_it_takes_gives_and_refuses_and_shows_it(module, name):
    node = defined(module)[name]
    docstring = ast.get_docstring(node)
    assert docstring, f"{name} says nothing"
    found = sections(docstring)
    is_error = isinstance(node, ast.ClassDef) and any(
        "Error" in ast.unparse(b) or "LookupError" in ast.unparse(b) for b in node.bases
    )
    taken = [] if is_error else arguments(node)
    described = found.get("Args", "") + "\n" + found.get("Attributes", "")
    missing = [
        a
        for a in taken
        if not re.search(rf"^\s*(?:[\w*, ]+, )?\*{{0,2}}{a}(?:, [\w*, ]+)?(?: \([^)]*\))?:", described, re.MULTILINE)
    ]
    assert not missing, f"{name}: Args lacks {', '.join(missing)}"
    if isinstance(node, ast.FunctionDef) and returns_something(node):
        assert found.get("Returns") or found.get("Yields"), f"{name} has no section Returns"
    if refuses(node):
        assert found.get("Raises"), f"{name} raises or checks, and has no section Raises"
    if not is_error:
        assert ">>>" in found.get("Example", ""), f"{name} has no Example that runs"
    if PAPER.search("\n".join(text for title, text in found.items() if title not in ("Source", "Args", "Note"))):
        assert found.get("Source"), f"{name} leans on a paper, and has no section Source"


WITH_EXAMPLES = sorted({module for module in MODULES if ">>>" in MODULES[module].read_text(encoding="utf-8")})


@pytest.mark.parametrize("module", WITH_EXAMPLES or ["none"])
def test_the_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    assert WITH_EXAMPLES, "no docstring has an example"
    monkeypatch.chdir(tmp_path)  # an example may write files
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(module), optionflags=options)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {module} fail; run python -m doctest"

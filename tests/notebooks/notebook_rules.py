"""What every lesson must be, as rules over the notebook file read as data; nothing is executed here.

`problems(notebook, ledger)` judges one lesson, `ledger_problems(notebooks, ledger)` the lessons
against the ledger. Each message names the notebook, the cell (numbered from 0 over the code cells,
as nbval does) with its first line, the rule by name, and what to do.
"""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import nbformat
from nbformat import NotebookNode

CHECKED = "nbval-check-output"
TAGS = {CHECKED, "raises-exception", "hide-input"}
HEAD = ("**You will be able to**", "**You need**", "**Minutes**", "**Claims settled here**")
FOOT = ("## What did not replicate", "## Three questions an interviewer asks", "## Exercises", "## Sources")
MAX_BYTES, MAX_LINES, MAX_RUN = 2_000_000, 25, {"text": 3, "code": 2}

ROOTS = "home|root|tmp|Users|usr|opt|var|mnt|srv|work|workspace|private"
MACHINE_PATH = re.compile(rf"(?<![\w./])(?:/(?:{ROOTS})/|[A-Za-z]:\\)\S*")
DECIMAL = re.compile(r"(?<![\w.])(?:\d[\d,_]*)?\.\d+")
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}", re.IGNORECASE)
ANSI_COLOUR = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Cell:
    """A code cell and its number, or a text cell with number None, and what can be read off it."""

    number: int | None
    raw: NotebookNode

    def __str__(self) -> str:
        first = (self.raw.source.strip().splitlines() or ["(empty)"])[0]
        return f"{'text' if self.number is None else f'Cell {self.number}'} “{first[:60]}”"

    @property
    def tags(self) -> set[str]:
        return set(self.raw.metadata.get("tags", []))

    @cached_property
    def tree(self) -> ast.Module | None:
        """The cell as Python; None if it is not Python: a magic, a shell command, a slip."""
        try:
            return compile(self.raw.source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except (SyntaxError, ValueError):
            return None

    @property
    def claims(self) -> list[str | None]:
        """The ids in the calls of claim(…), None for an id that is not a literal text."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)] if self.tree else []
        calls = [call for call in calls if "claim" in (getattr(call.func, "id", ""), getattr(call.func, "attr", ""))]
        ids = [getattr(call.args[0], "value", None) if call.args else None for call in calls]
        return [id if isinstance(id, str) else None for id in ids]

    def stream(self, name: str) -> str:
        return "".join(o.text for o in self.raw.outputs if o.output_type == "stream" and o.name == name)

    @property
    def errors(self) -> list[NotebookNode]:
        return [o for o in self.raw.outputs if o.output_type == "error"]

    @property
    def shown(self) -> list[tuple[str, str]]:
        """Everything displayed, as (MIME type, content)."""
        return [(mime, str(content)) for o in self.raw.outputs for mime, content in o.get("data", {}).items()]

    @property
    def words(self) -> str:
        """All text in the outputs, without colours and pictures: streams, displayed text, errors."""
        texts = [self.stream("stdout"), self.stream("stderr")]
        texts += [content for mime, content in self.shown if not mime.startswith("image/")]
        texts += [line for error in self.errors for line in (error.evalue, *error.traceback)]
        return ANSI_COLOUR.sub("", "\n".join(texts))


@dataclass(frozen=True)
class Lesson:
    """A notebook in memory, its name (the file's stem) and its size in bytes."""

    name: str
    raw: NotebookNode
    size: int

    @cached_property
    def cells(self) -> list[Cell]:
        numbers = iter(range(len(self.raw.cells)))
        return [Cell(next(numbers) if cell.cell_type == "code" else None, cell) for cell in self.raw.cells]

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.number is not None]

    @property
    def checked(self) -> list[Cell]:
        return [cell for cell in self.code if CHECKED in cell.tags]

    def markdown(self, cells: list[Cell]) -> str:
        return "\n".join(cell.raw.source for cell in cells if cell.raw.cell_type == "markdown")


RULES: dict[str, tuple[str, Callable]] = {}


def rule(name: str, scope: str):
    """Register check(x, ledger) → None, or what is wrong and the mend; x is the lesson, or each cell of the scope."""
    return lambda check: RULES.setdefault(name, (scope, check))


@rule("notebook format", "lesson")
def _(lesson, ledger):
    try:
        nbformat.validate(lesson.raw)
    except nbformat.ValidationError as error:
        return f"{error.message}; save it again from Jupyter"


@rule("kernel", "lesson")
def _(lesson, ledger):
    kernel = lesson.raw.metadata.get("kernelspec", {}).get("name")
    language = lesson.raw.metadata.get("language_info", {}).get("name")
    if (kernel, language) != ("python3", "python"):
        return f"kernel {kernel!r}, language {language!r}; run it with the kernel python3 and save it"


@rule("file size", "lesson")
def _(lesson, ledger):
    if lesson.size > MAX_BYTES:
        return f"{lesson.size:,} bytes, at most {MAX_BYTES:,}; show fewer or smaller pictures"


@rule("execution order", "lesson")
def _(lesson, ledger):
    for expected, cell in enumerate([cell for cell in lesson.code if cell.raw.source.strip()], start=1):
        if cell.raw.execution_count != expected:
            return f"{cell} has count {cell.raw.execution_count}, not {expected}; restart the kernel and run all"


@rule("rhythm", "lesson")
def _(lesson, ledger):
    for kind, run in groupby(lesson.cells, lambda cell: "text" if cell.number is None else "code"):
        run = list(run)
        if len(run) > MAX_RUN[kind]:
            return f"{len(run)} {kind} cells in a row from {run[0]}, at most {MAX_RUN[kind]}; join some, or alternate"


@rule("head", "lesson")
def _(lesson, ledger):
    first_code = lesson.cells.index(lesson.code[0]) if lesson.code else None
    head = lesson.markdown(lesson.cells[:first_code])
    missing = [label for label in HEAD if label not in head]
    missing += [] if re.search(r"^# \S", head, re.MULTILINE) else ["a title, # …"]
    missing += [] if re.search(r"\*\*Minutes\*\*.*\d", head) else ["a number in the line of **Minutes**"]
    if missing:
        return f"before the first code cell, add {'; '.join(missing)}"


@rule("foot", "lesson")
def _(lesson, ledger):
    headings = re.findall(r"^## .*\S", lesson.markdown(lesson.cells), re.MULTILINE)
    if tuple(headings[-len(FOOT) :]) != FOOT:
        return f"the last sections are {headings[-len(FOOT) :]}; end with {list(FOOT)}, in this order"


@rule("open_lesson", "lesson")
def _(lesson, ledger):
    statements = [ast.unparse(node) for cell in lesson.code if cell.tree for node in cell.tree.body]
    opened = [statement for statement in statements if "open_lesson(" in statement]
    if opened != [f"claim = open_lesson({lesson.name!r})"]:
        return f'opened by {opened or "no cell"}; write, once: claim = open_lesson("{lesson.name}")'


@rule("no claim", "lesson")
def _(lesson, ledger):
    if not any(cell.claims for cell in lesson.checked):
        return f"settles nothing; add claim(…) in a cell tagged {CHECKED}"


@rule("known tags", "all")
def _(cell, ledger):
    if unknown := sorted(cell.tags - TAGS):
        return f"has the tags {unknown}; only {', '.join(sorted(TAGS))} are known"


@rule("NBVAL comment", "code")
def _(cell, ledger):
    if found := re.search(r"^\s*#.*(NBVAL_|PYTEST_VALIDATE_).*", cell.raw.source, re.MULTILINE):
        return f"{found.group().strip()!r} would override the tags; remove it and tag the cell"


@rule("shell or magic", "code")
def _(cell, ledger):
    if cell.tree is None:
        return "is not plain Python; write ! and % lines as Python, or mend the syntax"
    if any(getattr(node, "id", "") == "get_ipython" for node in ast.walk(cell.tree)):
        return "calls get_ipython(), a magic in disguise; use plain Python"


@rule("long cell", "code")
def _(cell, ledger):
    if (lines := len(cell.raw.source.splitlines())) > MAX_LINES:
        return f"{lines} lines, at most {MAX_LINES}; split it, or move a function to lora_ref"


@rule("stderr", "code")
def _(cell, ledger):
    if text := cell.stream("stderr"):
        return f"wrote to stderr {text[:80]!r}; remove its cause"


@rule("error output", "code")
def _(cell, ledger):
    if cell.errors and "raises-exception" not in cell.tags:
        return f"raised {cell.errors[0].ename}; mend it, or tag the cell raises-exception and {CHECKED}"


@rule("raises-exception", "code")
def _(cell, ledger):
    # nbval only *allows* such a cell to raise: that it does, only the comparison of its output sees
    if "raises-exception" in cell.tags and not (cell.errors and CHECKED in cell.tags):
        return f"nothing would notice that it raises no more; store its error and tag it {CHECKED} too"


@rule("machine path", "code")
def _(cell, ledger):
    if path := MACHINE_PATH.search(cell.words):
        return f"shows {path.group()[:60]!r}; show a relative path, or only the file's name"


@rule("SVG", "code")
def _(cell, ledger):
    if any(mime == "image/svg+xml" or "<svg" in content for mime, content in cell.shown):
        return "shows an SVG, which differs from run to run; show a PNG"


@rule("HTML", "checked")
def _(cell, ledger):
    if any(mime == "text/html" for mime, _ in cell.shown):
        return "compares HTML, which differs between library versions; print text, or take the tag off"


@rule("unstable digits", "checked")
def _(cell, ledger):
    words = cell.words
    for fixed in [text for claim in ledger.values() for text in (claim.text, claim.statement, claim.finding)]:
        words = words.replace(fixed, "")
    unstable = [n for n in DECIMAL.findall(words) if len(re.sub(r"\D", "", n).lstrip("0")) > 4]
    if unstable := unstable + ADDRESS.findall(words):
        return f"compares {unstable[0]}, whose last digits another machine prints otherwise; print at most 4 digits"


@rule("unchecked claim", "code")
def _(cell, ledger):
    if cell.claims and CHECKED not in cell.tags:
        return f"claims {cell.claims[0]!r} without the tag; tag the cell {CHECKED}"


@rule("literal id", "code")
def _(cell, ledger):
    if None in cell.claims:
        return 'computes the id of a claim; write it out, claim("id", …)'


@rule("claim line", "code")
def _(cell, ledger):
    for id in cell.claims:
        if id in ledger and f"\n{ledger[id].text}\n" not in f"\n{cell.stream('stdout')}\n":
            return f"its stored output lacks the lines of claim {id!r}; run the notebook again and save it"


def read(notebook: Path | NotebookNode, name: str | None = None) -> Lesson:
    """A lesson from its file, or from a notebook in memory and its name."""
    if isinstance(notebook, Path):
        return Lesson(notebook.stem, nbformat.read(notebook, as_version=4), notebook.stat().st_size)
    return Lesson(name, notebook, len(json.dumps(notebook, indent=1)))


def problems(notebook: Path | NotebookNode, ledger: dict, name: str | None = None) -> list[str]:
    """Every rule that a lesson breaks, in words; a notebook in memory needs its `name`."""
    lesson = read(notebook, name)
    found = []
    for broken, (scope, check) in RULES.items():
        subjects = {"lesson": [lesson], "all": lesson.cells, "code": lesson.code, "checked": lesson.checked}[scope]
        for subject in subjects:
            if what := check(subject, ledger):
                where = f"{lesson.name}, {subject}" if scope != "lesson" else lesson.name
                found.append(f"{where}: {broken} — {what}")
        if broken == "notebook format" and found:
            break
    return found


def ledger_problems(notebooks: dict[str, Path | NotebookNode], ledger: dict) -> list[str]:
    """Where the lessons (stem → notebook) and the ledger disagree, in both directions."""
    found, claimed = [], set()
    for stem, notebook in notebooks.items():
        for cell, id in [(one, id) for one in read(notebook, stem).code for id in one.claims if id]:
            claimed.add((id, stem))
            if id not in ledger:
                found.append(f"{stem}, {cell}: unknown id — {id!r} is not in claims.toml; add it there, or mend the id")
            elif ledger[id].lesson != stem:
                found.append(f"{stem}, {cell}: wrong lesson — the ledger settles {id!r} in {ledger[id].lesson}")
    for id, claim in ledger.items():
        if claim.lesson not in notebooks:
            found.append(f"claims.toml, [{id}]: missing lesson — there is no notebooks/{claim.lesson}.ipynb")
        elif (id, claim.lesson) not in claimed:
            found.append(f"claims.toml, [{id}]: missing claim — {claim.lesson} never calls claim({id!r}, …)")
    return found

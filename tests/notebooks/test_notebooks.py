"""The lessons obey the rules and agree with the ledger; and each rule, and nbval as set up here, bites."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from lora_ref.course.claims import Claim, ledger
from tests.notebooks.notebook_rules import CHECKED, FOOT, HEAD, RULES, ledger_problems, problems

ROOT = Path(__file__).parents[2]
LESSONS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


# The real lessons


@pytest.mark.parametrize("name", LESSONS or ["none"])
def test_lesson_obeys_the_rules(name):
    assert LESSONS, "there is no lesson in notebooks/"
    assert not (found := problems(LESSONS[name], ledger())), "\n".join(found)


def test_lessons_and_ledger_agree():
    assert not (found := ledger_problems(LESSONS, ledger())), "\n".join(found)


# The rules bite: a small good lesson, and one change for each way to break it

NAME = "01_svd_truncation"
CLAIM = Claim("x_is_y", "X is Y.", "false", "X is 1.23456 times Y.", "arithmetic", NAME)
SMALL_LEDGER = {CLAIM.id: CLAIM}
ABSENT = Claim("y_is_z", "Y is Z.", "true", "It is.", "arithmetic", NAME)


def text(source):
    return v4.new_markdown_cell(source)


def stream(words, name="stdout"):
    return v4.new_output("stream", name=name, text=words)


def code(source, *outputs, tags=()):
    outputs = [stream(o) if isinstance(o, str) else o for o in outputs]
    return v4.new_code_cell(source, outputs=outputs, metadata={"tags": list(tags)} if tags else {})


def shows(mime, content):
    return v4.new_output("display_data", data={mime: content})


def lesson(*cells, name=NAME):
    """A lesson with head, opening cell, the given cells and foot, its code cells counted 1, 2, …"""
    opening = f'from lora_ref.course.claims import open_lesson\nclaim = open_lesson("{name}")'
    head, foot = text("\n".join(["# SVD", *(f"{label} 5" for label in HEAD)])), text("\n".join(FOOT))
    notebook = v4.new_notebook(cells=[head, code(opening), text("Now."), *cells, foot])
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return notebook


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
ERROR = v4.new_output("error", ename="ValueError", evalue="no")
HEAD_CELL, OPENING_CELL, TEXT_CELL, CLAIM_CELL, PLAIN_CELL, FOOT_CELL = 0, 1, 2, 3, 5, -1


def good():
    settled = code('claim("x_is_y", True)\nprint(0.1235)', f"{CLAIM.text}\n0.1235\n", tags=[CHECKED])
    plain = code("(4\n% 3)", "1.23456\n", shows("text/html", "<table/>"), tags=["hide-input"])
    notebook = lesson(settled, text("Then."), plain, code(""))
    notebook.cells[PLAIN_CELL + 1].execution_count = None
    return notebook


def change(cell=PLAIN_CELL, **fields):
    """Set fields of one cell."""
    return lambda notebook: notebook.cells[cell].update(nbformat.from_dict(fields))


def tagged(*tags):
    return nbformat.from_dict({"tags": list(tags)})


def insert(*cells):
    return lambda notebook: notebook.cells.__setitem__(slice(4, 4), cells)


def replace_in_head(old, new):
    return lambda notebook: change(HEAD_CELL, source=notebook.cells[0].source.replace(old, new))(notebook)


BAD = [
    ("notebook format", change(outputs=[{"output_type": "stream"}])),
    ("kernel", lambda n: n.metadata.kernelspec.update(name="julia")),
    ("kernel", lambda n: n.metadata.language_info.update(name="R")),
    ("file size", change(outputs=[shows("image/png", "A" * 2_000_000)])),
    ("execution order", change(execution_count=None)),
    ("execution order", lambda n: [n.cells[i].update(execution_count=c) for i, c in ((1, 2), (3, 1))]),
    ("execution order", change(execution_count=7)),
    ("rhythm", insert(text("a"), text("b"), text("c"))),
    ("rhythm", insert(code("1"), code("2"))),
    ("head", change(HEAD_CELL, source="# SVD")),
    ("head", replace_in_head("# SVD", "SVD")),
    ("head", replace_in_head("**You need** 5", "You need 5")),
    ("head", replace_in_head("**Minutes** 5", "**Minutes** some")),
    ("foot", change(FOOT_CELL, source="\n".join(FOOT[:3]))),
    ("foot", change(FOOT_CELL, source="\n".join(FOOT[::-1]))),
    ("foot", change(FOOT_CELL, source="\n".join([*FOOT, "## More"]))),
    ("open_lesson", change(OPENING_CELL, source='claim = open_lesson("02_intrinsic_dimension")')),
    ("open_lesson", change(OPENING_CELL, source="from lora_ref.course.claims import claim")),
    ("open_lesson", change(OPENING_CELL, source=f'settle = open_lesson("{NAME}")')),
    ("no claim", change(CLAIM_CELL, source="print(1)", metadata=tagged())),
    ("known tags", change(metadata=tagged("nbval-skip"))),
    ("known tags", change(CLAIM_CELL, metadata=tagged("NBVAL-CHECK-OUTPUT"))),
    ("known tags", change(TEXT_CELL, metadata=tagged("slide"))),
    ("NBVAL comment", change(source="4\n  # NBVAL_IGNORE_OUTPUT")),
    ("NBVAL comment", change(source="#NBVAL_SKIP\n4")),
    ("shell or magic", change(source="!ls")),
    ("shell or magic", change(source="files = !ls")),
    ("shell or magic", change(source="%matplotlib inline\n4")),
    ("shell or magic", change(source="%%bash\nls")),
    ("shell or magic", change(source="if True:\n    %timeit 4")),
    ("shell or magic", change(source='get_ipython().system("ls")')),
    ("long cell", change(source="4\n" * 26)),
    ("stderr", change(outputs=[stream("UserWarning", "stderr")])),
    ("error output", change(outputs=[ERROR])),
    ("raises-exception", change(metadata=tagged("raises-exception"), outputs=[ERROR])),
    ("raises-exception", change(metadata=tagged("raises-exception", CHECKED))),
    ("machine path", change(outputs=[stream("saved /home/someone/a.png")])),
    ("machine path", change(outputs=[stream(r"saved C:\Users\someone")])),
    ("machine path", change(outputs=[shows("text/plain", "PosixPath('/tmp/a')")])),
    ("machine path", change(outputs=[v4.new_output("error", ename="E", traceback=["\x1b[32m/root/a.py"])])),
    ("SVG", change(outputs=[shows("image/svg+xml", "<svg/>")])),
    ("SVG", change(outputs=[shows("text/html", "<div><svg/></div>")])),
    ("HTML", change(metadata=tagged(CHECKED), outputs=[shows("text/html", "<table/>")])),
    ("unstable digits", change(metadata=tagged(CHECKED), outputs=[stream("loss 0.12345")])),
    ("unstable digits", change(metadata=tagged(CHECKED), outputs=[stream("1.2346e-07")])),
    ("unstable digits", change(metadata=tagged(CHECKED), outputs=[shows("text/plain", "[1,234.5]")])),
    ("unstable digits", change(metadata=tagged(CHECKED), outputs=[stream("<Line2D at 0x7f3a12bc>")])),
    ("unchecked claim", change(CLAIM_CELL, metadata=tagged())),
    ("unchecked claim", change(source="def f():\n    lessons.claim('x_is_y', True)")),
    ("literal id", change(source='claim(f"{4}_is_y", True)')),
    ("literal id", change(source="claim(*pair)")),
    ("claim line", change(CLAIM_CELL, outputs=[])),
    ("claim line", change(CLAIM_CELL, outputs=[stream(CLAIM.text + "!")])),
    ("claim line", change(CLAIM_CELL, outputs=[shows("text/plain", CLAIM.text)])),
]


def test_good_lesson_passes(tmp_path):
    path = tmp_path / f"{NAME}.ipynb"
    nbformat.write(good(), path)
    assert problems(path, SMALL_LEDGER) == problems(good(), SMALL_LEDGER, NAME) == []
    assert ledger_problems({NAME: path}, SMALL_LEDGER) == ledger_problems({NAME: good()}, SMALL_LEDGER) == []


@pytest.mark.parametrize("name, spoil", BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_lesson_is_refused(name, spoil):
    notebook = good()
    spoil(notebook)
    found = [message for message in problems(notebook, SMALL_LEDGER, NAME) if f": {name} — " in message]
    assert len(found) == 1 and found[0].startswith(NAME)


def test_every_rule_is_tried():
    assert {name for name, _ in BAD} == set(RULES)


def test_message_names_notebook_cell_rule_and_mend():
    notebook = good()
    change(CLAIM_CELL, metadata=tagged())(notebook)
    assert (
        f"{NAME}, Cell 1 “claim(\"x_is_y\", True)”: unchecked claim — claims 'x_is_y' without the tag; "
        f"tag the cell {CHECKED}"
    ) in problems(notebook, SMALL_LEDGER, NAME)


@pytest.mark.parametrize(
    "notebooks, claims, message",
    [
        ([NAME], {**SMALL_LEDGER, ABSENT.id: ABSENT}, "[y_is_z]: missing claim"),
        ([NAME], {}, 'Cell 1 “claim("x_is_y", True)”: unknown id'),
        ([NAME, "03_lora_layer"], SMALL_LEDGER, '03_lora_layer, Cell 1 “claim("x_is_y", True)”: wrong lesson'),
        ([], SMALL_LEDGER, "[x_is_y]: missing lesson"),
    ],
)
def test_lessons_against_ledger(notebooks, claims, message):
    (found,) = ledger_problems({name: good() for name in notebooks}, claims)
    assert message in found


# nbval, run with the options of pyproject.toml, bites: {file: {cell: (outcome, words of the failure)}}

REAL = next(iter(ledger().values()))
SETTLE = f'claim("{REAL.id}", True)'
DIVISION = v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero")
GOOD_CELLS = [  # the last one's output differs, but is not checked
    code(SETTLE, REAL.text + "\n", tags=[CHECKED]),
    code(f"import sys\nassert sys.prefix == {sys.prefix!r}"),
    code("1 / 0", DIVISION, tags=[CHECKED, "raises-exception"]),
    code("print(2)", "1\n"),
]
BAD_CELLS = {
    "failing assertion": code("assert 1 + 1 == 3, 'sums differ'"),
    "differing checked output": code("print(2)", "1\n", tags=[CHECKED]),
    "false claim": code(f'claim("{REAL.id}", False, error=0.5)', REAL.text + "\n", tags=[CHECKED]),
    "unknown claim": code('claim("no_such_claim", True)'),
    "new stderr": code(f"{SETTLE}\nimport sys; print('w', file=sys.stderr)", REAL.text + "\n", tags=[CHECKED]),
    "raises no more": code("1 / 1", DIVISION, tags=[CHECKED, "raises-exception"]),
}


def run_nbval(folder, notebooks, *options):
    """Run pytest on notebooks with this project's options; return its exit code and every cell's outcome."""
    for name, notebook in notebooks.items():
        notebook.metadata.kernelspec = {**KERNEL, "name": "no_such_kernel"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = ["-m", "pytest", f"-c={ROOT / 'pyproject.toml'}", f"--rootdir={folder}", "--junitxml=report.xml", "."]
    run = subprocess.run([sys.executable, *command, *options], cwd=folder, env=environment, capture_output=True)
    outcomes = {name: {} for name in notebooks}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        result = ("passed", "") if outcome is None else (outcome.tag, outcome.text or "")
        outcomes[case.get("classname").split(".")[0]][case.get("name")] = result
    return run.returncode, outcomes


@pytest.fixture(scope="module")
def nbval(tmp_path_factory):
    cells = {"good": GOOD_CELLS, "bad": BAD_CELLS.values()}
    notebooks = {name: lesson(*cells[name], name=REAL.lesson) for name in cells}
    return run_nbval(tmp_path_factory.mktemp("nbval"), notebooks)


def test_nbval_passes_a_good_lesson(nbval):
    assert nbval[1]["good"] == {f"Cell {i}": ("passed", "") for i in range(5)}


@pytest.mark.parametrize(
    "kind, words",
    [
        ("failing assertion", "sums differ"),
        ("differing checked output", "Cell outputs differ"),
        ("false claim", REAL.statement),
        ("false claim", "error = 0.5"),
        ("unknown claim", "no claim 'no_such_claim' in the ledger"),
        ("new stderr", "Unexpected output fields from running code: {'stderr'}"),
        ("raises no more", "Missing output fields"),
    ],
)
def test_nbval_fails_a_bad_cell(nbval, kind, words):
    number = 1 + list(BAD_CELLS).index(kind)
    outcome, message = nbval[1]["bad"][f"Cell {number}"]
    assert nbval[0] == 1 and outcome == "failure" and f"Cell {number}" in message and words in message


def test_nbval_stops_a_slow_cell(tmp_path):
    slow = v4.new_notebook(cells=[code("import time"), code("time.sleep(60)"), code("time")])
    exit_code, outcomes = run_nbval(tmp_path, {"slow": slow}, "--nbval-cell-timeout=2")
    assert exit_code == 1 and outcomes["slow"]["Cell 0"] == ("passed", "")
    assert "Timeout of 2 seconds exceeded executing cell" in outcomes["slow"]["Cell 1"][1]

"""lora_ref.bench.report: lines as rows come, tables, what was left out, and the picture."""

import io

import pytest
import torch
from PIL import Image

from lora_ref.bench import report
from lora_ref.bench.benchmarks import Benchmark
from lora_ref.bench.report import RowPrinter, cell, fewer_rounds_line, left_out_lines, picture, table
from lora_ref.bench.schedule import Job, LeftOut

RATIO = {"q1": 0.5, "median": 0.75, "q3": 1.0}


def measure(case, rounds, device):
    """What is measured.

    ratio = a / b
    """


BENCHMARK = Benchmark(measure, lambda rows: f"{len(rows)} rows", lambda case, rounds: 1.0, [], xlabel="numbers")


def job(name="one"):
    return Job(name, BENCHMARK, 0, "case")


def row(a_ms=1.5, ratio=RATIO, size=10):
    return {"shape": "2×3", "a_ms": a_ms, "ratio": ratio, "size": size, "seconds": {"a": [0.001, 0.002, 0.004]}}


@pytest.mark.parametrize(
    "value, text",
    [
        (RATIO, "0.750 [0.500, 1.000]"),
        (None, "—"),
        ("", "—"),
        ("bfloat16", "bfloat16"),
        (1234567, "1,234,567"),
        (1234.56, "1,234.6"),
        (0.12345, "0.1235"),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


def test_each_row_is_a_line_at_once_in_equal_columns():
    lines = []
    printer = RowPrinter(write=lambda text, flush: lines.append((text, flush)))
    printer(job(), row())
    assert len(lines) == 3 and all(flush for _, flush in lines)
    assert lines[0][0] == "\none" and lines[1][0].split() == ["shape", "a", "ms", "ratio", "[quartiles]"]
    printer(job(), row(a_ms=2345.6, ratio=None))
    assert len(lines) == 4
    assert {len(text) for text, _ in lines[1:]} == {len(lines[1][0])}
    assert "2,345.6" in lines[3][0] and "—" in lines[3][0]


def test_the_titles_come_again_after_another_benchmark():
    lines = []
    printer = RowPrinter(write=lambda text, flush: lines.append(text))
    for name in ("one", "two", "one", "one"):
        printer(job(name), row())
    assert [line.strip() for line in lines if line.startswith("\n")] == ["one", "two", "one"]
    assert sum("ratio [quartiles]" in line for line in lines) == 3 and len(lines) == 10


def test_a_table_has_caption_columns_and_summary():
    text = table("one", BENCHMARK, [row(), row(a_ms=200.0, ratio=None)])
    assert text.startswith("one: What is measured.\n\nratio = a / b") and text.endswith("\n2 rows.")
    titles, first, second = text.splitlines()[-4:-1]
    assert len(titles) == len(first) == len(second) and titles.split() == ["shape", "a", "ms", "ratio", "[quartiles]"]
    assert first.split() == ["2×3", "1.5000", "0.750", "[0.500,", "1.000]"] and second.split() == ["2×3", "200.0", "—"]
    assert "size" not in text and "seconds" not in text
    assert table("one", BENCHMARK, []) == "one: no case was measured."


def test_lines_of_what_the_budget_left_out_name_the_command():
    left_out = [LeftOut(job("one"), "budget"), LeftOut(job("two"), "budget"), LeftOut(job("one"), "budget")]
    assert left_out_lines(left_out, 300.0, {}, ["--rounds", "5"]) == [
        "Left out: 2 of one, 1 of two; the budget of 300 s did not allow for them. All cases:",
        "    python -m lora_ref.bench one two --rounds 5 --budget 0",
    ]
    assert left_out_lines(left_out, 300.0, {}, ["--full"])[1] == "    python -m lora_ref.bench one two --full"


def test_lines_of_an_interrupted_run_and_of_emulated_cases():
    left_out = [LeftOut(job("one"), "emulated"), LeftOut(job("two"), "interrupted")]
    assert left_out_lines(left_out, None, {torch.bfloat16: "no such products"}, []) == [
        "Incomplete: interrupted before 1 of two could be measured. All cases:",
        "    python -m lora_ref.bench two --budget 0",
        "Left out: 1 of one; their products are emulated here (bfloat16: no such products). With them:",
        "    python -m lora_ref.bench one --emulated",
    ]
    assert left_out_lines([], 300.0, {}, []) == []


def test_fewer_rounds_are_counted():
    rows = {"one": [{"rounds": 3}, {"rounds": 7}, {"rounds": 4}], "two": [{"rounds": 7}, {}], "three": []}
    assert fewer_rounds_line(rows, 7) == "Fewer than 7 rounds, to stay within the budget: 2 of one (column rounds)."
    assert fewer_rounds_line(rows, 3) == ""


def test_the_machine_in_one_line():
    found = report.machine(torch.device("cpu"), rounds=5)
    line = report.machine_line(found)
    assert "\n" not in line and "5 rounds" in line and f"torch {torch.__version__}" in line
    assert f"{torch.get_num_threads()} of {found['cores']} cores" in line and line.endswith("+00:00")
    assert "load" not in report.machine_line(found | {"load": None})
    assert "load 1.3" in report.machine_line(found | {"load": 1.26})


def test_the_picture_has_a_panel_for_each_benchmark_with_rows():
    rows = [row(), row(size=100), row(size=1000) | {"seconds": {}}]  # the last one was not timed

    def width(results):
        with Image.open(io.BytesIO(picture({"one": BENCHMARK, "two": BENCHMARK}, results))) as image:
            image.load()
            assert image.format == "PNG"
            return image.width

    assert width({"one": rows, "two": rows}) == 2 * width({"one": rows, "two": []})


def test_a_benchmark_may_draw_its_own_panel():
    drawn = []
    own = BENCHMARK._replace(draw=lambda axes, rows: drawn.append(rows), xlabel="")
    assert picture({"one": own}, {"one": [row()]}).startswith(b"\x89PNG") and drawn == [[row()]]

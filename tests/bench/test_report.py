"""lora_ref.bench.report: lines as rows come, and tables at the end."""

import io

from PIL import Image

from lora_ref.bench.benchmarks import Benchmark, Job
from lora_ref.bench.report import RowPrinter, cell, fewer_rounds_line, machine, machine_line, picture, table

RATIO = {"q1": 0.5, "median": 1.25, "q3": 2.0}


def measure(case, rounds, device):
    """A caption."""
    yield {}


BENCHMARK = Benchmark(measure, lambda rows: f"{len(rows)} rows", lambda case, rounds: 1.0, [])


def lines_of(*rows):
    lines = []
    printer = RowPrinter(lambda text, flush: lines.extend(text.split("\n")) if flush else None)
    for name, row in rows:
        printer(Job(name, BENCHMARK, 0, None), row)
    return lines


def test_rows_stand_under_their_header_in_columns_of_fixed_width():
    first = {"d": 256, "new_ms": 1.5, "ratio": RATIO, "seconds": {}, "size": 1}
    second = {"d": 4096, "new_ms": 1234.5, "ratio": None, "seconds": {}, "size": 1}
    lines = lines_of(("layer", first), ("layer", second), ("svd", {"d": 1}), ("layer", first))
    assert lines == [
        "",
        "layer",
        "     d    new ms     ratio [quartiles]",
        "   256    1.5000  1.250 [0.500, 2.000]",
        " 4,096   1,234.5                     —",
        "",
        "svd",
        "     d",
        "     1",
        "",
        "layer",
        "     d    new ms     ratio [quartiles]",
        "   256    1.5000  1.250 [0.500, 2.000]",
    ]


def test_a_table_has_the_caption_the_rows_and_the_summary():
    text = table("svd", BENCHMARK, [{"d": 1, "ratio": None, "size": 1, "seconds": {}}])
    assert text.splitlines() == ["svd: A caption.", "", "d  ratio [quartiles]", "1                  —", "1 rows."]
    assert table("svd", BENCHMARK, []) == "svd: no case was measured."
    assert [cell(value) for value in (1_000, 12.34, 0.5, None, "a")] == ["1,000", "12.3", "0.5000", "—", "a"]


def test_rows_of_fewer_rounds_are_counted():
    rows = {"a": [{"rounds": 7}, {"rounds": 3}], "b": [{"rounds": 7}], "c": [{}]}
    assert fewer_rounds_line(rows, 7).startswith("Fewer than 7 rounds") and "1 of a (" in fewer_rounds_line(rows, 7)
    assert fewer_rounds_line({"b": [{"rounds": 7}], "c": [{}]}, 7) == ""


def test_the_machine_is_described_in_one_line():
    found = machine("cpu", 5)
    line = machine_line(found)
    assert found["device_name"] in line and found["cpu_capability"] in line and "; 5 rounds; " in line
    assert f"torch {found['libraries']['torch']}" in line and "\n" not in line


def test_a_picture_leaves_out_benchmarks_without_rows():
    rows = [{"size": size, "seconds": {"one": [1.0, 2.0]}} for size in (1, 10)]
    widths = []
    for results in ({"a": rows}, {"a": rows, "b": []}, {"a": rows, "b": rows}):
        with Image.open(io.BytesIO(picture({"a": BENCHMARK, "b": BENCHMARK}, results))) as image:
            widths.append(image.width)
    assert widths[0] == widths[1] < widths[2]

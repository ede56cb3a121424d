"""lora_ref.bench: the command line, a whole quick run, the budget, Ctrl-C and crashes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from lora_ref.bench import command_line as bench
from lora_ref.bench.benchmarks import Benchmark
from lora_ref.environment import environment


@pytest.fixture
def threads():
    """main() sets torch's thread count for its process; here that process is pytest's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "lora_ref.bench", "--quick", "--json", "b.json", "--picture", "b.png"]
    root = str(Path(bench.__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"}
    run = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return directory, run


def test_quick_run_prints_tables_and_nothing_of_the_progress(quick_run):
    _, run = quick_run
    for words in ("svd: The full and the randomised", "O(dk·min(d, k))", "ratio [quartiles]", "256×192", "fastfood"):
        assert words in run.stdout
    assert "case/s" not in run.stdout and "Traceback" not in run.stderr


def test_quick_run_writes_json_for_machines(quick_run):
    directory, _ = quick_run
    report = json.loads((directory / "b.json").read_text(encoding="utf-8"))
    where = report["environment"]
    assert set(where) == {"date_utc", "rounds", *environment("cpu")}
    assert set(where) >= {"python", "device", "threads", "cores", "platform", "load", "cpu_capability"}
    assert where["libraries"]["torch"] == torch.__version__ and where["device"] == "cpu" and where["threads"] == 1
    assert where["date_utc"].endswith("+00:00")
    assert report["complete"] is True and report["left_out"] == []
    assert list(report["benchmarks"]) == [name for name in bench.BENCHMARKS if name != "compile"]
    (row,) = report["benchmarks"]["svd"]
    assert len(row["seconds"]["full"]) == where["rounds"] == 3
    assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]


def test_quick_run_writes_a_png_and_leaves_nothing_beside(quick_run):
    directory, _ = quick_run
    with Image.open(directory / "b.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > image.height > 300
    assert sorted(path.name for path in directory.iterdir()) == ["b.json", "b.png"]


def test_import_brings_nothing_beyond_torch_and_safetensors():
    code = (
        "import sys, torch; before = set(sys.modules); import lora_ref.bench.command_line; "
        "print(*({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert set(run.stdout.split()) <= {"lora_ref", "safetensors"}, run.stdout + run.stderr


@pytest.mark.parametrize(
    "argv, words",
    [
        (["flops"], ["unknown benchmark 'flops'", "svd, projections"]),
        (["svd", "--rounds", "0"], ["--rounds 0 is out of range"]),
        (["svd", "--threads", "-2"], ["--threads -2 is out of range"]),
        (["svd", "--json", "no/such/place/b.json"], ["cannot write", "directory that exists"]),
        (["svd", "--picture", "b.svg"], ["not a .png"]),
        (["svd", "--quick", "--full"], ["not allowed with"]),
        (["svd", "--budget", "-1"], ["--budget -1 is out of range", "0 for no limit"]),
        (["svd", "--budget", "nan"], ["--budget nan is out of range"]),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_before_any_timing(argv, words, capsys, monkeypatch, threads):
    monkeypatch.setattr(bench, "run", lambda *a, **k: pytest.fail("the benchmark ran"))
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


class Case(NamedTuple):
    size: int
    dtype: torch.dtype = torch.float32


def stub(measure, cases, **settings):
    return Benchmark(measure, lambda rows: f"{len(rows)} rows", lambda case, rounds: 1.0, cases, **settings)


def row_of(case):
    return {"shape": str(case), "ratio": None, "size": 1, "seconds": {"a": [1.0]}}


def test_names_are_run_once_each(capsys, monkeypatch, threads):
    cases = []

    def rows(case, rounds, device):
        """A stub."""
        cases.append((case, rounds))
        yield row_of(case)

    slow = stub(lambda *_: pytest.fail("nobody named it"), ["first"], on_request=True)
    usual = stub(rows, ["first", "second", "largest"], default_cases=2)
    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": usual, "slow": slow})
    for argv, expected in (
        (["stub", "stub", "--rounds", "2"], [("first", 2), ("second", 2)]),
        (["stub", "--budget", "0"], [("first", 7), ("second", 7)]),
        (["--quick"], [("first", 3)]),
        (["--full"], [("first", 7), ("second", 7), ("largest", 7)]),
    ):
        cases.clear()
        assert bench.main(argv) == 0
        assert cases == expected
    assert "3 rows." in capsys.readouterr().out


def test_what_the_budget_leaves_out_is_counted_on_the_screen_and_in_the_json(tmp_path, capsys, monkeypatch, threads):
    now = [0.0]

    def rows(case, rounds, device):
        """A stub."""
        now[0] += 4
        yield row_of(case)

    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": stub(rows, ["a", "b", "c"], setup_seconds=0)})
    target = tmp_path / "b.json"
    assert bench.main(["--budget", "11", "--json", str(target)], clock=lambda: now[0]) == 0
    report = json.loads(target.read_text(encoding="utf-8"))
    assert report["complete"] is False and len(report["benchmarks"]["stub"]) == 1
    assert [one["benchmark"] for one in report["left_out"]] == ["stub", "stub"]
    assert {one["case"] for one in report["left_out"]} == {"b", "c"}
    assert {one["reason"] for one in report["left_out"]} == {"budget"}
    shown = capsys.readouterr().out
    assert "Left out: 2 of stub; the budget of 11 s" in shown
    assert "    python -m lora_ref.bench stub --budget 0" in shown


def test_emulated_cases_run_only_where_they_are_named(tmp_path, capsys, monkeypatch, threads):
    measured = []

    def rows(case, rounds, device):
        """A stub."""
        measured.append(case)
        yield row_of(case.size)

    cases = [Case(1), Case(2, torch.bfloat16)]
    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": stub(rows, cases)})
    monkeypatch.setattr(bench, "emulated_dtypes", lambda device: {torch.bfloat16: "it is slow"})
    target = tmp_path / "b.json"
    assert bench.main(["--json", str(target)]) == 0
    report = json.loads(target.read_text(encoding="utf-8"))
    assert measured == cases[:1] and report["complete"] is True
    assert report["left_out"] == [{"benchmark": "stub", "case": "size 2, dtype bfloat16", "reason": "emulated"}]
    assert "bfloat16: it is slow" in capsys.readouterr().out
    measured.clear()
    assert bench.main(["--emulated"]) == 0
    assert measured == cases


# ---------------------------------------------------------------- Ctrl-C and crashes


def test_ctrl_c_exits_with_130_and_writes_what_was_measured(tmp_path, capsys, monkeypatch, threads):
    def rows(case, rounds, device):
        """A stub."""
        if case == "second":
            raise KeyboardInterrupt
        yield row_of(case)

    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": stub(rows, ["first", "second", "third"])})
    data, image = tmp_path / "b.json", tmp_path / "b.png"
    assert bench.main(["--full", "--json", str(data), "--picture", str(image)]) == 130
    report = json.loads(data.read_text(encoding="utf-8"))
    assert [row["shape"] for row in report["benchmarks"]["stub"]] == ["first"] and report["complete"] is False
    assert [(one["case"], one["reason"]) for one in report["left_out"]] == [
        ("second", "interrupted"),
        ("third", "interrupted"),
    ]
    with Image.open(image) as picture:
        picture.load()
        assert picture.format == "PNG"
    shown = capsys.readouterr().out
    assert "1 rows." in shown and "Incomplete: interrupted before 2 of stub" in shown


def test_ctrl_c_before_the_first_row_writes_no_picture_and_says_so(tmp_path, capsys, monkeypatch, threads):
    def rows(case, rounds, device):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": stub(rows, ["first"])})
    assert bench.main(["--json", str(tmp_path / "b.json"), "--picture", str(tmp_path / "b.png")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["benchmarks"] == {"stub": []}
    captured = capsys.readouterr()
    assert "no case was measured" in captured.out and "b.png is not written" in captured.err


def test_a_crash_in_a_benchmark_leaves_the_old_file_whole(tmp_path, monkeypatch, threads):
    def rows(case, rounds, device):
        yield {"shape": "1×1", "size": 1, "seconds": {"a": [1.0]}}
        raise RuntimeError("the machine broke")

    target = tmp_path / "b.json"
    target.write_bytes(b"old")
    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": stub(rows, [1, 2])})
    with pytest.raises(RuntimeError, match="the machine broke"):
        bench.main(["--json", str(target), "--picture", str(tmp_path / "b.png")])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b.json", b"old")]

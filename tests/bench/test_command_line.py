"""lora_ref.bench: the rows and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_ref.bench import command_line as bench


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
    run = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100)
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
    assert set(where) == {"date_utc", "python", "torch", "device", "threads", "cores", "platform", "rounds"}
    assert where["torch"] == torch.__version__ and where["device"] == "cpu" and where["threads"] == 1
    assert where["date_utc"].endswith("+00:00")
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
        "import sys, torch; before = set(sys.modules); import lora_ref.bench; "
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
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_before_any_timing(argv, words, capsys, monkeypatch, threads):
    monkeypatch.setattr(bench, "paired", lambda *a, **k: pytest.fail("the benchmark ran"))
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_names_are_run_once_each(capsys, monkeypatch, threads):
    cases = []

    def rows(case, rounds):
        cases.append((case, rounds))
        yield {"shape": str(case), "ratio": None, "size": 1, "seconds": {}}

    stub = bench.Benchmark(rows, lambda rows: f"{len(rows)} rows", "size", ["first", "second", "largest"])
    slow = bench.Benchmark(lambda *_: pytest.fail("nobody named it"), str, "size", ["first"], on_request=True)
    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": stub, "slow": slow})
    for argv, expected in (
        (["stub", "stub", "--rounds", "2"], [("first", 2), ("second", 2)]),
        (["--quick"], [("first", 3)]),
        (["--full"], [("first", 7), ("second", 7), ("largest", 7)]),
    ):
        cases.clear()
        assert bench.main(argv) == 0
        assert cases == expected
    assert "3 rows." in capsys.readouterr().out


# ---------------------------------------------------------------- crashes


def test_a_crash_in_a_benchmark_leaves_the_old_file_whole(tmp_path, monkeypatch, threads):
    def rows(case, rounds):
        yield {"shape": "1×1", "size": 1, "seconds": {"a": [1.0]}}
        raise RuntimeError("the machine broke")

    target = tmp_path / "b.json"
    target.write_bytes(b"old")
    monkeypatch.setattr(bench, "BENCHMARKS", {"stub": bench.Benchmark(rows, str, "size", [1, 2])})
    with pytest.raises(RuntimeError, match="the machine broke"):
        bench.main(["--json", str(target), "--picture", str(tmp_path / "b.png")])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b.json", b"old")]

"""lora_ref.bench.command_line: what a run prints and writes, in its budget, interrupted, and mistaken."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def command(*options):
    """(command, environment) of the benchmark in a process of its own."""
    root = str(Path(bench.__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-m", "lora_ref.bench", *options], os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    argv, variables = command("--quick", "--json", "b.json", "--picture", "b.png")
    run = subprocess.run(argv, cwd=directory, env=variables, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return directory, run


def test_quick_run_prints_tables_and_no_progress_bar(quick_run):
    _, run = quick_run
    for words in ("svd: The full and the randomised", "O(dk·min(d, k))", "ratio [quartiles]", "256×192", "fastfood"):
        assert words in run.stdout
    assert "case/s" not in run.stdout and "Traceback" not in run.stderr


def test_quick_run_writes_json_for_machines(quick_run):
    directory, _ = quick_run
    report = json.loads((directory / "b.json").read_text(encoding="utf-8"))
    where = report["environment"]
    assert set(where) == {"date_utc", "rounds", *environment("cpu")}
    assert where["libraries"]["torch"] == torch.__version__ and where["device"] == "cpu" and where["threads"] == 1
    assert report["complete"] is True and report["left_out"] == []
    assert where["date_utc"].endswith("+00:00")
    assert list(report["benchmarks"]) == [name for name in bench.BENCHMARKS if name != "compile"]
    (row,) = report["benchmarks"]["svd"]
    assert len(row["seconds"]["full"]) == where["rounds"] == row["rounds"] == 3
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
        (["svd", "--budget", "soon"], ["invalid float value: 'soon'"]),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_before_any_timing(argv, words, capsys, monkeypatch, threads):
    monkeypatch.setattr(bench, "run", lambda *a, **k: pytest.fail("the benchmark ran"))
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


class Clock:
    """Seconds that pass only where a benchmark lets them."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def stub(clock, cases, *, measured=None, seconds=lambda case, rounds: rounds * case / 7, **options):
    """A benchmark whose case n has n multiply-adds, and takes as many of the clock's seconds in seven rounds."""

    def measure(case, rounds, device):
        """A stub's caption."""
        clock.now += seconds(case, rounds)
        if measured is not None:
            measured.append((case, rounds))
        yield {"shape": str(case), "ratio": None, "size": case, "seconds": {"one": [float(case)]}}

    return Benchmark(
        measure, lambda rows: f"{len(rows)} rows", lambda case, rounds: rounds * case / 7, cases, **options
    )


@pytest.fixture
def clock():
    return Clock()


def use(monkeypatch, **benchmarks):
    monkeypatch.setattr(bench, "BENCHMARKS", benchmarks)


def test_names_are_run_once_each(capsys, monkeypatch, threads, clock):
    measured = []
    slow = Benchmark(lambda *_: pytest.fail("it was not named"), str, lambda *_: 1, [1], on_request=True)
    use(monkeypatch, stub=stub(clock, [1, 2, 3], measured=measured, default_cases=2), slow=slow)
    for argv, expected in (
        (["stub", "stub", "--rounds", "2"], [(1, 2), (2, 2)]),
        (["--quick"], [(1, 3)]),
        (["--full"], [(1, 7), (2, 7), (3, 7)]),
    ):
        measured.clear()
        assert bench.main(argv, clock=clock) == 0
        assert measured == expected
    assert "3 rows." in capsys.readouterr().out


# The budget


def test_a_default_run_stays_within_300_seconds_and_says_what_it_left_out(
    capsys, monkeypatch, threads, clock, tmp_path
):
    measured = []
    use(monkeypatch, stub=stub(clock, [10, 20, 40, 80, 160, 500, 1000], measured=measured))
    assert bench.main(["--json", str(tmp_path / "b.json")], clock=clock) == 0
    assert clock.now - 100 <= 300
    assert measured[0] == (10, 7) and {case for case, _ in measured} >= {10, 20, 40}
    assert all(3 <= rounds <= 7 for _, rounds in measured) and dict(measured)[40] < 7

    out = capsys.readouterr().out
    left = 7 - len(measured)
    assert f"Left out: {left} of stub; the budget of 300 s did not allow for them." in out
    assert "python -m lora_ref.bench stub --budget 0" in out
    assert "Fewer than 7 rounds, to stay within the budget:" in out and "(column rounds)" in out

    report = json.loads((tmp_path / "b.json").read_text())
    assert report["complete"] is False and len(report["left_out"]) == left
    assert {"benchmark": "stub", "case": "1000", "reason": "budget"} in report["left_out"]
    rows = report["benchmarks"]["stub"]
    assert [row["size"] for row in rows] == sorted(case for case, _ in measured), "rows stand in the order of the cases"
    assert {row["size"]: row["rounds"] for row in rows} == dict(measured)


@pytest.mark.parametrize("options", [["--budget", "0"], ["--full"], ["--quick"]])
def test_without_a_budget_nothing_is_left_out_and_no_round_is_saved(options, capsys, monkeypatch, threads, clock):
    measured = []
    use(monkeypatch, stub=stub(clock, [500, 10, 1000], measured=measured))
    assert bench.main([*options, "--rounds", "7"], clock=clock) == 0
    assert measured == [(500, 7), (10, 7), (1000, 7)][: 1 if options == ["--quick"] else 3]
    assert "Left out" not in capsys.readouterr().out


def test_a_budget_can_be_given_to_a_full_run_and_its_command_repeats_the_options(capsys, monkeypatch, threads, clock):
    use(monkeypatch, stub=stub(clock, [1, 2, 1000], default_cases=1))
    assert bench.main(["--full", "--budget", "50", "--rounds", "5", "--emulated"], clock=clock) == 0
    out = capsys.readouterr().out
    assert "1 of stub; the budget of 50 s" in out
    assert "python -m lora_ref.bench stub --full --emulated --rounds 5\n" in out


def test_a_real_run_keeps_to_a_budget_of_a_few_seconds(tmp_path):
    argv, variables = command("svd", "layer_memory", "--budget", "6", "--json", "b.json")
    start = time.monotonic()
    run = subprocess.run(argv, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 60  # the start of Python and torch, and other processes, are in it
    report = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert report["complete"] is False and {one["reason"] for one in report["left_out"]} <= {"budget", "emulated"}
    assert report["benchmarks"]["svd"] and "the budget of 6 s did not allow for them" in run.stdout


# Numbers that the hardware emulates


class Typed:
    def __init__(self, dtype):
        self.dtype = dtype
        self.group = str(dtype)

    def __str__(self):
        return self.group


def typed(measured):
    def measure(case, rounds, device):
        measured.append(case.dtype)
        yield {"dtype": str(case.dtype), "size": 1, "seconds": {}}

    cases = [Typed(torch.float32), Typed(torch.bfloat16)]
    return Benchmark(measure, lambda rows: f"{len(rows)} rows", lambda case, rounds: 1.0, cases)


@pytest.mark.parametrize("size", [[], ["--full"]])
def test_emulated_kinds_run_only_when_they_are_asked_for(size, capsys, monkeypatch, threads, tmp_path):
    measured = []
    use(monkeypatch, typed=typed(measured))
    monkeypatch.setattr(bench, "emulated_dtypes", lambda device: {torch.bfloat16: "this CPU has no such products"})
    assert bench.main([*size, "--json", str(tmp_path / "b.json")]) == 0
    assert measured == [torch.float32]
    out = capsys.readouterr().out
    assert "1 of typed; their products are emulated here (bfloat16: this CPU has no such products)" in out
    assert f"python -m lora_ref.bench {' '.join(['typed', *size])} --emulated" in out
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["left_out"] == [{"benchmark": "typed", "case": "torch.bfloat16", "reason": "emulated"}]
    assert report["complete"] is True

    measured.clear()
    assert bench.main([*size, "--emulated"]) == 0
    assert measured == [torch.float32, torch.bfloat16] and "Left out" not in capsys.readouterr().out


# An interrupt


def interrupted_at(case_to_stop):
    def seconds(case, rounds):
        if case == case_to_stop:
            raise KeyboardInterrupt
        return 1

    return seconds


def test_an_interrupt_keeps_what_was_measured(capsys, monkeypatch, threads, clock, tmp_path):
    use(monkeypatch, stub=stub(clock, [1, 2, 3, 4], seconds=interrupted_at(3)), later=stub(clock, [5]))
    files = ["--json", str(tmp_path / "b.json"), "--picture", str(tmp_path / "b.png")]
    assert bench.main(["--budget", "0", *files], clock=clock) == 130
    out = capsys.readouterr().out
    assert "stub: A stub's caption." in out and "2 rows." in out and "later: no case was measured." in out
    assert "Incomplete: interrupted before 2 of stub, 1 of later could be measured." in out
    assert "python -m lora_ref.bench stub later --budget 0" in out
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["complete"] is False
    assert [(one["benchmark"], one["case"], one["reason"]) for one in report["left_out"]] == [
        ("stub", "3", "interrupted"),
        ("stub", "4", "interrupted"),
        ("later", "5", "interrupted"),
    ]
    assert [row["size"] for row in report["benchmarks"]["stub"]] == [1, 2] and report["benchmarks"]["later"] == []
    with Image.open(tmp_path / "b.png") as image:
        image.load()


def test_an_interrupt_before_the_first_row_draws_nothing(capsys, monkeypatch, threads, clock, tmp_path):
    use(monkeypatch, stub=stub(clock, [1, 2], seconds=interrupted_at(1)))
    files = ["--json", str(tmp_path / "b.json"), "--picture", str(tmp_path / "b.png")]
    assert bench.main(files, clock=clock) == 130
    assert json.loads((tmp_path / "b.json").read_text())["benchmarks"] == {"stub": []}
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert "b.png is not written: no case was measured" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
def test_rows_reach_a_pipe_as_they_are_measured_and_ctrl_c_leaves_them_in_the_file(tmp_path):
    argv, variables = command("svd", "--budget", "0", "--json", "b.json")
    run = subprocess.Popen(
        argv, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    try:
        for line in run.stdout:
            if line.split()[:1] == ["256×192"]:
                break
        assert run.poll() is None, "the first row came only at the end"
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in err, err
    assert "Incomplete: interrupted before" in out
    report = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert report["complete"] is False and report["benchmarks"]["svd"][0]["shape"] == "256×192"


# A crash


def test_a_crash_in_a_benchmark_leaves_the_old_file_whole(tmp_path, monkeypatch, threads):
    def measure(case, rounds, device):
        yield {"shape": "1×1", "size": 1, "seconds": {"a": [1.0]}}
        raise RuntimeError("the machine broke")

    target = tmp_path / "b.json"
    target.write_bytes(b"old")
    use(monkeypatch, stub=Benchmark(measure, str, lambda case, rounds: 1.0, [1, 2]))
    with pytest.raises(RuntimeError, match="the machine broke"):
        bench.main(["--json", str(target), "--picture", str(tmp_path / "b.png")])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b.json", b"old")]

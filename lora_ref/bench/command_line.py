"""Paired timings: python -m lora_ref.bench [NAME …] [--rounds N] [--threads N] [--json FILE] [--picture FILE.png]

    ratio = median over rounds i of  t_i(contender) / t_i(reference)

A machine's speed drifts, with heat and with what else it runs, by more than many differences
worth knowing. So the contenders take turns: each round times every one of them once, the order
rotates from round to round, and only times of the same round are divided by each other.

A benchmark is an entry of BENCHMARKS: cases, and a function that yields rows (dicts) for one case.
The table shows every key of a row but `size`, the abscissa of the picture, and `seconds`, all the
times by contender. Times are wall-clock; a key says its unit (s, ms). `ratio` has no unit.
`compile` runs only when it is named: compiling takes minutes.

One CPU thread unless --threads says otherwise: on cores that are shared, two threads that wait for
each other have been seen to take ten times as long as one.
"""

import argparse
import importlib.util
import inspect
import io
import itertools
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from .._files import atomic_write, write_json
from ..intrinsic_dimension import PROJECTIONS
from ..measure import paired, quartiles
from ..svd import randomized_svd
from . import compiled as compile_bench
from . import layer as layer_bench
from . import model as model_bench

LARGEST_DENSE = 256 * 2**20  # bytes: a larger dense P is counted, not built


def svd_rows(case: tuple[int, int], rounds: int) -> Iterator[dict]:
    """The full and the randomised SVD (p = 10, q = 2), cut to rank r = 16, of a d×k matrix with σ_i = 1/i.

        error = ‖W − U_r·diag(S_r)·V_rᵀ‖₂ / σ_{r+1} ≥ 1 (Eckart–Young);   ratio = randomised / full
        expected cost: full O(dk·min(d, k)), randomised O(dk·r)

    float32, on the CPU. Source: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061).
    """
    (d, k), r = case, 16
    generator = torch.Generator().manual_seed(0)
    sigma = 1 / torch.arange(1, min(d, k) + 1)
    left, right = (torch.linalg.qr(torch.randn(n, len(sigma), generator=generator)).Q for n in (d, k))
    W = left * sigma @ right.mT
    functions = {
        "full": lambda: torch.linalg.svd(W, full_matrices=False),
        "randomised": lambda: randomized_svd(W, r, oversampling=10, power_iterations=2, generator=generator),
    }
    timing = paired(functions, rounds)
    row = {"shape": f"{d}×{k}", "size": d * k, "seconds": {name: t.seconds for name, t in timing.items()}}
    row |= {f"{name}_ms": t.ms for name, t in timing.items()} | {"ratio": quartiles(timing["randomised"].ratios)}
    for name, function in functions.items():
        U, S, Vh = function()
        residual = W - U[:, :r] * S[:r] @ Vh[:r]
        row[f"{name}_error"] = (torch.linalg.matrix_norm(residual, 2) / sigma[r]).item()
    yield row


def projection_rows(case: tuple[int, int], rounds: int) -> Iterator[dict]:
    """Projections P: R^d → R^D (lesson 02): memory, set-up, and a step, z ↦ P·z with its backward g ↦ Pᵀ·g.

        expected cost: dense and orthonormal O(D·d) in memory and time, Fastfood O(D) and O(D·log d)

    float32, on the CPU; ratio = step / dense step. A dense P above 256 MiB is counted, not built (—).
    """
    D, d = case
    built = {name: make for name, make in PROJECTIONS.items() if name == "fastfood" or 4 * D * d <= LARGEST_DENSE}
    setup = paired({name: lambda make=make: make(D, d) for name, make in built.items()}, min(rounds, 3))
    modules = {name: make(D, d, torch.Generator().manual_seed(0)) for name, make in built.items()}
    z, gradient = torch.ones(d, requires_grad=True), torch.ones(D)
    step = paired({name: lambda P=P: torch.autograd.grad(P(z), z, gradient) for name, P in modules.items()}, rounds)
    for name in PROJECTIONS:
        row = {"D": D, "d": d, "projection": name, "bytes": 4 * D * d, "setup_s": None, "step_ms": None, "ratio": None}
        if name in built:
            row |= {"bytes": modules[name].nbytes(), "setup_s": statistics.median(setup[name].seconds)}
            row |= {"step_ms": step[name].ms, "ratio": quartiles(step[name].ratios) if "dense" in built else None}
        yield row | {"size": D, "seconds": {name: step[name].seconds} if name in built else {}}


def svd_finding(rows: list[dict]) -> str:
    return f"At {rows[-1]['shape']} the randomised SVD takes {rows[-1]['ratio']['median']:.3f}× the full one's time"


def projection_finding(rows: list[dict]) -> str:
    row = [row for row in rows if row["projection"] == "fastfood" and row["ratio"]][-1]
    share = row["bytes"] / (4 * row["D"] * row["d"])
    return f"At D = {row['D']:,} Fastfood takes {row['ratio']['median']:.3f}× dense's time, {share:.3f}× its memory"


class Benchmark(NamedTuple):
    """`rows(case, rounds)` yields a case's rows, its docstring is the table's caption; `finding(rows)` is a
    sentence for people. --quick runs the first of `cases`, --full all, a plain run the first `plain`.
    `draw(axes, rows)` draws the picture's panel; without one it is time against size. `on_request`: runs only when
    it is named."""

    rows: Callable[[tuple, int], Iterator[dict]]
    finding: Callable[[list[dict]], str]
    xlabel: str
    cases: list[tuple]
    plain: int = -1
    draw: Callable | None = None
    on_request: bool = False


SHAPES = [(256, 192), (512, 384), (1024, 768), (2048, 1536), (3072, 2304)]
SUBSPACES = [(8_970, 256), (100_000, 256), (1_000_000, 256), (4_000_000, 256)]
LLAMAS = [case._replace(p=p) for case in model_bench.CASES for p in (0.0, 0.1)]
BENCHMARKS = {
    "layer": Benchmark(
        layer_bench.layer_rows, layer_bench.layer_finding, "", layer_bench.LAYERS, layer_bench.PLAIN, layer_bench.draw
    ),
    "layer_memory": Benchmark(
        layer_bench.memory_rows,
        layer_bench.memory_finding,
        "",
        layer_bench.LAYERS,
        layer_bench.PLAIN,
        layer_bench.draw_memory,
    ),
    "model": Benchmark(model_bench.rows, model_bench.finding, "parameters", LLAMAS),
    "compile": Benchmark(compile_bench.rows, compile_bench.finding, "parameters", LLAMAS, plain=2, on_request=True),
    "svd": Benchmark(svd_rows, svd_finding, "entries of the matrix, d·k", SHAPES),
    "projections": Benchmark(projection_rows, projection_finding, "parameters, D", SUBSPACES),
}


def cell(value: dict | str | float | None) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.3f} [{value['q1']:.3f}, {value['q3']:.3f}]"
    if value is None or isinstance(value, str):
        return value or "—"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value >= 10 else f"{value:.4f}"


def table(name: str, rows: list[dict]) -> str:
    """The rows as text in columns, under the caption, with the finding below."""
    keys = [key for key in rows[0] if key not in ("size", "seconds")]
    titles = ["ratio [quartiles]" if key == "ratio" else key.replace("_", " ") for key in keys]
    lines = [titles, *([cell(row[key]) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = ["  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines]
    bench = BENCHMARKS[name]
    return "\n".join([f"{name}: {inspect.getdoc(bench.rows)}\n", *body, bench.finding(rows) + "."])


def draw_times(axes, rows: list[dict]) -> None:
    """The median time of every contender against the size, both logarithmic, bars = quartiles."""
    labels = dict.fromkeys(label for row in rows for label in row["seconds"])
    for label, style in zip(labels, itertools.cycle(("o-", "s--", "^:", "D-."))):
        points = [(row["size"], quartiles(row["seconds"][label])) for row in rows if label in row["seconds"]]
        x, y = [x for x, _ in points], [1e3 * q["median"] for _, q in points]
        bars = [[1e3 * abs(q[end] - q["median"]) for _, q in points] for end in ("q1", "q3")]
        axes.errorbar(x, y, yerr=bars, fmt=style, capsize=3, label=label)
    axes.set(xscale="log", yscale="log", ylabel="one call, ms (bars: quartiles)")


def picture(results: dict[str, list[dict]]) -> bytes:
    """A PNG: a panel for each benchmark, its finding as the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * len(results), 4.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        (BENCHMARKS[name].draw or draw_times)(axes, rows)
        if BENCHMARKS[name].xlabel:
            axes.set_xlabel(BENCHMARKS[name].xlabel)
        axes.set_title(textwrap.fill(BENCHMARKS[name].finding(rows), 76), fontsize="medium")
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def environment(device: str = "cpu") -> dict:
    """Where the numbers come from: versions, threads and the class of machine, no host's name."""
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The checked command line: every mistake is found before the first timing, and exits with 2."""
    known = ", ".join(BENCHMARKS)
    usual = [name for name, benchmark in BENCHMARKS.items() if not benchmark.on_request]
    parser = argparse.ArgumentParser(prog="python -m lora_ref.bench", description="Paired timings of lora_ref.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known} (default: {', '.join(usual)})")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7, with --quick 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows, all times and the environment")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw what was found")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of layers and models (default cpu)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one case only: seconds")
    size.add_argument("--full", action="store_true", help="larger sizes too: minutes")
    args = parser.parse_args(argv)
    args.rounds = (3 if args.quick else 7) if args.rounds is None else args.rounds
    args.names = list(dict.fromkeys(args.names or usual))
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; choose from {known}")
    for option, value in (("--rounds", args.rounds), ("--threads", args.threads)):
        if value < 1:
            parser.error(f"{option} {value} is out of range; pass 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to run on the CPU")
    for path in filter(None, (args.json, args.picture)):
        if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
            parser.error(f"cannot write {path}; name a file in a directory that exists and is writable")
    if args.picture and args.picture.suffix.lower() != ".png":
        parser.error(f"--picture {args.picture} is not a .png; name one, such as bench.png")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed; pip install matplotlib, or leave it out")
    if "compile" in args.names and (reason := compile_bench.no_compiler(args.device)):
        parser.error(f"the benchmark 'compile': {reason}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    layer_bench.DEVICE = torch.device(args.device)
    cases = []
    for name in args.names:
        end = 1 if args.quick else None if args.full else BENCHMARKS[name].plain
        cases += [(name, case) for case in BENCHMARKS[name].cases[:end]]
    if importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        cases = tqdm(cases, desc="bench", unit="case", leave=False)  # on stderr
    results: dict[str, list[dict]] = {name: [] for name in args.names}
    for name, case in cases:
        results[name] += BENCHMARKS[name].rows(case, args.rounds)
    report = {"environment": environment(args.device) | {"rounds": args.rounds}, "benchmarks": results}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    for name, rows in results.items():
        print("\n" + table(name, rows))
    if args.json:
        write_json(report, args.json)
    if args.picture:
        with atomic_write(args.picture) as file:
            file.write(picture(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

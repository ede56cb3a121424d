"""Paired timings: python -m lora_ref.bench [NAME …] [--budget SECONDS] [--rounds N] [--json FILE] [--picture FILE.png]

    ratio = median over rounds i of  t_i(contender) / t_i(reference)

A machine's speed drifts, with heat and with what else it runs, by more than many differences worth knowing. So the
contenders take turns: each round times every one of them once, the order rotates from round to round, and only times
of the same round are divided by each other. Times are wall-clock; a column's title says its unit (s, ms). `ratio` has
no unit.

Each row is printed as soon as it is measured, and the tables at the end. A run takes about 300 s, or --budget: the most
informative cases come first, expensive ones get fewer rounds (never fewer than 3), and those that do not fit are left
out and counted at the end. `--budget 0` measures all of the default cases, `--full` the larger sizes too, both without
a limit of time; `--quick` measures one case of each benchmark. Ctrl-C ends a run and keeps what it measured (exit code
130). bfloat16 on a CPU that has no such products takes minutes for a case and says little: --emulated measures it all
the same. `compile` runs only when it is named: compiling takes minutes.

One CPU thread unless --threads says otherwise: on cores that are shared, two threads that wait for each other have been
seen to take ten times as long as one.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .._files import atomic_write, write_json
from . import report
from .benchmarks import BENCHMARKS, choose
from .compiled import no_compiler
from .hardware import emulated_dtypes
from .schedule import Outcome, run, without_emulated

DEFAULT_BUDGET = 300.0  # seconds
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends


def _parser() -> argparse.ArgumentParser:
    usual = [name for name, benchmark in BENCHMARKS.items() if not benchmark.on_request]
    names = f"of {', '.join(BENCHMARKS)} (default: {', '.join(usual)})"
    parser = argparse.ArgumentParser(prog="python -m lora_ref.bench", description="Paired timings of lora_ref.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"the time to stay within, 0 = no limit (default {DEFAULT_BUDGET:g}; none with --quick and --full)",
    )
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7, with --quick 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows, all times and the environment")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of layers and models (default cpu)")
    parser.add_argument(
        "--emulated", action="store_true", help="also cases whose products the hardware emulates, such as bfloat16"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one case of each benchmark only: seconds")
    size.add_argument("--full", action="store_true", help="all cases, larger sizes too, without a budget: an hour")
    return parser


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The checked command line: every mistake is found before the first timing, and exits with 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.rounds is None:
        args.rounds = 3 if args.quick else 7
    if args.budget is None:
        args.budget = 0.0 if args.quick or args.full else DEFAULT_BUDGET
    usual = [name for name, benchmark in BENCHMARKS.items() if not benchmark.on_request]
    args.names = list(dict.fromkeys(args.names or usual))
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    for option, value in (("--rounds", args.rounds), ("--threads", args.threads)):
        if value < 1:
            parser.error(f"{option} {value} is out of range; pass 1 or more")
    if not (math.isfinite(args.budget) and args.budget >= 0):
        parser.error(f"--budget {args.budget:g} is out of range; pass seconds, or 0 for no limit")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to run on the CPU")
    _check_files(parser, args)
    if "compile" in args.names and (reason := no_compiler(args.device)):
        parser.error(f"the benchmark 'compile': {reason}")
    return args


def _check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for path in filter(None, (args.json, args.picture)):
        if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
            parser.error(f"cannot write {path}; name a file in a directory that exists and is writable")
    if args.picture and args.picture.suffix.lower() != ".png":
        parser.error(f"--picture {args.picture} is not a .png; name one, such as bench.png")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed; pip install matplotlib, or leave it out")


def _repeated_options(args: argparse.Namespace) -> list[str]:
    """The options of this run that a command for what it left out has to have too."""
    options = []
    for name in ("quick", "full", "emulated"):
        if getattr(args, name):
            options.append(f"--{name}")
    if args.rounds != (3 if args.quick else 7):
        options += ["--rounds", str(args.rounds)]
    if args.threads != 1:
        options += ["--threads", str(args.threads)]
    if args.device != "cpu":
        options += ["--device", args.device]
    return options


def main(argv: list[str] | None = None, *, clock: Callable[[], float] = time.monotonic) -> int:
    """Run the command line; return the exit code. `clock` reads seconds, for the budget."""
    started = clock()
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    machine = report.machine(device, args.rounds)
    print(report.machine_line(machine), flush=True)

    emulated = {} if args.emulated else emulated_dtypes(device)
    size = "quick" if args.quick else "full" if args.full else "default"
    jobs = choose({name: BENCHMARKS[name] for name in args.names}, size)
    jobs, left_out = without_emulated(jobs, emulated)
    budget = args.budget or None
    outcome = run(jobs, args.rounds, budget, device, on_row=report.RowPrinter(), clock=clock, started=started)
    outcome.left_out += left_out
    outcome.rows = {name: outcome.rows.get(name, []) for name in args.names}

    _print_tables(args, outcome, budget, emulated)
    _write_files(args, outcome, machine)
    return INTERRUPTED if outcome.interrupted else 0


def _print_tables(args: argparse.Namespace, outcome: Outcome, budget: float | None, emulated: dict) -> None:
    for name, rows in outcome.rows.items():
        print("\n" + report.table(name, BENCHMARKS[name], rows))
    notes = report.left_out_lines(outcome.left_out, budget, emulated, _repeated_options(args))
    if fewer := report.fewer_rounds_line(outcome.rows, args.rounds):
        notes.insert(0, fewer)
    if notes:
        print("\n" + "\n".join(notes), flush=True)


def _write_files(args: argparse.Namespace, outcome: Outcome, machine: dict) -> None:
    if args.json:
        left_out = [{"benchmark": one.job.name, "case": str(one.job), "reason": one.reason} for one in outcome.left_out]
        content = {"environment": machine, "complete": outcome.complete, "left_out": left_out}
        write_json(content | {"benchmarks": outcome.rows}, args.json)
    if args.picture:
        if not any(outcome.rows.values()):
            print(f"{args.picture} is not written: no case was measured", file=sys.stderr)
            return
        with atomic_write(args.picture) as file:
            file.write(report.picture(BENCHMARKS, outcome.rows))


if __name__ == "__main__":
    sys.exit(main())

"""The sweep of lessons 06 and 07: python -m lora_ref.course.experiments.sweep --output DIR [--part 0/2]

Every experiment is a table of arms (`arms`). The learning rate of each arm is tuned by `tune`: on seed 0 it moves by
factors of two until both neighbours are worse on validation examples; then seeds 1 and 2 run at the best one. Each run
ends as one JSON file in DIR/runs, so that a sweep that was stopped resumes after its last run, and several processes
(--part i/n) share the arms. --collect FILE puts all runs into one record.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from ..._files import write_json
from ..training.lr_search import next_lrs
from .arms import ARMS, SEEDS, Arm
from .record import collect
from .run_files import best_lr, file_stem, load_runs, losses_by_lr, save_run
from .training_run import run_arm, updates_of


def tune(arm: Arm, directory: Path) -> None:
    """Run the arm until its best learning rate on seed 0 has a worse neighbour on both sides; then the other seeds."""
    while lrs := next_lrs(losses_by_lr(load_runs(directory, arm)), [arm.initial_lr], factor=2):
        run_once(arm, SEEDS[0], lrs[0], directory)
    best = best_lr(load_runs(directory, arm))
    for seed in SEEDS[1:]:
        run_once(arm, seed, best, directory)


def run_once(arm: Arm, seed: int, lr: float, directory: Path) -> None:
    """Make and save this run, unless its file is there."""
    if (seed, lr) in load_runs(directory, arm):
        return
    found = run_arm(arm, seed, lr, directory)
    save_run(directory, arm, found)
    print(f"{file_stem(arm):32} seed {seed} lr {lr:.3g}: {found['validation']:.4f}", flush=True)


def part_of(text: str) -> tuple[int, int]:
    """The two numbers of --part i/n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; pass i/n with 0 <= i < n, such as 0/2 and 1/2")
    return int(match[1]), int(match[2])


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m lora_ref.course.experiments.sweep",
        description="Run the language-model experiments of lessons 06 and 07.",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--part", type=part_of, default="0/1", help="i/n: every n-th arm, from the i-th on (from 0)")
    parser.add_argument("--collect", type=Path, help="write all finished arms there as one record, and run nothing")
    args = parser.parse_args(argv)
    file = next((path for path in (args.output, *args.output.parents) if path.is_file()), None)
    if file is not None:
        parser.error(f"--output {args.output}: {file} is a file; name a directory")
    if args.collect and (args.collect.is_dir() or not args.collect.absolute().parent.is_dir()):
        parser.error(f"--collect {args.collect} cannot be written; name a file in a directory that exists")
    return parser, args


def main(argv: list[str] | None = None) -> int:
    """The command: run this part's arms, or collect the runs."""
    parser, args = parse_arguments(argv)
    torch.set_num_threads(1)
    if args.collect:
        record = collect(ARMS, args.output, updates_of)
        if not record["experiments"]:
            parser.error(f"--output {args.output} has no finished arm to collect; run the sweep there first")
        write_json(record, args.collect)
        return 0
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    (args.output / "weights").mkdir(exist_ok=True)
    part, parts = args.part
    for arm in ARMS[part::parts]:
        tune(arm, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

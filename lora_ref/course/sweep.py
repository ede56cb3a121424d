"""The language-model experiments of lessons 06 and 07: python -m lora_ref.course.sweep --output DIR [--part 0/2]

Every experiment is a table of arms; an arm says what is trained, on what, for how long. Its learning rate is tuned by
`tune`: on seed 0 the rate moves by factors of two until both neighbours are worse on validation examples; then seeds 1
and 2 run at the best rate. Each run ends as one JSON file in DIR/runs, so that a sweep that was stopped goes on where
it was, and several processes (--part i/n) share the arms. --collect FILE puts all runs into one record.
"""

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import LoRAConfig
from ..model import add_lora, merge
from .data_to_text import Row, batches, encode, held_out_loss, scores, text_loss
from .grammar import Example, examples
from .models import language_model, trainable
from .pretrain import bits_per_byte
from .pretrain import encode as encode_prose
from .prose import PACKAGES, prose
from .training import train

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLP = ALL[4:]
TRAIN, VALIDATION, TEST = 2000, 100, 200  # examples of a domain, all with distinct records
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """What is trained, and how: adapter are LoRAConfig's fields (None: every weight); first_rate begins the search."""

    experiment: str
    name: str
    adapter: dict | None
    first_rate: float
    steps: int = 100
    batch: int = 8
    n: int = TRAIN
    domain: str = "restaurants"
    start: str = "prose_llama"  # or "random", or an arm, whose weights of the same seed are where this one begins
    report: bool = False  # also what it forgets along the way, texts, BLEU and slot errors; and keep the weights


def lora(r: int, targets: list[str] = ALL, **more) -> dict:
    return {"r": r, "lora_alpha": 32, "target_modules": targets, **more}


def per_layer(ranks: dict[str, int]) -> dict:
    """All linear layers, with ranks by pattern; α/r = 4 in each, as r = 8 has it."""
    return lora(8, rank_pattern=ranks, alpha_pattern={key: 4 * r for key, r in ranks.items()})


LORA, FULL = 8e-3, 1e-3  # where the search for a rate begins
ATTENTION, FEED = r"self_attn\.\w+", r"mlp\.\w+"
EARLY, LATE = r"layers\.[01]\..*", r"layers\.[23]\..*"
ARMS = [  # a budget is that of r = 8 on all linear layers: 116,736 numbers, met within 3 %
    *(Arm("rank", f"r = {r}", lora(r), LORA) for r in (8, 1, 64, 16, 2, 4, 32)),
    Arm("rank", "full", None, FULL),
    Arm("tasks", "full", None, FULL, steps=200, batch=16, report=True),
    Arm("tasks", "r = 8", lora(8), LORA, steps=200, batch=16, report=True),
    Arm("tasks", "from scratch", None, 4e-3, steps=200, batch=16, start="random", report=True),
    Arm("placement", "q", lora(76, ["q_proj"]), LORA),
    Arm("placement", "k", lora(76, ["k_proj"]), LORA),
    Arm("placement", "v", lora(76, ["v_proj"]), LORA),
    Arm("placement", "o", lora(76, ["o_proj"]), LORA),
    Arm("placement", "q, v", lora(38, ["q_proj", "v_proj"]), LORA),
    Arm("placement", "q, k, v, o", lora(19, ALL[:4]), LORA),
    Arm("placement", "MLP", lora(14, MLP), LORA),
    Arm("tasks", "full, then weather", None, FULL, domain="weather", start="tasks/full", report=True),
    Arm("tasks", "r = 8, then weather", lora(8), LORA, domain="weather", start="tasks/full", report=True),
    *(Arm("few examples", name, adapter, rate, n=50) for name, adapter, rate in (
        ("full", None, FULL), ("r = 1", lora(1), LORA), ("r = 8", lora(8), LORA), ("r = 64", lora(64), LORA))),
    *(Arm("batch", f"{name}, batch {size}", adapter, rate * (size / 8) ** 0.5, steps=800 // size, batch=size)
      for size in (32, 2) for name, adapter, rate in (("full", None, FULL), ("r = 8", lora(8), LORA))),
    Arm("layers", "more in attention", per_layer({ATTENTION: 16, FEED: 2}), LORA),
    Arm("layers", "more in the MLP", per_layer({ATTENTION: 2, FEED: 12}), LORA),
    Arm("layers", "more in early layers", per_layer({EARLY: 14, LATE: 2}), LORA),
    Arm("layers", "more in late layers", per_layer({EARLY: 2, LATE: 14}), LORA),
]  # fmt: skip


@cache
def data(domain: str) -> dict:
    """The domain's examples in three disjoint parts, each with four texts; the losses are of the first."""
    found = examples(domain, TRAIN + VALIDATION + TEST, texts=4)
    return {"train": found[:TRAIN], "validation": found[TRAIN:-TEST], "test": found[-TEST:]}


def rows_of(tokenizer, found: list[Example]) -> list[Row]:
    """The prompts and first texts of examples as token ids."""
    return encode(tokenizer, [replace(example, texts=example.texts[:1]) for example in found])


@cache
def held_out_prose() -> list[str]:
    """Prose that the base model was not trained on: the held-out documents of the first four packages."""
    return prose(list(PACKAGES)[:4]).held_out


def prose_bits(model: nn.Module, tokenizer) -> float:
    """Bits per byte on the held-out prose; what fine-tuning adds to it is what was forgotten."""
    texts = held_out_prose()
    return bits_per_byte(model, encode_prose(tokenizer, texts), sum(len(text.encode()) + 1 for text in texts))


def begin(arm: Arm, seed: int, directory: Path) -> tuple[nn.Module, object]:
    """The model as the arm begins, adapted if it is to be, and the tokeniser."""
    model, tokenizer = language_model()
    if arm.start == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(model)(model.config)
    elif arm.start != "prose_llama":
        source = next(a for a in ARMS if f"{a.experiment}/{a.name}" == arm.start)
        rate = best_rate(results(directory, source))
        model.load_state_dict(load_file(weights(directory, source, seed, rate)), strict=False)
        model.tie_weights()
    if arm.adapter is not None:
        add_lora(model, LoRAConfig(**arm.adapter), generator=torch.Generator().manual_seed(seed))
    return model, tokenizer


def run(arm: Arm, seed: int, rate: float, directory: Path) -> dict:
    """One training run: losses on validation and test examples in nats a token; inf where it diverged."""
    torch.manual_seed(seed)
    model, tokenizer = begin(arm, seed, directory)
    parts, pad = data(arm.domain), tokenizer.eos_token_id
    rows = {part: rows_of(tokenizer, found) for part, found in parts.items()}
    rows["train"] = rows["train"][: arm.n]
    plan = batches(rows["train"], arm.batch, arm.steps, seed)

    def look(model) -> dict:
        found = {"validation": held_out_loss(model, rows["validation"], pad)}
        if arm.n < TRAIN:
            found["train"] = held_out_loss(model, rows["train"], pad)
        if arm.report:
            found["prose"] = prose_bits(model, tokenizer)
            if arm.domain != "restaurants":
                others = rows_of(tokenizer, data("restaurants")["validation"])
                found["restaurants"] = held_out_loss(model, others, pad)
        return found

    start = time.perf_counter()
    found = {"seed": seed, "rate": rate, "trained": trainable(model), "all": sum(p.numel() for p in model.parameters())}
    try:
        history = train(
            model,
            lambda model, t: text_loss(model, [rows["train"][i] for i in plan[t]], pad),
            arm.steps,
            rate,
            warmup=arm.steps // 10,
            evaluate=look,
            every=arm.steps // (15 if arm.report else 5),
        )
    except FloatingPointError:
        return found | {"validation": math.inf, "test": math.inf}
    found["curve"] = [
        {"step": step} | {k: round(v, 5) for k, v in value.items()} for step, value in history.evaluations
    ]
    model.eval()
    found["validation"] = history.evaluations[-1][1]["validation"]
    found["test"] = held_out_loss(model, rows["test"], pad)
    found["losses"] = [round(value, 4) for value in history.losses]
    if arm.report:
        merged = merge(copy.deepcopy(model)) if arm.adapter else model
        judged = scores(merged, tokenizer, parts["test"][:100])
        found |= {"bleu": judged.bleu, "slot_errors": judged.slot_errors, "texts": judged.texts[:8]}
        keep = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        save_file(keep, weights(directory, arm, seed, rate))
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def stem(arm: Arm) -> str:
    return f"{arm.experiment}-{arm.name}".replace(" ", "_").replace(",", "").replace("=", "")


def weights(directory: Path, arm: Arm, seed: int, rate: float) -> Path:
    return directory / "weights" / f"{stem(arm)}-{seed}-{rate:.3g}.safetensors"


def results(directory: Path, arm: Arm) -> dict[tuple[int, float], dict]:
    """What was run of an arm so far: (seed, rate) → the run."""
    files = sorted((directory / "runs").glob(f"{stem(arm)}-[0-9]-*.json"))
    runs = [json.loads(file.read_text()) for file in files]
    return {(run["seed"], run["rate"]): run for run in runs}


def best_rate(runs: dict[tuple[int, float], dict]) -> float:
    """The rate with the lowest validation loss on seed 0."""
    return min((run["validation"], rate) for (seed, rate), run in runs.items() if seed == SEEDS[0])[1]


def tune(arm: Arm, directory: Path) -> None:
    """Run the arm until its best rate on seed 0 has a worse neighbour on both sides, then the other seeds there."""

    def need(seed: int, rate: float) -> None:
        if (seed, rate) not in results(directory, arm):
            found = run(arm, seed, rate, directory)
            file = directory / "runs" / f"{stem(arm)}-{seed}-{rate:.3g}.json"
            file.with_suffix(".part").write_text(json.dumps(found))
            file.with_suffix(".part").replace(file)
            print(f"{stem(arm):32} seed {seed} rate {rate:.3g}: {found['validation']:.4f}", flush=True)

    need(SEEDS[0], arm.first_rate)
    while True:
        rate = best_rate(results(directory, arm))
        missing = [r for r in (2 * rate, rate / 2) if (SEEDS[0], r) not in results(directory, arm)]
        if not missing:
            break
        need(SEEDS[0], missing[0])
    for seed in SEEDS[1:]:
        need(seed, rate)


def collect(directory: Path) -> dict:
    """All runs by experiment and arm, each with the arm's settings, its tuned rate and its runs."""
    found = {}
    for arm in ARMS:
        runs = results(directory, arm)
        if {seed for seed, _ in runs} >= set(SEEDS):
            table = {k: v for k, v in vars(arm).items() if k not in ("experiment", "name")}
            ordered = [runs[key] for key in sorted(runs)]
            found.setdefault(arm.experiment, {})[arm.name] = table | {"best_rate": best_rate(runs), "runs": ordered}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_ref.course.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th arm, from the i-th on")
    parser.add_argument("--collect", type=Path, help="write all runs there as one record, and run nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    (args.output / "weights").mkdir(exist_ok=True)
    if args.collect:
        args.collect.write_text(json.dumps(collect(args.output), indent=1) + "\n")
        return 0
    i, n = map(int, args.part.split("/"))
    for arm in ARMS[i::n]:
        tune(arm, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

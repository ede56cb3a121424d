"""The language-model experiments of lessons 06 and 07: python -m lora_ref.course.experiments.sweep --output DIR [--part 0/2]

Every experiment is a table of arms; an arm says what is trained, on what, for how long. Its learning rate is tuned by
`tune`: on seed 0 the rate moves by factors of two until both neighbours are worse on validation examples; then seeds 1
and 2 run at the best rate. Each run ends as one JSON file in DIR/runs, so that a sweep that was stopped goes on where
it was, and several processes (--part i/n) share the arms. --collect FILE puts all runs into one record.
"""

import argparse
import copy
import math
import re
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..._files import write_json
from ...config import LoRAConfig
from ...model import add_lora, merge
from ..classifiers import trainable
from ..text.corpus import PACKAGES, prose
from ..text.data_to_text import Row, batches, encode, held_out_loss, scores, text_loss
from ..text.grammar import Example, examples
from ..text.language_model import language_model
from ..text.pretrain import bits_per_byte
from ..text.pretrain import encode as encode_prose
from ..training import train
from .record import SEEDS, TRAIN, Arm, Updates, best_rate, collect, finished, results, save, stem, weights
from .update_statistics import updates

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLP = ALL[4:]
VALIDATION, TEST = 100, 200  # examples of a domain beside TRAIN to train on, all with distinct records


def lora(r: int, targets: list[str] = ALL, **more) -> dict:
    return {"r": r, "lora_alpha": 32, "target_modules": targets, **more}


def per_layer(ranks: dict[str, int]) -> dict:
    """All linear layers, with ranks by pattern; α/r = 4 in each, as r = 8 has it."""
    return lora(8, rank_pattern=ranks, alpha_pattern={key: 4 * r for key, r in ranks.items()})


LORA, FULL = 8e-3, 1e-3  # where the search for a rate begins
ATTENTION, FEED = r"self_attn\.\w+", r"mlp\.\w+"
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
    Arm("rank", "full, linear layers only", None, FULL, trains=r".*_proj\.weight"),
    Arm("few examples", "from scratch", None, 4e-3, n=50, start="random"),
]  # fmt: skip


def named(experiment: str, name: str) -> Arm:
    """The arm of this name. Errors: LookupError, with the names that there are."""
    for arm in ARMS:
        if (arm.experiment, arm.name) == (experiment, name):
            return arm
    known = ", ".join(repr(arm.name) for arm in ARMS if arm.experiment == experiment)
    raise LookupError(f"no arm {name!r} in {experiment!r}; it has {known or 'none: there is no such experiment'}")


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


def begin(arm: Arm, seed: int, directory: Path | None = None) -> tuple[nn.Module, object]:
    """The model as the arm begins, adapted if it is to be, and the tokeniser.

    Errors: ValueError for an arm that begins with another's weights, which `directory` has not.
    """
    model, tokenizer = language_model()
    if arm.start == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(model)(model.config)
    elif arm.start != "prose_llama":
        source = named(*arm.start.split("/", 1))
        runs = {} if directory is None else results(directory, source)
        if not finished(runs):
            raise ValueError(
                f"{arm.experiment}/{arm.name} begins where {arm.start} ends, which has not finished in directory = "
                f"{directory}; pass the directory of a sweep in which it has"
            )
        model.load_state_dict(load_file(weights(directory, source, seed, best_rate(runs))), strict=False)
        model.tie_weights()
    if arm.trains:
        for name, p in model.named_parameters():
            p.requires_grad_(re.fullmatch(arm.trains, name) is not None)
    if arm.adapter is not None:
        add_lora(model, LoRAConfig(**arm.adapter), generator=torch.Generator().manual_seed(seed))
    return model, tokenizer


def run(arm: Arm, seed: int, rate: float, directory: Path | None = None) -> dict:
    """One training run: losses on validation and test examples in nats a token; inf where it diverged.

    `directory`, of a sweep, is where arms find other arms' weights and keep their own. Errors: as `begin`.
    """
    diverged = {"validation": math.inf, "test": math.inf}
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
            warmup_steps=arm.steps // 10,
            evaluate=look,
            eval_steps=max(1, arm.steps // (10 if arm.report else 5)),
        )
    except FloatingPointError:
        return found | diverged
    if not math.isfinite(history.evaluations[-1][1]["validation"]):  # in the last step
        return found | diverged
    found["curve"] = [
        {"step": step} | {k: round(v, 5) for k, v in value.items()} for step, value in history.evaluations
    ]
    model.eval()
    found["validation"] = history.evaluations[-1][1]["validation"]
    found["test"] = held_out_loss(model, rows["test"], pad)
    found["losses"] = [round(value, 4) for value in history.losses]
    if arm.report:
        merged = copy.deepcopy(model)
        if arm.adapter is not None:
            merge(merged)
        judged = scores(merged, tokenizer, parts["test"][:100])
        found |= {"bleu": judged.bleu, "slot_errors": judged.slot_errors, "texts": judged.texts[:8]}
    if arm.report and directory is not None:
        keep = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        save_file(keep, weights(directory, arm, seed, rate))
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def tune(arm: Arm, directory: Path) -> None:
    """Run the arm until its best rate on seed 0 has a worse neighbour on both sides, then the other seeds there."""

    def need(seed: int, rate: float) -> None:
        if (seed, rate) not in results(directory, arm):
            found = run(arm, seed, rate, directory)
            save(directory, arm, found)
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


def updates_of(arm: Arm, seed: int, directory: Path) -> Updates:
    """Path → (W0, ΔW) of the arm's run at its best rate, from the weights that it kept."""
    model, _ = begin(arm, seed, directory)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = load_file(weights(directory, arm, seed, best_rate(results(directory, arm))))
    model.load_state_dict(kept, strict=False)
    model.tie_weights()
    return updates(before, model)


def share(text: str) -> tuple[int, int]:
    """The two numbers of --part i/n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; pass i/n with 0 <= i < n, such as 0/2 and 1/2")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_ref.course.experiments.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--part", type=share, default="0/1", help="i/n: every n-th arm, from the i-th on (from 0)")
    parser.add_argument("--collect", type=Path, help="write all finished arms there as one record, and run nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    file = next((path for path in (args.output, *args.output.parents) if path.is_file()), None)
    if file is not None:
        parser.error(f"--output {args.output}: {file} is a file; name a directory")
    if args.collect:
        if args.collect.is_dir() or not args.collect.absolute().parent.is_dir():
            parser.error(f"--collect {args.collect} cannot be written; name a file in a directory that exists")
        record = collect(ARMS, args.output, updates_of)
        if not record["experiments"]:
            parser.error(f"--output {args.output} has no finished arm to collect; run the sweep there first")
        write_json(record, args.collect)
        return 0
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    (args.output / "weights").mkdir(exist_ok=True)
    i, n = args.part
    for arm in ARMS[i::n]:
        tune(arm, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One training run of an arm: its model, its data, what is measured."""

import copy
import math
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ...config import LoRAConfig
from ...model import add_lora, merge
from ..classifiers import trainable
from ..text.corpus import PACKAGES, load_corpus
from ..text.data_to_text import Row, batches, encode, held_out_loss, text_loss
from ..text.documents import bits_per_byte, count_bytes, encode_documents
from ..text.evaluation import scores
from ..text.grammar import Example, examples
from ..text.language_model import language_model
from ..training import History, train
from .arms import TRAIN_EXAMPLES, Arm, find_arm
from .run_files import best_lr, is_finished, load_runs, weights_path
from .update_statistics import Updates, updates

VALIDATION_EXAMPLES, TEST_EXAMPLES = 100, 200  # of a domain, beside TRAIN_EXAMPLES; all with distinct records


@cache
def load_splits(domain: str) -> dict[str, list[Example]]:
    """The domain's examples in three disjoint parts, each example with four texts.

    Args:
        domain: "restaurants" or "weather".

    Returns:
        "train" (2,000 examples), "validation" (100) and "test" (200).

    Raises:
        ValueError: an unknown domain.

    Example:
        >>> {part: len(found) for part, found in load_splits("weather").items()}
        {'train': 2000, 'validation': 100, 'test': 200}
    """
    found = examples(domain, TRAIN_EXAMPLES + VALIDATION_EXAMPLES + TEST_EXAMPLES, texts=4)
    return {
        "train": found[:TRAIN_EXAMPLES],
        "validation": found[TRAIN_EXAMPLES:-TEST_EXAMPLES],
        "test": found[-TEST_EXAMPLES:],
    }


def encode_first_texts(tokenizer, found: list[Example]) -> list[Row]:
    """The examples as rows of token ids, each with its first text; all losses are of these.

    Args:
        tokenizer: the model's.
        found: examples with one text or more.

    Returns:
        One row for each example.

    Example:
        >>> rows = encode_first_texts(language_model()[1], examples("weather", 3, texts=4))
        >>> len(rows)
        3
    """
    return encode(tokenizer, [replace(example, texts=example.texts[:1]) for example in found])


@cache
def held_out_prose() -> list[str]:
    """Prose that the base model was not trained on: the held-out documents of the first four packages."""
    return load_corpus(list(PACKAGES)[:4]).held_out


def prose_bits(model: nn.Module, tokenizer, documents: list[str] | None = None) -> float:
    """Bits per byte on the held-out prose. What fine-tuning adds to it is what was forgotten.

    Args:
        model: a causal language model, used in the mode that it is in.
        tokenizer: its tokeniser.
        documents: the prose (default: held-out documents, which the first call gathers in a few seconds).

    Returns:
        Bits per byte, as `bits_per_byte`.

    Example:
        >>> model, tokenizer = language_model()
        >>> prose_bits(model, tokenizer, ["The function returns an array."]) < 2
        True
    """
    documents = held_out_prose() if documents is None else documents
    return bits_per_byte(model, encode_documents(tokenizer, documents), count_bytes(documents))


def build_model(arm: Arm, seed: int, directory: Path | None = None) -> tuple[nn.Module, object]:
    """The arm's model before training, adapted if the arm has an adapter, and the tokeniser.

    Raises ValueError for an arm that begins with another's weights, when these are not in `directory`.
    """
    model, tokenizer = language_model()
    if arm.initial_weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(model)(model.config)
    elif arm.initial_weights != "prose_llama":
        source = find_arm(*arm.initial_weights.split("/", 1))
        runs = {} if directory is None else load_runs(directory, source)
        if not is_finished(runs):
            raise ValueError(
                f"{arm.experiment}/{arm.name} begins with the weights of {arm.initial_weights}, which has not finished "
                f"in directory = {directory}; pass the directory of a sweep in which it has"
            )
        load_weights(model, weights_path(directory, source, seed, best_lr(runs)))
    if arm.trainable_pattern:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.fullmatch(arm.trainable_pattern, name) is not None)
    if arm.adapter is not None:
        add_lora(model, LoRAConfig(**arm.adapter), generator=torch.Generator().manual_seed(seed))
    return model, tokenizer


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a run's trained weights into a model of the same form."""
    model.load_state_dict(load_file(path), strict=False)
    model.tie_weights()


def run_arm(arm: Arm, seed: int, lr: float, directory: Path | None = None) -> dict:
    """One training run. Half a minute for 100 steps of 8 examples on one CPU core.

    Args:
        arm: what is trained, and how.
        seed: of the adapter's (or the random model's) weights and of the batches.
        lr: the peak learning rate.
        directory: of a sweep, where the weights of other arms are, and this run's are saved if the arm reports.

    Returns:
        seed, lr; trained and all (numbers of parameters); validation and test: losses in nats a token at the end, inf
        where the run diverged. If it did not: curve (measures at several steps), losses (of each step), seconds; if
        the arm reports, bleu, slot_errors and eight texts.

    Raises:
        ValueError: the weights to begin with are not in `directory`.

    Example:
        >>> from lora_ref.course.experiments.record import shipped
        >>> run = shipped()["rank"]["r = 8"]["runs"][0]  # made by run_arm(find_arm("rank", "r = 8"), 0, 4e-3)
        >>> run["seed"], run["lr"], run["trained"], round(run["test"], 2)
        (0, 0.004, 116736, 0.56)
        >>> run_arm(find_arm("tasks", "full, then weather"), seed=0, lr=1e-3)
        Traceback (most recent call last):
        ValueError: tasks/full, then weather begins with the weights of tasks/full, which has not finished in ...
    """
    torch.manual_seed(seed)
    model, tokenizer = build_model(arm, seed, directory)
    parts, pad = load_splits(arm.domain), tokenizer.eos_token_id
    rows = {part: encode_first_texts(tokenizer, found) for part, found in parts.items()}
    rows["train"] = rows["train"][: arm.train_examples]
    found = {"seed": seed, "lr": lr, "trained": trainable(model), "all": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    history = _train(arm, model, tokenizer, rows, seed, lr)
    if history is None:
        return found | {"validation": math.inf, "test": math.inf}
    curve = [{"step": step} | {k: round(v, 5) for k, v in value.items()} for step, value in history.evaluations]
    model.eval()
    found |= {
        "curve": curve,
        "validation": history.evaluations[-1][1]["validation"],
        "test": held_out_loss(model, rows["test"], pad),
        "losses": [round(value, 4) for value in history.losses],
    }
    if arm.report:
        merged = copy.deepcopy(model)
        if arm.adapter is not None:
            merge(merged)
        judged = scores(merged, tokenizer, parts["test"][:100])
        found |= {"bleu": judged.bleu, "slot_errors": judged.slot_errors, "texts": judged.texts[:8]}
        if directory is not None:
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, weights_path(directory, arm, seed, lr))
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _train(arm: Arm, model: nn.Module, tokenizer, rows: dict[str, list[Row]], seed: int, lr: float) -> History | None:
    """Train the model as the arm says; None where the run diverged."""
    pad = tokenizer.eos_token_id
    plan = batches(rows["train"], arm.batch_size, arm.steps, seed)

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = {"validation": held_out_loss(model, rows["validation"], pad)}
        if arm.train_examples < TRAIN_EXAMPLES:
            found["train"] = held_out_loss(model, rows["train"], pad)
        if arm.report:
            found["prose"] = prose_bits(model, tokenizer)
            if arm.domain != "restaurants":
                others = encode_first_texts(tokenizer, load_splits("restaurants")["validation"])
                found["restaurants"] = held_out_loss(model, others, pad)
        return found

    try:
        history = train(
            model,
            lambda model, t: text_loss(model, [rows["train"][i] for i in plan[t]], pad),
            arm.steps,
            lr,
            warmup_steps=arm.steps // 10,
            evaluate=evaluate,
            eval_steps=max(1, arm.steps // (10 if arm.report else 5)),
        )
    except FloatingPointError:
        return None
    diverged_in_the_last_step = not math.isfinite(history.evaluations[-1][1]["validation"])
    return None if diverged_in_the_last_step else history


def updates_of(arm: Arm, seed: int, directory: Path) -> Updates:
    """Path → (W0, ΔW) of the arm's run at its best learning rate, from its saved weights."""
    model, _ = build_model(arm, seed, directory)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, weights_path(directory, arm, seed, best_lr(load_runs(directory, arm))))
    return updates(before, model)

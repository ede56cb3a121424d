"""The course's fine-tuning task: a language model reads a record and writes the sentences that say it.

    name[Miller's Table], eatType[pub], area[riverside]⏎        the prompt: read, not scored
    Miller's Table is a pub by the river.<|endoftext|>           the text: scored in training, written in evaluation

Examples come from `grammar` (or, in the same form, from the E2E data). `encode` turns them into rows of token ids,
`batch` pads rows and masks what is not scored, `text_loss` is the loss of both training and evaluation.
"""

import random
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import check_integer
from .grammar import Example, slot_error_rate

IGNORED = -100  # the label that cross_entropy leaves out


class Row(NamedTuple):
    """One prompt and one text, as token ids; the first `prompt` of them are the prompt's."""

    ids: list[int]
    prompt: int


class Scores(NamedTuple):
    """How well a model does the task: held-out loss (nats a token), BLEU (0 to 100), slot errors a slot; its texts."""

    loss: float
    bleu: float
    slot_errors: float
    texts: list[str]


def prompt(example: Example) -> str:
    """What the model reads: the record on one line."""
    return f"{example.meaning}\n"


def encode(tokenizer, examples: Sequence[Example], longest: int | None = None) -> list[Row]:
    """One row for each text of each example: the prompt's tokens, the text's, the end's.

    Prompt and text are tokenised apart, so that a prompt has the same tokens in training and in writing.
    Errors: ValueError for no text at all, a tokeniser without an end token, a row of more than `longest` tokens.
    """
    if not any(example.texts for example in examples):
        raise ValueError("there are no examples with a text; pass at least one")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokeniser has no end token, and a text could not end; set tokenizer.eos_token")
    prompts = tokenizer([prompt(e) for e in examples], add_special_tokens=False)["input_ids"]
    texts = tokenizer([text for e in examples for text in e.texts], add_special_tokens=False)["input_ids"]
    heads = [head for e, head in zip(examples, prompts) for _ in e.texts]
    rows = [Row([*head, *text, tokenizer.eos_token_id], len(head)) for head, text in zip(heads, texts)]
    if longest is not None and max(len(row.ids) for row in rows) > longest:
        raise ValueError(
            f"a row has {max(len(row.ids) for row in rows)} tokens, more than longest = {longest}; "
            "raise it, up to the model's own limit, or leave such examples out"
        )
    return rows


def batch(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Rows padded on the right to one length: input_ids, attention_mask and labels, each (rows, length), int64.

    Labels are the ids of the texts; the prompts and the padding are IGNORED. `pad` is the id to fill with.
    Errors: ValueError for no rows.
    """
    if not rows:
        raise ValueError("there are no rows; pass at least one")
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.prompt : len(row.ids)] = ids[i, row.prompt : len(row.ids)]
        mask[i, : len(row.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(rows: Sequence[Row], size: int, steps: int, seed: int) -> list[list[int]]:
    """For every step, which rows to use: `steps` lists of `size` indices, shuffled epoch by epoch.

    Rows of like length meet in a batch (they are sorted within blocks of eight batches), which saves padding; the
    order of the batches is shuffled. Errors: ValueError for more rows a batch than there are, or steps < 1.
    """
    size = check_integer(size, "size", 1, len(rows), f"there are {len(rows)} rows")
    steps, rng, found = check_integer(steps, "steps", 1), random.Random(seed), []
    while len(found) < steps:
        order = rng.sample(range(len(rows)), len(rows))[: len(rows) // size * size]
        epoch = []
        for i in range(0, len(order), 8 * size):
            block = sorted(order[i : i + 8 * size], key=lambda j: len(rows[j].ids))
            epoch += [block[j : j + size] for j in range(0, len(block), size)]
        found += rng.sample(epoch, len(epoch))
    return found[:steps]


def text_loss(model: nn.Module, rows: Sequence[Row], pad: int) -> Tensor:
    """The mean cross-entropy of the texts' tokens given all before them, in nats a token (a scalar with a gradient).

    A label stands at its own place and is predicted from the one before, so both are shifted by one.
    """
    total, count = total_loss(model, batch(rows, pad))
    return total / count


def total_loss(model: nn.Module, inputs: dict[str, Tensor], copies: int = 1) -> tuple[Tensor, int]:
    """(sum of the losses, how many tokens) of a padded batch, which goes to the model's device.

    With `copies` > 1 the model reads the batch so many times, one copy after the other, as adapters side by side want
    it (`add_batched_lora`): the sum is each copy's own, (copies,), and the tokens are those of one.
    """
    inputs = {name: value.to(next(model.parameters()).device) for name, value in inputs.items()}
    if copies > 1:
        inputs = {name: value.repeat(copies, 1) for name, value in inputs.items()}
    labels = inputs.pop("labels")[:, 1:]
    logits, count = model(**inputs).logits[:, :-1], int((labels != IGNORED).sum()) // copies
    if copies == 1:
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"), count
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(copies, -1).sum(1), count


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Row], pad: int, size: int = 32) -> float:
    """`text_loss` over all rows, `size` at a time, each token counting once; the model as it is (set eval mode).

    Errors: ValueError for no rows, size < 1.
    """
    size = check_integer(size, "size", 1)
    if not rows:
        raise ValueError("there are no rows; pass at least one")
    ordered, total, count = sorted(rows, key=lambda row: len(row.ids)), 0.0, 0
    for i in range(0, len(ordered), size):
        value, tokens = total_loss(model, batch(ordered[i : i + size], pad))
        total, count = total + value.item(), count + tokens
    return total / count


@torch.no_grad()
def write(model: nn.Module, tokenizer, examples: Sequence[Example], size: int = 32, tokens: int = 96) -> list[str]:
    """What the model writes for each record: the likeliest token each time, until the end or `tokens` tokens.

    Prompts of a batch are padded on the left, so that all of them end where the writing begins. The end is the
    tokeniser's, as in training, and nothing is penalised, whatever the model's own generation settings say.
    Errors: ValueError for no examples, size < 1, tokens < 1.
    """
    size, tokens = check_integer(size, "size", 1), check_integer(tokens, "tokens", 1)
    if not examples:
        raise ValueError("there are no examples; pass at least one")
    prompts = tokenizer([prompt(e) for e in examples], add_special_tokens=False)["input_ids"]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    device, pad = next(model.parameters()).device, tokenizer.eos_token_id
    for i in range(0, len(order), size):
        chosen = order[i : i + size]
        length = len(prompts[chosen[-1]])
        ids = torch.tensor([[pad] * (length - len(prompts[j])) + prompts[j] for j in chosen], device=device)
        mask = torch.tensor([[0] * (length - len(prompts[j])) + [1] * len(prompts[j]) for j in chosen], device=device)
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": pad}
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **greedy)
        for j, row in zip(chosen, out[:, length:].tolist()):
            texts[j] = tokenizer.decode([*takewhile(lambda i: i != pad, row)], skip_special_tokens=True).strip()
    return texts


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU by sacrebleu, 0 to 100, each text against all references of its record.

    Errors: TypeError for a string in place of a list, whose letters would be scored; ValueError for no texts, or
    texts and references of unequal number.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts is the string {texts!r:.40}, not a list of texts; pass [text]")
    for i, found in enumerate([references] if isinstance(references, str) else references):
        if isinstance(found, str):
            raise TypeError(
                f"the references of text {i} are the string {found!r:.40}, not a list of strings; pass "
                "[[reference], …], a list for each text, of one reference or more"
            )
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts, {len(references)} lists of references; pass at least one of each, alike")
    from sacrebleu import BLEU

    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return BLEU().corpus_score(list(texts), streams).score


def scores(model: nn.Module, tokenizer, examples: Sequence[Example]) -> Scores:
    """The task's three measures on held-out examples, whose texts are the references; in eval mode, then as before."""
    training, rows = model.training, encode(tokenizer, examples)
    model.eval()
    try:
        loss = held_out_loss(model, rows, tokenizer.eos_token_id)
        texts = write(model, tokenizer, examples)
    finally:
        model.train(training)
    found = bleu(texts, [example.texts for example in examples])
    return Scores(loss, found, slot_error_rate(list(zip(examples, texts))), texts)

"""The course's fine-tuning task: a language model reads a record and writes the sentences that express it.

    name[Miller's Table], eatType[pub], area[riverside]⏎        the prompt: read, not scored
    Miller's Table is a pub by the river.<|endoftext|>           the text: scored in training, generated in evaluation

Examples come from `grammar` (or, in the same form, from the E2E data). `encode` turns them into rows of token ids,
`collate` pads rows and masks what is not scored. The module `evaluation` generates texts and judges them.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import check_integer
from .grammar import Example

IGNORE_INDEX = -100  # the label that cross_entropy leaves out


class Row(NamedTuple):
    """One prompt and one text, as token ids.

    Args:
        ids: the prompt's tokens, the text's, the end token.
        prompt_length: how many of them are the prompt's.

    Example:
        >>> row = Row([11, 12, 13, 21, 22, 0], prompt_length=3)
        >>> row.ids[row.prompt_length :]
        [21, 22, 0]
    """

    ids: list[int]
    prompt_length: int


def prompt(example: Example) -> str:
    r"""What the model reads: the record on one line.

    Args:
        example: the record; its texts play no part.

    Returns:
        The meaning representation and a line break.

    Example:
        >>> prompt(Example("weather", {"town": "Elmstead", "rain": "none"}, []))
        'town[Elmstead], rain[none]\n'
    """
    return f"{example.meaning}\n"


def encode(tokenizer, examples: Sequence[Example], max_length: int | None = None) -> list[Row]:
    """One row of token ids for each text of each example: the prompt's tokens, the text's, the end token.

    Prompt and text are tokenised separately, so that a prompt has the same tokens in training and in generation.

    Args:
        tokenizer: one of transformers, with an end token.
        examples: the records with their texts; one without a text gives no row.
        max_length: the most tokens that a row may have (default: no limit). Nothing is cut off.

    Returns:
        The rows, example by example.

    Raises:
        ValueError: no text at all, a tokeniser without an end token, or a row of more than `max_length` tokens.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> tokenizer = language_model()[1]
        >>> (row,) = encode(tokenizer, [Example("weather", {"town": "Elmstead"}, ["Dry in Elmstead."])])
        >>> tokenizer.decode(row.ids[row.prompt_length :])
        'Dry in Elmstead.<|endoftext|>'
    """
    if not any(example.texts for example in examples):
        raise ValueError("there are no examples with a text; pass at least one")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokeniser has no end token, and a text could not end; set tokenizer.eos_token")
    prompts = tokenizer([prompt(e) for e in examples], add_special_tokens=False)["input_ids"]
    texts = tokenizer([text for e in examples for text in e.texts], add_special_tokens=False)["input_ids"]
    heads = [head for e, head in zip(examples, prompts, strict=True) for _ in e.texts]
    rows = [Row([*head, *text, tokenizer.eos_token_id], len(head)) for head, text in zip(heads, texts, strict=True)]
    longest = max(len(row.ids) for row in rows)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"a row has {longest} tokens, more than max_length = {max_length}; "
            "raise it, up to the model's own limit, or leave such examples out"
        )
    return rows


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """A batch: rows padded on the right to one length.

    Args:
        rows: one or more.
        pad_token_id: the id to fill with.

    Returns:
        input_ids, attention_mask and labels, each (rows, length), int64. Labels are the ids of the texts; at prompts
        and padding they are IGNORE_INDEX.

    Raises:
        ValueError: no rows.

    Example:
        >>> batch = collate([Row([11, 12, 21, 0], 2), Row([11, 21, 0], 1)], pad_token_id=0)
        >>> batch["labels"].tolist(), batch["attention_mask"].tolist()
        ([[-100, -100, 21, 0], [-100, 21, 0, -100]], [[1, 1, 1, 1], [1, 1, 1, 0]])
    """
    if not rows:
        raise ValueError("there are no rows; pass at least one")
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.prompt_length : len(row.ids)] = ids[i, row.prompt_length : len(row.ids)]
        mask[i, : len(row.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """For every step, the indices of the rows to use; shuffled epoch by epoch.

    Rows of similar length share a batch (they are sorted within blocks of eight batches), which saves padding; the
    order of the batches is shuffled. An epoch leaves out rows that do not fill a batch.

    Args:
        rows: the rows to draw from.
        batch_size: rows in a batch, 1 … len(rows).
        steps: how many batches, 1 or more.
        seed: of the generator, which serves this call alone.

    Returns:
        `steps` lists of `batch_size` indices.

    Raises:
        ValueError: batch_size or steps out of range.

    Example:
        >>> rows = [Row([1] * length, 1) for length in (2, 9, 3, 8)]
        >>> plan = batches(rows, batch_size=2, steps=2, seed=0)  # one epoch: each row once
        >>> sorted(sorted(chosen) for chosen in plan)  # the two short ones together
        [[0, 2], [1, 3]]
    """
    batch_size = check_integer(batch_size, "batch_size", 1, len(rows), f"there are {len(rows)} rows")
    steps, rng, found = check_integer(steps, "steps", 1), random.Random(seed), []
    while len(found) < steps:
        order = rng.sample(range(len(rows)), len(rows))[: len(rows) // batch_size * batch_size]
        epoch = []
        for i in range(0, len(order), 8 * batch_size):
            block = sorted(order[i : i + 8 * batch_size], key=lambda j: len(rows[j].ids))
            epoch += [block[j : j + batch_size] for j in range(0, len(block), batch_size)]
        found += rng.sample(epoch, len(epoch))
    return found[:steps]


def text_loss(model: nn.Module, rows: Sequence[Row], pad_token_id: int) -> Tensor:
    """The mean cross-entropy of the texts' tokens, each given all tokens before it.

        loss = Σ −log p(token | the tokens before it) / number of scored tokens

    Args:
        model: a causal language model of transformers.
        rows: the batch; one or more.
        pad_token_id: the id to pad with.

    Returns:
        A scalar in nats a token, with a gradient.

    Raises:
        ValueError: no rows.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> text_loss(language_model()[0], [Row([11, 12, 13, 0], 2)], pad_token_id=0).requires_grad
        True
    """
    total, count = summed_loss(model, collate(rows, pad_token_id))
    return total / count


def summed_loss(model: nn.Module, batch: dict[str, Tensor], copies: int = 1) -> tuple[Tensor, int]:
    """The sum of the losses of a batch's scored tokens, and their number.

    A label stands at its own position and is predicted from the one before, so both are shifted by one.

    Args:
        model: a causal language model of transformers.
        batch: what `collate` returns; it is moved to the model's device.
        copies: with E > 1 the batch is repeated E times, one copy after the other, as E adapters on one base require
            (`add_batched_lora`).

    Returns:
        (sum in nats, number of scored tokens of one copy). The sum is a scalar; for E > 1 it has shape (E,), one for
        each copy.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> model, _ = language_model()
        >>> total, count = summed_loss(model, collate([Row([11, 12, 13, 0], 2)], 0), copies=3)
        >>> tuple(total.shape), count
        ((3,), 2)
    """
    inputs = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    if copies > 1:
        inputs = {name: value.repeat(copies, 1) for name, value in inputs.items()}
    labels = inputs.pop("labels")[:, 1:]
    logits, count = model(**inputs).logits[:, :-1], int((labels != IGNORE_INDEX).sum()) // copies
    if copies == 1:
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"), count
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(copies, -1).sum(1), count


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Row], pad_token_id: int, batch_size: int = 32) -> float:
    """`text_loss` over all rows, each token counting once.

    Args:
        model: a causal language model, used in the mode that it is in (set eval mode first).
        rows, pad_token_id: as of `text_loss`.
        batch_size: rows at a time, 1 or more; it changes the result by rounding alone.

    Returns:
        The loss in nats a token.

    Raises:
        ValueError: no rows or batch_size < 1.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> model, _ = language_model()
        >>> rows = [Row([11, 12, 13, 0], 2), Row([11, 13, 0], 1)]
        >>> abs(held_out_loss(model, rows, 0, batch_size=1) - text_loss(model, rows, 0).item()) < 1e-4
        True
    """
    batch_size = check_integer(batch_size, "batch_size", 1)
    if not rows:
        raise ValueError("there are no rows; pass at least one")
    ordered, total, count = sorted(rows, key=lambda row: len(row.ids)), 0.0, 0
    for i in range(0, len(ordered), batch_size):
        value, tokens = summed_loss(model, collate(ordered[i : i + batch_size], pad_token_id))
        total, count = total + value.item(), count + tokens
    return total / count

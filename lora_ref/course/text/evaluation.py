"""How a model does the data-to-text task: the texts that it generates, their BLEU and their slot errors."""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import nn

from ..._checks import check_integer
from .data_to_text import encode, held_out_loss, prompt
from .grammar import Example, slot_error_rate


class Scores(NamedTuple):
    """The measures of the task on held-out examples.

    Args:
        loss: held-out loss in nats a token.
        bleu: 0 to 100.
        slot_errors: errors per slot; 0 is perfect.
        texts: the generated texts, one for each example.

    Example:
        >>> Scores(loss=0.4, bleu=60.0, slot_errors=0.1, texts=["It is a pub."]).slot_errors
        0.1
    """

    loss: float
    bleu: float
    slot_errors: float
    texts: list[str]


@torch.no_grad()
def generate_texts(
    model: nn.Module, tokenizer, examples: Sequence[Example], batch_size: int = 32, max_new_tokens: int = 96
) -> list[str]:
    """The text that the model generates for each record, by greedy decoding: the likeliest token each time.

    The prompts of a batch are padded on the left, so that all of them end where generation begins. The end token is
    the tokeniser's, as in training, and nothing is penalised, whatever the model's own generation settings are.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: its tokeniser, with an end token.
        examples: the records, one or more; their texts play no part.
        batch_size: records at a time, 1 or more.
        max_new_tokens: where a text is cut off if the end token has not come, 1 or more.

    Returns:
        One text for each example, in their order, without the end token.

    Raises:
        ValueError: no examples, batch_size < 1 or max_new_tokens < 1.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> record = Example("weather", {"town": "Elmstead", "rain": "none"}, [])
        >>> texts = generate_texts(*language_model(), [record], max_new_tokens=3)
        >>> len(texts), type(texts[0])
        (1, <class 'str'>)
    """
    batch_size = check_integer(batch_size, "batch_size", 1)
    max_new_tokens = check_integer(max_new_tokens, "max_new_tokens", 1)
    if not examples:
        raise ValueError("there are no examples; pass at least one")
    prompts = tokenizer([prompt(e) for e in examples], add_special_tokens=False)["input_ids"]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    device, pad = next(model.parameters()).device, tokenizer.eos_token_id
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": pad, "pad_token_id": pad}
    for i in range(0, len(order), batch_size):
        chosen = order[i : i + batch_size]
        length = len(prompts[chosen[-1]])
        ids = torch.tensor([[pad] * (length - len(prompts[j])) + prompts[j] for j in chosen], device=device)
        mask = torch.tensor([[0] * (length - len(prompts[j])) + [1] * len(prompts[j]) for j in chosen], device=device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **greedy)
        for j, row in zip(chosen, out[:, length:].tolist(), strict=True):
            texts[j] = tokenizer.decode([*takewhile(lambda i: i != pad, row)], skip_special_tokens=True).strip()
    return texts


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU by sacrebleu, each text against all references of its record.

    Args:
        texts: one or more.
        references: for each text a list of one or more references; the lists may differ in length.

    Returns:
        0 (no common words) to 100 (every text is one of its references).

    Raises:
        TypeError: a string where a list is expected; its letters would be scored.
        ValueError: no texts, texts and references of unequal number, or a text without a reference.

    Example:
        >>> round(bleu(["the pub is cheap today"], [["the pub is cheap today", "today the pub is cheap"]]), 6)
        100.0
        >>> bleu(["the pub is cheap today"], [["it rains"]])
        0.0
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
        raise ValueError(
            f"{len(texts)} texts, {len(references)} lists of references; pass as many lists as texts, at least one, "
            "with at least one reference in each"
        )
    from sacrebleu import BLEU

    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return BLEU().corpus_score(list(texts), streams).score


def scores(model: nn.Module, tokenizer, examples: Sequence[Example]) -> Scores:
    """The task's three measures on held-out examples, in eval mode; the model's mode is restored.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokeniser.
        examples: records with their references, one or more.

    Returns:
        Loss, BLEU, slot errors, and the texts that were judged.

    Raises:
        ValueError: no examples with a text.

    Example:
        >>> from lora_ref.course.text.grammar import examples
        >>> from lora_ref.course.text.language_model import language_model
        >>> found = scores(*language_model(), examples("weather", 1))  # before any fine-tuning
        >>> found.loss > 2 and found.slot_errors > 0.5
        True
    """
    training, rows = model.training, encode(tokenizer, examples)
    model.eval()
    try:
        loss = held_out_loss(model, rows, tokenizer.eos_token_id)
        texts = generate_texts(model, tokenizer, examples)
    finally:
        model.train(training)
    found = bleu(texts, [example.texts for example in examples])
    return Scores(loss, found, slot_error_rate(list(zip(examples, texts, strict=True))), texts)

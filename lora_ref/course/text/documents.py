"""Documents for a language model: a tokeniser trained on them, their token ids, and how well a model predicts them."""

import math

import torch
from torch import Tensor, nn

END = "<|endoftext|>"


def train_tokenizer(documents: list[str], vocab_size: int):
    """A byte-level BPE of transformers: any text can be encoded, and decoded again byte for byte.

    Args:
        documents: the texts to train on.
        vocab_size: tokens in the vocabulary; at least the 256 bytes and END.

    Returns:
        A `PreTrainedTokenizerFast` whose first, last and padding token is END.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def encode_documents(tokenizer, documents: list[str]) -> Tensor:
    """All documents in one row of token ids, each followed by the end token.

    Args:
        tokenizer: one of transformers, with an end token.
        documents: the texts.

    Returns:
        The ids, shape (tokens,), int64.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> _, tokenizer = language_model()
        >>> tokenizer.decode(encode_documents(tokenizer, ["It has rows.", "It has columns."]))
        'It has rows.<|endoftext|>It has columns.<|endoftext|>'
    """
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([id for row in rows for id in [*row, tokenizer.eos_token_id]])


def count_bytes(documents: list[str]) -> int:
    """Bytes of the documents in UTF-8, and one for the end of each.

    Args:
        documents: the texts.

    Returns:
        The number of bytes, by which `bits_per_byte` divides.

    Example:
        >>> count_bytes(["é", "ab"])
        6
    """
    return sum(len(text.encode()) + 1 for text in documents)


@torch.no_grad()
def bits_per_byte(model: nn.Module, ids: Tensor, n_bytes: int, length: int = 256) -> float:
    """How well a language model predicts a text: −log₂ p(text) / bytes. Lower is better.

    The text is cut into windows, and the model sees each without the one before. The first token is not predicted.

    Args:
        model: a causal language model of transformers, used in the mode that it is in.
        ids: the text as token ids, shape (tokens,), on the model's device.
        n_bytes: the text's size in bytes, as of `count_bytes`.
        length: tokens of a window.

    Returns:
        Bits per byte.

    Example:
        >>> from lora_ref.course.text.language_model import language_model
        >>> model, tokenizer = language_model()
        >>> text = ["The function returns a tensor with the same shape as its input."]
        >>> 0.5 < bits_per_byte(model, encode_documents(tokenizer, text), count_bytes(text)) < 2
        True
    """
    windows = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    total = 0.0
    for same_length in (windows[:-1], windows[-1:]):  # the last one is shorter
        for i in range(0, len(same_length), 32):
            batch = torch.stack(same_length[i : i + 32])
            logits = model(input_ids=batch[:, :-1]).logits.float()
            total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / math.log(2) / n_bytes

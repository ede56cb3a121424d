"""The language model that ships with the course."""

from pathlib import Path

import torch


def language_model(directory: str | Path | None = None):
    """The course's pretrained Llama and its tokeniser. No network; less than a second.

    Args:
        directory: one that transformers' `save_pretrained` wrote (default: the model that ships with the package; see
            its card, assets/prose_llama/README.md).

    Returns:
        (model, tokenizer): a causal language model of transformers in float32 and eval mode, and its tokeniser.

    Raises:
        FileNotFoundError: the directory has no model.

    Example:
        >>> model, tokenizer = language_model()
        >>> model.config.model_type, model.config.hidden_size, len(tokenizer)
        ('llama', 192, 2048)
        >>> tokenizer.decode(tokenizer("A matrix has rows.")["input_ids"])
        'A matrix has rows.'
    """
    directory = Path(__file__).parents[1] / "assets" / "prose_llama" if directory is None else Path(directory)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no model; python -m lora_ref.course.text.pretrain makes the course's own"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(directory)

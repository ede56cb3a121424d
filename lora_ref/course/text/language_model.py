"""The language model that ships with the course."""

from pathlib import Path

import torch


def language_model(directory: str | Path | None = None):
    """The course's pretrained Llama and its tokeniser: (model in float32 and eval mode, tokenizer). No network.

    Without a directory, the one that ships with the package (see its card, assets/prose_llama/README.md). Any
    directory that transformers' save_pretrained wrote will do. Errors: FileNotFoundError when there is none.
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

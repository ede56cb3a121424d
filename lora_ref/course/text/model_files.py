"""The files of a pretrained model's directory: weights, tokeniser, record, card and checksums."""

import hashlib
import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ..._files import write_json
from ..training import History
from .corpus import PACKAGES, Corpus
from .documents import bits_per_byte, count_bytes

PROMPTS = ["The function returns", "If the input is", "This method is used to", "A matrix is"]


def write_model(
    directory: Path,
    model,
    tokenizer,
    corpus: Corpus,
    held_out: Tensor,
    history: History,
    settings: dict,
    windows: tuple[int, int],
) -> dict:
    """Write the directory; return the record, whose quality is that of the model as written, in float16.

    `settings` are steps, rate, seed and threads; `windows` is (windows of a step, tokens of a window).
    """
    from transformers import LlamaForCausalLM

    model.eval().half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    size = count_bytes(corpus.held_out)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **settings,
        "seconds": round(history.seconds, 1),
        "torch": version("torch"),
        "packages": {name: version({"sklearn": "scikit-learn"}.get(name, name)) for name in PACKAGES},
        "bits_per_byte": bits_per_byte(model, held_out, size),
        "untrained": history.evaluations[0][1],
        "uniform": math.log2(len(tokenizer)) * len(held_out) / size,
        "evaluations": history.evaluations,
        "date_utc": datetime.now(UTC).date().isoformat(),
    }
    write_json(record, directory / "record.json")
    samples = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    (directory / "README.md").write_text(card(corpus, record, samples, len(tokenizer), windows), encoding="utf-8")
    files = sorted(path for path in directory.iterdir() if path.name != "SHA256SUMS" and path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    (directory / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    return record


def sample(model, tokenizer, prompt: str, max_new_tokens: int = 60, seed: int = 0) -> str:
    """A continuation of the prompt, drawn at temperature 0.7 from the 40 likeliest tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def card(corpus: Corpus, record: dict, samples: list[str], vocab_size: int, windows: tuple[int, int]) -> str:
    """The card in Markdown: what the model is, what it was trained on, how good it is, how to make it again.

    `samples` has one text for each of PROMPTS.
    """
    size = sum(len(text.encode()) for text in corpus.train)
    sources = "\n".join(f"| {name} | {record['packages'][name]} | {licence} |" for name, licence in PACKAGES.items())
    return f"""# prose_llama

A Llama (transformers) of {record["parameters"]:,} parameters with a byte-level BPE of {vocab_size:,} tokens, trained \
from
nothing on English technical prose. It is small enough to ship and to fine-tune on a laptop, and it is the base model of
this course's language lessons. It writes grammatical sentences in the style of library documentation; what they say is
not to be relied on. Licence of the weights: Apache-2.0, as the project.

## Data

The running text in the docstrings of these packages, each under its own licence. The texts are read from the installed
packages; they are not shipped here.

| package | version | licence |
|---|---|---|
{sources}

{len(corpus.train):,} documents of {size:,} bytes for training; {len(corpus.held_out):,}, chosen by hash, held out.

{_training_section(record, windows)}

{_quality_section(record, samples)}"""


def _training_section(record: dict, windows: tuple[int, int]) -> str:
    batch_size, length = windows
    steps, tokens = record["steps"], record["steps"] * batch_size * length
    minutes, threads = record["seconds"] / 60, record["threads"]
    return f"""## Training

{steps:,} steps of {batch_size} × {length} tokens ({tokens:,} in all), AdamW, peak rate {record["rate"]:g}, bfloat16 \
autocast,
seed {record["seed"]}; {minutes:.0f} minutes on {threads} CPU thread(s), torch {record["torch"]}.

    python -m lora_ref.course.text.pretrain"""


def _quality_section(record: dict, samples: list[str]) -> str:
    prompts = ", ".join(f'"{prompt}"' for prompt in PROMPTS)
    drawn = "\n".join(f"> {' '.join(text.split())}\n" for text in samples)
    bits, uniform, untrained = record["bits_per_byte"], record["uniform"], record["untrained"]
    return f"""## Quality

Held-out bits per byte: **{bits:.3f}** (uniform over tokens: {uniform:.3f}; the untrained model:
{untrained:.3f}). Drawn at temperature 0.7, with the prompts {prompts}:

{drawn}"""

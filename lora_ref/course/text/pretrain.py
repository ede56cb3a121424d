"""The course's language model, from nothing: python -m lora_ref.course.text.pretrain [--output DIR] [--steps N]

A Llama of 2.2 million parameters and a byte-level BPE of 2,048 tokens, trained on the prose of
`lora_ref.course.text.corpus`. About an hour on one CPU core. Interrupted, the same command goes on from its
last checkpoint. DIR ends with the model in float16 (safetensors), the tokeniser, a card and checksums.
"""

import argparse
import hashlib
import json
import math
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ..training import train
from .corpus import PACKAGES, Prose, prose

ASSETS = Path(__file__).parents[1] / "assets" / "prose_llama"
END = "<|endoftext|>"
LENGTH, BATCH = 256, 16  # tokens of a window, windows of a step
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
PROMPTS = ["The function returns", "If the input is", "This method is used to", "A matrix is"]


def train_tokenizer(texts: list[str]):
    """A byte-level BPE of SHAPE's vocabulary: any text can be written in it, and comes back byte for byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"], special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts in one row of token ids, each followed by END."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([id for row in rows for id in [*row, tokenizer.eos_token_id]])


@torch.no_grad()
def bits_per_byte(model, ids: torch.Tensor, size: int) -> float:
    """−log₂ p(text) / bytes: ids in windows of LENGTH, each seen without the one before; `size` bytes of text."""
    windows = [ids[i : i + LENGTH + 1] for i in range(0, len(ids) - 1, LENGTH)]
    total = 0.0
    for same in (windows[:-1], windows[-1:]):  # the last one is shorter
        for i in range(0, len(same), 32):
            batch = torch.stack(same[i : i + 32])
            logits = model(input_ids=batch[:, :-1]).logits.float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    return total / math.log(2) / size


def sample(model, tokenizer, prompt: str, tokens: int = 60, seed: int = 0) -> str:
    """A continuation, drawn at temperature 0.7 from the 40 likeliest tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def card(texts: Prose, record: dict, samples: list[str]) -> str:
    """The model's card: what it is, what it was trained on, how well it does, how to make it again."""
    size = sum(len(text.encode()) for text in texts.train)
    sources = "\n".join(f"| {name} | {record['packages'][name]} | {licence} |" for name, licence in PACKAGES.items())
    drawn = "\n".join(f"> {' '.join(text.split())}\n" for text in samples)
    return f"""# prose_llama

A Llama (transformers) of {record["parameters"]:,} parameters with a byte-level BPE of {SHAPE["vocab_size"]:,} tokens, trained from
nothing on English technical prose. It is small enough to ship and to fine-tune on a laptop, and it is the base model of
this course's language lessons. It writes grammatical sentences in the style of library documentation; what they say is
not to be relied on. Licence of the weights: Apache-2.0, as the project.

## Data

The running text in the docstrings of these packages, each under its own licence. The texts are read from the installed
packages; they are not shipped here.

| package | version | licence |
|---|---|---|
{sources}

{len(texts.train):,} documents of {size:,} bytes for training; {len(texts.held_out):,}, chosen by hash, held out.

## Training

{record["steps"]:,} steps of {BATCH} × {LENGTH} tokens ({record["steps"] * BATCH * LENGTH:,} in all), AdamW, peak rate {record["rate"]:g}, bfloat16 autocast,
seed {record["seed"]}; {record["seconds"] / 60:.0f} minutes on {record["threads"]} CPU thread(s), torch {record["torch"]}.

    python -m lora_ref.course.text.pretrain

## Quality

Held-out bits per byte: **{record["bits_per_byte"]:.3f}** (uniform over tokens: {record["uniform"]:.3f}; the untrained model:
{record["untrained"]:.3f}). Drawn at temperature 0.7, with the prompts {", ".join(f'"{prompt}"' for prompt in PROMPTS)}:

{drawn}"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lora_ref.course.text.pretrain", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=ASSETS, help="directory (default: the package's own assets)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    for option, value in (("--steps", args.steps), ("--threads", args.threads)):
        if value < 1:
            parser.error(f"{option} {value} is out of range; pass 1 or more")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a directory")
    return args


def main(argv: list[str] | None = None, texts: Prose | None = None) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    args = arguments(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if texts is None:
        print("reading the docstrings …", flush=True)
        texts = prose()
    tokenizer = train_tokenizer(texts.train)
    ids, held_out = encode(tokenizer, texts.train), encode(tokenizer, texts.held_out)
    size = sum(len(text.encode()) + 1 for text in texts.held_out)  # END stands for a byte
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    print(f"{len(ids):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def loss(model, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([ids[i : i + LENGTH + 1] for i in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    history = train(
        model,
        loss,
        args.steps,
        args.rate,
        warmup_steps=min(200, args.steps // 10),
        weight_decay=0.1,
        betas=(0.9, 0.95),
        evaluate=lambda model: bits_per_byte(model, held_out, size),
        eval_steps=max(1, min(500, args.steps // 4)),
        checkpoint_path=args.output / "checkpoint.pt",
        tokens_per_step=BATCH * LENGTH,
        progress=True,
    )
    for step, value in history.evaluations:
        print(f"step {step:6,}  held-out bits per byte {value:.4f}")
    model.eval().half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    model = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "rate": args.rate,
        "seed": args.seed,
        "threads": args.threads,
        "seconds": round(history.seconds, 1),
        "torch": version("torch"),
        "packages": {name: version({"sklearn": "scikit-learn"}.get(name, name)) for name in PACKAGES},
        "bits_per_byte": bits_per_byte(model, held_out, size),
        "untrained": history.evaluations[0][1],
        "uniform": math.log2(SHAPE["vocab_size"]) * len(held_out) / size,
        "evaluations": history.evaluations,
        "date_utc": datetime.now(UTC).date().isoformat(),
    }
    (args.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    samples = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    (args.output / "README.md").write_text(card(texts, record, samples))
    (args.output / "checkpoint.pt").unlink()
    files = sorted(path for path in args.output.iterdir() if path.name != "SHA256SUMS" and path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    (args.output / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print(f"held-out bits per byte {record['bits_per_byte']:.3f}; written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

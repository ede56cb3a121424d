"""Pretraining: `pretrain`, and the course's own model: python -m lora_ref.course.text.pretrain [--output DIR]

The command trains a Llama of 2.2 million parameters and a byte-level BPE of 2,048 tokens on the prose of `corpus`. It
takes about an hour on one CPU core. Interrupted, the same command resumes from its last checkpoint. DIR ends with the
model in float16 (safetensors), the tokeniser, a card and checksums.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..training import History, train
from .corpus import Corpus, load_corpus
from .documents import bits_per_byte, count_bytes, encode_documents, train_tokenizer
from .model_files import write_model

ASSETS = Path(__file__).parents[1] / "assets" / "prose_llama"
LENGTH, BATCH_SIZE = 256, 16  # tokens of a window, windows of a step
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def pretrain(
    model: nn.Module,
    ids: Tensor,
    held_out: Tensor,
    held_out_bytes: int,
    *,
    steps: int,
    batch_size: int,
    length: int,
    lr: float,
    seed: int,
    warmup_steps: int,
    eval_steps: int,
    autocast: torch.dtype | None = None,
    checkpoint_path: str | Path | None = None,
    accelerator=None,
    progress: bool = False,
) -> History:
    """Train a causal language model on windows of text, by AdamW (weight decay 0.1, β = (0.9, 0.95)).

    The loss of step t is the mean cross-entropy over `batch_size` windows of `length` tokens, which are drawn from
    `seed` and t alone, so that an interrupted run resumes with the same windows.

    Args:
        model: a causal language model of transformers; it is trained in place.
        ids: the text as token ids, shape (tokens,), at least length + 2.
        held_out: the held-out text, likewise; `bits_per_byte` is measured on it.
        held_out_bytes: its size in bytes.
        steps: steps of the optimiser.
        batch_size: windows of a step, over all processes.
        length: tokens of a window.
        lr: the peak learning rate, reached after `warmup_steps`; then it falls linearly to 0.
        seed: of the windows.
        warmup_steps: steps of warm-up.
        eval_steps: after how many steps the held-out text is evaluated; also before the first step and after the last.
        autocast: the 16-bit type of the forward passes in training (default: none; evaluations have none).
        checkpoint_path: a file, written at each evaluation; if it is there, the run resumes from it.
        accelerator: an `accelerate.Accelerator`; each of its processes takes its share of the windows.
        progress: whether to show a bar.

    Returns:
        The history of `train`; its evaluations are held-out bits per byte.

    Raises:
        ValueError: too few tokens for a window, and as `train`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model, text = LlamaForCausalLM(LlamaConfig(vocab_size=5, **shape)), torch.arange(80) % 5
        >>> schedule = {"steps": 9, "lr": 0.01, "seed": 0, "warmup_steps": 1, "eval_steps": 9}
        >>> history = pretrain(model, text, text[:20], 20, batch_size=3, length=6, **schedule)
        >>> (_, before), (_, after) = history.evaluations
        >>> after < before
        True
    """
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    process, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    return train(
        model,
        window_loss(ids, batch_size, length, seed, autocast, process, processes),
        steps,
        lr,
        warmup_steps=warmup_steps,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        evaluate=lambda model: bits_per_byte(model, held_out.to(device), held_out_bytes),
        eval_steps=eval_steps,
        checkpoint_path=checkpoint_path,
        tokens_per_step=batch_size * length,
        progress=progress,
        accelerator=accelerator,
    )


def window_loss(
    ids: Tensor,
    batch_size: int,
    length: int,
    seed: int,
    autocast: torch.dtype | None = None,
    process: int = 0,
    processes: int = 1,
) -> Callable[[nn.Module, int], Tensor]:
    """loss(model, t): this process's share of the mean loss over the windows of step t.

    The shares of all processes add up to the mean.
    """
    if len(ids) < length + 2:
        raise ValueError(f"ids has {len(ids)} tokens; windows of {length} tokens need at least {length + 2}")

    def loss(model: nn.Module, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + t)
        starts = torch.randint(0, len(ids) - length - 1, (batch_size,), generator=generator)[process::processes]
        device = next(model.parameters()).device
        windows = torch.stack([ids[i : i + length + 1] for i in starts]).to(device)
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            logits = model(input_ids=windows[:, :-1]).logits
        total = nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
        return total / (batch_size * length)

    return loss


# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lora_ref.course.text.pretrain",
        description="Train the course's language model and its tokeniser on the docstrings of the pinned dependencies.",
    )
    parser.add_argument("--output", type=Path, default=ASSETS, help="directory (default: the package's own assets)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", dest="lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    for option, value in (("--steps", args.steps), ("--threads", args.threads)):
        if value < 1:
            parser.error(f"{option} {value} is out of range; pass 1 or more")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a directory")
    return args


def main(argv: list[str] | None = None, corpus: Corpus | None = None) -> int:
    """The command: read the corpus, train, write the model with its record, card and checksums."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if corpus is None:
        print("reading the docstrings …", flush=True)
        corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.train, SHAPE["vocab_size"])
    ids, held_out = encode_documents(tokenizer, corpus.train), encode_documents(tokenizer, corpus.held_out)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    print(f"{len(ids):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    history = pretrain(
        model,
        ids,
        held_out,
        count_bytes(corpus.held_out),
        steps=args.steps,
        batch_size=BATCH_SIZE,
        length=LENGTH,
        lr=args.lr,
        seed=args.seed,
        warmup_steps=min(200, args.steps // 10),
        eval_steps=max(1, min(500, args.steps // 4)),
        autocast=torch.bfloat16,
        checkpoint_path=args.output / "checkpoint.pt",
        progress=True,
    )
    for step, value in history.evaluations:
        print(f"step {step:6,}  held-out bits per byte {value:.4f}")
    settings = {"steps": args.steps, "rate": args.lr, "seed": args.seed, "threads": args.threads}
    (args.output / "checkpoint.pt").unlink()
    record = write_model(args.output, model, tokenizer, corpus, held_out, history, settings, (BATCH_SIZE, LENGTH))
    print(f"held-out bits per byte {record['bits_per_byte']:.3f}; written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

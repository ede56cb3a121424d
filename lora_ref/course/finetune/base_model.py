"""A base model from nothing, where the fine-tuning is to need no network: a Llama, pretrained on the gathered prose.

Its shape and its training are the profile's `base_…` fields; its tokeniser is the shipped model's.
"""

import json

import torch
from torch import nn

from ..._files import write_json
from ..text.corpus import PACKAGES, load_corpus
from ..text.documents import count_bytes, encode_documents
from ..text.pretrain import pretrain
from .hub import load_tokenizer, quiet
from .profiles import Profile
from .run_directory import Workplace


def new_model(p: Profile, device: str | None = None) -> nn.Module:
    """The model before any training; on the meta device it has shapes alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(load_tokenizer("prose_llama")),
        hidden_size=p.base_hidden,
        intermediate_size=-(-p.base_hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=p.base_layers,
        num_attention_heads=p.base_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device(device or "cpu"):
        return LlamaForCausalLM(config)


def check_packages(p: Profile) -> list[str]:
    """The packages to read. Errors: ValueError for one that is not known."""
    if p.base_packages == ("all",):
        return list(PACKAGES)
    for name in p.base_packages:
        if name not in PACKAGES:
            raise ValueError(f"base_packages has {name!r}; choose 'all', or some of {', '.join(PACKAGES)}")
    return list(p.base_packages)


def make_base(p: Profile, place: Workplace, accelerator, progress: bool) -> float:
    """Pretrain the base into DIR/base, unless it is there; its held-out bits per byte.

    Errors: ValueError under FSDP (several processes as DDP will do), or with too little prose.
    """
    directory = place.directory / "base"
    if (directory / "bits.json").exists():
        return json.loads((directory / "bits.json").read_text())["bits_per_byte"]
    if accelerator.distributed_type == "FSDP":
        raise ValueError("a new base is not made under FSDP; run with one process or DDP first, into the same output")
    corpus = load_corpus(check_packages(p))
    tokenizer = load_tokenizer("prose_llama")
    if not corpus.held_out:
        raise ValueError(f"base_packages = {p.base_packages!r} have too little prose to hold some out; name more")
    ids, held_out = (encode_documents(tokenizer, part) for part in corpus)
    torch.manual_seed(0)
    model = new_model(p)
    place.say(
        f"base: {sum(x.numel() for x in model.parameters()):,} parameters, {len(ids):,} tokens of prose, "
        f"{p.base_steps * p.base_batch * p.base_length:,} to be seen"
    )
    checkpoint = place.checkpoint("base")
    history = pretrain(
        model,
        ids,
        held_out,
        count_bytes(corpus.held_out),
        steps=p.base_steps,
        batch_size=p.base_batch,
        length=p.base_length,
        lr=p.base_rate,
        seed=1,
        warmup_steps=p.base_steps // 10,
        eval_steps=max(1, p.base_steps // 5),
        checkpoint_path=checkpoint,
        accelerator=accelerator,
        progress=progress,
    )
    bits = history.evaluations[-1][1]
    place.say(f"base: {bits:.3f} held-out bits per byte after {history.seconds:.0f} s")
    if place.first:
        with quiet(bars=False):
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_json({"bits_per_byte": bits}, directory / "bits.json")
        checkpoint.unlink()
    accelerator.wait_for_everyone()
    return bits

"""A base model from nothing, where the fine-tuning is to need no network: a Llama, pretrained on the gathered prose.

Its shape and its training are the settings of the profile's group `base`; its tokeniser is the shipped model's.
"""

import json

import torch
from torch import nn

from ..._files import write_json
from ..text.corpus import PACKAGES, load_corpus
from ..text.documents import count_bytes, encode_documents
from ..text.pretrain import pretrain
from .config import BaseModelSettings
from .hub import load_tokenizer, quiet
from .run_directory import RunDirectory


def new_model(base: BaseModelSettings, device: str | None = None) -> nn.Module:
    """The model before any training; on the meta device it has shapes alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(load_tokenizer("prose_llama")),
        hidden_size=base.hidden_size,
        intermediate_size=-(-base.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=base.num_layers,
        num_attention_heads=base.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device(device or "cpu"):
        return LlamaForCausalLM(config)


def check_packages(base: BaseModelSettings) -> list[str]:
    """The packages to read. Errors: ValueError for one that is not known."""
    if base.packages == ("all",):
        return list(PACKAGES)
    for name in base.packages:
        if name not in PACKAGES:
            raise ValueError(f"base_packages has {name!r}; choose 'all', or some of {', '.join(PACKAGES)}")
    return list(base.packages)


def make_base(base: BaseModelSettings, directory: RunDirectory, accelerator, progress: bool) -> float:
    """Pretrain the base into DIR/base, unless it is there; its held-out bits per byte.

    Errors: ValueError under FSDP (several processes as DDP will do), or with too little prose.
    """
    base_directory = directory.path / "base"
    if (base_directory / "bits.json").exists():
        return json.loads((base_directory / "bits.json").read_text())["bits_per_byte"]
    if accelerator.distributed_type == "FSDP":
        raise ValueError("a new base is not made under FSDP; run with one process or DDP first, into the same output")
    tokenizer = load_tokenizer("prose_llama")
    model, bits = _pretrained(base, tokenizer, directory, accelerator, progress)
    if directory.is_main_process:
        with quiet(bars=False):
            model.save_pretrained(base_directory)
        tokenizer.save_pretrained(base_directory)
        write_json({"bits_per_byte": bits}, base_directory / "bits.json")
        directory.checkpoint("base").unlink()
    accelerator.wait_for_everyone()
    return bits


def _pretrained(
    base: BaseModelSettings, tokenizer, directory: RunDirectory, accelerator, progress: bool
) -> tuple[nn.Module, float]:
    """(the model, its held-out bits per byte)."""
    corpus = load_corpus(check_packages(base))
    if not corpus.held_out:
        raise ValueError(f"base_packages = {base.packages!r} have too little prose to hold some out; name more")
    ids, held_out = (encode_documents(tokenizer, part) for part in corpus)
    torch.manual_seed(0)
    model = new_model(base)
    directory.log(
        f"base: {sum(x.numel() for x in model.parameters()):,} parameters, {len(ids):,} tokens of prose, "
        f"{base.steps * base.batch_size * base.length:,} to be seen"
    )
    history = pretrain(
        model,
        ids,
        held_out,
        count_bytes(corpus.held_out),
        steps=base.steps,
        batch_size=base.batch_size,
        length=base.length,
        lr=base.lr,
        seed=1,
        warmup_steps=base.steps // 10,
        eval_steps=max(1, base.steps // 5),
        checkpoint_path=directory.checkpoint("base"),
        accelerator=accelerator,
        progress=progress,
    )
    bits = history.evaluations[-1][1]
    directory.log(f"base: {bits:.3f} held-out bits per byte after {history.seconds:.0f} s")
    return model, bits

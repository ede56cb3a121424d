"""Models and data sets of a few kilobytes, as directories and files: what the tests of the fine-tuning run on."""

import csv
import json
from pathlib import Path

import torch

from lora_ref.course.text.language_model import language_model

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def save(model, directory: Path) -> str:
    model.save_pretrained(directory)
    language_model()[1].save_pretrained(directory)
    return str(directory)


def llama(directory: Path, **changes) -> str:
    """A Llama's directory: 16 wide, two layers, one head for keys (so that d ≠ k), tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"num_key_value_heads": 1, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | own | {"max_position_embeddings": 256} | changes))
    return save(model, directory)


def roberta(directory: Path) -> str:
    """A RoBERTa's directory, without a classifier's head: 63 positions."""
    from transformers import RobertaConfig, RobertaModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobertaModel(RobertaConfig(**SHAPE, max_position_embeddings=64, type_vocab_size=1))
    return save(model, directory)


def write_csv(path: Path, columns: list[str], rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def e2e(directory: Path, train: int = 12) -> str:
    """A directory of csv files with E2E's columns, two texts to a record."""
    directory.mkdir()
    for part, n in (("train", train), ("validation", 3), ("test", 3)):
        rows = []
        for i in range(n):
            record = f"name[The {part} {i}], eatType[pub], familyFriendly[yes]"
            rows += [(record, f"The {part} {i} is a pub."), (record, f"A pub for all is The {part} {i}, by the river.")]
        write_csv(directory / f"{part}.csv", ["meaning_representation", "human_reference"], rows)
    return str(directory)


def sst2(directory: Path) -> str:
    """A directory of jsonl files with SST-2's columns; the test part has no labels, as GLUE's have none."""
    directory.mkdir()
    for part, n in (("train", 24), ("validation", 8), ("test", 4)):
        rows = [{"sentence": f"{'good' if i % 2 else 'bad'} film {i}", "label": i % 2, "idx": i} for i in range(n)]
        rows = [row | {"label": -1} for row in rows] if part == "test" else rows
        (directory / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def mrpc(directory: Path) -> str:
    """A directory of json files with MRPC's columns."""
    directory.mkdir()
    for part, n in (("train", 20), ("validation", 6)):
        rows = [
            {"sentence1": f"a {i}", "sentence2": f"a {i}" if i % 3 else "b", "label": int(i % 3 > 0)} for i in range(n)
        ]
        (directory / f"{part}.json").write_text(json.dumps(rows))
    return str(directory)

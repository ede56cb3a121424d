"""The shipped language model: whole, quick to load, as good as its record says."""

import hashlib
import json
import math
import time
from pathlib import Path

import pytest
import torch

from lora_ref import LoRAConfig, add_lora, count_parameters
from lora_ref.course.text import documents, pretrain
from lora_ref.course.text import language_model as models

ASSETS = pretrain.ASSETS


@pytest.fixture(scope="module")
def shipped():
    return models.language_model()


def test_the_files_are_those_of_the_checksums_and_small():
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {path.name for path in ASSETS.iterdir()} - {"SHA256SUMS"}
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name
    assert (ASSETS / "model.safetensors").stat().st_size < 8e6


def test_it_loads_in_less_than_a_second(shipped):
    start = time.perf_counter()  # transformers is imported by now
    models.language_model()
    assert time.perf_counter() - start < 1


def test_it_is_a_llama_of_the_size_that_the_card_says(shipped):
    model, tokenizer = shipped
    record = json.loads((ASSETS / "record.json").read_text())
    assert model.config.model_type == "llama" and model.dtype == torch.float32 and not model.training
    assert count_parameters(model).total == record["parameters"] and 1e6 < record["parameters"] < 3e6
    assert len(tokenizer) == model.config.vocab_size == 2048


def test_it_predicts_technical_english_far_better_than_chance(shipped):
    model, tokenizer = shipped
    record = json.loads((ASSETS / "record.json").read_text())
    assert record["bits_per_byte"] < 0.6 * record["uniform"]
    text = [  # written for this test
        "The function returns a tensor with the same shape as its input, and raises an error if the shapes differ.",
        "If the argument is None, the default value is used and a warning is given to the user of this class.",
    ]
    size = sum(len(line) + 1 for line in text)
    chance = math.log2(2048) * len(documents.encode_documents(tokenizer, text)) / size
    assert documents.bits_per_byte(model, documents.encode_documents(tokenizer, text), size) < 0.6 * chance


def test_it_takes_an_adapter(shipped):
    model, _ = models.language_model()
    add_lora(model, LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    assert count_parameters(model).trainable == 4 * 2 * 4 * (192 + 192)


def test_a_directory_without_a_model_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="lora_ref.course.text.pretrain"):
        models.language_model(tmp_path)
    assert not Path(tmp_path / "config.json").exists()

"""course/text/pretrain.py: the whole way from texts to a directory that transformers loads, in miniature."""

import hashlib
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ref.course.classifiers import seeded
from lora_ref.course.text import pretrain
from lora_ref.course.text.corpus import Corpus
from lora_ref.course.text.documents import bits_per_byte, encode_documents

WORDS = "the matrix returns a value of this function when its input array has the given shape".split()


@pytest.fixture(scope="module")
def texts():
    g = torch.Generator().manual_seed(0)

    def text():
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (40,), generator=g)) + "."

    return Corpus([text() for _ in range(300)], [text() for _ in range(12)])


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "LENGTH", 32)
        patch.setattr(pretrain, "BATCH_SIZE", 4)
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        patch.setattr(pretrain, "SHAPE", pretrain.SHAPE | small | {"vocab_size": 300})
        yield


@pytest.fixture(scope="module")
def trained(texts, tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    argv = ["--output", str(directory), "--steps", "30", "--rate", "0.01"]
    assert pretrain.main(argv, texts) == 0
    return directory


def test_the_directory_has_model_tokeniser_card_and_checksums(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "record.json", "SHA256SUMS"} <= names
    assert "checkpoint.pt" not in names
    for line in (trained / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((trained / name).read_bytes()).hexdigest() == digest
    record = json.loads((trained / "record.json").read_text())
    assert record["bits_per_byte"] < record["untrained"] and record["steps"] == 30
    card = (trained / "README.md").read_text()
    assert f"{record['bits_per_byte']:.3f}" in card and "Apache-2.0" in card and "/" + "tmp" not in card


def test_transformers_loads_it_and_it_predicts_better_than_chance(trained, texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for text in (*texts.held_out, "Ünïcode → bytes, \n and\ttabs 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = encode_documents(tokenizer, texts.held_out)
    size = sum(len(text) + 1 for text in texts.held_out)
    assert bits_per_byte(model, ids, size) < 0.8 * math.log2(300) * len(ids) / size


def test_the_windows_losses_of_all_processes_add_up_to_their_mean():
    shape = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1}
    model = seeded(0, lambda: LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)))
    ids = torch.arange(500) % 97
    alone = pretrain.window_loss(ids, 6, 16, 1)(model, 3)
    shares = [pretrain.window_loss(ids, 6, 16, 1, None, process, 2)(model, 3) for process in (0, 1)]
    torch.testing.assert_close(sum(shares), alone)
    labels = model(input_ids=ids[None, :16]).logits
    assert 0.5 < alone.item() / torch.tensor(2048.0).log().item() < 1.5 and labels.shape == (1, 16, 2048)
    assert pretrain.window_loss(ids, 6, 16, 1)(model, 4).item() != alone.item()
    assert pretrain.window_loss(ids, 6, 16, 2)(model, 3).item() != alone.item()


def test_a_windows_loss_is_the_mean_cross_entropy_of_the_tokens_after_the_first():
    shape = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1}
    model = seeded(0, lambda: LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)))
    ids = torch.arange(500) * 7 % 97
    starts = torch.randint(0, 500 - 16 - 1, (5,), generator=torch.Generator().manual_seed(3 * 1_000_003 + 2))
    windows = torch.stack([ids[i : i + 17] for i in starts])
    truth = model(input_ids=windows, labels=windows).loss
    torch.testing.assert_close(pretrain.window_loss(ids, 5, 16, 3)(model, 2), truth)
    half = pretrain.window_loss(ids, 5, 16, 3, torch.bfloat16)(model, 2)
    assert half.dtype == torch.float32 and half != truth
    torch.testing.assert_close(half, truth, rtol=1e-2, atol=0)


def test_a_text_too_short_for_a_window_is_refused(refused):
    refused(lambda: pretrain.window_loss(torch.arange(17), 5, 16, 0), "ids has 17 tokens", "at least 18")
    pretrain.window_loss(torch.arange(18), 5, 16, 0)


def test_the_same_command_gives_the_same_model(trained, texts, tiny, tmp_path):
    assert pretrain.main(["--output", str(tmp_path), "--steps", "30", "--rate", "0.01"], texts) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize("argv, words", [(["--steps", "0"], "--steps 0"), (["--output", __file__], "is a file")])
def test_mistakes_on_the_command_line_exit_with_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err

"""course/text/documents.py: any text comes back from its tokens, and bits per byte are what they say."""

import math

import pytest
import torch

from lora_ref.course.text.documents import bits_per_byte, count_bytes, encode_documents, train_tokenizer

TEXTS = ["A matrix has rows and columns.", "Ünïcode → bytes, \n and\ttabs 🙂"]


def test_any_text_comes_back_from_its_tokens_and_each_document_ends():
    tokenizer = train_tokenizer(["rows and columns, rows and columns"], 300)
    ids = encode_documents(tokenizer, TEXTS)
    assert ids.dtype == torch.int64 and (ids == tokenizer.eos_token_id).sum() == 2
    first, second, after = tokenizer.decode(ids).split("<|endoftext|>")
    assert [first, second, after] == [*TEXTS, ""]
    assert count_bytes(TEXTS) == sum(len(text.encode()) for text in TEXTS) + 2


def test_bits_per_byte_is_the_mean_negative_log_likelihood():
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 300)})

    ids = torch.arange(100) % 300
    assert bits_per_byte(Uniform(), ids, 50) == pytest.approx(99 * math.log2(300) / 50, rel=1e-5)


def test_windows_are_predicted_each_without_the_one_before():
    class Counting(torch.nn.Module):
        """Predicts that the next id is one more, if it sees the one before; else nothing."""

        def forward(self, input_ids):
            seen.append(tuple(input_ids.shape))
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids + 1, 200) * 1e4})

    seen = []
    assert bits_per_byte(Counting(), torch.arange(150), 50, length=4) == pytest.approx(0, abs=1e-6)
    assert seen == [(32, 4), (5, 4), (1, 1)]

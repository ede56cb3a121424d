"""course/text/data_to_text.py: what is scored, and that padding changes nothing."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lora_ref.course.text.data_to_text import (
    IGNORE_INDEX,
    Row,
    batches,
    collate,
    encode,
    held_out_loss,
    summed_loss,
    text_loss,
)
from lora_ref.course.text.grammar import Example

from .text_models import END, EXAMPLES, MODELS, TOKENIZER, each_model, tiny

IDS = st.integers(0, len(TOKENIZER) - 1)
PARTS = st.tuples(st.lists(IDS, min_size=1, max_size=7), st.lists(IDS, min_size=1, max_size=9))
ROWS = st.lists(PARTS.map(lambda parts: Row(parts[0] + parts[1], len(parts[0]))), min_size=1, max_size=5)


def losses(model, row):
    """−log p of each token of the row's text given all before it: one row, no padding, no labels."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return [-logs[i - 1, row.ids[i]].item() for i in range(row.prompt_length, len(row.ids))]


def mean(values):
    return sum(values) / len(values)


# rows


def test_a_row_is_the_record_on_a_line_then_a_text_then_the_end():
    rows = encode(TOKENIZER, EXAMPLES)
    pairs = [(example, text) for example in EXAMPLES for text in example.texts]
    assert len(rows) == len(pairs) == 12
    for row, (example, text) in zip(rows, pairs):
        assert TOKENIZER.decode(row.ids[: row.prompt_length]) == f"{example.meaning}\n"
        assert TOKENIZER.decode(row.ids[row.prompt_length : -1]) == text
        assert row.ids[-1] == END and row.ids.count(END) == 1


def test_prompt_and_text_are_tokenised_apart_and_nothing_is_put_before_them():
    begins = copy.deepcopy(TOKENIZER)
    begins.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", END)])
    assert begins("one")["input_ids"][0] == END
    assert encode(begins, EXAMPLES) == encode(TOKENIZER, EXAMPLES)
    (row,) = encode(TOKENIZER, [Example("weather", {"town": "Elmstead"}, ["\nno"])])
    assert row.prompt_length == len(TOKENIZER("town[Elmstead]\n")["input_ids"])
    assert row.ids[row.prompt_length : -1] == TOKENIZER("\nno")["input_ids"]


def test_an_example_without_a_text_gives_no_row():
    silent = Example("weather", {"town": "Elmstead"}, [])
    assert encode(TOKENIZER, [silent, EXAMPLES[0], silent]) == encode(TOKENIZER, EXAMPLES[:1])


# collation: what is scored


def test_prompts_and_padding_are_not_scored_the_end_is():
    found = collate([Row([11, 12, 13, 14, END], 3), Row([21, 22, 23, 24, 25, 26, END], 2)], pad_token_id=END)
    assert {name: value.tolist() for name, value in found.items()} == {
        "input_ids": [[11, 12, 13, 14, END, END, END], [21, 22, 23, 24, 25, 26, END]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
        "labels": [[-100, -100, -100, 14, END, -100, -100], [-100, -100, 23, 24, 25, 26, END]],
    }


@given(rows=ROWS, pad=IDS)
def test_a_batch_holds_each_row_and_scores_each_token_of_its_text_once(rows, pad):
    found = collate(rows, pad)
    length = max(len(row.ids) for row in rows)
    assert all(value.shape == (len(rows), length) and value.dtype == torch.int64 for value in found.values())
    for i, row in enumerate(rows):
        ids, mask, labels = (found[name][i].tolist() for name in ("input_ids", "attention_mask", "labels"))
        more = length - len(row.ids)
        assert ids == row.ids + [pad] * more
        assert mask == [1] * len(row.ids) + [0] * more
        assert labels == [IGNORE_INDEX] * row.prompt_length + row.ids[row.prompt_length :] + [IGNORE_INDEX] * more


# the loss


@settings(max_examples=15)
@given(
    rows=ROWS, pad=IDS, name=st.sampled_from(["tiny", "tied"]), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_the_loss_and_its_gradient_are_transformers_own(rows, pad, name, dtype):
    model = copy.deepcopy(MODELS[name]).to(dtype)
    names, parameters = zip(*model.named_parameters())
    theirs = model(**collate(rows, pad)).loss
    expected = torch.autograd.grad(theirs, parameters)
    own = text_loss(model, rows, pad)
    found = torch.autograd.grad(own, parameters)
    assert own.shape == () and own.dtype == torch.float32
    torch.testing.assert_close(own, theirs.float(), rtol=1e-5, atol=1e-6)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for name, g, truth in zip(names, found, expected):
        torch.testing.assert_close(g, truth, **close, msg=lambda says: f"{name}: {says}")


@each_model
def test_the_loss_is_the_mean_over_the_texts_tokens_one_row_at_a_time(model):
    rows = encode(TOKENIZER, EXAMPLES)
    truth = [loss for row in rows for loss in losses(model, row)]
    assert len(truth) == sum(len(TOKENIZER(text)["input_ids"]) + 1 for e in EXAMPLES for text in e.texts)
    for pad in (END, 7):
        assert text_loss(model, rows, pad).item() == pytest.approx(mean(truth), rel=1e-5)


@each_model
@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_held_out_loss_is_that_of_the_rows_one_by_one(model, size):
    """5 rows a time of 12 leave 2: a mean of the batches' means is another number."""
    rows = encode(TOKENIZER, EXAMPLES)
    truth = mean([loss for row in rows for loss in losses(model, row)])
    means = [text_loss(model, rows[i : i + 5], END).item() for i in range(0, 12, 5)]
    assert abs(mean(means) - truth) > 1e-4 * truth
    found = held_out_loss(model, rows, END, size)
    assert isinstance(found, float) and found == pytest.approx(truth, rel=1e-5)
    assert held_out_loss(model, rows[::-1], 7, size) == pytest.approx(truth, rel=1e-5)


def test_the_held_out_loss_takes_the_model_as_it_is_and_builds_no_graph():
    model, rows, graphs = tiny(attention_dropout=0.5), encode(TOKENIZER, EXAMPLES), []
    model.register_forward_hook(lambda module, inputs, out: graphs.append(out.logits.requires_grad))
    calm = held_out_loss(model, rows, END)
    noisy = held_out_loss(model.train(), rows, END)
    assert model.training and noisy != calm and graphs == [False, False]


@pytest.mark.parametrize("copies", [2, 3])
def test_the_summed_loss_of_copies_is_that_of_each(copies):
    batch = collate(encode(TOKENIZER, EXAMPLES), END)
    alone, count = summed_loss(MODELS["tiny"], batch)
    found, tokens = summed_loss(MODELS["tiny"], batch, copies)
    assert found.shape == (copies,) and tokens == count == sum((labels != -100).sum() for labels in batch["labels"])
    torch.testing.assert_close(found, alone.expand(copies), rtol=1e-5, atol=0)


# the order of the rows


def of_length(lengths):
    return [Row([1] * n, 1) for n in lengths]


@given(n=st.integers(1, 60), data=st.data(), steps=st.integers(1, 40), seed=st.integers(0, 5))
def test_an_epoch_uses_no_row_twice_and_whole_batches_only(n, data, steps, seed):
    size = data.draw(st.integers(1, n))
    rows = of_length(data.draw(st.lists(st.integers(2, 9), min_size=n, max_size=n)))
    found = batches(rows, size, steps, seed)
    assert len(found) == steps and all(len(chosen) == size for chosen in found)
    per_epoch = n // size
    for i in range(0, steps, per_epoch):
        used = [j for chosen in found[i : i + per_epoch] for j in chosen]
        assert len(set(used)) == len(used) and set(used) <= set(range(n))
        if n % size == 0 and i + per_epoch <= steps:
            assert sorted(used) == list(range(n))
    assert batches(rows, size, steps, seed) == found
    assert batches(rows, size, steps + 3, seed)[:steps] == found


def test_epochs_and_seeds_differ_and_the_rest_of_an_epoch_is_never_the_same():
    rows = of_length(range(2, 42))
    found = batches(rows, 4, 20, seed=0)
    assert found[:10] != found[10:] and found != batches(rows, 4, 20, seed=1)
    assert {j for chosen in batches(rows, 16, 40, seed=0) for j in chosen} == set(range(40))  # 8 of 40 are left out


def test_rows_of_like_length_meet_which_saves_padding_but_the_batches_order_tells_nothing():
    rng = random.Random(0)
    rows = of_length(rng.randint(10, 90) for _ in range(640))

    def padding(chosen):
        lengths = [len(rows[j].ids) for j in chosen]
        return max(lengths) * len(lengths) - sum(lengths)

    found, mixed = batches(rows, 8, 80, seed=0), rng.sample(range(640), 640)
    assert sum(map(padding, found)) < 0.3 * sum(padding(mixed[i : i + 8]) for i in range(0, 640, 8))
    means = torch.tensor([mean([len(rows[j].ids) for j in chosen]) for chosen in found])
    rises = (means.diff() > 0).double().mean().item()
    assert 0.35 < rises < 0.65  # sorted blocks of eight would rise seven times in eight
    assert abs(torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]) < 0.35


def test_batches_draws_from_its_own_generator(rng_untouched):
    before = random.getstate()
    batches(of_length(range(2, 12)), 3, 7, seed=0)
    assert random.getstate() == before


# bad input


def test_bad_input_is_refused(refused):
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    silent, rows = [Example("weather", {"town": "Elmstead"}, [])], encode(TOKENIZER, EXAMPLES)
    model = tiny()
    for nothing in ([], silent):
        refused(lambda: encode(TOKENIZER, nothing), "no examples with a text", "at least one")
    refused(lambda: encode(endless, EXAMPLES), "no end token", "tokenizer.eos_token")
    longest = max(len(row.ids) for row in rows)
    assert encode(TOKENIZER, EXAMPLES, longest) == rows
    refused(
        lambda: encode(TOKENIZER, EXAMPLES, longest - 1), f"{longest} tokens", f"max_length = {longest - 1}", "raise"
    )
    for call in (
        collate,
        lambda rows, pad: text_loss(model, rows, pad),
        lambda rows, pad: held_out_loss(model, rows, pad),
    ):
        refused(lambda: call([], END), "no rows", "at least one")
    refused(lambda: held_out_loss(model, rows, END, 0), "batch_size = 0")
    refused(lambda: batches(rows, 13, 1, 0), "batch_size = 13", "there are 12 rows")
    refused(lambda: batches(rows, 0, 1, 0), "batch_size = 0")
    refused(lambda: batches(rows, 2, 0, 0), "steps = 0")
    refused(lambda: batches([], 1, 1, 0), "there are 0 rows")

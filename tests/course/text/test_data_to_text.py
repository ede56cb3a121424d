"""course/data_to_text.py: what is scored, that padding changes nothing, and the measures against their sources."""

import copy
import random

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ref.course.classifiers import seeded
from lora_ref.course.text.data_to_text import (
    IGNORED,
    Row,
    batch,
    batches,
    bleu,
    encode,
    held_out_loss,
    prompt,
    scores,
    text_loss,
    write,
)
from lora_ref.course.text.grammar import Example, examples, slot_error_rate
from lora_ref.course.text.language_model import language_model

SHIPPED, TOKENIZER = language_model()
END = TOKENIZER.eos_token_id
EXAMPLES = examples("restaurants", 5, seed=1, texts=2) + examples("weather", 2, seed=1)


def tiny(seed=0, **more):
    """A random Llama whose attention has no square matrix: q_proj (64, 32), k_proj and v_proj (16, 32)."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
    return seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**sizes | heads | more))).eval()


MODELS = {"tiny": tiny(), "tied": tiny(1, tie_word_embeddings=True), "shipped": SHIPPED}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
IDS = st.integers(0, len(TOKENIZER) - 1)
PARTS = st.tuples(st.lists(IDS, min_size=1, max_size=7), st.lists(IDS, min_size=1, max_size=9))
ROWS = st.lists(PARTS.map(lambda parts: Row(parts[0] + parts[1], len(parts[0]))), min_size=1, max_size=5)


def losses(model, row):
    """−log p of each token of the row's text given all before it: one row, no padding, no labels."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return [-logs[i - 1, row.ids[i]].item() for i in range(row.prompt, len(row.ids))]


def mean(values):
    return sum(values) / len(values)


def greedy(model, tokenizer, example, tokens):
    """The likeliest token, again and again: one row, no padding, no cache."""
    ids, new = tokenizer(prompt(example), add_special_tokens=False)["input_ids"], []
    while len(new) < tokens and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return new


def text_of(tokenizer, ids):
    """The end may be an ordinary token, if tokenizer.eos_token was set by hand, and is no part of the text even so."""
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def ending_at(token):
    """The tokeniser with this token as its end, as a random model may well write it."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


# rows


def test_a_row_is_the_record_on_a_line_then_a_text_then_the_end():
    rows = encode(TOKENIZER, EXAMPLES)
    pairs = [(example, text) for example in EXAMPLES for text in example.texts]
    assert len(rows) == len(pairs) == 12
    for row, (example, text) in zip(rows, pairs):
        assert TOKENIZER.decode(row.ids[: row.prompt]) == f"{example.meaning}\n"
        assert TOKENIZER.decode(row.ids[row.prompt : -1]) == text
        assert row.ids[-1] == END and row.ids.count(END) == 1


def test_prompt_and_text_are_tokenised_apart_and_nothing_is_put_before_them():
    begins = copy.deepcopy(TOKENIZER)
    begins.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", END)])
    assert begins("one")["input_ids"][0] == END
    assert encode(begins, EXAMPLES) == encode(TOKENIZER, EXAMPLES)
    (row,) = encode(TOKENIZER, [Example("weather", {"town": "Elmstead"}, ["\nno"])])
    assert row.prompt == len(TOKENIZER("town[Elmstead]\n")["input_ids"])
    assert row.ids[row.prompt : -1] == TOKENIZER("\nno")["input_ids"]


def test_an_example_without_a_text_gives_no_row():
    silent = Example("weather", {"town": "Elmstead"}, [])
    assert encode(TOKENIZER, [silent, EXAMPLES[0], silent]) == encode(TOKENIZER, EXAMPLES[:1])


# batches: what is scored


def test_prompts_and_padding_are_not_scored_the_end_is():
    found = batch([Row([11, 12, 13, 14, END], 3), Row([21, 22, 23, 24, 25, 26, END], 2)], pad=END)
    assert {name: value.tolist() for name, value in found.items()} == {
        "input_ids": [[11, 12, 13, 14, END, END, END], [21, 22, 23, 24, 25, 26, END]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
        "labels": [[-100, -100, -100, 14, END, -100, -100], [-100, -100, 23, 24, 25, 26, END]],
    }


@given(rows=ROWS, pad=IDS)
def test_a_batch_holds_each_row_and_scores_each_token_of_its_text_once(rows, pad):
    found = batch(rows, pad)
    length = max(len(row.ids) for row in rows)
    assert all(value.shape == (len(rows), length) and value.dtype == torch.int64 for value in found.values())
    for i, row in enumerate(rows):
        ids, mask, labels = (found[name][i].tolist() for name in ("input_ids", "attention_mask", "labels"))
        more = length - len(row.ids)
        assert ids == row.ids + [pad] * more
        assert mask == [1] * len(row.ids) + [0] * more
        assert labels == [IGNORED] * row.prompt + row.ids[row.prompt :] + [IGNORED] * more


# the loss


@settings(max_examples=15)
@given(
    rows=ROWS, pad=IDS, name=st.sampled_from(["tiny", "tied"]), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_the_loss_and_its_gradient_are_transformers_own(rows, pad, name, dtype):
    model = copy.deepcopy(MODELS[name]).to(dtype)
    names, parameters = zip(*model.named_parameters())
    theirs = model(**batch(rows, pad)).loss
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


def test_the_held_out_loss_takes_the_model_as_it_is_and_asks_for_no_gradient():
    model, rows, graphs = tiny(attention_dropout=0.5), encode(TOKENIZER, EXAMPLES), []
    model.register_forward_hook(lambda module, inputs, out: graphs.append(out.logits.requires_grad))
    calm = held_out_loss(model, rows, END)
    noisy = held_out_loss(model.train(), rows, END)
    assert model.training and noisy != calm and graphs == [False, False]


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


# writing


@each_model
@pytest.mark.parametrize("size", [1, 3, 32])
def test_writing_is_greedy_and_the_padding_on_the_left_changes_nothing(model, size):
    lengths = [len(TOKENIZER(prompt(example))["input_ids"]) for example in EXAMPLES]
    assert len(set(lengths)) > 3 and lengths != sorted(lengths)
    truth = [text_of(TOKENIZER, greedy(model, TOKENIZER, example, 8)) for example in EXAMPLES]
    assert len(set(truth)) > 3
    assert write(model, TOKENIZER, EXAMPLES, size, tokens=8) == truth


def test_writing_stops_at_the_tokenisers_end_and_the_end_is_not_in_the_text():
    """Whatever the model's own settings say of the end and of penalties, as those of models from the Hub may."""
    model = tiny(2)
    tokenizer = ending_at(greedy(model, TOKENIZER, EXAMPLES[3], 5)[4])
    ids = [greedy(model, tokenizer, example, 20) for example in EXAMPLES]
    ended = [row[-1] == tokenizer.eos_token_id for row in ids]
    assert any(ended) and not all(ended)
    truth = [text_of(tokenizer, row) for row in ids]
    assert write(model, tokenizer, EXAMPLES, tokens=20) == truth
    model.generation_config.eos_token_id = [ids[0][1], ids[1][2]]
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=2.0, num_beams=2)
    assert write(model, tokenizer, EXAMPLES, tokens=20) == truth


def test_writing_begins_as_training_taught_it():
    """Trained on one record until it says it, the model writes it, end and all: prompts are the same in both."""
    model = tiny(3).train()
    (example,) = [Example("weather", {"town": "Elmstead", "rain": "none"}, ["Dry in Elmstead."])]
    rows, optimizer = encode(TOKENIZER, [example]), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        text_loss(model, rows, END).backward()
        optimizer.step()
    assert write(model.eval(), TOKENIZER, [example], tokens=40) == ["Dry in Elmstead."]


# BLEU


WORDS = st.lists(st.sampled_from("The the pub by a river is cheap .".split()), min_size=1, max_size=9).map(" ".join)
JUDGED = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=4)), min_size=1, max_size=5)


@given(JUDGED)
def test_bleu_is_sacrebleus_of_the_corpus_with_all_references(judged):
    """For sacrebleu references come by number, one list over all texts. One given twice changes nothing."""
    texts, references = map(list, zip(*judged))
    streams = [[found[i % len(found)] for found in references] for i in range(4)]
    assert bleu(texts, references) == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score, abs=1e-9)


@pytest.mark.parametrize(
    "texts, references, says",
    [
        (["The pub is cheap."], ["The pub is cheap."], ["text 0", "'The pub is cheap.'", "[[reference], …]"]),
        (["a", "b"], [["a"], "It rains."], ["text 1", "'It rains.'", "a list for each text"]),
        (["a", "b"], "It rains.", ["text 0", "'It rains.'", "[[reference], …]"]),
        ("It rains.", [["It rains."]], ["texts is the string 'It rains.'", "pass [text]"]),
    ],
)
def test_bleu_refuses_a_string_whose_letters_it_would_score(texts, references, says):
    with pytest.raises(TypeError) as error:
        bleu(texts, references)
    assert all(part in str(error.value) for part in says), error.value


def test_bleu_takes_the_best_of_references_of_unequal_number():
    right, wrong = "the pub lies by the river today", "it may well rain in the evening"
    assert bleu([right], [[right]]) == pytest.approx(100)
    assert bleu([right, wrong], [[wrong, right], [wrong]]) == pytest.approx(100)
    assert bleu([right], [[wrong]]) < 10
    assert bleu([""], [[right]]) == 0


# all of it


@pytest.mark.parametrize("training", [True, False])
def test_scores_are_the_three_measures_in_eval_mode_and_the_mode_comes_back(training):
    model = tiny(attention_dropout=0.5).train(training)
    found = scores(model, TOKENIZER, EXAMPLES)
    assert model.training == training and model.model.layers[0].training == training
    model.eval()
    assert found.loss == held_out_loss(model, encode(TOKENIZER, EXAMPLES), END)
    assert found.texts == write(model, TOKENIZER, EXAMPLES)
    assert found.bleu == bleu(found.texts, [example.texts for example in EXAMPLES])
    assert found.slot_errors == slot_error_rate(list(zip(EXAMPLES, found.texts)))
    assert found.slot_errors > 0.9  # nothing is learnt yet


def test_a_model_that_fails_gets_its_mode_back():
    model = tiny().train()
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(model, TOKENIZER, EXAMPLES)
    assert model.training


# bad input


def test_bad_input_is_refused(refused):
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    silent, rows = [Example("weather", {"town": "Elmstead"}, [])], encode(TOKENIZER, EXAMPLES)
    model = tiny()
    for nothing in ([], silent):
        refused(lambda: encode(TOKENIZER, nothing), "no examples with a text", "at least one")
        refused(lambda: scores(model.train(), TOKENIZER, nothing), "no examples with a text")
    refused(lambda: encode(endless, EXAMPLES), "no end token", "tokenizer.eos_token")
    longest = max(len(row.ids) for row in rows)
    assert encode(TOKENIZER, EXAMPLES, longest) == rows
    refused(lambda: encode(TOKENIZER, EXAMPLES, longest - 1), f"{longest} tokens", f"longest = {longest - 1}", "raise")
    for call in (
        batch,
        lambda rows, pad: text_loss(model, rows, pad),
        lambda rows, pad: held_out_loss(model, rows, pad),
    ):
        refused(lambda: call([], END), "no rows", "at least one")
    refused(lambda: held_out_loss(model, rows, END, 0), "size = 0")
    refused(lambda: batches(rows, 13, 1, 0), "size = 13", "there are 12 rows")
    refused(lambda: batches(rows, 0, 1, 0), "size = 0")
    refused(lambda: batches(rows, 2, 0, 0), "steps = 0")
    refused(lambda: batches([], 1, 1, 0), "there are 0 rows")
    refused(lambda: write(model, TOKENIZER, []), "no examples", "at least one")
    refused(lambda: write(model, TOKENIZER, EXAMPLES, size=0), "size = 0")
    refused(lambda: write(model, TOKENIZER, EXAMPLES, tokens=0), "tokens = 0")
    for texts, references in (([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])):
        refused(lambda: bleu(texts, references), f"{len(texts)} texts", f"{len(references)} lists of references")

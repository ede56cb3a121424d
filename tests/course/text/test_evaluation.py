"""course/text/evaluation.py: greedy texts whatever the padding, and the measures against their sources."""

import copy

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.course.text.data_to_text import encode, held_out_loss, prompt, text_loss
from lora_ref.course.text.evaluation import bleu, generate_texts, scores
from lora_ref.course.text.grammar import Example, slot_error_rate

from .text_models import END, EXAMPLES, TOKENIZER, each_model, tiny


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


# generation


@each_model
@pytest.mark.parametrize("size", [1, 3, 32])
def test_generation_is_greedy_and_the_padding_on_the_left_changes_nothing(model, size):
    lengths = [len(TOKENIZER(prompt(example))["input_ids"]) for example in EXAMPLES]
    assert len(set(lengths)) > 3 and lengths != sorted(lengths)
    truth = [text_of(TOKENIZER, greedy(model, TOKENIZER, example, 8)) for example in EXAMPLES]
    assert len(set(truth)) > 3
    assert generate_texts(model, TOKENIZER, EXAMPLES, size, max_new_tokens=8) == truth


def test_generation_stops_at_the_tokenisers_end_and_the_end_is_not_in_the_text():
    """Whatever the model's own settings say of the end and of penalties, as those of models from the Hub may."""
    model = tiny(2)
    tokenizer = ending_at(greedy(model, TOKENIZER, EXAMPLES[3], 5)[4])
    ids = [greedy(model, tokenizer, example, 20) for example in EXAMPLES]
    ended = [row[-1] == tokenizer.eos_token_id for row in ids]
    assert any(ended) and not all(ended)
    truth = [text_of(tokenizer, row) for row in ids]
    assert generate_texts(model, tokenizer, EXAMPLES, max_new_tokens=20) == truth
    model.generation_config.eos_token_id = [ids[0][1], ids[1][2]]
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=2.0, num_beams=2)
    assert generate_texts(model, tokenizer, EXAMPLES, max_new_tokens=20) == truth


def test_a_model_trained_on_one_record_generates_its_text():
    """Trained on one record until it says it, the model writes it, end and all: prompts are the same in both."""
    model = tiny(3).train()
    (example,) = [Example("weather", {"town": "Elmstead", "rain": "none"}, ["Dry in Elmstead."])]
    rows, optimizer = encode(TOKENIZER, [example]), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        text_loss(model, rows, END).backward()
        optimizer.step()
    assert generate_texts(model.eval(), TOKENIZER, [example], max_new_tokens=40) == ["Dry in Elmstead."]


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
    assert found.texts == generate_texts(model, TOKENIZER, EXAMPLES)
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
    model = tiny()
    for nothing in ([], [Example("weather", {"town": "Elmstead"}, [])]):
        refused(lambda: scores(model.train(), TOKENIZER, nothing), "no examples with a text")
    refused(lambda: generate_texts(model, TOKENIZER, []), "no examples", "at least one")
    refused(lambda: generate_texts(model, TOKENIZER, EXAMPLES, batch_size=0), "batch_size = 0")
    refused(lambda: generate_texts(model, TOKENIZER, EXAMPLES, max_new_tokens=0), "max_new_tokens = 0")
    for texts, references in (([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])):
        refused(lambda: bleu(texts, references), f"{len(texts)} texts", f"{len(references)} lists of references")

"""course/text/grammar.py: sentences that express their record, and an error rate that notices when they do not."""

import itertools
import random

import pytest

from lora_ref.course.text import grammar
from lora_ref.course.text.grammar import DOMAINS, Example, examples, realize, slot_error_rate, slot_errors


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_wording_of_a_value_hides_in_one_of_another_value(domain):
    for slot, values in DOMAINS[domain].items():
        for (one, ways), (other, others) in itertools.permutations(values.items(), 2):
            for way, text in itertools.product(ways, others):
                assert not grammar._contains_words(way.lower(), f" {text.lower()} "), (slot, one, other, way)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_grammar_expresses_every_record_without_an_error(domain):
    found = examples(domain, 1500, seed=3, texts=2)
    assert slot_error_rate([(example, text) for example in found for text in example.texts]) == 0
    assert all(text[0].isupper() and text.endswith(".") and "  " not in text for e in found for text in e.texts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_examples_are_distinct_repeatable_and_grow(domain):
    few, many = examples(domain, 20, seed=1), examples(domain, 60, seed=1)
    assert many[:20] == few and examples(domain, 20, seed=2) != few
    assert len({example.meaning for example in many}) == 60
    assert all(len(example.slots) >= 4 for example in many)


@pytest.mark.parametrize("domain", DOMAINS)
def test_wording_and_order_vary(domain):
    slots = max((example.slots for example in examples(domain, 200)), key=len)
    rng = random.Random(0)
    texts = {realize(domain, slots, rng) for _ in range(200)}
    assert len(texts) > 150 and len({text.split()[0] for text in texts}) >= 3


EXAMPLE = Example(
    "restaurants", {"name": "The Old Mill", "eatType": "pub", "priceRange": "cheap", "near": "Northgate"}, []
)


@pytest.mark.parametrize(
    "text, errors",
    [
        ("The Old Mill is a cheap pub near Northgate.", 0),
        ("Not far from Northgate there is an inexpensive PUB called the old mill.", 0),
        ("The Old Mill is a pub near Northgate.", 1),  # a slot is missing
        ("The Old Mill is an upmarket pub near Northgate.", 2),  # one is missing, one is wrong
        ("The Old Mill is a cheap pub near Northgate. It is family friendly.", 1),  # one is made up
        ("The Old Mill is a cheap public house near Northgate.", 1),  # pub is no part of a word
        ("It is a cheap pub near Amber Room.", 3),
        ("", 4),
    ],
)
def test_slot_errors_counts_what_is_missing_wrong_or_made_up(text, errors):
    assert slot_errors(EXAMPLE, text) == (errors, 4)
    assert slot_error_rate([(EXAMPLE, text), (EXAMPLE, "")]) == (errors + 4) / 8


def test_the_meaning_is_in_e2es_notation():
    assert EXAMPLE.meaning == "name[The Old Mill], eatType[pub], priceRange[cheap], near[Northgate]"


def test_bad_input_is_refused(refused):
    refused(lambda: examples("films", 3), "'films' is unknown", "restaurants")
    refused(lambda: examples("weather", 0), "n = 0")
    refused(lambda: examples("weather", 1, texts=0), "texts = 0")
    refused(lambda: slot_error_rate([]), "no texts")

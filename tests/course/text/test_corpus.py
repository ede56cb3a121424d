"""course/text/corpus.py: what counts as running text, and a corpus that comes out the same every time."""

import pytest

from lora_ref.course.text import corpus

DOCSTRING = """
Return the product of two matrices, with ``B`` applied to the result of *each* first.

The factors are kept apart because their product is large, see :class:`~torch.nn.Linear` for
what a layer does with it. It costs less.

Parameters
----------
A : array_like
    The first factor, with as many columns as the input has numbers in it, always.

>>> multiply(A, B) and then some more words that would make a sentence of it.

Too short a paragraph.

    an indented block of words that begins in lower case and goes on for quite a while.
"""


def test_running_text_is_kept_without_markup_and_nothing_else():
    assert list(corpus.paragraphs(DOCSTRING)) == [
        "Return the product of two matrices, with B applied to the result of each first.",
        "The factors are kept apart because their product is large, see torch.nn.Linear for what a layer does with it. "
        "It costs less.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "lower case begins this paragraph, which has more than ten words in it, as one sees.",
        "This paragraph of more than ten words does not end as a sentence should end, does it",
        "1 2 3 4 5 6 7 8 9 10 A B C D E F G H I J K L M N 11 12 13 14 15 16 17 18 19 20.",
        "This one has a code line in it, which is no running text at all.\n>>> print(1)\nAnd it goes on.",
        "A définition with letters beyond ASCII in it is left out of the corpus, however long it is.",
    ],
)
def test_what_is_no_running_text(text):
    assert list(corpus.paragraphs(text)) == []


def test_docstrings_are_read_not_run(tmp_path):
    (tmp_path / "a.py").write_text('"""Module."""\nraise SystemExit\ndef f():\n    """Function."""\n')
    (tmp_path / "b.py").write_text("def f(:")
    assert list(corpus.docstrings(tmp_path / "a.py")) == ["Module.", "Function."]
    assert list(corpus.docstrings(tmp_path / "b.py")) == []


def test_a_corpus_is_the_same_every_time_without_repetition_and_split_by_content(refused):
    first = corpus.load_corpus(["peft", "accelerate"])
    assert first == corpus.load_corpus(["peft", "accelerate"])
    assert len(first.train) > 500 and 0.005 < len(first.held_out) / len(first.train) < 0.05
    lines = "\n".join(first.train + first.held_out).split("\n")
    assert len(lines) == len(set(lines)) and all(line.isascii() for line in lines)
    assert not set(first.train) & set(first.held_out)
    refused(lambda: corpus.load_corpus(["no_such_package_here"]), "no_such_package_here is not installed")

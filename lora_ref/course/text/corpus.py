"""English technical prose that needs no network: the docstrings of the pinned dependencies.

A docstring is cut into paragraphs. Those that are running text go into the corpus; code, tables, signatures and lists
of parameters do not. The texts are under their packages' licences, all permissive: see PACKAGES.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGES = {
    "accelerate": "Apache-2.0",
    "huggingface_hub": "Apache-2.0",
    "IPython": "BSD-3-Clause",
    "matplotlib": "Matplotlib (PSF-based)",
    "mpmath": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "peft": "Apache-2.0",
    "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "tornado": "Apache-2.0",
    "transformers": "Apache-2.0",
}
WORD = re.compile(r"[A-Za-z]+")
MARKUP = re.compile(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`|`{1,2}([^`]*)`{1,2}_?|\*{1,2}(\w[^*]*\w)\*{1,2}")


class Corpus(NamedTuple):
    """Documents of running text, in two parts.

    A document is the paragraphs of one docstring, joined by newlines. Every 50th, chosen by its hash, is held out.

    Args:
        train: the documents to train on.
        held_out: the documents to evaluate on; none of them is in `train`.

    Example:
        >>> corpus = Corpus(train=["A matrix has rows.", "It has columns."], held_out=["A vector has entries."])
        >>> len(corpus.train), corpus.held_out
        (2, ['A vector has entries.'])
    """

    train: list[str]
    held_out: list[str]


def paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of running text in a docstring, each on one line, without markup.

    Running text: at least ten words, four fifths of its characters letters and spaces, no line that is code or a
    heading, and it begins with a capital and ends as a sentence does.
    """
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.strip().splitlines()
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        if len(indents) > 1 or any(re.match(r"\s*(>>>|\.\.\.|\.\. |[-=~*+|#:@]|\d+\.)", line) for line in lines):
            continue
        text = " ".join(" ".join(lines).split())
        text = MARKUP.sub(lambda match: next(group for group in match.groups() if group is not None), text)
        if len(WORD.findall(text)) < 10 or not re.match(r"[A-Z]", text) or not re.search(r"[.:!?]$", text):
            continue
        if sum(c.isalpha() or c == " " for c in text) >= 0.8 * len(text) and text.isascii():
            yield text


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings in a source file, in order; none where it is not Python of this version. Nothing is executed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def load_corpus(packages: Sequence[str] = tuple(PACKAGES)) -> Corpus:
    """All running text in the docstrings of these packages. About a minute for all of them; no network.

    A paragraph that was seen before is left out. The texts depend on the packages' versions. The source files are
    parsed, not executed.

    Args:
        packages: names as they are imported (default: all of PACKAGES).

    Returns:
        The documents, in the order of the packages and of their files' paths.

    Raises:
        ValueError: a package is not installed.

    Example:
        >>> corpus = load_corpus(["accelerate"])
        >>> len(corpus.train) > 20 * len(corpus.held_out) > 0
        True
    """
    seen, corpus = set(), Corpus([], [])
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{package} is not installed, and its docstrings cannot be read; pip install {package}")
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            for docstring in docstrings(path):
                fresh = [text for text in paragraphs(docstring) if text not in seen]
                seen.update(fresh)
                if fresh:
                    document = "\n".join(fresh)
                    held_out = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) % 50 == 0
                    (corpus.held_out if held_out else corpus.train).append(document)
    return corpus

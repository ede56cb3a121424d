"""English technical prose that is there offline: what the docstrings of the pinned dependencies say.

A docstring is cut into paragraphs; those that are running text are kept (no code, tables, signatures or
lists of parameters). The texts are under their packages' licences, all permissive: see PACKAGES.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
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


class Prose(NamedTuple):
    """Documents, each the paragraphs of one docstring joined by newlines; every 50th, by its hash, is held out."""

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


def prose(packages: list[str] = list(PACKAGES)) -> Prose:
    """All the prose of these packages, a paragraph that is met again left out. About a minute; no network.

    Errors: ValueError for a package that is not installed. The texts depend on the packages' versions.
    """
    seen, documents = set(), Prose([], [])
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{package} is not installed, and its docstrings cannot be read; pip install {package}")
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            for docstring in docstrings(path):
                fresh = [text for text in paragraphs(docstring) if text not in seen]
                seen.update(fresh)
                if fresh:
                    text = "\n".join(fresh)
                    held_out = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 50 == 0
                    (documents.held_out if held_out else documents.train).append(text)
    return documents

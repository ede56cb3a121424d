"""Data sets as tables: local files and directories, the Hugging Face Hub by name; parts that are missing are cut.

Local csv, tsv, json and jsonl files need no library; a Hub data set needs `datasets`. See sources for the rest.
"""

import csv
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .hub import asking, first_line, is_local, reachable, refusal, unreachable

PARTS = {"train": ("train",), "validation": ("valid", "dev", "val"), "test": ("test",)}  # how files' names begin
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


def load_tables(name: str) -> dict[str, list[dict]]:
    """The parts of a data set, each a list of rows (column → value); at least "train".

    `name` is a file, a directory of files whose names begin with train, validation (dev, val) and test, or a Hub name,
    NAME[:CONFIGURATION][@REVISION]. Errors: FileNotFoundError, ConnectionError and OSError as load_model's (OSError
    also for a configuration or revision that is not there); ImportError for a Hub name without the `datasets` library;
    ValueError for files that are not what their names say, or no rows.
    """
    if Path(name).is_file():
        tables = {"train": read_table(Path(name))}
    elif Path(name).is_dir():
        tables = _directory(Path(name))
    else:
        tables = _hub_tables(name)
    if not tables["train"]:
        raise ValueError(f"{name} has no row to train on; its parts: { {k: len(v) for k, v in tables.items()} }")
    return {part: rows for part, rows in tables.items() if rows}


def _directory(directory: Path) -> dict[str, list[dict]]:
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES)
    tables = {}
    for part, beginnings in PARTS.items():
        found = [path for path in files if path.name.lower().startswith(beginnings)]
        if len(found) > 1:
            raise ValueError(f"{directory} has several files for {part}: {', '.join(path.name for path in found)}")
        if found:
            tables[part] = read_table(found[0])
    if "train" not in tables:
        names = ", ".join(path.name for path in files) or "none"
        raise ValueError(
            f"{directory} has no training file; one is named train…{' or train…'.join(SUFFIXES)} (such files: {names})"
        )
    return tables


def _hub_tables(name: str) -> dict[str, list[dict]]:
    plain, _, revision = name.partition("@")
    plain, _, configuration = plain.partition(":")
    is_local(plain, "data set")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"the data set {plain} is on the Hugging Face Hub, which the library `datasets` reads: pip install "
            'datasets, or this project\'s extra, pip install -e ".[hub]"; or name a local csv, tsv, json or jsonl '
            "file, or a directory of them"
        )
    offline = not reachable()
    if offline and _commit(plain, revision) is None:
        raise ConnectionError(unreachable(name, "data set"))
    import datasets

    try:
        with asking(offline), _silent(datasets):
            found = datasets.load_dataset(plain, configuration or None, revision=revision or None)
    except Exception as error:
        raise refusal(name, "data set", error, offline) from None
    # Where a revision cannot be read, the library takes the latest in its cache, whichever that is.
    kept = {Path(file["filename"]).parent.name for part in found.values() for file in part.cache_files}
    if kept - {_commit(plain, revision)}:
        if offline:
            raise ConnectionError(unreachable(name, "data set"))
        raise OSError(
            f"{name} cannot be loaded from the Hub: `datasets` cannot read this revision (in its cache is another, "
            f"{', '.join(kept)}); its copy as parquet may do: {name.partition('@')[0]}@refs/convert/parquet"
        )
    tables = {part: [dict(row) for row in found[part]] for part in PARTS if part in found}
    if "train" not in tables:
        raise ValueError(f"{name} has no part named train; it has {', '.join(found)}")
    return tables


def _commit(name: str, revision: str) -> str | None:
    """The commit that a data set's revision was when the Hub was last asked; None where it never was."""
    from huggingface_hub import constants

    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    file = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", revision or "main")
    return file.read_text().strip() if file.is_file() else None


def read_table(path: Path) -> list[dict]:
    """The rows of a csv, tsv, json (a list of objects) or jsonl file. Errors: ValueError with the line or the mend."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
        elif suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            raise ValueError(f"its name must end in one of {', '.join(SUFFIXES)}")
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} cannot be read: it must hold a list of objects, one a row")
    return rows


def three_parts(groups: dict[str, list], most: dict[str, int], seed: int = 0) -> dict[str, list]:
    """Parts that are missing are cut from the training part by a shuffle from seed: a tenth each, one at least, and
    no more than `most` says for the part.

    Errors: ValueError where too few are left to train on.
    """
    parts, tenth = dict(groups), max(1, len(groups["train"]) // 10)
    for part in ("validation", "test"):
        if part not in parts:
            order = random.Random(f"{part} {seed}").sample(parts["train"], len(parts["train"]))
            cut = min(tenth, most[part])
            parts[part], parts["train"] = order[:cut], order[cut:]
    if not parts["train"]:
        raise ValueError(f"too few examples to train on, { {k: len(v) for k, v in parts.items()} }; three at least")
    return parts


@contextmanager
def _silent(datasets) -> Iterator[None]:
    """Without the bars and warnings of `datasets`."""
    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()

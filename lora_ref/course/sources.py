"""Where models and data come from: the package itself, local directories and files, the Hugging Face Hub by name.

A local directory stands wherever a Hub name does. Without a network a name that is in the Hub's local cache works; any
other is refused at once, with what to do. Local csv, tsv, json and jsonl files need no library; a Hub data set needs
`datasets`.
"""

import csv
import importlib.util
import json
import random
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch
from torch import nn

from .models import language_model

PARTS = {"train": ("train",), "validation": ("valid", "dev", "val"), "test": ("test",)}  # how files' names begin
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(name: str):
    """The tokeniser of the shipped model ("prose_llama"), a directory or a Hub name. Errors as load_model's."""
    from transformers import AutoTokenizer

    if name == "prose_llama":
        return language_model()[1]
    return _pretrained(AutoTokenizer, name)


def load_model(name: str, task: str = "data-to-text", labels: int | None = None, seed: int = 0) -> nn.Module:
    """The model in float32 and eval mode: a causal language model, or a classifier of so many labels.

    `seed` draws what the files do not hold, such as a new classifier's head. Errors: FileNotFoundError for a directory
    that is none or holds no model; ConnectionError for a Hub name that is neither cached nor to be reached, or whose
    download breaks off; OSError for a name that the Hub does not know.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if name == "prose_llama":
        return language_model()[0]
    more = {} if labels is None else {"num_labels": labels}
    kind = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _pretrained(kind, name, dtype=torch.float32, **more).eval()


def _pretrained(kind: type, name: str, **options):
    """kind.from_pretrained(name), with errors that say what to do."""
    local = is_local(name, "model")
    offline = local or not reachable()
    try:
        with _asking(offline), _quiet(bars=not offline and sys.stderr.isatty()):
            return kind.from_pretrained(name, local_files_only=offline, **options)
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not _broke_off(error):
            raise
        if local:
            raise FileNotFoundError(
                f"{name} holds no model of this kind ({_first(error)}); name a directory that save_pretrained wrote"
            ) from None
        raise _refusal(name, "model", error, offline) from None


def is_local(name: str, what: str) -> bool:
    """Whether the name is a path that exists. Errors: FileNotFoundError for one that can be no Hub name either."""
    if Path(name).exists():
        return True
    if not NAME.fullmatch(name):
        raise FileNotFoundError(f"{name} does not exist, and is no name of a {what} on the Hub (OWNER/NAME)")
    return False


def reachable(seconds: float = 5.0) -> bool:
    """Whether the Hub can be asked: not set offline, and its host, or the proxy on the way to it, answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url, proxies = urlparse(constants.ENDPOINT), getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.netloc):
        url = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 1080)
        socket.create_connection((url.hostname, port), timeout=seconds).close()
    except OSError:
        return False
    return True


def unreachable(name: str, what: str) -> str:
    """What was asked for, how to have it, what runs instead."""
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
    command = f"hf download {name}"
    if what == "data set":  # of what `hf download` brings, `datasets` finds nothing again without a network
        command = f"python -c \"from lora_ref.course.sources import load_tables; load_tables('{name}')\""
    return (
        f"the {what} {name} is not in the local cache, and {why}. Where there is a network, `{command}` puts it into "
        f"HF_HOME (here {constants.HF_HOME}): set HF_HOME to a copy of that directory, or name a local directory "
        f"instead of {name}. Without any of this, --profile cpu-mini (a CPU) and --profile gpu-offline (a GPU) need "
        "no network"
    )


def _refusal(name: str, what: str, error: Exception, offline: bool) -> OSError:
    """What to raise for an error of the libraries, which come in many kinds and hide one another."""
    if offline or isinstance(error, ConnectionError) or not reachable():
        return ConnectionError(unreachable(name, what))
    if cause := _broke_off(error):
        return ConnectionError(f"the download of the {what} {name} failed: {_first(cause)}; try it again")
    said, hint = " ".join(str(error).strip().split("\n")[:2]) or type(error).__name__, ""
    if "scripts are no longer supported" in said:
        hint = f"; its copy as parquet may do: {name.partition('@')[0]}@refs/convert/parquet"
    return OSError(f"{name} cannot be loaded from the Hub: {said[:300]}{hint}")


def _broke_off(error: BaseException | None) -> BaseException | None:
    """The error of the network behind another error: httpx's (or httpx2's, by the Hub library's version) or Xet's."""
    while error is not None:
        if {kind.__name__ for kind in type(error).__mro__} & {"TransportError", "XetDownloadError"}:
            break
        error = error.__cause__ or error.__context__
    return error


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
        with _asking(offline), _silent(datasets):
            found = datasets.load_dataset(plain, configuration or None, revision=revision or None)
    except Exception as error:
        raise _refusal(name, "data set", error, offline) from None
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
        raise ValueError(f"{path} cannot be read: {_first(error)}") from None
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


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


@contextmanager
def _asking(offline: bool) -> Iterator[None]:
    """Offline, without asking the Hub again and again for files that it may not even have."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Without transformers' reports of what was loaded, and its bars: at a terminal those of a download may stay."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if not bars:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


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
